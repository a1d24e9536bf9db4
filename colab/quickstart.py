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
# # jaxpeft in four minutes
#
# Tune a small vision-language model (BLIP, 1.85M parameters, shipped with the package) to answer questions about pictures,
# by LoRA: the base stays frozen, 5 % of its parameters are added beside it. Nothing is downloaded but packages.

# %%
# On Colab: put a clone or an unpacked archive of the repository beside this notebook, as `jaxpeft` (Files pane), and run
# this cell. It works on CPU, GPU and TPU runtimes. If jax was imported before, restart the runtime after it.
import importlib.metadata, os, shutil, subprocess, sys

HERE = ".." if os.path.exists("../pyproject.toml") else "jaxpeft"
SOURCE = os.path.abspath(os.environ.get("JAXPEFT_SOURCE", HERE))
try:
    importlib.metadata.version("jaxpeft")
except importlib.metadata.PackageNotFoundError:
    tpu = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if tpu else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", SOURCE + extra], check=True)
sys.path.insert(0, SOURCE)  # for configs/

TINY = bool(os.environ.get("JAXPEFT_TINY"))  # the tests: seconds instead of minutes, and nothing is learned

# %%
import json
from pathlib import Path

import jax, matplotlib.pyplot as plt

import jaxpeft as jp
from configs import quickstart
from jaxpeft import data
from jaxpeft.runtime import malloc

malloc.keep_freed_memory()  # faster steps on CPU
print(jax.devices())

# %% [markdown]
# ## The pictures
#
# `scenes` draws its pictures by rule, so train and test never mix and every answer is known.

# %%
config = quickstart.get_config()
config.data.n_train, config.data.n_test, config.steps = (64, 16, 4) if TINY else (4096, 256, 1500)
config.eval.gallery = False
train = data.load(config.data, ["train"])["train"]
figure, axes = plt.subplots(1, 4, figsize=(13, 4))
for ax, i in zip(axes, range(4)):
    asked = train.rows[i]["questions"][:2]
    ax.imshow(train.images[i])
    ax.set_title("\n".join(f"{q['question']}? {q['answers'][0]}" for q in asked), fontsize=8)
    ax.axis("off")

# %% [markdown]
# ## Tune
#
# One call: data, model, method, training, evaluation. Interrupt it and run the cell again: it goes on where it was.

# %%
workdir = Path("runs/quickstart")
result = jp.run(config, workdir)

# %% [markdown]
# The frozen base only captions: it cannot answer at all. `blind` rows look at no picture, so what is above them was seen.

# %%
steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
plt.figure(figsize=(6, 2.5))
plt.plot([s["step"] for s in steps], [s["loss"] for s in steps])
_ = plt.xlabel("step"), plt.ylabel("loss, nats per question")
# %% [markdown]
# ## Look
#
# Test pictures that no training saw, asked by us.

# %%
model, variables, methods, task = jp.load_run(workdir)
test = data.load(config.data, ["test"])["test"]
some = [(i, q) for i in range(8) for q in test.rows[i]["questions"][:1]]
answers = jp.generate(model, variables, [test.images[i] for i, _ in some], [q["question"] for _, q in some])
figure, axes = plt.subplots(2, 4, figsize=(13, 7))
for ax, (i, q), answer in zip(axes.flat, some, answers):
    ax.imshow(test.images[i])
    mark = "right" if answer == q["answers"][0] else f"it is {q['answers'][0]}"
    ax.set_title(f"{q['question']}?\n{answer} ({mark})", fontsize=8)
    ax.axis("off")

# %% [markdown]
# ## What was tuned
#
# Every leaf with its shape. Sizes, places and other methods: change `config.method`, or see `new_method.ipynb`.

# %%
print(jp.describe(variables, jp.trainable(variables)))

# %% [markdown]
# Next: `your_pictures.ipynb` (a folder of yours, and back to PyTorch), `study.ipynb` (which method, at which size, with how
# many pictures), `new_method.ipynb` (write one in a cell).
