# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A study: which method, at which size, with how many images?
#
# **Question.** Is it worth adding LoRA to the model, or is it enough to train the last layer? With few parameters
# or more? With 64 images or 256? One run answers none of this. A *study* is a grid of runs that does, and a report
# that reads the grid.
#
# **What you will see.** The plan of a very small study, its 15 runs, two figures of its report, and what the report
# concludes. It shows how a study works. It is weak evidence about the methods: there is one seed, and two methods.
#
# **How long it takes.** Six minutes on two busy CPU cores, less on idle ones. Nothing is downloaded except Python
# packages.

# %% [markdown]
# ## Install
#
# Run this cell first. It installs jaxpeft from a clone of the repository, if it is not installed already.

# %%
# jaxpeft is not on a public package registry yet. On Colab, put a clone or an unpacked archive of the repository beside this
# notebook, as a folder named `jaxpeft` (Files pane). If jax was imported before this cell, restart the runtime after it.
import importlib.metadata, os, shutil, subprocess, sys

places = (os.environ.get("JAXPEFT_SOURCE"), "..", "jaxpeft")
clones = [os.path.abspath(place) for place in places if place and os.path.exists(f"{place}/jaxpeft/__init__.py")]
try:
    importlib.metadata.version("jaxpeft")
except importlib.metadata.PackageNotFoundError:
    if not clones:
        raise RuntimeError("jaxpeft is not installed, and no clone of it lies beside this notebook") from None
    tpu = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if tpu else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", clones[0] + extra], check=True)
sys.path[:0] = clones[:1]  # so that this kernel finds what was just installed
FIGURES = os.path.join(clones[0] if clones else "", "docs", "figures")  # drawings; not part of the installed package

TINY = bool(os.environ.get("JAXPEFT_TINY"))  # set by the tests: seconds instead of minutes, and nothing is learned

# %%
import json
from pathlib import Path

from IPython.display import Image, display

from jaxpeft.cli import read_config
from jaxpeft.runtime import host, malloc
from jaxpeft.study import cost, execute, report
from jaxpeft.study.report import answers
from jaxpeft.study.report import rows as reading

malloc.keep_freed_memory()  # makes steps faster on a CPU
_ = host.keep_compiled_programs()  # runs of one shape compile once

# %% [markdown]
# ## The grid
#
# - A *setting* is a task with its data. Here there is one: `vqa_stated`, questions about colour, shape and
#   position.
# - A *variant* is a method. `lora_head` is LoRA with one layer of the decoder's head trained with it, at rank 2
#   and 8. `head` is that layer alone: the control.
# - A *cell* is a setting, a variant, a size and a number of training images, 64 or 256.
# - Every cell gets the same number of learning rates, three. The one with the best score on the validation images
#   is chosen.
#
# There are three splits of images. **train**: 64 or 256 images; the smaller set is a part of the larger. **val**:
# 64 images, which choose the learning rate and say when to stop. **test**: 128 images, **held out**. The report
# shows test scores. The score on val would be too good, because the learning rate was chosen to make it high.
#
# A dry run prints the plan and starts nothing.

# %%
config = read_config(f"studies/tiny:steps={4 if TINY else 1000},seeds=1,small=True")
if TINY:
    config.variants.lora_head.sizes, config.learning_rates = (2,), (1.0,)
    config.points.vqa.data.n_val, config.points.vqa.data.n_test, config.points.vqa.eval.forgetting = 16, 16, False
else:
    config.learning_rates = (1 / 3, 1.0, 3.0)  # times the middle one of each variant
    config.points.vqa.data.n_test, config.points.vqa.stop.patience = 128, 4
directory = Path("runs/study")
print(cost.dry_run(config, directory))

# %% [markdown]
# Each line is a cell. `tuned` is the number of parameters that are trained, `stored` what is kept beside the base,
# `MB` the memory of parameters and optimizer. `s a run` is an estimate for all 1,000 steps that are allowed; most
# runs stop earlier.
#
# ## Run
#
# In a terminal: `jaxpeft study --config=studies/tiny --workdir=runs/study`, with one process per core, on as many
# machines as see the directory. Stop it and start it again: finished runs stay. The next cell runs in this process,
# one run after the other. Each line that it prints is a finished run, named by its setting, variant and size,
# images (`n`), seed (`s`) and learning rate.

# %%
rows = execute.run(config, directory, workers=1)
print(len(rows), "runs;", sum(row["status"] == "done" for row in rows), "done")

# %% [markdown]
# ## Read: was the learning rate right?
#
# The report is one page, `runs/study/report/index.html`, with all figures and tables. We begin with the figure that
# tells whether the others can be trusted: the score on *validation* images against the learning rate, a line per
# cell. The filled marker is the one that was chosen.

# %%
print(report.write(directory))
display(Image(filename=str(directory / "report" / "learning_rates.png"), width=560))

# %% [markdown]
# **How to read it.** If a line is highest in the middle, the best learning rate is likely inside the range. If it
# is highest at an end, as in two of the LoRA cells here, a better one may lie outside, and the cell may be judged
# too low. Lines that zigzag say something else: 64 validation images are too few to tell rates apart, and the
# choice is partly luck. The list of runs above shows what this costs: LoRA of rank 8 with 256 images has a higher
# test score at another rate than the chosen one. We may not choose that one now: then test images would have chosen
# it, and would no longer be held out. (The crosses of `head` cannot be filled.)
#
# ## Read: how much do more images help?
#
# The score on held-out *test* images against the number of training images, at the chosen learning rates. Of
# several sizes the middle one is drawn. The left axis is in points: 0 is the best guess without the image, 100 the
# best cell here. The right axis is the accuracy itself.

# %%
display(Image(filename=str(directory / "report" / "score_data.png"), width=560))

# %% [markdown]
# **How to read it.** A line that rises says that more images helped; both do. The distance between the lines is
# what LoRA adds to the head alone: training the last layer is not enough for a task that is new to the base, and
# stays below the best guess without the image. The frozen base is at the bottom: it has never answered a question.
# An orange ring would mark runs that were stopped by the cap on steps while they were still improving; there are
# none here.
#
# ## All cells, and what the report concludes
#
# First, what the report begins with: what to use, what more images and a larger size bring, and how far to trust it.
# Then the test score of the chosen run of each cell, and why it stopped: `plateau` when the validation loss no longer
# improved, `cap` at the last step allowed. Last, two claims of the paper (arXiv 2403.08433), and what the report says
# of them.

# %%
study = reading.read(directory)
for sentence in answers.sentences(study, {name: answers.choices(study, name) for name in config.settings}):
    print(sentence)
print(f"\n{'variant':<12}{'size':>5}{'images':>8}{'stored':>9}{'rate':>8}   test accuracy")
for row in sorted(study.rows, key=lambda row: (row["variant"], row["size"], row["n_images"])):
    if row["chosen"]:
        what = f"{row['variant']:<12}{row['size']:>5}{row['n_images']:>8}{row['stored']:>9,}{row['lr']:>8g}"
        print(f"{what}   {row['test']:.3f} ({row['stopped']})")
print()
for claim in json.loads((directory / "report" / "claims.json").read_text())["verdicts"]:
    if claim["claim"] in ("C1", "C2"):
        print(f"{claim['claim']}, {claim['statement']}: {claim['verdict']}")
        print(f"    {claim['note']}")

# %% [markdown]
# **How to read it.** A claim about methods needs at least three of them, with three points each, and several seeds:
# the interval of an effect is one over seeds, because another seed moves the scores too. This grid has none of these,
# so its claims are *not tested*. In a real study there are four verdicts: *positive*; *positive, below the margin*
# that was set before; *flat*; *negative*. Where the interval allows none of them, it says *undecided*.
#
# ## The real ones
#
# | Config | Is |
# |---|---|
# | `studies/scenes` | a first look: one seed, one learning rate per method |
# | `studies/scenes_full` | five methods and two controls on synthetic scenes, three rates, three seeds: hours on two cores |
# | `studies/paper` | the grid of the paper: mPLUG on COCO and VQA v2, where these are on disk; not run yet |
#
# What the full study found, and what it cannot say, is in [Results](../docs/results/which_method.md). To study a
# method of your own, write it as in `new_method.ipynb` and add it to the `variants` of a config.
