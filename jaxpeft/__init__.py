"""jaxpeft: parameter-efficient fine-tuning of vision-language models in JAX/Flax.

Layout, in import order: a module imports from its own folder and those above it, never from those below.
    runtime/ tree ops     files, signals, locks, registries, process setup; trees of arrays by name; array operations
    methods/ adapt/       the methods, and the sites of a model where they act; parameter budgets; other Flax models
    inputs/ models/       tokenizers, images, templates; BLIP, mPLUG, PaliGemma and SmolVLM, conversion, loading, decoding
    data/ metrics/ tasks/ data sets -> examples -> batches; scores; captioning and VQA
    interchange/          PEFT adapters, Hugging Face directories and our own format, in and out
    training/ config      one run: setup, inputs, training loop, checkpoints, evaluation, result; its default config
    study/ apps/ cli      a grid of runs and its report; generate, export, demo, report, pretrain; the `jaxpeft` command

    import jax, jaxpeft as jp
    model, params = jp.load("tiny", task="vqa")
    method = jp.LoRA(rank=8)
    variables = jp.attach(model, params, method, jax.random.key(0))
    tuned, frozen = jp.split(variables, jp.trainable(variables))
"""

from importlib import metadata as _metadata

from jaxpeft.adapt.budget import solve_size
from jaxpeft.adapt.linen_bridge import intercept
from jaxpeft.adapt.sites import attach, counts, describe, fold, merge, stack, trainable
from jaxpeft.apps.generate import generate
from jaxpeft.interchange import export_hf, export_peft, import_peft, load_tuned, save_tuned
from jaxpeft.methods import (
    IA3,
    MAM,
    OFT,
    SSF,
    VPT,
    BitFit,
    Compacter,
    DoRA,
    Full,
    Gated,
    Head,
    LayerNorms,
    LoHa,
    LoRA,
    Method,
    NewWords,
    ParallelAdapter,
    PiSSA,
    Prefix,
    Prompt,
    Scoped,
    Selective,
    SerialAdapter,
    UniPELT,
    VeRA,
)  # fmt: skip
from jaxpeft.models.loading import load
from jaxpeft.runtime import renamed as _renamed
from jaxpeft.training.finished import load_run
from jaxpeft.training.run import run
from jaxpeft.tree import join, split

try:
    __version__ = _metadata.version("jaxpeft")
except _metadata.PackageNotFoundError:  # a clone that is not installed
    __version__ = "0+unknown"
__all__ = [
    "BitFit", "Compacter", "DoRA", "Full", "Gated", "Head", "IA3", "LayerNorms", "LoHa", "LoRA", "MAM", "Method", "NewWords",
    "OFT", "ParallelAdapter", "PiSSA", "Prefix", "Prompt", "SSF", "Scoped", "Selective", "SerialAdapter", "UniPELT", "VPT",
    "VeRA",
    "attach", "counts", "describe", "export_hf", "export_peft", "fold", "generate", "import_peft", "intercept", "join", "load",
    "load_run", "load_tuned", "merge", "run", "save_tuned", "solve_size", "split", "stack", "trainable",
]  # fmt: skip


def __getattr__(name: str) -> None:
    """Raise ImportError for a name of version 0.1, giving the current name."""
    if name in _renamed.MODULES | _renamed.NAMES:
        raise ImportError(f"jaxpeft.{name} is now jaxpeft.{(_renamed.MODULES | _renamed.NAMES)[name]}")
    raise AttributeError(f"module 'jaxpeft' has no attribute {name!r}")
