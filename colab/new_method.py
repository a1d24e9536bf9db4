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
# # A new method in one cell
#
# **Question.** You have read a paper about a method that jaxpeft does not have. How much code does it take, and how
# do you know that it is right before you train for hours?
#
# **What you will see.** FourierFT (Gao et al. 2024, arXiv 2405.03003) in 25 lines; three checks that find most
# mistakes in seconds; a short training beside LoRA; and a picture of what the two methods add to a weight matrix.
# LoRA's update of a matrix is a product of two thin matrices. That of FourierFT is the inverse Fourier transform of
# a few learned coefficients $c_l$ at fixed random places $(j_l, k_l)$ of an otherwise empty spectrum $E$:
#
# $$ y = x W + b + \alpha\, x\, \mathrm{Re}\,\mathcal F^{-1}(E), \qquad E_{j_l, k_l} = c_l. $$
#
# **How long it takes.** A few minutes on two CPU cores. Nothing is downloaded except Python packages.

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
import dataclasses, json
from pathlib import Path
from typing import ClassVar

import jax, jax.numpy as jnp, matplotlib.pyplot as plt, numpy as np
from IPython.display import SVG, display

import jaxpeft as jp
from jaxpeft import methods
from jaxpeft.cli import read_config
from jaxpeft.methods import Method
from jaxpeft.runtime import malloc

malloc.keep_freed_memory()  # makes steps faster on a CPU

# %% [markdown]
# ## Where a method acts
#
# The drawing shows LoRA at a linear layer. FourierFT acts at the same place, with the same frozen $W$; only the
# path next to it is another one. (The drawing is shown where the notebook runs from a clone.)

# %%
if os.path.exists(f"{FIGURES}/lora.svg"):
    display(SVG(filename=f"{FIGURES}/lora.svg"))

# %% [markdown]
# ## The method
#
# A method is a frozen dataclass with pure functions. Its fields are its settings.
#
# - `kinds` says at which kinds of site it can act (linear layers here), `targets` which of these it takes: a
#   regular expression of their paths.
# - `init` makes the adapter parameters for one layer.
# - `linear` is what the method does to `y = x W + b`.
# - `merge` adds its effect to the base weights.
# - `size_field` names the field that decides how many parameters there are.


# %%
@dataclasses.dataclass(frozen=True)
class FourierFT(Method):
    n: int = 64  # coefficients per matrix
    alpha: float = 150.0
    targets: str = r"text_.*attention/(query|value)$"
    name: ClassVar[str] = "fourier"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    size_field: ClassVar[str] = "n"

    def init(self, rng, site, base):
        return {"c": jnp.zeros(self.n)}  # zero: training starts at the base

    def delta(self, params, shape):
        n_in, n_out = shape
        places = jax.random.choice(jax.random.key(2024), n_in * n_out, (self.n,), replace=False)
        spectrum = jnp.zeros(n_in * n_out).at[places].set(params["c"]).reshape(shape)
        return self.alpha * jnp.fft.ifft2(spectrum).real

    def linear(self, params, x, y, base, rng):
        return y + x @ self.delta(params, base["kernel"].shape)

    def merge(self, params, base):
        return base | {"kernel": base["kernel"] + self.delta(params, base["kernel"].shape)}


# %% [markdown]
# ## Is it right?
#
# Three checks on random inputs, before any training:
#
# 1. **Does it have as many parameters as it should?** 64 coefficients for each matrix: query and value, of
#    self-attention and cross-attention, in 2 text towers of 3 layers: 64 x 2 x 2 x 2 x 3 = 1,536.
# 2. **Does a fresh method change nothing?** All coefficients start at zero, so the logits must be those of the
#    base, exactly.
# 3. **Does merging give the same model?** We set the coefficients to random numbers, and compare the method beside
#    the frozen base with the plain model that has merged weights. The two ways of adding differ by rounding, and by
#    nothing else.

# %%
model, params = jp.load("tiny", task="vqa")
variables = jp.attach(model, params, FourierFT(), jax.random.key(0))
print("1. parameters:", jp.counts(variables, jp.trainable(variables)))

rng = np.random.default_rng(0)
batch = {
    "image": rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8),
    "prompt": rng.integers(7, 60, (2, 6)).astype(np.int32),
    "tokens": rng.integers(7, 60, (2, 1, 4)).astype(np.int32),
}
plain = model.apply({"params": params}, batch)
print("2. fresh, largest difference:", float(jnp.abs(model.apply(variables, batch) - plain).max()))

moved = jax.tree.map(
    lambda x, on: x + jnp.asarray(rng.normal(0, 1, x.shape), x.dtype) if on else x,
    variables,
    jp.trainable(variables),
)
acting = model.apply(moved, batch)
merged = model.apply({"params": jp.merge(model, moved)}, batch)
print("3. moved, effect:", float(jnp.abs(acting - plain).max()))
print("3. merged - beside:", float(jnp.abs(merged - acting).max()))

# %% [markdown]
# The count is right, the fresh method changes nothing, and merging costs only rounding (about a millionth of the
# effect).
#
# ## Train it like any other
#
# One line in `methods.METHODS` makes it known by name: to configs, studies and the size solver. In a file of your
# own, say `mine.py`, `--imports=mine` brings it to every command.
#
# We train it and LoRA of rank 2 on questions about 2,048 images, with one layer of the decoder's head trained
# beside each. The score is the accuracy on 256 test images that are **held out**: training does not use them.
# `blind` is the best guess from the question alone, without the image.

# %%
methods.METHODS["fourier"] = FourierFT
scores = {}
for name, size, lr in (("fourier", 64, 3e-2), ("lora", 2, 3e-3)):
    print(f"--- {name}")
    config = read_config(f"point:task=vqa,head=transform,size={size},lr={lr},method={name},steps={4 if TINY else 600}")
    config.data.n_train, config.data.n_test = (64, 16) if TINY else (2048, 256)
    config.eval.base, config.eval.gallery = False, False
    result = jp.run(config, f"runs/{name}", log=lambda text: None)
    test = result["metrics"]["test"]
    scores[name] = result["counts"]["stored"], test["tuned"]["accuracy"], test["blind"]["question_only"]["accuracy"]
for name, (stored, accuracy, blind) in scores.items():
    print(
        f"{name}: {stored:,} parameters stored (16,844 of them in the head), accuracy {accuracy:.3f}, blind {blind:.3f}"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
for name, color in (("fourier", "tab:purple"), ("lora", "tab:green")):
    steps = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    left.plot([row["step"] for row in steps], [row["loss"] for row in steps], color=color, label=name)
    bars = right.bar([name], [scores[name][1]], color=color)
    right.bar_label(bars, fmt="%.3f")
right.axhline(scores["lora"][2], color="black", linestyle=":", label="blind guess")
left.set(xlabel="training step", ylabel="training loss\n(nats per question)", ylim=(0, None))
right.set(ylabel="accuracy on test images", ylim=(0, 1))
left.grid(alpha=0.3)
left.legend(frameon=False)
_ = right.legend(frameon=False)

# %% [markdown]
# Both learned to look: both bars end above the dotted line. Which method is better cannot be read from this, as
# there is one seed, one learning rate each, and different numbers of parameters. For a fair comparison, make both
# variants of a study (`study.ipynb`).
#
# ## What did they add to a matrix?
#
# The merged matrix minus the base matrix, for the query of the first layer of the decoder's self-attention. Red is
# positive, blue is negative.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
for ax, name in zip(axes, ("fourier", "lora")):
    model, variables, _, _ = jp.load_run(f"runs/{name}")
    new, old = (
        tree["text_decoder"]["blocks"]["self_attention"]["query"]["kernel"][0]
        for tree in (jp.merge(model, variables), variables["params"])
    )
    change = np.asarray(new - old)
    values = np.linalg.svd(change, compute_uv=False)
    image = ax.imshow(change, cmap="RdBu_r", vmin=-np.abs(change).max(), vmax=np.abs(change).max())
    ax.set_title(f"{name}: rank {int((values > 1e-3 * values[0]).sum())}", fontsize=11)
    ax.set(xlabel="output dimension", ylabel="input dimension")
    figure.colorbar(image, ax=ax, shrink=0.8)

# %% [markdown]
# LoRA's update is made of stripes: each of its two directions is one row pattern times one column pattern, so its
# rank is 2. That of FourierFT is a sum of 64 waves over the whole matrix. Its rank is far higher, although it has
# an eighth of LoRA's parameters here (64 instead of 512).
#
# ## Keep it
#
# To add a method to jaxpeft, move the class to a file in `jaxpeft/methods/`, import it in `jaxpeft/methods/__init__.py`
# and `jaxpeft/__init__.py`, and give it a row in `tests/methods_table.py`. The tests then check identity at the start,
# counts, gradients, merging, dtypes and saving. It also needs a place in the documentation: `docs/adding/method.md`
# lists every step.
