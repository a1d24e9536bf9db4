"""The grid of a study: its cells, their runs, and the learning rate chosen for a cell.

A study is a config (configs/studies/): `settings` (what is learned, from near to far from pre-training), `variants` (method,
head, sizes or budgets of stored parameters), `n_images` (nested subsets), `learning_rates` and `seeds`, and any keys of a run's
config as `axes` (axes.py). A cell is (setting, variant, size, n_images). Each cell is trained at every learning rate with
seed 0 (search.py). The rate that is best on validation images, never on test images, is then used with the other seeds, which
draw another subset, initialisation and order. If the search has fewer steps than the other runs (`search_steps`), seed 0 too is
trained once more with the chosen rate.

`steps` gives the steps of a run for each of `n_images`. A setting's `base` may contain '{seed}': every seed then has a base of
its own. `measure` says what the best is: 'main', the main metric on the split `select_on`, or 'nll', nats per token in the
validation of the run; the text metrics are reported too.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator

import ml_collections

from jaxpeft import data, methods, tasks
from jaxpeft.adapt import budget
from jaxpeft.models import loading
from jaxpeft.runtime import renamed
from jaxpeft.study import axes, claims, search
from jaxpeft.training import setup

OF_STUDY = ("task", "lr_scale", "consistent", "ceiling")  # keys of a setting that are none of a run's config
MEASURES = ("main", "nll")


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
    """One training run: a cell of a study, a seed and a learning rate. `short`: one of a search with fewer steps."""

    cell: Cell
    seed: int
    lr: float
    study: ml_collections.ConfigDict = dataclasses.field(compare=False, repr=False)
    short: bool = False

    @property
    def id(self) -> str:
        return f"{self.cell}-s{self.seed}-lr{self.lr:.3g}" + ("-search" if self.short else "")

    @property
    def searches(self) -> bool:
        """Whether the cell's learning rate is chosen by this run."""
        return self.short or (self.seed == 0 and not _apart(self.study))

    @property
    def drawn(self) -> dict:
        """The config keys that random search drew for this run, beside its learning rate."""
        return search.trials(self.study, _middle(self.study, self.cell)).get(self.lr, {})

    @functools.cached_property
    def config(self) -> ml_collections.ConfigDict:
        """The config of this run, as for `main.py`."""
        study, cell = self.study, self.cell
        setting, variant = study.settings[cell.setting], axes.variants(study)[cell.variant]
        c = study.points[setting["task"]].copy_and_resolve_references()
        fields = {**methods.defaults(variant["method"]), **variant.get("fields", {})}
        if field := methods.size_field(variant["method"]):
            fields[field] = cell.size
        c.method = ml_collections.ConfigDict({"name": variant["method"], **fields})
        c.name, c.head = self.id, variant["head"]
        c.seed = c.data.subset_seed = self.seed
        c.data.n_images, c.optim.lr = cell.n_images, self.lr
        if study.get("steps"):
            c.steps = dict(zip(study.n_images, study.steps, strict=True))[cell.n_images]
        c.update({key: value for key, value in setting.items() if key not in OF_STUDY})
        c.update_from_flattened_dict(axes.keys(variant) | self.drawn)
        # equal in all runs with one base, so scored once per setting
        c.eval.base = bool(variant.get("base")) and (self.seed == 0 or "{seed}" in c.base)
        c.base = c.base.replace("{seed}", str(self.seed))
        # asked for by the default recipe, which is that of scenes; a setting or the study may have other data
        c.eval.forgetting = c.eval.forgetting and c.data.name == "scenes"
        if self.short:
            c.steps, c.epochs = round(c.steps * study.search_steps), c.epochs * study.search_steps
            c.eval.splits = (study.select_on,) if study.get("measure", "main") == "main" else ()
            c.eval.base = c.eval.forgetting = False
        return c


def cells(config) -> list[Cell]:
    """The cells in a fixed order. Raises ValueError for an unknown method or setting and for a key of version 0.1."""
    renamed.check_study(config)
    found = {}
    for setting in config.settings:
        for name, variant in axes.variants(config).items():
            if variant.get("settings") and setting not in variant["settings"]:
                continue
            sizes = _sizes(config, setting, variant)
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


def _sizes(config, setting: str, variant) -> tuple[int, ...]:
    field = methods.size_field(variant["method"])
    if not field:
        return (0,)
    if variant.get("sizes"):
        return tuple(variant["sizes"])
    fields = json.dumps(dict(variant.get("fields", {})), sort_keys=True)
    base, task = bases(config, setting)[0], config.settings[setting]["task"]
    budgets = variant.get("budgets") or config.budgets
    return tuple(dict.fromkeys(_solved(base, task, variant["method"], fields, n) for n in budgets))


def bases(config, setting: str) -> list[str]:
    """The bases of a setting: one, or one for each seed."""
    about = config.settings[setting]
    base = about.get("base") or config.points[about["task"]].base
    return list(dict.fromkeys(base.replace("{seed}", str(seed)) for seed in range(config.seeds)))


@functools.cache
def _solved(base: str, task: str, method: str, fields: str, stored: int) -> int:
    return budget.solve_size(abstract_model(base, task), methods.build(method, **json.loads(fields)), stored).size


@functools.cache
def abstract_model(base: str, task: str):
    """The model of a base for a task, from its configuration alone: planning needs no weights."""
    return loading.abstract(base, task=task)


def learning_rates(config, cell: Cell) -> list[float]:
    """The learning rates that a cell tries at first."""
    return list(search.trials(config, _middle(config, cell)))


def _middle(config, cell: Cell) -> float:
    return search.middle_rate(axes.variants(config)[cell.variant], config.settings[cell.setting], cell.size)


def _apart(config) -> bool:
    """Whether the runs of the search have fewer steps than the others."""
    return config.get("search_steps", 1.0) < 1


def best_learning_rate(tried: Iterable[tuple[float, float]]) -> float | None:
    """The learning rate of the pair (learning rate, validation score) with the best score; of equal scores the smallest
    learning rate. None where there are no pairs."""
    return min(((-score, lr) for lr, score in tried), default=(0.0, None))[1]


def runs(config, finished: dict[str, dict], given_up=frozenset()) -> list[Run]:
    """All runs known so far: those of the search, and those with all seeds of cells whose learning rate is chosen.

    `finished`: id -> result. A cell's learning rate is chosen once all runs of its search are finished or in `given_up`.
    """
    named, later = [], []
    for cell in cells(config):
        tried, lr = searched(config, cell, finished, given_up)
        named += tried
        if lr is not None:
            later += [Run(cell, seed, lr, config) for seed in range(0 if _apart(config) else 1, config.seeds)]
    return named + later


def searched(config, cell: Cell, finished: dict[str, dict], given_up) -> tuple[list[Run], float | None]:
    """(the runs of a cell's search so far, its learning rate). It is None until all of them are finished or given up, and where
    none is finished. With `config.extend` the next rates outwards follow one by one (search.beyond)."""
    rates, left = learning_rates(config, cell), config.get("extend", 0)
    while True:
        tried = [Run(cell, 0, lr, config, short=_apart(config)) for lr in rates]
        if not all(one.id in finished or one.id in given_up for one in tried):
            return tried, None
        scores = [(one.lr, validation_score(config, finished[one.id])) for one in tried if one.id in finished]
        best = best_learning_rate(scores)
        beyond = search.beyond(rates, best) if best is not None and left else None
        if beyond is None:
            return tried, best
        rates, left = [*rates, beyond], left - 1


def validation_score(config, result: dict) -> float:
    """What a result is chosen by, the higher the better: by `config.measure` the main metric, or less the nats per token."""
    if config.get("measure", "main") == "nll":
        return -result["validation"]["kept"]
    return result["metrics"][config["select_on"]]["tuned"][result["main_metric"]]


def n_final(config) -> int:
    """The number of runs of a cell after its search."""
    return config.seeds if _apart(config) else config.seeds - 1


def n_runs(config, known: Iterable[Run] = ()) -> int:
    """The number of runs of the whole study, with the rates that the extended searches of the runs `known` have added."""
    n_cells, n_tried = len(cells(config)), len(search.trials(config, 1.0))
    added = max(0, sum(run.searches for run in known) - n_cells * n_tried)
    return n_cells * (n_tried + n_final(config)) + added


def check(config) -> None:
    """Raise ValueError where a base or the data of a setting cannot be read, where the data have fewer training images than
    a cell needs, and for what `check_config` refuses."""
    check_config(config)
    ids = [str(cell) for cell in cells(config)]
    if twice := [one for one in ids if ids.count(one) > 1]:
        raise ValueError(
            f"two cells of study {config.name} have the same name, {twice[0]}; rename a setting or variant"
        )
    for setting in config.settings:
        for base in bases(config, setting):
            loading.read(base, task=config.settings[setting]["task"])
    for setting in config.settings:
        mine = [cell for cell in cells(config) if cell.setting == setting]
        most = max(mine, key=lambda cell: cell.n_images)
        c = Run(most, 0, 1.0, config).config
        train = data.load(c.data, setup.needed_splits(c))["train"]
        n = len(setup.with_texts(c, tasks.build(c.task, **c.task_options), train).rows)
        if most.n_images > n:
            raise ValueError(
                f"study {config.name}: n_images includes {most.n_images}, but the training split of setting {setting!r} has "
                f"{n} images with texts of its task; n_images must be at most {n}"
            )


def check_config(config) -> None:
    """Raise ValueError for axes, a search, steps, a measure, margins or declarations that cannot be carried out or judged by.
    Reads no files."""
    renamed.check_study(config)
    claims.check(config)
    axes.check(config)
    search.check(config)
    _check_measure(config)
    if len(config.get("steps", ())) not in (0, len(config.n_images)):
        raise ValueError(
            f"config.steps is {config.steps}; it must have a number for each of n_images {config.n_images}"
        )


def _check_measure(config) -> None:
    measure = config.get("measure", "main")
    if measure not in MEASURES:
        raise ValueError(f"config.measure is {measure!r}; choose one of {', '.join(MEASURES)}")
    for task, point in config.points.items():
        if config.select_on not in point.eval.splits:
            raise ValueError(
                f"points.{task}.eval.splits is {tuple(point.eval.splits)}; it must hold {config.select_on!r}, "
                "which config.select_on says chooses the learning rate"
            )
        if "test" not in point.eval.splits:
            raise ValueError(
                f"points.{task}.eval.splits is {tuple(point.eval.splits)}; it must hold 'test', by which the "
                "report compares runs"
            )
        if point.optim.schedule == "plateau" and point.stop.split == "test":
            raise ValueError(
                f"points.{task}.stop.split is 'test', so the step that is kept would be chosen on test images; set "
                "it to 'val'"
            )
        if measure == "nll" and (point.optim.schedule, point.stop.split) != ("plateau", config.select_on):
            raise ValueError(
                f"config.measure is 'nll', so every run must validate on {config.select_on!r}; set "
                f"points.{task}.optim.schedule to 'plateau' and points.{task}.stop.split to {config.select_on!r}"
            )
