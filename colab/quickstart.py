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
# # Quickstart: teach a model to answer questions about images
#
# **Question.** A small vision-language model can write captions, but it has never answered a question. Can it learn
# to, if almost all of its parameters stay as they are?
#
# **What you will see.** We take BLIP with 2.5 million parameters (it comes with the package), add LoRA to its
# attention layers, and train only that, together with one small layer of the decoder's head: 5 % of the parameters.
# Then we ask it about images that it has never seen, and compare its answers with the truth, with the model before
# training, and with guesses that do not look at the image.
#
# **How long it takes.** Three minutes on two CPU cores, up to ten if they are busy. Nothing is downloaded except
# Python packages.

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

# %% [markdown]
# Load what the notebook needs. The list that is printed shows the devices that JAX found; a CPU is enough.

# %%
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import SVG, display

import jaxpeft as jp
from jaxpeft import data
from jaxpeft.cli import read_config
from jaxpeft.runtime import malloc

malloc.keep_freed_memory()  # makes steps faster on a CPU
print(jax.devices())

# %% [markdown]
# ## The images and the questions
#
# A config holds every setting of a run. `quickstart` is a config of the package; we only shorten it. Its data set,
# `scenes`, draws images of coloured shapes by rule, so the right answer to every question is known.
#
# The images are divided into two splits:
#
# - **train** (4,096 images, six questions each): the model learns from these;
# - **test** (256 other images): **held out**. No training step uses them.
#
# Only a score on held-out images counts. A model could learn the answers to its training questions by heart; on new
# images that does not help.
#
# The next cell shows four *training* images with two of their questions.

# %%
config = read_config("quickstart")
config.data.n_train, config.data.n_test, config.steps = (64, 16, 4) if TINY else (4096, 256, 1500)
config.eval.gallery = False
splits = data.load(config.data, ["train", "test"])
train, test = splits["train"], splits["test"]

figure, axes = plt.subplots(1, 4, figsize=(14, 4.2), layout="constrained")
for ax, image, row in zip(axes, train.images, train.rows):
    ax.imshow(image)
    ax.set_title("\n".join(f"{q['question']}? {q['answers'][0]}" for q in row["questions"][:2]), fontsize=9)
    ax.axis("off")

# %% [markdown]
# There are six types of question: whether something exists, how many there are, its colour, its shape, its
# position, and which of two things is larger or more frequent.
#
# ## The method: LoRA
#
# A linear layer computes $y = x W + b$. LoRA leaves the matrix $W$ frozen and adds a second path next to it, through
# two thin matrices: $y = x W + b + s\, x A B$. Only $A$ and $B$ are trained. $B$ starts at zero, so before the
# first step the model is exactly the base. The upper part of the drawing shows this; the lower part shows relatives
# of LoRA. (The drawing is shown where the notebook runs from a clone.)

# %%
if os.path.exists(f"{FIGURES}/lora.svg"):
    display(SVG(filename=f"{FIGURES}/lora.svg"))

# %% [markdown]
# ## Train
#
# `jp.run` does everything: it loads the data and the base, attaches the method, trains, and scores the test images.
# It first prints what will be trained, then the loss (lower is better), and at the end a table. If you interrupt
# it, run the cell again: it continues from its last checkpoint.

# %%
workdir = Path("runs/quickstart")
result = jp.run(config, workdir)

# %% [markdown]
# **How to read the table.** Each row answers the same held-out questions; `accuracy` is the share of right answers.
#
# - *blind: majority* always gives the most frequent answer. *blind: question only* gives the most frequent answer
#   to the same question in the training data. Neither looks at the image. Only what is above these rows was read
#   from the image.
# - *perfect writer* is the ceiling: the score of a model that knows every answer, with this vocabulary.
# - *frozen base* is the model before training. It writes captions, so none of its answers is right.
# - *tuned* is the model after training.
# - *nll* is the negative log-likelihood of the right answers, in nats per token: how surprised the model is by
#   them.
#
# The line below the table has 95 % intervals. If the interval of a difference does not contain zero, the difference
# is larger than what chance in the choice of test images explains.
#
# ## Did training settle?
#
# The thin line is the loss of single batches, the thick line its mean over the last ten recorded values.

# %%
steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
at, loss = np.array([(row["step"], row["loss"]) for row in steps if "loss" in row]).T
mean = [loss[max(0, i - 9) : i + 1].mean() for i in range(len(loss))]
figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.plot(at, loss, color="tab:blue", alpha=0.35, linewidth=1)
ax.plot(at, mean, color="tab:blue", linewidth=2)
ax.set(xlabel="training step", ylabel="training loss\n(nats per question)", ylim=(0, None))
ax.grid(alpha=0.3)

# %% [markdown]
# The loss falls fast while the model learns which words are answers at all, then slowly while it learns to look.
# The learning rate goes to zero at the end of a run, so the curve is flat there even if more could be learned. The
# full quickstart takes twice as many steps on twice as many images, and reaches an accuracy of .67.
#
# ## Which questions did it learn?
#
# The same held-out scores as a picture, one group of bars per type of question.

# %%
scores = result["metrics"]["test"]
rows = {
    "blind: question only": scores["blind"]["question_only"],
    "frozen base": scores["base"],
    "tuned": scores["tuned"],
}
kinds = sorted(scores["tuned"]["by_type"])
figure, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
for i, (label, row) in enumerate(rows.items()):
    heights = [row["accuracy"], *(row["by_type"][kind]["accuracy"] for kind in kinds)]
    bars = ax.bar(
        np.arange(len(heights)) + 0.27 * (i - 1), heights, 0.27, label=label, color=("0.7", "black", "tab:green")[i]
    )
    ax.bar_label(bars, fmt="%.2f", fontsize=7)
ax.set_xticks(range(len(kinds) + 1), ["all questions", *kinds])
ax.set(ylabel="accuracy on test images", ylim=(0, 1))
_ = ax.legend(frameon=False, ncols=3, loc="upper center")

# %% [markdown]
# Compare each green bar with the grey bar to its left: the difference is what the model read from the image.
# Questions of yes or no have a high grey bar, as a guess is right half of the time.
#
# ## Look at answers
#
# Eight held-out images, the first ones of the test split, not chosen by us. A green title is a right answer, a red
# one is wrong.

# %%
model, variables, methods, task = jp.load_run(workdir)
shown = range(8)
asked = [test.rows[i]["questions"][0] for i in shown]
answers = jp.generate(model, variables, [test.images[i] for i in shown], [q["question"] for q in asked], task=task)
figure, axes = plt.subplots(2, 4, figsize=(14, 8), layout="constrained")
for ax, i, q, answer in zip(axes.flat, shown, asked, answers):
    correct = answer == q["answers"][0]
    note = "correct" if correct else f"should be {q['answers'][0]}"
    ax.imshow(test.images[i])
    ax.set_title(f"{q['question']}?\nanswer: {answer} - {note}", fontsize=9.5, color="green" if correct else "red")
    ax.axis("off")

# %% [markdown]
# Eight images are too few for a score; they show what kind of mistakes the model makes. The score is the one in the
# table, on all test questions.
#
# ## What was trained
#
# Every array (leaf) that was trained, with its shape. Names that begin with `peft/` are LoRA's: `a` and `b` are $A$
# and $B$ above, stacked over the layers of the tower. Names that begin with `params/` are leaves of the base that
# were trained in place: here one layer of the head that writes words. Everything else is frozen.

# %%
print(jp.describe(variables, jp.trainable(variables)))

# %% [markdown]
# The column `stored` is what you need to keep beside the base: fewer than 120,000 numbers. The base itself did not
# change, so one base can serve many tasks.
#
# ## Next
#
# - `your_images.ipynb`: train on a folder of your own images
# - `study.ipynb`: which method, at which size, with how many images?
# - `new_method.ipynb`: write a method of your own in one cell
# - `export.ipynb`: take the result to PyTorch and back
