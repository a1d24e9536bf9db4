"""What a report says first: what to use, what more images and a larger size bring, and how far to trust it.

Pure functions over a study's results. Scores are of test images; what is chosen is chosen on validation images.
"""

import collections
import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from jaxpeft.study import claims, intervals
from jaxpeft.study.claims import Result, on_axis
from jaxpeft.study.intervals import Estimate
from jaxpeft.study.report.markup import estimate
from jaxpeft.study.report.rows import Study, cell_of

Cell = tuple[str, int, int]  # variant, size, number of images


@dataclasses.dataclass(frozen=True)
class Choice:
    """The cell to use in a setting with a number of training images: that with the best mean on validation images, in the
    study's measure."""

    setting: str
    cell: Cell
    runs: dict[int, Result]  # seed -> run
    tied: list[Cell] | None  # cells that are not shown to be worse on test images, in that measure; None: too few seeds
    n_others: int
    over_base: Estimate | float | None  # its test score less that of the frozen base

    @property
    def score(self) -> float:
        """Its mean test score."""
        return statistics.fmean(one.score for one in self.runs.values())

    @property
    def gains(self) -> bool:
        """Whether it is shown to be better than the frozen base, or with one seed is better; True where that was not scored."""
        if self.over_base is None:
            return True
        return (self.over_base.low if isinstance(self.over_base, Estimate) else self.over_base) > 0

    @property
    def best_run(self) -> Result:
        """Its run with the best validation score."""
        return max(self.runs.values(), key=lambda one: one.validation)


def mean(values: Sequence[float] | np.ndarray) -> Estimate | float:
    """The mean of one number per seed with its interval, or the number where there is one seed."""
    return intervals.t_interval(values) if len(values) > 1 else float(values[0])


def choices(study: Study, setting: str) -> list[Choice]:
    """What to use, for each number of training images."""
    by_cell, found = claims.cells(one for one in study.results if one.setting == setting), []
    base, bases = study.base(setting), study.bases(setting)
    for n in sorted({cell[2] for cell in by_cell}):
        rivals = [cell for cell in by_cell if cell[2] == n]
        best = max(rivals, key=lambda cell: statistics.fmean(one.validation for one in by_cell[cell].values()))
        others = [cell for cell in rivals if cell != best]
        less = {cell: difference(by_cell[best], by_cell[cell], study.in_nats) for cell in others}
        known = all(isinstance(one, Estimate) for one in less.values())
        tied = [cell for cell, one in less.items() if isinstance(one, Estimate) and one.low <= 0] if known else None
        gain = (
            None if base is None else mean([one.score - bases.get(seed, base) for seed, one in by_cell[best].items()])
        )
        found.append(Choice(setting, best, by_cell[best], tied, len(others), gain))
    return found


def difference(first: dict[int, Result], second: dict[int, Result], in_nats: bool = False) -> Estimate | float | None:
    """The test score of a cell less that of another, paired by seed; None where they have no seed in common.

    `in_nats`: nats per token, the other's less the first's, so that this too is positive where the first is better.
    """

    def gain(a: Result, b: Result) -> float:
        return b.test_nll - a.test_nll if in_nats else a.score - b.score

    seeds = sorted(first.keys() & second.keys())
    return mean([gain(first[seed], second[seed]) for seed in seeds]) if seeds else None


def name(cell: Cell) -> str:
    """A cell in words, without its number of images."""
    return f"{cell[0]} {cell[1]}" if cell[1] else cell[0]


def names(cells: Sequence[Cell]) -> str:
    """Cells in words: 'lora_head 2, 8; head'."""
    sizes = collections.defaultdict(list)
    for variant, size, _ in cells:
        sizes[variant].append(str(size))
    return "; ".join(variant if some == ["0"] else f"{variant} {', '.join(some)}" for variant, some in sizes.items())


def slopes(results: Sequence[Result], axis: str) -> dict[str, tuple[dict[int, float], float]]:
    """variant -> (seed -> least-squares slope of the score per doubling; the number of doublings on its axis).

    Of variants with two cells or more on the axis 'data' or 'size', and the seeds that all of their cells have. Variants
    whose cells have no seed in common are left out.
    """
    by_cell, found, where = claims.cells(results), {}, {"data": 2, "size": 1}[axis]
    for variant, line in on_axis(by_cell, axis).items():
        xs = [cell[where] for cell in line]
        if len(line) > 1 and (seeds := claims.shared(by_cell, line)):
            slope_S = intervals.slope(xs, claims.scores(by_cell, line)).tolist()
            found[variant] = (dict(zip(seeds, slope_S, strict=True)), intervals.doublings(xs))
    return found


def pooled(
    found: dict[str, tuple[dict[int, float], float]], sized: set[str], whole: bool = False
) -> Estimate | float | None:
    """The mean of slopes over the variants in `sized`, those with a size: controls are left out. `whole`: over the axis
    instead of per doubling. Of the seeds that all of these variants have; None where there are none."""
    mine = [(by_seed, n if whole else 1.0) for variant, (by_seed, n) in found.items() if variant in sized]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed, _ in mine))) if mine else []
    return mean([statistics.fmean(by_seed[seed] * n for by_seed, n in mine) for seed in seeds]) if seeds else None


def sized(study: Study) -> set[str]:
    """The variants that have a size."""
    return {one.variant for one in study.results if one.size}


def chosen_rates(study: Study) -> list[tuple[dict, int, str]]:
    """(a cell's run with the chosen rate, the number of rates tried, where the chosen one is among them: 'smallest', 'inside'
    or 'largest'), for the cells that tried several. A rate whose run failed was tried too: the search does not go beyond it."""
    tried = collections.defaultdict(set)
    for row in study.searched:
        tried[cell_of(row)].add(row["lr"])
    found = []
    for row in study.searched:
        rates, lr = tried[cell_of(row)], row["lr"]
        if row["chosen"] and len(rates) > 1:
            place = "smallest" if lr == min(rates) else "largest" if lr == max(rates) else "inside"
            found.append((row, len(rates), place))
    return found


def rate_places(study: Study) -> list[dict]:
    """Where the chosen rates stand among those that were tried, for each setting and variant: the numbers of cells with the
    smallest, one in between, and the largest. Cells with one rate are left out."""
    found = {}
    for row, n, place in chosen_rates(study):
        key = row["setting"], row["variant"]
        one = found.setdefault(key, {"smallest": 0, "inside": 0, "largest": 0, "tried": set()})
        one[place] += 1
        one["tried"].add(n)
    order = {name: i for i, name in enumerate([*study.config["settings"], *study.config["variants"]])}
    keys = sorted(found, key=lambda key: (order[key[0]], order[key[1]]))
    return [{"setting": setting, "variant": variant, **found[setting, variant]} for setting, variant in keys]


def budget(study: Study) -> list[dict]:
    """By how much the steps beyond those of the search lower the validation loss, in nats per token: the number of cells, the
    mean and the largest for each setting and variant. [] where the search has all steps."""
    groups = collections.defaultdict(list)
    for row in study.rows:
        if row["id"] in study.gains:
            groups[row["setting"], row["variant"]].append(study.gains[row["id"]])
    return [
        {
            "setting": setting,
            "variant": variant,
            "cells": len(some),
            "mean": statistics.fmean(some),
            "largest": max(some),
        }
        for (setting, variant), some in groups.items()
    ]


def sentences(study: Study, chosen: dict[str, list[Choice]]) -> list[str]:
    """Three sentences: what to use with the most images, what more images and a larger size bring, how far to trust it."""
    last = [found[-1] for found in chosen.values() if found]
    if not last:
        return ["No run has finished."]
    return [f"What to use: {'; '.join(_use(study, one) for one in last)}.", _effects(study), _trust(study)]


def _use(study: Study, one: Choice) -> str:
    base, metric = study.base(one.setting), study.metric(one.setting)
    where = f"on {one.setting} with {one.cell[2]:,} images"
    if not one.gains:
        seeds = f"{len(one.runs)} seed{'s' * (len(one.runs) > 1)}"
        return (
            f"{where}, the frozen base (test {metric} {base:.3f}): the best method, {name(one.cell)}, has {one.score:.3f} and "
            f"is not shown to be better by {seeds}"
        )
    said = f"test {metric} {one.score:.3f}" + ("" if base is None else f", frozen base {base:.3f}")
    if one.score <= (blind := study.blind(one.setting)):
        said += f", no better than the best guess without images, {blind:.3f}"
    if one.n_others:
        tied = "one seed, so ties are not known" if one.tied is None else f"tied with {len(one.tied) or 'none'}"
        said += f", {tied}" + ("" if one.tied is None else f" of {one.n_others} others")
    return f"{where}, {name(one.cell)} ({said})"


def _effects(study: Study) -> str:
    said = []
    for axis, words in (("data", "{:.3g} times the images"), ("size", "up to {:.3g} times the size")):
        parts, most = [], 0.0
        for setting in study.config["settings"]:
            found = slopes([one for one in study.results if one.setting == setting], axis)
            mine = {variant: one for variant, one in found.items() if variant in sized(study)}
            if (change := pooled(mine, set(mine), whole=True)) is not None:
                most = max(most, *(2**n for _, n in mine.values()))
                alone = " (one seed)" if isinstance(change, float) else ""
                parts.append(f"{estimate(change, '+')}{alone} {study.metric(setting)} on {setting}")
        if parts:
            said.append(f"{words.format(most)} {', '.join(parts)}")
    if not said:
        return "Every method was run at one size and with one number of images, so their effects are not known."
    return f"What more brings on average over methods, in test scores: {'; '.join(said)}."


def _trust(study: Study) -> str:
    places = rate_places(study)
    at_edge, n = (sum(one[a] + one[b] for one in places) for a, b in (("smallest", "largest"), ("inside", "inside")))
    n = at_edge + n // 2
    done = [row for row in study.rows if row["chosen"]]
    capped = sum(row["stopped"] == "cap" for row in done)
    seeds = len({row["seed"] for row in done})
    at_end = f"in {at_edge} of {n} cells the best learning rate is the smallest or the largest that was tried"
    longer = f"{capped} of {len(done)} chosen runs reached the cap on steps, and may score higher if trained longer"
    if study.gains:  # a fixed budget, and what a part of it reaches
        some, rest = list(study.gains.values()), 1 - study.config["search_steps"]
        longer = (
            f"the last {100 * rest:.0f} % of the steps lower the validation loss by {statistics.fmean(some):.3g} nats per "
            f"token on average and by {max(some):.3g} at most, and where this is much, more steps may lower it further"
        )
    elif not capped:
        longer = "no chosen run was ended by the cap on steps"
    return f"How far to trust it: {seeds} seed{'s' * (seeds > 1)}; {at_end if n else 'one learning rate a cell'}; {longer}."
