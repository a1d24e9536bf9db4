"""The paper's claims as tests on a study's results: effect, bootstrap interval, verdict. Pure functions of numbers.

Input is a list of `Final`: one per cell and seed, at the learning rate that validation chose, with the main metric of
every test example. All runs of a setting are scored on the same examples, and seed s draws the same subset in every cell,
so both are resampled jointly: a replicate draws seeds and examples with replacement and recomputes the whole effect.
With one seed only examples are resampled, and the interval does not cover the variation between seeds.

A verdict ('supported', 'refuted' or 'undecided') is based on an interval, not on a point estimate. A claim that nothing
changes is judged by an equivalence test: it is supported if the whole interval is within a stated margin of zero. Intervals
are 95 % percentile intervals; for equivalence 90 %, which amounts to two one-sided tests at 5 %.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxpeft.metrics.bootstrap import REPLICATES, interval

LAYER, EMBEDDING = ("serial_adapter", "parallel_adapter", "lora"), ("prompt", "prefix")
MARGIN = 0.05  # share of the setting's mean score that counts as no change


@dataclasses.dataclass(frozen=True)
class Final:
    """A cell's run with one seed: its place in the grid and its scores on test examples."""

    setting: str
    task: str
    variant: str
    method: str
    size: int
    n_images: int
    stored: int
    seed: int
    each: np.ndarray  # (examples,) main metric
    converged: bool
    validation: float  # main metric on the split that learning rates are chosen on


class Table:
    """The finals of one setting as an array scores[cell, seed] of per-example vectors, resampled together."""

    def __init__(self, finals: Sequence[Final]):
        self.cells = sorted({(f.variant, f.size, f.n_images) for f in finals})
        self.about = {(f.variant, f.size, f.n_images): f for f in finals}
        seeds = [{f.seed for f in finals if (f.variant, f.size, f.n_images) == cell} for cell in self.cells]
        self.seeds = sorted(set.intersection(*seeds)) if seeds else []  # the seeds that every cell has
        where = {(f.variant, f.size, f.n_images, f.seed): f.each for f in finals}
        rows = [[where[*cell, seed] for seed in self.seeds] for cell in self.cells]
        self.each_CSE = np.array(rows) if rows and self.seeds else np.zeros((len(rows), 0, 0))

    def means(self, rng: np.random.Generator | None = None, examples=None) -> np.ndarray:
        """Mean scores (cells,); with `rng` those of a bootstrap replicate, with `examples` on these examples only."""
        x = self.each_CSE if examples is None else self.each_CSE[:, :, examples]
        if rng is None:
            return x.mean(axis=(1, 2))
        _, n_seeds, n_examples = x.shape
        by_seed = x[:, :, rng.integers(n_examples, size=n_examples)].mean(axis=2)
        if n_seeds == 1:
            return by_seed[:, 0]
        # a bootstrap mean of n values has only (n - 1) / n of the variance: with three seeds a third is missing
        middle, drawn = by_seed.mean(axis=1), by_seed[:, rng.integers(n_seeds, size=n_seeds)].mean(axis=1)
        return middle + np.sqrt(n_seeds / (n_seeds - 1)) * (drawn - middle)

    @property
    def enough(self) -> bool:
        return self.each_CSE.size > 0


def verdict_positive(low: float, high: float, margin: float) -> str:
    """Verdict on a positive effect: supported above zero; refuted below zero, or if the whole interval is in the margin."""
    if high < 0 or (-margin < low and high < margin):
        return "refuted"
    return "supported" if low > 0 else "undecided"


def verdict_flat(low: float, high: float, margin: float) -> str:
    """Verdict on no change: supported within the margin, refuted outside it."""
    if -margin < low and high < margin:
        return "supported"
    return "refuted" if low > margin or high < -margin else "undecided"


def slope(xs: Sequence[float], scores: np.ndarray) -> float:
    """Least-squares slope of scores per doubling of x."""
    x = np.log2(np.asarray(xs, float))
    x -= x.mean()
    return float(x @ scores / (x @ x))


def middle_size(sizes: Sequence[int]) -> int:
    """The size of a variant's data axis: that with the most numbers of images, the smallest of several."""
    return min(set(sizes), key=lambda size: (-sizes.count(size), size))


def _axis(table: Table, axis: str, variants) -> dict[str, list[int]]:
    """variant -> indices of its cells along 'data' (at its middle size) or 'size' (with all images), if at least two."""
    lines = {}
    for variant in variants:
        mine = [(i, cell) for i, cell in enumerate(table.cells) if cell[0] == variant]
        if not mine:
            continue
        if axis == "size":
            most = max(cell[2] for _, cell in mine)
            line = [i for i, cell in mine if cell[2] == most]
            line.sort(key=lambda i: table.about[table.cells[i]].stored)
        else:
            middle = middle_size([cell[1] for _, cell in mine])
            line = sorted((i for i, cell in mine if cell[1] == middle), key=lambda i: table.cells[i][2])
        if len(line) > 1:
            lines[variant] = line
    return lines


def _x(table: Table, axis: str, i: int) -> float:
    """The number of images, or the method's size: its stored parameters grow with it, the head's do not."""
    return table.cells[i][2 if axis == "data" else 1]


def trend(table: Table, axis: str, variants) -> Callable | None:
    """effect(rng): the mean over variants of the score's slope per doubling of data or of the method's size."""
    lines = _axis(table, axis, variants)
    if not lines:
        return None

    def effect(rng):
        scores = table.means(rng)
        return np.mean([slope([_x(table, axis, i) for i in line], scores[line]) for line in lines.values()])

    return effect


def change(table: Table, axis: str, variants) -> Callable | None:
    """effect(rng): the mean over variants of the fitted change from the lower to the upper end of an axis."""
    lines = _axis(table, axis, variants)
    if not lines:
        return None

    def effect(rng):
        scores, total = table.means(rng), []
        for line in lines.values():
            xs = [_x(table, axis, i) for i in line]
            total.append(slope(xs, scores[line]) * np.log2(xs[-1] / xs[0]))
        return np.mean(total)

    return effect


def slopes(finals: Sequence[Final], replicates: int = REPLICATES) -> list[dict]:
    """The mean slope over PEFT variants of each setting and axis, as a share of its mean score, with the interval."""
    out = []
    for setting in dict.fromkeys(f.setting for f in finals):
        table = Table([f for f in finals if f.setting == setting])
        for axis in ("data", "size"):
            effect = trend(table, axis, peft_variants(finals))
            if effect is None or not table.enough:
                continue
            value, low, high = (x / table.means().mean() for x in interval(effect, replicates))
            out.append(
                {"setting": setting, "axis": axis, "slope": value, "low": low, "high": high, "seeds": len(table.seeds)}
            )
    return out


def converged(finals: Sequence[Final]) -> list[Final]:
    """The runs of cells whose seeds all converged: a cell is judged on all of its seeds or not at all."""
    capped = {(f.setting, f.variant, f.size, f.n_images) for f in finals if not f.converged}
    return [f for f in finals if (f.setting, f.variant, f.size, f.n_images) not in capped]


def departure(table: Table, variants) -> Callable | None:
    """effect(rng): how far scores are from monotonic over sizes; the mean over variants.

    For a variant it is the smaller of its largest rise and its largest fall between two sizes. The two pairs of sizes are
    picked on one half of the examples and measured on the other, and vice versa, so that noise alone has a mean <= 0.
    """
    lines = {variant: line for variant, line in _axis(table, "size", variants).items() if len(line) > 2}
    if not lines:
        return None
    halves = [np.arange(h, table.each_CSE.shape[2], 2) for h in (0, 1)]
    picked = {}  # once, from the original data: all replicates measure the same pairs
    for h, half in enumerate(halves):
        scores = table.means(None, half)
        for variant, line in lines.items():
            pairs = [(i, j) for k, i in enumerate(line) for j in line[k + 1 :]]
            up, down = (max(pairs, key=lambda p, s=s: s * (scores[p[1]] - scores[p[0]])) for s in (1, -1))
            picked[h, variant] = up, down

    def effect(rng):
        found = []
        for h in (0, 1):
            scores = table.means(rng, halves[1 - h])
            for variant in lines:
                up, down = picked[h, variant]
                found.append(min(scores[up[1]] - scores[up[0]], scores[down[0]] - scores[down[1]]))
        return np.mean(found)

    return effect


def difference(table: Table, ours: Sequence[int], theirs: Sequence[int]) -> Callable:
    """effect(rng): the mean score of some cells minus that of others."""

    def effect(rng):
        scores = table.means(rng)
        return scores[list(ours)].mean() - scores[list(theirs)].mean()

    return effect


@dataclasses.dataclass
class Verdict:
    """The verdict on one claim for one setting (or between settings)."""

    claim: str
    statement: str
    test: str
    where: str
    unit: str
    effect: float | None
    low: float | None
    high: float | None
    margin: float
    verdict: str
    n_cells: int
    n_seeds: int
    n_examples: int
    note: str = ""


def judge(finals: Sequence[Final], replicates: int = REPLICATES) -> list[Verdict]:
    """Judge every claim on every setting -> verdicts, sorted by claim."""
    settings = list(dict.fromkeys(f.setting for f in finals))
    tables = {setting: Table([f for f in finals if f.setting == setting]) for setting in settings}
    tasks = {setting: next(f.task for f in finals if f.setting == setting) for setting in settings}
    peft = peft_variants(finals)
    out = []

    def add(claim, statement, test, setting, unit, effect, decide, confidence=0.95, scale=1.0):
        table = tables[setting]
        shared = {"n_cells": len(table.cells), "n_seeds": len(table.seeds), "n_examples": table.each_CSE.shape[-1]}
        margin = MARGIN * float(abs(table.means().mean())) * scale if table.enough else 0.0
        if effect is None or not table.enough:
            note = "no cells for it"
            out.append(
                Verdict(
                    claim, statement, test, setting, unit, None, None, None, margin, "undecided", **shared, note=note
                )
            )
            return
        value, low, high = interval(effect, replicates, confidence)
        note = "" if len(table.seeds) > 1 else "one seed: the interval covers test examples only"
        made = decide(low, high, margin)
        out.append(Verdict(claim, statement, test, setting, unit, value, low, high, margin, made, **shared, note=note))

    for setting in settings:
        table = tables[setting]
        if tasks[setting] == "vqa":
            test = "mean slope over methods is above 0; refuted below 0 or within the margin"
            words = {"C1": "more data helps", "C2": "more tunable parameters help"}
            for claim, axis in (("C1", "data"), ("C2", "size")):
                effect, unit = trend(table, axis, peft), "score per doubling"
                add(claim, f"VQA: {words[claim]}", test, setting, unit, effect, verdict_positive, scale=0.2)
        else:
            test = "fitted change from least to most data lies within the margin (two one-sided tests)"
            statement = "captioning: data size does not matter"
            add("C3", statement, test, setting, "score", change(table, "data", peft), verdict_flat, 0.9)
            test = "smaller of largest rise and largest fall over sizes is above 0, pairs picked on other examples"
            statement = "captioning: the effect of tunable size is not monotonic"
            add("C4", statement, test, setting, "score", departure(table, peft), verdict_positive)
        ours, theirs = (
            [i for i, c in enumerate(table.cells) if table.about[c].method in group] for group in (LAYER, EMBEDDING)
        )
        effect = difference(table, ours, theirs) if ours and theirs else None
        add(
            "C5", "methods that compose with layers beat those that compose with embeddings",
            "mean score over cells, serial and parallel adapter and LoRA less prompt and prefix, is above 0",
            setting, "score", effect, verdict_positive,
        )  # fmt: skip
        add(
            "C6", "PEFT with a tuned classifier can beat full fine-tuning",
            "the PEFT cell that validation picks, at the most data that full fine-tuning has, less full fine-tuning there",
            setting, "score", _best_against_full(table, finals, setting, peft), verdict_positive,
        )  # fmt: skip
    out += _interactions(tables, tasks, peft, replicates)
    return sorted(out, key=lambda one: one.claim)


def peft_variants(finals: Sequence[Final]) -> list[str]:
    """The variants whose method is one of the paper's five."""
    return list(dict.fromkeys(f.variant for f in finals if f.method in (*LAYER, *EMBEDDING)))


def _best_against_full(table, finals, setting, peft):
    full = [i for i, cell in enumerate(table.cells) if table.about[cell].method == "full"]
    if not full:
        return None
    there = max(full, key=lambda i: table.cells[i][2])
    rivals = [
        i for i, cell in enumerate(table.cells)
        if cell[0] in peft and cell[0].endswith("_head") and cell[2] == table.cells[there][2]
    ]  # fmt: skip
    if not rivals:
        return None

    def validation(i):
        return np.mean(
            [f.validation for f in finals if f.setting == setting and (f.variant, f.size, f.n_images) == table.cells[i]]
        )

    return difference(table, [max(rivals, key=validation)], [there])


def _interactions(tables, tasks, peft, replicates) -> list[Verdict]:
    """Judge the claim in the paper's title: slopes, as shares of their setting's mean score, are larger for VQA."""
    out = []
    near = [setting for setting in tables if tasks[setting] != "vqa" and tables[setting].enough]
    far = [setting for setting in tables if tasks[setting] == "vqa" and tables[setting].enough]
    if not near or not far:
        return out
    for axis, words in (("data", "data size"), ("size", "tunable size")):
        effects = {setting: trend(tables[setting], axis, peft) for setting in (*near, *far)}
        if any(effect is None for effect in effects.values()):
            continue
        scale = {setting: tables[setting].means().mean() for setting in effects}

        def effect(rng, effects=effects, scale=scale):
            shares = {setting: effects[setting](rng) / scale[setting] for setting in effects}
            return np.mean([shares[setting] for setting in far]) - np.mean([shares[setting] for setting in near])

        value, low, high = interval(effect, replicates)
        every = [tables[setting] for setting in effects]
        out.append(
            Verdict(
                f"C7 {axis}", f"{words} matters more for VQA than for captioning",
                "difference of mean slopes, each as a share of its setting's mean score, is above 0",
                f"{' + '.join(far)} less {' + '.join(near)}", "share of score per doubling", value, low, high,
                MARGIN * 0.2, verdict_positive(low, high, MARGIN * 0.2), sum(len(t.cells) for t in every),
                min(len(t.seeds) for t in every), min(t.each_CSE.shape[-1] for t in every),
            )
        )  # fmt: skip
    return out
