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
# # Your own images: from a folder to a model that writes your captions
#
# **Question.** You have a few hundred images with captions in your own words. The model knows such things in
# images, but not your words. Can it learn them from so few, and does it then describe images that it has not seen?
#
# **What you will see.** A shop sells stickers, and its catalogue names them in its own way: not "a large red star
# at the top left" but "maxi ruby star upper left". The notebook draws 800 such stickers with their catalogue
# entries, trains LoRA on them, and then lets the model write entries for held-out images. Put in the name of a
# folder of your own, and the same cells run on it.
#
# **How long it takes.** About a minute on two idle CPU cores, longer on busy ones. Nothing is downloaded except
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

# %%
import collections, csv, itertools, json, textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import SVG, display
from PIL import Image

import jaxpeft as jp
from jaxpeft import data
from jaxpeft.cli import read_config
from jaxpeft.data.scenes import world
from jaxpeft.runtime import malloc

malloc.keep_freed_memory()  # makes steps faster on a CPU

# %% [markdown]
# Set `IMAGES` to a folder of yours: images of any size and format, and a file `captions.csv` whose first row is
# `image,caption`. With a folder of real photographs, set `BASE` to a BLIP that knows photographs, such as
# `"Salesforce/blip-image-captioning-base"` (a download of 990 MB) or a directory that holds one. The base `"tiny"`
# comes with the package and knows only synthetic shapes.

# %%
IMAGES, BASE = "", "tiny"

# %% [markdown]
# ## The folder
#
# Without a folder of yours, this cell draws the stickers: one shape per image, in JPEG files of different sizes.
# The dictionary holds the shop's words. The base knows "ring", "left" and the other words that the shop did not
# change; it has never seen the 12 words on the right.

# %%
WORDS = {
    **{"small": "mini", "large": "maxi", "top": "upper", "bottom": "lower", "red": "ruby", "green": "emerald"},
    **{"blue": "sapphire", "yellow": "amber", "purple": "amethyst", "cyan": "topaz", "white": "pearl", "black": "onyx"},
}


if not IMAGES:
    IMAGES = Path("stickers")
    IMAGES.mkdir(exist_ok=True)
    scenes = (scene for i in itertools.count() if len((scene := world.scene("train", i)).objects) == 1)
    with open(IMAGES / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i, scene in enumerate(itertools.islice(scenes, 40 if TINY else 800)):
            Image.fromarray(world.render(scene)).resize((120 + i % 60, 130), 3).save(IMAGES / f"{i:04}.jpg", quality=92)
            (thing,) = scene.objects
            words = f"{thing.size} {thing.color} {thing.shape} {thing.quadrant}".split()
            table.writerow([f"{i:04}.jpg", " ".join(WORDS.get(word, word) for word in words)])

lines = (Path(IMAGES) / "captions.csv").read_text().splitlines()
print(f"{len(lines) - 1} captions, for example:", *lines[1:5], sep="\n")

# %% [markdown]
# ## Train
#
# The images are divided into three splits, by a hash of their names:
#
# - **train** (eight in ten): the model learns from these;
# - **val** (one in ten): the loss on these is measured during training, to decide when to stop and which step to
#   keep;
# - **test** (one in ten): **held out**. They are used once, at the end, so that nothing was fitted to them, not
#   even the number of steps. Only their score says how the model will do on your next image.
#
# The drawing shows the way of an image and its text. (It is shown where the notebook runs from a clone.)

# %%
if os.path.exists(f"{FIGURES}/data_path.svg"):
    display(SVG(filename=f"{FIGURES}/data_path.svg"))

# %% [markdown]
# In a terminal, the next cell is `jaxpeft run --config=folder:root=stickers,annotations=captions.csv
# --workdir=runs/stickers`. Anything that is wrong with the data is listed in one error before training starts.
# Words that the base does not know are added to its vocabulary, and their rows are trained with LoRA.

# %%
config = read_config(f"folder:root={IMAGES},annotations=captions.csv,base={BASE}" + (",steps=4" if TINY else ""))
config.data.data_dir = "runs/prepared"
config.eval.gallery = False
workdir = Path("runs/stickers")
result = jp.run(config, workdir)

# %% [markdown]
# **How to read the table.** The score is CIDEr-D: it compares the words and groups of words in a caption with the
# true caption, and rare words count more. 10 is the best possible score here.
#
# - *blind* rows write one and the same caption for every image: the most frequent one, and the one that fits best.
#   To beat them, a model must look.
# - *frozen base* is the model before training. It does not know the shop's words, so its score is near zero even
#   where its description is right: this row alone shows little. Beating *blind* is the test.
# - *tuned, no picture* is the trained model when it is shown a gray image. If its score were near that of *tuned*,
#   the model would not use the image.
# - *tuned* is the trained model on held-out images.
#
# Below the table stand 95 % intervals of the differences.
#
# ## The curves
#
# Training loss and validation loss, both in nats per token: how surprised the model is by the next word of the true
# caption. Zero would be no surprise.

# %%
curve = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation (val images)", "o-")):
    at, loss = zip(*((row["step"], row[key]) for row in curve if key in row))
    ax.plot(at, loss, style, label=label, markersize=3, linewidth=1.2)
kept = result["validation"]["kept_step"]
ax.axvline(kept, color="grey", linestyle=":", label=f"step that was kept ({kept:,})")
ax.set(xlabel="training step", ylabel="loss (nats per token)", yscale="log")
ax.grid(alpha=0.3)
_ = ax.legend(frameon=False)

# %% [markdown]
# The axis of the loss is logarithmic, as the loss falls by a factor of a hundred. Both curves fall together at
# first. Then the training loss goes on falling and the validation loss does not: from there on, the model only
# learns the training captions by heart. That is when training stops, and the step with the lowest validation loss
# is kept.
#
# ## Scores on held-out images
#
# CIDEr-D is hard to picture, so we count too: for how many held-out images is the caption right **word for word**?
# `predictions.jsonl` holds every caption that was written for the test images.

# %%
predictions = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
labels = {
    "blind": "one caption for\nall (blind)",
    "base": "frozen base",
    "text_only": "tuned, shown a\ngray image",
    "tuned": "tuned",
}
colors = ["0.7", "black", "tab:orange", "tab:green"]
exact = [np.mean([row[key] in row["references"] for row in predictions]) for key in labels]
cider = [np.mean([row[f"{key}_cider_d"] for row in predictions]) for key in labels]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
for ax, heights, name, top in ((axes[0], cider, "CIDEr-D", 10), (axes[1], exact, "captions right word for word", 1)):
    bars = ax.bar(list(labels.values()), heights, color=colors)
    ax.bar_label(bars, fmt="%.2f")
    ax.set(ylabel=name, ylim=(0, 1.1 * top))
    ax.tick_params(axis="x", labelsize=8)
_ = figure.suptitle(f"{len(predictions)} held-out images", fontsize=11)

# %% [markdown]
# The green bar is far above all others. The orange bar shows that the gain comes from looking at the image: when it
# sees only gray, the trained model still uses the shop's words, but it cannot know which ones are right.
#
# ## Look at captions, before and after
#
# The first eight held-out images, not chosen by us. "before" is the frozen base: plain English, no sizes, and not
# always right. "after" is the trained model. Green means right word for word; where it is red, the true entry
# stands below it.

# %%
model, variables, methods, task = jp.load_run(workdir)
shown = predictions[:8]
paths = [Path(IMAGES) / row["image_id"] for row in shown]
before = jp.generate(model, {"params": variables["params"]}, paths, beams=1)
after = jp.generate(model, variables, paths, beams=1, task=task)
figure, axes = plt.subplots(2, 4, figsize=(14, 9), layout="constrained")
for ax, path, row, old, new in zip(axes.flat, paths, shown, before, after):
    right = new in row["references"]
    truth = "" if right else f"\ntruth: {row['references'][0]}"
    ax.imshow(Image.open(path))
    ax.set_title(textwrap.fill(f"before: {old}", 40), fontsize=9, loc="left", color="0.35")
    ax.text(0, -0.04, textwrap.fill(f"after: {new}{truth}", 40, replace_whitespace=False), fontsize=9.5, va="top",
            transform=ax.transAxes, color="green" if right else "red")  # fmt: skip
    ax.axis("off")

# %% [markdown]
# ## Which words does it get wrong?
#
# Each word of the true captions, and how often the trained model wrote the same word at the same place. A mistake
# in one word makes a whole caption wrong above.

# %%
seen, found = collections.Counter(), collections.Counter()
for row in predictions:
    truth, ours = row["references"][0].split(), row["tuned"].split()
    for i, word in enumerate(truth):
        seen[word] += 1
        found[word] += ours[i : i + 1] == [word]
names = [word for word, n in seen.most_common(30) if n >= (1 if TINY else 3)]
figure, ax = plt.subplots(figsize=(11, 3), layout="constrained")
bars = ax.bar(names, [found[word] / seen[word] for word in names], color="tab:green")
ax.bar_label(bars, [seen[word] for word in names], fontsize=7)
ax.set(ylabel="share found", ylim=(0, 1.1))
ax.tick_params(axis="x", rotation=60)

# %% [markdown]
# The small numbers say how often a word stands in the true captions of held-out images. With few, the bar is
# uncertain. The words for colours are found nearly always; most mistakes are in the shapes. The base confuses
# shapes too, as the captions "before" show, and both use the same frozen image encoder.
#
# ## Did it learn entries by heart?
#
# There are 448 possible entries, so many held-out images have an entry that also stands below a training image, and
# others have one that no training image has. If the model could only repeat whole entries, it would fail on the
# latter.

# %%
trained_on = {caption for row in data.load(config.data, ["train"])["train"].rows for caption in row["captions"]}
for label, old in (("the same entry as a training image", True), ("an entry that no training image has", False)):
    right = [row["tuned"] in row["references"] for row in predictions if (row["references"][0] in trained_on) == old]
    print(f"{len(right):3} held-out images with {label}: {sum(right)} right word for word")

# %% [markdown]
# Compare the two shares. Entries that no training image has are right about as often as the others, as far as so
# few images can tell: the model puts words together that it never saw together.
#
# ## Use it
#
# In a terminal, `jaxpeft generate --workdir runs/stickers --folder IMAGES` writes captions for a folder, and
# `jaxpeft demo --workdir runs/stickers` opens a local page in the browser where you can try images. To use the
# model in PyTorch, see [export.ipynb](export.ipynb).
