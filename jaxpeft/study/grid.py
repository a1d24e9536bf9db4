"""The grid of a study: its cells, their runs, and the learning rate chosen for a cell.

A study is a config (configs/studies/): `settings` (what is learned, from near to far from pre-training), `variants` (method,
head, sizes or budgets of stored parameters), `n_images` (nested subsets), `learning_rates` and `seeds`. A cell is (setting,
variant, size, n_images). Each cell is trained at every learning rate with seed 0. The learning rate with the best main metric
on validation images, never on test images, is then used with the other seeds, which draw another subset, initialisation and
order.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator

import ml_collections

from jaxpeft import data, methods
from jaxpeft.adapt import budget
from jaxpeft.models import loading
from jaxpeft.runtime import renamed
from jaxpeft.study import claims
from jaxpeft.training import setup

OF_STUDY = ("task", "lr_scale", "consistent", "ceiling")  # keys of a setting that are none of a run's config


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """A configuration in the grid; `size` is the method's rank, bottleneck or length, 0 where it has none."""

    setting: str
    variant: str
    size: int
    n_images: int

    def __str__(self):
        return f"{self.setting}-{self.variant}{self.size or ''}-n{self.n_images}"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: a cell of a study, a seed and a learning rate."""

    cell: Cell
    seed: int
    lr: float
    study: ml_collections.ConfigDict = dataclasses.field(compare=False, repr=False)

    @property
    def id(self) -> str:
        return f"{self.cell}-s{self.seed}-lr{self.lr:.3g}"

    @functools.cached_property
    def config(self) -> ml_collections.ConfigDict:
        """The config of this run, as for `main.py`."""
        setting, variant = self.study.settings[self.cell.setting], self.study.variants[self.cell.variant]
        c = self.study.points[setting["task"]].copy_and_resolve_references()
        fields = {**methods.defaults(variant.method), **variant.get("fields", {})}
        if field := methods.size_field(variant.method):
            fields[field] = self.cell.size
        c.method = ml_collections.ConfigDict({"name": variant.method, **fields})
        c.name, c.size, c.head = self.id, self.cell.size, variant.head
        c.seed = c.data.subset_seed = self.seed
        c.data.n_images, c.optim.lr = self.cell.n_images, self.lr
        c.eval.base = bool(variant.get("base")) and self.seed == 0  # equal in all runs, so scored once per setting
        c.update({key: value for key, value in setting.items() if key not in OF_STUDY})
        return c


def cells(config) -> list[Cell]:
    """The cells in a fixed order. Raises ValueError for an unknown method or setting and for a key of version 0.1."""
    renamed.check_study(config)
    found = {}
    for setting, about in config.settings.items():
        for name, variant in config.variants.items():
            if variant.get("settings") and setting not in variant.settings:
                continue
            sizes = _sizes(config, about["task"], variant)
            for size, n_images in _pairs(config, sizes, tuple(variant.get("n_images", ())) or config.n_images):
                found[Cell(setting, name, size, n_images)] = None
    return list(found)


def _pairs(config, sizes, all_n_images) -> Iterator[tuple[int, int]]:
    """Pairs (size, n_images): all, or with config.cross=False those on the two axes through (middle size, all images)."""
    middle, most = sizes[len(sizes) // 2], max(all_n_images)
    for n_images in all_n_images:
        for size in sizes:
            if config.cross or size == middle or n_images == most:
                yield size, n_images


def _sizes(config, task: str, variant) -> tuple[int, ...]:
    field = methods.size_field(variant.method)
    if not field:
        return (0,)
    if variant.get("sizes"):
        return tuple(variant.sizes)
    budgets = variant.get("budgets") or config.budgets
    base, fields = config.points[task].base, json.dumps(dict(variant.get("fields", {})), sort_keys=True)
    return tuple(dict.fromkeys(_solved(base, task, variant.method, fields, n) for n in budgets))


@functools.cache
def _solved(base: str, task: str, method: str, fields: str, stored: int) -> int:
    return budget.solve_size(abstract_model(base, task), methods.build(method, **json.loads(fields)), stored).size


@functools.cache
def abstract_model(base: str, task: str):
    """The model of a base for a task, from its configuration alone: planning needs no weights."""
    return loading.abstract(base, task=task)


def learning_rates(config, cell: Cell) -> list[float]:
    """The learning rates of a cell: its variant's `lr`, times its setting's `lr_scale`, times each of config.learning_rates."""
    middle = config.variants[cell.variant].lr * config.settings[cell.setting].get("lr_scale", 1.0)
    return [float(f"{middle * factor:.3g}") for factor in config.learning_rates]


def best_learning_rate(tried: Iterable[tuple[float, float]]) -> float | None:
    """The learning rate of the pair (learning rate, validation score) with the best score; of equal scores the smallest
    learning rate. None where there are no pairs."""
    return min(((-score, lr) for lr, score in tried), default=(0.0, None))[1]


def runs(config, finished: dict[str, dict], given_up=frozenset()) -> list[Run]:
    """All runs known so far: those with seed 0, and those with other seeds of cells whose learning rate is chosen.

    `finished`: id -> result. A cell's learning rate is chosen once all of its runs with seed 0 are finished or in `given_up`.
    """
    named, later = [], []
    for cell in cells(config):
        tried = [Run(cell, 0, lr, config) for lr in learning_rates(config, cell)]
        named += tried
        if all(one.id in finished or one.id in given_up for one in tried):
            results = [finished[one.id] for one in tried if one.id in finished]
            lr = best_learning_rate((one["lr"], _score(one, config.select_on)) for one in results)
            later += [Run(cell, seed, lr, config) for seed in range(1, config.seeds)] if lr else []
    return named + later


def _score(result: dict, split: str) -> float:
    return result["metrics"][split]["tuned"][result["main_metric"]]


def n_runs(config) -> int:
    """The number of runs of the whole study."""
    return len(cells(config)) * (len(config.learning_rates) + config.seeds - 1)


def check(config) -> None:
    """Raise ValueError where a base or the data of a setting cannot be read, where the data have fewer training images than
    a cell needs, and for margins and declarations that claims cannot be judged by."""
    claims.check(config)
    for task in dict.fromkeys(setting["task"] for setting in config.settings.values()):
        loading.read(config.points[task].base, task=task)
    for setting in config.settings:
        mine = [cell for cell in cells(config) if cell.setting == setting]
        most = max(mine, key=lambda cell: cell.n_images)
        c = Run(most, 0, 1.0, config).config
        n = len(data.load(c.data, setup.needed_splits(c))["train"].rows)
        if most.n_images > n:
            raise ValueError(
                f"study {config.name}: n_images includes {most.n_images}, but the training split of setting {setting!r} has "
                f"{n} images; n_images must be at most {n}"
            )
