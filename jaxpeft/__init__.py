"""jaxpeft: parameter-efficient fine-tuning of vision-language models in JAX/Flax.

The map, in the order in which data flow:
    datasets/ tasks/ images text data     records -> examples -> batches
    layers sites models/ methods/ tree    model + what is tuned and where
    losses optim sharding train point     the step, the one loop, and a run from config to result
    decode metrics evals results          answers, scores, files
    budget interchange foreign            sizes for one budget; tuned trees to and from PyTorch; other Flax models
    checkpoint hub pretrain               what is kept, what comes in, what is shipped

    import jax, jaxpeft as jp
    model, params = jp.load("tiny", task="vqa")
    method = jp.LoRA(rank=8)
    variables = jp.attach(model, params, method, jax.random.key(0))
    tuned, frozen = jp.split(variables, jp.trainable(variables))
"""

from importlib import metadata as _metadata

from jaxpeft.adapt.budget import solve_size
from jaxpeft.adapt.linen_bridge import intercept
from jaxpeft.adapt.sites import attach, counts, describe, expand, fold, merge, stack, trainable
from jaxpeft.interchange import export_blip, export_peft, import_peft, load_tuned, save_tuned
from jaxpeft.methods import *  # noqa: F403  every method, by its class name
from jaxpeft.methods import __all__ as _methods
from jaxpeft.models.loading import load
from jaxpeft.runtime import renamed as _renamed
from jaxpeft.training.evaluate import generate
from jaxpeft.training.finished import load_run
from jaxpeft.training.run import run
from jaxpeft.tree import join, split

try:
    __version__ = _metadata.version("jaxpeft")
except _metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
__all__ = [
    *_methods, "attach", "counts", "describe", "expand", "export_blip", "export_peft", "fold", "generate", "import_peft",
    "intercept", "join", "load", "load_run", "load_tuned", "merge", "run", "save_tuned", "solve_size", "split", "stack",
    "trainable",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Modules of version 0.1 are an ImportError that names today's."""
    if name in _renamed.MODULES:
        raise ImportError(f"jaxpeft.{name} is now jaxpeft.{_renamed.MODULES[name]}")
    raise AttributeError(f"module 'jaxpeft' has no attribute {name!r}")
