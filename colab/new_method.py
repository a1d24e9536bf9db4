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
# # Write a method in a cell
#
# A method is a frozen dataclass with pure functions. Here FourierFT (Gao et al. 2024, arXiv 2405.03003), which jaxpeft does not
# have: the update of a weight matrix is the inverse Fourier transform of a few learned coefficients at fixed random places,
#
# $$ y = x W + b + \alpha\, x\, \mathrm{Re}\,\mathcal F^{-1}(E), \qquad E_{j_l, k_l} = c_l. $$

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
import dataclasses
from typing import ClassVar

import jax, jax.numpy as jnp, numpy as np

import jaxpeft as jp
from jaxpeft.config import get_config
from jaxpeft.runtime import malloc
from jaxpeft import methods
from jaxpeft.methods import Method

malloc.keep_freed_memory()


# %% [markdown]
# ## The method
#
# `kinds` says where it can act (linears, norms, sublayers, keys and values, blocks, embeddings), `targets` which of them it
# takes; `init` makes its leaves for one layer; `linear` is what it does to `y = x W + b`; `merge` folds it into the weights.


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
# Attached to the shipped base it must change nothing; its leaves are counted; and merged weights must give the same answers as
# the method beside the frozen base.

# %%
model, params = jp.load("tiny", task="vqa")
method = FourierFT()
variables = jp.attach(model, params, method, jax.random.key(0))
print(jp.counts(variables, jp.trainable(variables)))

rng = np.random.default_rng(0)
batch = {
    "image": rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8),
    "prompt": rng.integers(7, 60, (2, 6)).astype(np.int32),
    "tokens": rng.integers(7, 60, (2, 1, 4)).astype(np.int32),
}
plain = model.apply({"params": params}, batch)
print("fresh, largest difference:", float(jnp.abs(model.apply(variables, batch) - plain).max()))

moved = jax.tree.map(
    lambda x, on: x + jnp.asarray(rng.normal(0, 1, x.shape), x.dtype) if on else x,
    variables,
    jp.trainable(variables),
)
acting = model.apply(moved, batch)
merged = model.apply({"params": jp.merge(model, moved)}, batch)
print(
    "moved, effect:", float(jnp.abs(acting - plain).max()), " merged - beside:", float(jnp.abs(merged - acting).max())
)

# %% [markdown]
# ## Train it like any other
#
# A line in `methods.METHODS`, and every config, size solver, study and command knows it by name. In a file of your own, say
# `mine.py`, `--imports=mine` brings it to `main.py` and to the commands `jaxpeft run`, `study`, `generate`, `export` and
# `demo`.

# %%
methods.METHODS["fourier"] = FourierFT
scores = {}
for name, size, lr in (("fourier", 64, 3e-2), ("lora", 2, 3e-3)):
    config = get_config("vqa", name, size, "transform")
    config.data.n_train, config.data.n_test, config.steps = (64, 16, 4) if TINY else (2048, 256, 600)
    config.optim.lr, config.eval.base, config.eval.gallery = lr, False, False
    result = jp.run(config, f"runs/{name}", log=lambda text: None)
    test = result["metrics"]["test"]
    scores[name] = result["counts"]["stored"], test["tuned"]["accuracy"], test["blind"]["question_only"]["accuracy"]
for name, (stored, accuracy, blind) in scores.items():
    print(f"{name}: {stored:,} parameters stored, accuracy {accuracy:.3f} (blind guess {blind:.3f})")

# %% [markdown]
# One seed and one learning rate each: no comparison of the two. For one, add the method to a study's `variants`
# (`study.ipynb`). To keep a method, move the class to a file in `jaxpeft/methods/` and give it a row in
# `tests/methods_table.py`: the tests then check identity at init, counts, gradients, merging, dtypes and saving.
