"""One of each that people add, from a module that is no part of jaxpeft: method, data set, task, optimizer, metric."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.data import DATASETS
from jaxpeft.data.base import Split
from jaxpeft.methods import METHODS, Method
from jaxpeft.metrics import METRICS
from jaxpeft.tasks import TASKS, Captioning
from jaxpeft.training.optim import OPTIMIZERS


@dataclasses.dataclass(frozen=True)
class Shift(Method):
    """A learned offset of every linear's output that `targets` matches."""

    targets: str = r"^text_decoder/blocks/mlp/down$"
    gain: float = 1.0
    name: ClassVar[str] = "shift"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def init(self, rng, site, base):
        return {"offset": jnp.zeros(site.shape[1])}

    def linear(self, params, x, y, base, rng):
        return y + self.gain * params["offset"].astype(y.dtype)

    def merge(self, params, base):
        return base | {"bias": base["bias"] + self.gain * params["offset"]}


COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}


def squares(config, splits):
    """`config.n` plain pictures a split."""
    found = {}
    for name in splits:
        colours = [list(COLOURS)[i % 3] for i in range(config.n)]
        images = [np.full((20, 30, 3), COLOURS[colour], np.uint8) for colour in colours]
        rows = [
            {"image_id": f"{name}-{i}", "captions": [f"a {colour} thing"], "questions": []}
            for i, colour in enumerate(colours)
        ]
        found[name] = Split(name, images, rows, source="squares")
    return found


@dataclasses.dataclass(frozen=True)
class Shout(Captioning):
    """Captions whose words stand twice."""

    name: ClassVar[str] = "shout"

    def template(self, model):
        template = super().template(model)

        def twice(text):
            return " ".join(word for word in template.clean_text(text).split() for _ in range(2))

        return dataclasses.replace(template, clean_text=twice)


def plain(config, decays):
    return optax.sgd(1.0)


def words(prediction, truths):
    """How many words were written."""
    return float(len(prediction.split()))


METHODS["shift"] = Shift
DATASETS["squares"] = squares
TASKS["shout"] = Shout
OPTIMIZERS["plain"] = plain
METRICS["words"] = words
