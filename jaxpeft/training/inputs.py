"""The inputs of a run: the examples of every split, with outputs of frozen stages in place of what they are computed from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxpeft.data.base import Examples, Split
from jaxpeft.data.pipeline import Resized
from jaxpeft.inputs.processor import Template
from jaxpeft.tasks import Task
from jaxpeft.training import frozen_cache
from jaxpeft.training.frozen_cache import FrozenCache
from jaxpeft.training.setup import Config, Log, Setup

BOTH = ("image", "example")  # the kinds of stages: one output per image, or one per example


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a run. `whole`, `chosen`: the whole training split, whose tables runs share, and the subset's indices."""

    task: Task
    template: Template
    splits: dict[str, Split]
    images: dict[str, Resized]
    cache: FrozenCache
    whole: Split | None = None
    chosen: np.ndarray | None = None
    made: dict[tuple, Examples] = dataclasses.field(default_factory=dict)

    def examples(self, name: str) -> Examples:
        """The examples of a split for training and likelihoods."""
        return self._once(("examples", name), lambda: self._filled(name, self._texts(name)))

    def eval_examples(self, name: str) -> Examples:
        """The evaluation examples of a split, for which texts are generated."""

        def make() -> Examples:
            return self._filled(name, self.task.eval_examples(self.splits[name], self.template))

        return self._once(("eval", name), make)

    def validation(self, name: str, most: int, per: tuple[str, ...] = BOTH) -> Examples:
        """At most `most` examples, spread evenly over a split; `per`: the kinds of stages that are filled in."""

        def make() -> Examples:
            examples = self._texts(name)
            some = np.unique(np.linspace(0, len(examples) - 1, min(most, len(examples))).astype(int))
            arrays = {key: array[some] for key, array in examples.arrays.items()}
            return self._filled(name, dataclasses.replace(examples, arrays=arrays), per)

        return self._once(("validation", name, most, per), make)

    def without_images(self, name: str) -> Examples:
        """`eval_examples` with the same grey image for all."""
        processor = self.cache.model.processor
        assert processor is not None  # `self.template` comes from it
        colour = (np.asarray(processor.image_mean, np.float32) * 255).astype(np.uint8)
        grey = np.broadcast_to(colour, (processor.image_size, processor.image_size, 3))
        examples = self.task.eval_examples(self.splits[name], self.template)
        index = np.zeros(len(examples), np.int32)
        examples = dataclasses.replace(examples, arrays=examples.arrays | {"image_index": index}, images=[grey])
        return self.cache.fill(Split("grey", [grey], [{"image_id": "grey"}]), examples)

    def _texts(self, name: str) -> Examples:
        """The examples of a split before stages are filled in."""
        return self._once(("texts", name), lambda: self.task.examples(self.splits[name], self.template))

    def _once(self, key: tuple, make: Callable[[], Examples]) -> Examples:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def _filled(self, name: str, examples: Examples, per: tuple[str, ...] = BOTH) -> Examples:
        split, arrays = self.splits[name], examples.arrays
        if name == "train" and self.whole is not None and self.chosen is not None:
            split = self.whole
            arrays = arrays | {"image_index": self.chosen[arrays["image_index"]].astype(np.int32)}
        return self.cache.fill(split, dataclasses.replace(examples, arrays=arrays, images=self.images[name]), per)


def prepare(config: Config, setup: Setup, directory: Path | None, log: Log) -> Inputs:
    """Prepare the inputs of a run. `directory`: where runs share outputs of frozen stages; None keeps them in memory."""
    model, (whole, chosen) = setup.model, setup.whole
    looked_at = setup.splits | ({"train": whole} if directory else {})
    images = {name: Resized.of(split.images, model) for name, split in looked_at.items()}
    template = setup.task.template(model)
    texts = setup.task.examples(setup.splits["train"], template)
    n_images = sum(map(len, images.values()))
    cache = frozen_cache.planned(config, model, setup.variables, setup.mask, texts, n_images)
    for name, why in cache.why.items():
        log(f"{name}: computed {f'every step: {why}' if why else 'once: it depends on no trainable leaf'}")
    cache = dataclasses.replace(cache, directory=directory, log=log)
    subset = (whole, chosen) if directory else (None, None)
    return Inputs(setup.task, template, setup.splits, images, cache, *subset, {("texts", "train"): texts})
