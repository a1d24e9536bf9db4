"""The paper's claims (arXiv 2403.08433) as tests on a study's results. Pure functions over rows; statistics in intervals.py.

**Rows.** A `Result` is the chosen run of a cell with one seed. A `Scale` says of a setting whether it is consistent with what
the base was pre-trained on, which the study's config declares, and where its scores begin and end.

**Unit.** All effects are in points: 100 (score - blind) / (ceiling - blind), so that captions and questions can be compared.
0 is the best guess without the image, 100 the ceiling. Effects of an axis are changes over the whole axis, not per doubling.

In nats (`in_nats`): a score is less nats per token, and effects and margins are in nats per token. In a study whose `measure`
is 'nll' this is the primary measure, and the points of text metrics are shown too.

**Test.** From each claim follows one number per seed, the effect, by an equation that stands at its function. Its 95 %
t-interval over seeds and a margin that the study's config sets beforehand decide the verdict (`intervals.verdict`): positive;
positive, below the margin; flat; or negative. Where the interval is too wide for any of them, it is 'undecided'. Effects of
fewer than three methods, or with fewer than three points each, are 'not tested': they speak about these methods, not about
methods. C6 compares two cells, so it needs three methods to pick from, but no points on an axis.

| claim | effect | where | the paper predicts | refuted by |
|---|---|---|---|---|
| C1 | `trend`, data | inconsistent settings | positive | flat, negative, below the margin |
| C2 | `trend`, size | inconsistent settings | positive | flat, negative, below the margin |
| C3 | `trend`, data | consistent settings | flat | positive, negative |
| C4 | `departure` | consistent settings | positive | flat, negative |
| C4 | `departure` | inconsistent settings | not positive | positive |
| C4 difference | `contrast` of `departure` | tasks that have both | positive | flat, negative |
| C5 | `layers_less` | each setting, prefix and prompt apart | positive | flat, negative |
| C6 | `best_less_full` | each setting and number of images | positive (it "can") | negative |
| C7 | `contrast` of `trend`, data and size | tasks that have both | positive | flat, negative |
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jaxpeft.study import intervals

LAYER, EMBEDDING = ("serial_adapter", "parallel_adapter", "lora"), ("prompt", "prefix")
PEFT = (*LAYER, *EMBEDDING)  # the paper's five
LEAST = 3  # methods, points of each, for an effect to be tested
EQUAL = 1.25  # stored parameters of cells of equal size differ by this factor at most
# In points; a departure is measured in standard deviations of a cell's score over seeds.
MARGINS = {"data": 2.0, "size": 2.0, "method": 2.0, "departure": 2.0}
# In nats per token, for judging likelihoods: .01 is 1 % of the probability of a token.
MARGINS_NLL = {"data": 0.01, "size": 0.01, "method": 0.01, "departure": 2.0}


@dataclasses.dataclass(frozen=True)
class Result:
    """A cell's run with one seed, at the learning rate that validation chose: its place in the grid and its scores."""

    setting: str
    task: str
    variant: str
    method: str
    head: str
    size: int
    n_images: int
    stored: int
    seed: int
    score: float  # main metric on test images
    validation: float  # what learning rates are chosen by, the higher the better: in the study's measure
    test_nll: float = float("nan")  # nats per token of the references of test images

    @property
    def cell(self) -> tuple[str, int, int]:
        return self.variant, self.size, self.n_images


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a setting declares, and where its scores begin and end."""

    setting: str
    task: str
    consistent: bool | None  # with pre-training, in task, style and data; None: the config does not say
    blind: float  # the best guess without the image
    ceiling: float
    declared: bool = False  # the ceiling; else it is the best mean score of the study

    def points(self, score: float) -> float:
        """A score as points."""
        return 100 * (score - self.blind) / (self.ceiling - self.blind)


@dataclasses.dataclass(frozen=True)
class Effect:
    """One number per seed, and what it was computed from. `missing` says why it does not count as tested ('' if it does)."""

    values: np.ndarray  # (seeds,)
    methods: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    noise: float = 0.0  # standard deviation over seeds of the score of a cell
    missing: str = ""
    seeds: tuple[int, ...] = ()  # that its cells have in common; `departure` has no value for the first of them


NONE = np.zeros(0)
NO_SEED = "the cells have no seed in common"
Cells = dict[tuple[str, int, int], dict[int, Result]]


def cells(results: Iterable[Result]) -> Cells:
    """cell -> seed -> result, in the order of variants, sizes and numbers of images."""
    found = collections.defaultdict(dict)
    for one in sorted(results, key=lambda one: (one.cell, one.seed)):
        found[one.cell][one.seed] = one
    return dict(found)


def shared(by_cell: Cells, wanted: Sequence[tuple]) -> list[int]:
    """The seeds that all of some cells have."""
    return sorted(set.intersection(*(set(by_cell[cell]) for cell in wanted))) if wanted else []


def scores(by_cell: Cells, wanted: Sequence[tuple], seeds: Sequence[int] | None = None) -> np.ndarray:
    """(cells, seeds): the scores of some cells, for `seeds`, or for those that all of them have."""
    seeds = shared(by_cell, wanted) if seeds is None else seeds
    return np.array([[by_cell[cell][seed].score for seed in seeds] for cell in wanted])


def middle_size(sizes: Sequence[int]) -> int:
    """The size of a variant's data axis: that with the most numbers of images, the smallest of several."""
    return min(set(sizes), key=lambda size: (-sizes.count(size), size))


def on_axis(cells: Iterable[tuple], axis: str) -> dict[str, list[tuple]]:
    """variant -> its cells (variant, size, n_images) along 'data', at its middle size, or along 'size', with all its images."""
    found, by_variant = {}, collections.defaultdict(list)
    for cell in cells:
        by_variant[cell[0]].append(cell)
    for variant, mine in by_variant.items():
        if axis == "data":
            middle = middle_size([size for _, size, _ in mine])
            mine = [cell for cell in mine if cell[1] == middle]
        else:
            most = max(n for _, _, n in mine)
            mine = [cell for cell in mine if cell[2] == most]
        found[variant] = sorted(mine)
    return found


def lines(by_cell: Cells, axis: str) -> dict[str, list[tuple]]:
    """variant -> its cells along 'data' (at its middle size) or 'size' (with all images), for the paper's five methods.

    Variants with fewer than `LEAST` cells on the axis are left out.
    """
    mine = [cell for cell in by_cell if next(iter(by_cell[cell].values())).method in PEFT]
    return {variant: cells for variant, cells in on_axis(mine, axis).items() if len(cells) >= LEAST}


def trend(results: Sequence[Result], axis: str, over: str = "axis") -> Effect:
    """C1, C2, C3: the change of the score from the lower to the upper end of the axis 'data' or 'size'.

    effect_s = mean over variants v of b_vs d_v, where b_vs is the least-squares slope of seed s's scores per doubling of the
    number of images, or of the method's size (rank, bottleneck, length), and d_v the number of doublings of v's line. With
    over='doubling', d_v is 1. C1 and C2 are refuted by an interval within the margin or below 0, C3 by one outside 0.
    """
    by_cell = cells(results)
    of = lines(by_cell, axis)
    slopes, where = [], {"data": 2, "size": 1}[axis]
    seeds = shared(by_cell, sum(of.values(), []))
    for line in of.values():
        xs = [cell[where] for cell in line]
        b_S = intervals.slope(xs, scores(by_cell, line, seeds))
        slopes.append(b_S * (intervals.doublings(xs) if over == "axis" else 1))
    return _effect(slopes, by_cell, of, axis)


def departure(results: Sequence[Result]) -> Effect:
    """C4: how far scores are from monotonic along the method's size.

    effect_s = mean over variants of score(i) - score(j) of seed s, for all seeds but the first. On the first seed, i, j are the
    two sizes whose difference is the smaller of the largest rise and the largest fall; where it has no rise or no fall, the
    variant counts as 0. So no seed is measured at a pair that its own noise has picked, and noise alone gives 0 on average. The
    margin is a multiple of the seeds' standard deviation. The line names the pairs.
    """
    by_cell = cells(results)
    of = lines(by_cell, "size")
    seeds = shared(by_cell, sum(of.values(), []))
    if not seeds:
        return _effect([], by_cell, of, "size")
    values, pairs = [], []
    for variant, line in of.items():
        score_PS = scores(by_cell, line, seeds)
        if pair := intervals.departure_pair(score_PS[:, 0]):
            i, j = pair
            values.append(score_PS[i, 1:] - score_PS[j, 1:])
            pairs.append(f"{variant} {line[i][1]} less {line[j][1]} at {line[i][2]} images")
        else:
            values.append(np.zeros(score_PS.shape[1] - 1))
            pairs.append(f"{variant}: monotonic on the first seed")
    return dataclasses.replace(_effect(values, by_cell, of, "size"), cells=tuple(pairs))


def layers_less(results: Sequence[Result], rival: str) -> Effect:
    """C5: methods on layers (serial and parallel adapter, LoRA) less `rival` ('prefix' or 'prompt') at equal size.

    effect_s = mean over cells r of the rival of (mean over methods on layers of their score - score(r)). A method's cell has
    the same number of images, the same head and the closest number of stored parameters, at most a factor `EQUAL` apart; cells
    of the rival that lack it for one of the methods are left out. Refuted by an interval below 0 or within the margin.
    """
    by_cell = cells(results)
    about = {cell: next(iter(runs.values())) for cell, runs in by_cell.items()}
    layers = [method for method in LAYER if any(one.method == method for one in about.values())]
    differences = []
    for cell, one in about.items():
        equal = [_closest(about, one, method) for method in layers] if one.method == rival else []
        if equal and all(equal):
            differences.append([cell, *equal])
    used = list(dict.fromkeys(sum(differences, [])))
    if not used:
        return Effect(NONE, missing=f"no cells of {rival} and of methods on layers that are equal in size")
    score_DCS = np.array([scores(by_cell, some, shared(by_cell, used)) for some in differences])
    values = list(score_DCS[:, 1:].mean(axis=1) - score_DCS[:, 0])
    effect = _effect(values, by_cell, _by_variant(used))
    few = _missing((*layers, rival), len(differences), "equal size")
    return dataclasses.replace(effect, missing=effect.missing or few)


def best_less_full(results: Sequence[Result], n_images: int) -> Effect:
    """C6: the best PEFT cell with a tuned head less full fine-tuning, with n_images training images.

    effect_s = score(best) - score(full) of seed s, where best is the cell with the highest mean validation score of the other
    seeds: a seed's luck is in its validation and in its test score, so a cell picked on the same seed would look too good. This
    compares two cells ("can beat"), so it needs three methods to pick from, but no axis. Refuted by an interval below 0.
    """
    by_cell = cells(one for one in results if one.n_images == n_images)
    about = {cell: next(iter(runs.values())) for cell, runs in by_cell.items()}
    full = [cell for cell, one in about.items() if one.method == "full"]
    rivals = [cell for cell, one in about.items() if one.method in PEFT and one.head not in ("none", "")]
    methods = {about[cell].method for cell in rivals}
    if not full or not rivals:
        return Effect(NONE, missing="full fine-tuning, or PEFT with a tuned head, was not run")
    score_CS, seeds = scores(by_cell, [*rivals, *full]), shared(by_cell, [*rivals, *full])
    if not seeds:
        return Effect(NONE, missing=NO_SEED)
    picked = []
    for seed in seeds:
        others = [other for other in seeds if other != seed] or seeds
        mean = [np.mean([by_cell[cell][other].validation for other in others]) for cell in rivals]
        picked.append(int(np.argmax(mean)))
    values = np.array([score_CS[i, s] - score_CS[-1, s] for s, i in enumerate(picked)])
    best = list(dict.fromkeys(rivals[i] for i in picked))
    effect = _effect([values], by_cell, _by_variant([*best, *full]))
    few = f"{len(methods)} of {LEAST} methods to pick from" if len(methods) < LEAST else ""
    return dataclasses.replace(effect, missing=few, seeds=tuple(seeds))


def contrast(results: Sequence[Result], scales: Sequence[Scale], effect: Callable, sign: int = 1) -> Effect:
    """C7, and the difference of C4: an effect in inconsistent settings less that in consistent ones, of the same task.

    effect_s = mean over tasks of (mean over inconsistent settings - mean over consistent settings), with the variants that have
    a line in all of them and the seeds that all of these have; times `sign`. Tasks without both kinds of setting are left out:
    captions against questions would compare tasks, not consistency.
    """
    sides = collections.defaultdict(lambda: {True: [], False: []})
    for scale in scales:
        if scale.consistent is not None:
            sides[scale.task][scale.consistent].append(scale.setting)
    both = {task: side for task, side in sides.items() if side[True] and side[False]}
    if not both:
        return Effect(NONE, missing="no task has both a consistent and an inconsistent setting")
    used = [setting for side in both.values() for setting in (*side[True], *side[False])]
    variants = [{one.variant for one in results if one.setting == setting} for setting in used]
    common = set.intersection(*variants)
    found = {
        setting: effect([one for one in results if one.setting == setting and one.variant in common])
        for setting in used
    }
    if any(not len(one.values) for one in found.values()):
        why = next(one.missing for one in found.values() if not len(one.values)) or "too few seeds"
        return Effect(NONE, missing=f"too little in common to both sides: {why}")
    seeds = set.intersection(*(set(one.seeds) for one in found.values()))
    if not seeds:
        return Effect(NONE, missing="too little in common to both sides: no seed")
    if any(set(one.seeds) != seeds for one in found.values()):
        # computed again and not cut, as `departure` depends on the first seed
        return contrast([one for one in results if one.seed in seeds], scales, effect, sign)

    def mean(settings):
        return np.mean([found[setting].values for setting in settings], axis=0)

    values = np.mean([sign * (mean(side[False]) - mean(side[True])) for side in both.values()], axis=0)
    first = found[used[0]]
    return Effect(
        values,
        tuple(dict.fromkeys(method for one in found.values() for method in one.methods)),
        tuple(f"{setting}: {cell}" for setting in used for cell in found[setting].cells),
        max(one.noise for one in found.values()),
        next((one.missing for one in found.values() if one.missing), ""),
        first.seeds,
    )


def selection(results: Sequence[Result]) -> intervals.Estimate | None:
    """A check, not a claim: does seed 0, on which learning rates are chosen, score higher than the others on test images?

    The estimate is over groups of cells with the same setting and number of images, as their subset is the same: the mean of
    (score of seed 0 - mean score of the others) / the seeds' standard deviation in the group. It is about 0, unless rates were
    chosen on the scored images, or the luck of a run is in both of its scores. None with fewer than three seeds or groups.
    """
    groups = collections.defaultdict(list)
    for setting in dict.fromkeys(one.setting for one in results):
        for (_, _, n_images), runs in cells([one for one in results if one.setting == setting]).items():
            if 0 in runs and len(runs) > 2:
                groups[setting, n_images].append([runs[seed].score for seed in sorted(runs)])
    found = []
    for rows in groups.values():
        n = min(map(len, rows))
        score_CS = np.array([row[:n] for row in rows])
        if noise := intervals.seed_sd(score_CS):
            found.append((score_CS[:, 0] - score_CS[:, 1:].mean(axis=1)).mean() / noise)
    return intervals.t_interval(found) if len(found) >= LEAST else None


def _closest(about: Mapping, one: Result, method: str) -> tuple | None:
    """The cell of a method that is equal in size to that of `one`."""
    alike = [
        (max(other.stored, one.stored) / min(other.stored, one.stored), cell) for cell, other in about.items()
        if other.method == method and other.n_images == one.n_images and other.head == one.head
    ]  # fmt: skip
    ratio, cell = min(alike, default=(np.inf, None))
    return cell if ratio <= EQUAL else None


def _by_variant(used: Sequence[tuple]) -> dict[str, list[tuple]]:
    return {variant: [cell for cell in used if cell[0] == variant] for variant in dict.fromkeys(c[0] for c in used)}


def _effect(values: list, by_cell: Cells, of: dict[str, list[tuple]], axis: str = "") -> Effect:
    """The mean over `values` as an effect of the cells in `of` (variant -> cells)."""
    methods = tuple(dict.fromkeys(next(iter(by_cell[line[0]].values())).method for line in of.values()))
    everything = [cell for line in of.values() for cell in line]
    seeds = tuple(shared(by_cell, everything))
    noise = intervals.seed_sd(scores(by_cell, everything)) if len(seeds) > 1 else 0.0
    points = LEAST if of else 0  # lines with fewer are not in `of`
    missing = _missing(methods, points, f"the {axis} axis") if axis else ""
    if everything and not seeds:
        missing = NO_SEED
    return Effect(np.mean(values, axis=0) if values else NONE, methods, named(of), noise, missing, seeds)


def _missing(methods: Sequence[str], points: int, where: str) -> str:
    """Why an effect does not count as tested, or ''."""
    if len(methods) >= LEAST and points >= LEAST:
        return ""
    needed = f"a test needs {LEAST} methods with {LEAST} points each on {where}; here"
    if not methods:
        return f"{needed} no method has them"
    return f"{needed}: {', '.join(methods)}" + (f" with {points}" if points < LEAST else "")


def named(of: Mapping[str, Sequence[tuple]]) -> tuple[str, ...]:
    """Cells in words: 'lora_head 16 at 64, 256, 1024 images', 'lora_head 2, 4 at 1024 images'."""
    found = []
    for variant, line in of.items():
        images, alike = collections.defaultdict(list), collections.defaultdict(list)
        for _, size, n in sorted(line):
            images[size].append(str(n))
        for size, ns in images.items():
            alike[", ".join(ns)].append(str(size))
        for ns, sizes in alike.items():
            found.append(f"{variant}{'' if sizes == ['0'] else ' ' + ', '.join(sizes)} at {ns} images")
    return tuple(found)


@dataclasses.dataclass
class Verdict:
    """The verdict on one claim for one setting (or between settings). Effect, interval and margin are in points."""

    claim: str
    statement: str
    predicts: str
    where: str
    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    margin: float
    verdict: str
    n_seeds: int
    methods: list[str]
    cells: list[str]
    note: str = ""
    survives: bool = False  # differs from 0 also when all lines are looked at together

    @property
    def estimate(self) -> intervals.Estimate | float | None:
        """The effect with its interval; the effect alone where there are too few seeds for one."""
        return self.effect if self.low is None else intervals.Estimate(self.effect, self.low, self.high, self.p)


def in_points(results: Sequence[Result], scales: Sequence[Scale]) -> list[Result]:
    """The results with their scores in points; without those of settings that have no scale."""
    by_name = {scale.setting: scale for scale in scales}
    return [
        dataclasses.replace(
            one,
            score=by_name[one.setting].points(one.score),
            validation=by_name[one.setting].points(one.validation),
        )
        for one in results
        if one.setting in by_name
    ]


def in_nats(results: Sequence[Result], scales: Sequence[Scale]) -> tuple[list[Result], list[Scale]]:
    """Results and scales for judging likelihoods: scores are less nats per token, and so are effects and margins
    (`MARGINS_NLL`)."""
    return [dataclasses.replace(one, score=-one.test_nll) for one in results], [
        dataclasses.replace(one, blind=0.0, ceiling=100.0, declared=True) for one in scales
    ]


def interactions(results: Sequence[Result], scales: Sequence[Scale]) -> dict[tuple[str, str], intervals.Estimate]:
    """(axis, variant) -> how much more the axis matters where settings are inconsistent; variant 'all' is their mean.

    In a crossed study (configs/studies/crossed.py) with tasks a, b and bases C, Q this is, for the axis 'data',

        D_data = 1/2 [(trend(a|Q) - trend(a|C)) + (trend(b|C) - trend(b|Q))]

    where a is consistent with C and b with Q: `contrast` of `trend`, over seeds, which are bases. The interval of one variant
    is an estimate, no verdict: a claim needs `LEAST` methods.
    """
    results, found = in_points(results, scales), {}
    names = list(dict.fromkeys(one.variant for one in results if one.method in PEFT))
    for axis in ("data", "size"):
        for name in ("all", *names):
            some = [one for one in results if name in ("all", one.variant)]
            effect = contrast(some, scales, lambda part, axis=axis: trend(part, axis))
            if len(effect.values) > 1:
                found[axis, name] = intervals.t_interval(effect.values)
    return found


def line(claim: str, statement: str, predicts: str, where: str, effect: Effect, margin: float) -> Verdict:
    """The line of a claim in the report: the interval of its effect and the verdict."""
    about = (len(effect.values), list(effect.methods), list(effect.cells))
    if len(effect.values) < 2:
        note = effect.missing or "too few seeds for an interval"
        value = float(effect.values[0]) if len(effect.values) else None
        return Verdict(
            claim, statement, predicts, where, value, None, None, None, margin, intervals.NOT_TESTED, *about, note
        )
    found = intervals.t_interval(effect.values)
    word = intervals.NOT_TESTED if effect.missing else intervals.verdict(found.low, found.high, margin)
    numbers = (found.value, found.low, found.high, found.p)
    return Verdict(claim, statement, predicts, where, *numbers, margin, word, *about, effect.missing)


def check(config) -> None:
    """Raise ValueError for a study's margins, or a setting's `consistent` and `ceiling`, that claims cannot be judged by."""
    for key, default, unit in (("margins", MARGINS, "points"), ("margins_nll", MARGINS_NLL, "nats per token")):
        margins = dict(config.get(key, default))
        if margins.keys() != default.keys():
            raise ValueError(
                f"config.{key} has {', '.join(sorted(margins))}; it must have {', '.join(sorted(default))}"
            )
        for name, value in margins.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"config.{key}.{name} is {value!r}; it must be a number above 0, in {unit}")
    for name, setting in config.settings.items():
        if not isinstance(consistent := setting.get("consistent", True), bool):
            raise ValueError(f"config.settings.{name}.consistent is {consistent!r}; it must be True or False")
        ceiling = setting.get("ceiling", 1.0)
        if isinstance(ceiling, bool) or not isinstance(ceiling, int | float) or not ceiling > 0:
            raise ValueError(
                f"config.settings.{name}.ceiling is {ceiling!r}; it must be a score of the main metric above 0"
            )


def judge(results: Sequence[Result], scales: Sequence[Scale], margins: Mapping[str, float] = MARGINS) -> list[Verdict]:
    """The verdicts on all claims, sorted by claim, for the settings that declare whether they are consistent."""
    results, found = in_points(results, scales), []
    for scale in scales:
        mine = [one for one in results if one.setting == scale.setting]
        if scale.consistent is not None and mine:
            found += _of_setting(mine, scale, margins)
    if found:
        found += _between(results, scales, margins)
    tested = [one for one in found if one.verdict != intervals.NOT_TESTED]
    for one, survives in zip(tested, intervals.surviving([one.p for one in tested]), strict=True):
        one.survives = survives
    return sorted(found, key=lambda one: one.claim)


def _of_setting(results: Sequence[Result], scale: Scale, margins: Mapping[str, float]) -> list[Verdict]:
    where, data, hump = scale.setting, trend(results, "data"), departure(results)
    noise = margins["departure"] * hump.noise
    if scale.consistent:
        found = [
            line("C3", "consistent: the number of images does not matter", "flat", where, data, margins["data"]),
            line("C4", "consistent: the effect of size is not monotonic", "positive", where, hump, noise),
        ]
    else:
        size = trend(results, "size")
        found = [
            line("C1", "inconsistent: more images help", "positive", where, data, margins["data"]),
            line("C2", "inconsistent: more tunable parameters help", "positive", where, size, margins["size"]),
            line("C4", "inconsistent: the effect of size is monotonic", "not positive", where, hump, noise),
        ]
    for rival in ("prefix", "prompt"):
        effect = layers_less(results, rival)
        statement = f"methods on layers beat {rival} at equal size"
        found.append(line("C5", statement, "positive", where, effect, margins["method"]))
    for n in sorted({one.n_images for one in results if one.method == "full"}):
        statement = f"PEFT with a tuned head can beat full fine-tuning, with {n:,} images"
        found.append(line("C6", statement, "positive", where, best_less_full(results, n), margins["method"]))
    return found


def _between(results: Sequence[Result], scales: Sequence[Scale], margins: Mapping[str, float]) -> list[Verdict]:
    where, found = "inconsistent less consistent settings of a task", []
    for axis, words in (("data", "the number of images"), ("size", "tunable size")):
        effect = contrast(results, scales, lambda some, axis=axis: trend(some, axis))
        statement = f"{words} matters more where a setting is inconsistent"
        found.append(line(f"C7 {axis}", statement, "positive", where, effect, margins[axis]))
    effect = contrast(results, scales, departure, sign=-1)
    statement = "the effect of size is further from monotonic where a setting is consistent"
    where = "consistent less inconsistent settings of a task"
    margin = margins["departure"] * effect.noise
    return [*found, line("C4 difference", statement, "positive", where, effect, margin)]
