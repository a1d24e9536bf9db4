"""A model of a few thousand parameters with awkward sizes, and batches for it."""

import contextlib
import functools
import gc
import os

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import config
from jaxpeft.apps.pretrain_blip import ALIASES, init, shared
from jaxpeft.data import scenes
from jaxpeft.inputs.processor import Template
from jaxpeft.models import loading, stack
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.models.blip_tokens import SPECIAL, BlipTokenizer

# Here, as programs that tests start import this file and not conftest.py
gc.set_threshold(200_000, 20, 100)  # tracing makes many objects: a tenth of the time went into looking for cycles
stack.UNROLLED = 0  # scanned as models of base size are: half the program to compile; test_model.py unrolls

TOKENIZER = BlipTokenizer.from_words(f"w{i}" for i in range(20))
SCENES = BlipTokenizer.from_words(scenes.WORDS)
CONFIG = dict(
    image_size=16, patch_size=8, vision_width=12, vision_layers=2, vision_heads=3, vision_mlp=20,
    vocab_size=len(TOKENIZER), text_width=12, text_layers=2, text_heads=2, text_mlp=20, max_positions=16,
    pad_id=0, cls_id=2, sep_id=3, bos_id=5, enc_id=6,
)  # fmt: skip


# Two programs that differ by the addition of an exact zero agree to the bit with the emitters that XLA uses outside the tests
# (see conftest.py)
NEWER = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else None
exact_jit = functools.partial(jax.jit, compiler_options=NEWER)


@contextlib.contextmanager
def optimized():
    """For runs long enough that they take longer without optimization."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@functools.cache
def model(question_encoder: bool = True, **overrides) -> Blip:
    return Blip.build(BlipConfig(**CONFIG | {"question_encoder": question_encoder} | overrides), TOKENIZER)


def template(task: str, tokenizer: BlipTokenizer = TOKENIZER, **options) -> Template:
    """How BLIP reads and writes the texts of a task, from a tokenizer alone."""
    return Blip.build(BlipConfig(), tokenizer).processor.template(task, **options)


@functools.cache
def params(question_encoder: bool = True, seed: int = 0, **overrides):
    """Random weights far from zero, so that every leaf matters."""
    net = model(question_encoder, **overrides)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), net.example()))["params"]
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.4, s.shape), jnp.float32), shapes)
    return jax.tree_util.tree_map_with_path(lambda path, x: x + 1 if path[-1].key == "scale" else x, drawn)


def of_scenes(**sizes) -> Blip:
    """A model that reads pictures and words of scenes."""
    sizes = CONFIG | sizes | {"image_size": 64, "patch_size": 32, "vocab_size": len(SCENES), "max_positions": 48}
    return Blip.build(BlipConfig(**sizes, question_encoder=True), SCENES)


def saved(directory, model, seed=0, **facts):
    """Write a checkpoint directory of ours with random weights -> (the directory, the parameters)."""
    stored = shared(init(model, seed))
    return loading.save(directory, model, stored, aliases=ALIASES, **facts), stored


def with_new_words(load):
    """`scenes.load` with three words in its training texts that the tiny bases lack."""

    def changed(config, splits):
        found = load(config, splits)
        if "train" in found:
            rows = [dict(row) for row in found["train"].rows]
            rows[0]["captions"] = ["a zebra beside a yak"]
            rows[0]["questions"] = [dict(q, question="is there a zebra", answers=["yak"]) for q in rows[0]["questions"]]
            found["train"] = type(found["train"])("train", found["train"].images, rows)
        return found

    return changed


def batch(n: int = 4, n_texts: int = 1, seed: int = 0) -> dict:
    """Pictures, padded questions, texts with targets and weights."""
    rng = np.random.default_rng(seed)
    words = lambda *shape: rng.integers(len(SPECIAL), len(TOKENIZER), shape).astype(np.int32)  # noqa: E731
    question = words(n, 5)
    question[0, 3:] = 0
    tokens, weights = words(n, n_texts, 4), np.ones((n, n_texts, 4), np.float32)
    weights[0, 0, 2:] = 0
    image = rng.integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)
    return {"image": image, "prompt": question, "tokens": tokens, "targets": words(n, n_texts, 4), "weights": weights}


def quiet(*_):
    """A log that keeps nothing."""


def config_of(base, task="vqa", method="lora", head="none", **changes):
    """A run of a few steps on a handful of scenes."""
    c = config.get_config(task, method, 2, head)
    c.base, c.steps, c.batch_size, c.log_every = str(base), 6, 8, 1
    c.data.n_train, c.data.n_val, c.data.n_test = 12, 0, 5
    c.eval.batch_size, c.eval.gallery, c.check_frozen = 8, False, True
    c.update_from_flattened_dict(changes)
    return c
