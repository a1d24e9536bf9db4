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
# # Export: to PyTorch and back
#
# **Question.** You have tuned a model with jaxpeft, and the people who will use it work with PyTorch. Do they get
# the same model? And can you load an adapter that was trained in PyTorch?
#
# **What you will see.** We tune a captioning model for a minute or two and write it in two forms: as a whole model
# for transformers, and as an adapter for Hugging Face PEFT. We load both in PyTorch, compare the logits number by
# number, and let all three programs write captions for held-out images. Then we go the other way: we read the PEFT
# adapter back, and at last one that was trained in PyTorch from the start.
#
# **How long it takes.** Five minutes on two busy CPU cores, less on idle ones. The comparison needs `torch`,
# `transformers` and `peft`; without them the notebook writes the files and skips the cells that read them. Nothing
# is downloaded except Python packages.

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
import importlib.util, textwrap, warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import jaxpeft as jp
from jaxpeft import data
from jaxpeft.cli import read_config
from jaxpeft.runtime import malloc

malloc.keep_freed_memory()  # makes steps faster on a CPU
warnings.filterwarnings("ignore")  # notes of other packages

TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
print("PyTorch, transformers and peft are here:", TORCH)

# %% [markdown]
# ## A tuned model
#
# A short run: LoRA of rank 16 on the text decoder of the tiny BLIP, and one layer of the decoder's head with it,
# with 2,048 training images of synthetic shapes. The captions say how many shapes there are and where, which the base
# does not. The test images are held out: training does not use them, and all comparisons below are made on them.

# %%
n_train, n_test, steps = (64, 8, 4) if TINY else (2048, 64, 600)
config = read_config(f"quickstart:task=captioning,steps={steps}")
config.data.n_train, config.data.n_test, config.eval.gallery = n_train, n_test, False
if TINY:
    config.task_options.max_new_tokens = 5
workdir = Path("runs/export")
result = jp.run(config, workdir)

# %% [markdown]
# The score is CIDEr-D on held-out images. *blind* rows write the same caption for every image; *tuned* must be
# above them and above *frozen base*. That is all we need here.
#
# ## Two forms
#
# - A **merged model**. The update $s A B$ of LoRA is added to the matrix $W$ that it stands beside, once and for
#   all. The result has the shape of the base, so any program that runs BLIP runs it. It is as large as the base.
# - An **adapter**. Only $A$ and $B$ and the head are written, under the names that PEFT uses. It is smaller, and
#   needs the base.
#
# In a terminal: `jaxpeft export --workdir runs/export --out merged`, and the same with `--format peft`. The base
# here is not on the Hugging Face hub, so it is written too, as `adapter/base`.

# %%
from jaxpeft.apps import export

export.main(["--workdir", str(workdir), "--out", "merged"])
export.main(["--workdir", str(workdir), "--out", "adapter", "--format", "peft"])
for path in ("merged/model.safetensors", "adapter/adapter_model.safetensors"):
    print(f"{path}: {Path(path).stat().st_size / 1e6:.2f} MB")

# %% [markdown]
# The adapter is a small part of the whole. Both have a model card, `README.md`, with data, method, scores and code
# that runs as it stands. This is the code on the card of the merged model:

# %%
card = Path("merged/README.md").read_text()
print(card.split("```python\n")[1].split("```")[0])

# %% [markdown]
# ## The same logits?
#
# Logits are the numbers from which the model chooses the next word. If they are equal, everything that follows is.
# We give all three programs the same held-out images and the same caption, and print the largest difference of any
# logit. For comparison, the first line says how much tuning itself changed the logits.

# %%
model, variables, methods, task = jp.load_run(workdir)
_, base = jp.load("tiny", task="captioning")  # the parameters before tuning
test = data.load(config.data, ["test"])["test"]
image_BYXC = np.stack([test.images[i] for i in range(8)])
tokens_T = np.array(task.template(model).target(test.rows[0]["captions"][0])[0][:-1])
tokens_BT = np.tile(tokens_T, (len(image_BYXC), 1))
batch = {"image": image_BYXC, "tokens": tokens_BT[:, None]}


def logits_of(model, variables):
    return np.asarray(model.apply(variables, batch))[:, 0]


ours = logits_of(model, variables)
print(f"effect of tuning:              {np.abs(ours - logits_of(model, {'params': base})).max():.1f}")
print(
    f"jaxpeft, method merged:        {np.abs(ours - logits_of(model, {'params': jp.merge(model, variables)})).max():.1e}"
)

# %%
if TORCH:
    import torch
    from peft import PeftModel
    from transformers import BlipForConditionalGeneration, BlipProcessor

    processor = BlipProcessor.from_pretrained("merged")
    merged = BlipForConditionalGeneration.from_pretrained("merged").eval()
    adapted = PeftModel.from_pretrained(BlipForConditionalGeneration.from_pretrained("adapter/base"), "adapter").eval()
    pixels = processor.image_processor(
        [Image.fromarray(image) for image in image_BYXC], return_tensors="pt"
    ).pixel_values

    def torch_logits(there):
        with torch.inference_mode():
            return there(pixel_values=pixels, input_ids=torch.tensor(tokens_BT)).logits.numpy()

    print(f"transformers, merged model:    {np.abs(torch_logits(merged) - ours).max():.1e}")
    print(f"peft, adapter on its base:     {np.abs(torch_logits(adapted) - ours).max():.1e}")

# %% [markdown]
# Differences of this size are rounding: float32 has about seven digits, and two programs add the same numbers in a
# different order.
#
# ## The same captions?
#
# Greedy search in all three programs, for all held-out images. `processor` turns the image and the prompt into
# tensors; the numbers in `generate` are those on the model card.

# %%
images = [test.images[i] for i in range(n_test)]
captions = {"jaxpeft": jp.generate(model, variables, images, beams=1, task=task)}
if TORCH:
    prompt = task.template(model).start_text
    given = len(task.template(model).start)
    lengths, _ = model.hf.generation(task)

    def written(there):
        inputs = processor(
            images=[Image.fromarray(image) for image in images], text=[prompt] * n_test, return_tensors="pt"
        )
        with torch.inference_mode():
            ids = there.generate(**inputs, **lengths)
        return [text.strip() for text in processor.batch_decode(ids[:, given:], skip_special_tokens=True)]

    captions |= {"transformers": written(merged), "peft": written(adapted)}
for name, texts in captions.items():
    same = sum(text == other for text, other in zip(texts, captions["jaxpeft"]))
    print(f"{name:<14}{same} of {n_test} captions are those of jaxpeft")

# %%
before = jp.generate(model, {"params": base}, images[:3], beams=1, task=task)
figure, axes = plt.subplots(1, 3, figsize=(13, 5.8), layout="constrained")
for i, ax in enumerate(axes):
    said = {}  # caption -> the programs that wrote it
    for name, texts in captions.items():
        said.setdefault(texts[i], []).append(name)
    lines = [f"before tuning: {before[i]}", *(f"{', '.join(names)}: {text}" for text, names in said.items())]
    ax.imshow(images[i])
    ax.axis("off")
    ax.set_anchor("N")
    ax.set_title("\n\n".join(textwrap.fill(line, 46) for line in lines), fontsize=9.5, loc="left")

# %% [markdown]
# Where all three programs wrote the same caption, it stands once, behind their names. Whether it is right is
# another matter, which the score above answers; here it matters that the programs agree, in their mistakes too.
#
# ## Back again
#
# `jp.import_peft` reads a directory that PEFT wrote, or that jaxpeft wrote for PEFT, onto a base. It checks every
# name and shape, and refuses what it would have to leave out.

# %%
back, found = jp.import_peft(model, base, "adapter")
print("read:", ", ".join(one.name for one in found))
print(f"there and back, largest difference of a logit: {np.abs(logits_of(model, back) - ours).max():.1e}")

# %% [markdown]
# ## An adapter that was trained in PyTorch
#
# The last cell starts in PyTorch: PEFT puts a new LoRA on the base, a few steps of AdamW train it on 32 training
# images, and PEFT saves it. It is not meant to be good, only to be different from its start. Then jaxpeft reads it.

# %%
if TORCH:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=r"text_decoder.*(query|value)")
    theirs = get_peft_model(BlipForConditionalGeneration.from_pretrained("adapter/base"), settings)
    train = data.load(config.data, ["train"])["train"]
    inputs = processor(
        images=[Image.fromarray(train.images[i]) for i in range(32)],
        text=[f"{prompt} {row['captions'][0]}" for row in train.rows[:32]],
        padding=True,
        return_tensors="pt",
    )
    inputs["input_ids"][:, 0] = model.config.bos_id  # BLIP's captions begin with this token
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3)
    losses = []
    for _ in range(2 if TINY else 30):
        loss = theirs(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    theirs.eval().save_pretrained("from_pytorch")
    print(f"loss in PyTorch: {losses[0]:.2f} -> {losses[-1]:.2f} after {len(losses)} steps")

    again, under = jp.load("adapter/base", task="captioning")  # the base that PEFT had, in jaxpeft
    back, found = jp.import_peft(again, under, "from_pytorch")
    print("read:", found[0].name, "of rank", found[0].rank)
    print(
        f"jaxpeft - peft, largest difference of a logit: {np.abs(logits_of(again, back) - torch_logits(theirs)).max():.1e}"
    )

# %% [markdown]
# Again only rounding. (The loss starts low because the base that was written beside the adapter already has the
# tuned layer of the head.) From here, the imported adapter is like any other: it can be evaluated, trained further,
# merged or exported again.
#
# ## What can be exported
#
# LoRA and its relatives, IA3, VeRA, OFT, prompts, prefixes and LayerNorms have a PEFT form. Adapters, LoHa, SSF,
# BitFit and VPT have none: `jp.save_tuned` and `jp.load_tuned` keep any method exactly, for jaxpeft. What can be
# merged can always leave as a merged model. The guide [Export to PyTorch](../docs/guides/export.md) has the table.
