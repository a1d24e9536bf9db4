"""Verdicts on made-up results of which the truth is known: each is reached when it should be, and not otherwise."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from configs.studies import tiny
from jaxpeft.study import claims, grid, intervals
from jaxpeft.study.claims import MARGINS, Result, Scale

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import claims_simulation  # noqa: E402
import rejudge  # noqa: E402

SIZES, N_IMAGES = (2, 4, 8, 16, 32), (64, 256, 1024, 4096, 16384)
METHODS = ("lora", "parallel_adapter", "serial_adapter", "prefix", "prompt")


def results(score, setting="questions", task="vqa", methods=METHODS, seeds=3, noise=0.001, seed=0):
    """Runs on both axes whose scores scatter around score(method, size, n_images)."""
    rng, out = np.random.default_rng(seed), []
    for method in methods:
        for size in (0,) if method == "full" else SIZES:
            for n in N_IMAGES:
                if size in (0, 8) or n == N_IMAGES[-1]:
                    for s in range(seeds):
                        x = score(method, size, n) + rng.normal(0, noise)
                        head, stored = ("none", 10**6) if method == "full" else ("transform", 1000 * size)
                        variant = method if method == "full" else f"{method}_head"
                        out.append(Result(setting, task, variant, method, head, size, n, stored, s, x, x))
    return out


def scale(setting="questions", task="vqa", consistent=False):
    return Scale(setting, task, consistent, blind=0.0, ceiling=1.0)


def verdict(claim, found, *scales, word=""):
    (one,) = [v for v in claims.judge(found, scales or [scale()]) if v.claim == claim and word in v.statement]
    return one


def by_data(points):
    """A change of the score by this many points from the least to the most data."""
    return lambda method, size, n: 0.5 + points / 100 * np.log2(n / 64) / 8


def by_size(points):
    return lambda method, size, n: 0.5 + points / 100 * np.log2(max(size, 1) / 2) / 4


# Intervals


def test_the_interval_is_that_of_students_t():
    values = [1.0, 2.5, 4.0]
    found, expected = intervals.t_interval(values), stats.ttest_1samp(values, 0)
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose((found.value, found.low, found.high, found.p), (2.5, low, high, expected.pvalue))
    assert intervals.t_interval([3.0, 3.0]) == intervals.Estimate(3.0, 3.0, 3.0, 0.0)
    assert intervals.t_interval([0.0, 0.0]).p == 1.0
    with pytest.raises(ValueError, match="needs at least 2 seeds, but there is 1"):
        intervals.t_interval([1.0])


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.1, 5.0, "positive"), (2.5, 5.0, "positive"), (0.1, 2.0, "positive"), (0.1, 1.9, "positive, below the margin"),
        (-1.9, 1.9, "flat"), (0.0, 1.9, "flat"), (-2.0, 1.0, "undecided"), (-1.0, 2.0, "undecided"),
        (-9.0, 9.0, "undecided"), (-1.0, -0.1, "negative"), (-9.0, -0.1, "negative"),
    ],
)  # fmt: skip
def test_each_interval_has_its_verdict(low, high, expected):
    assert intervals.verdict(low, high, 2.0) == expected


def test_a_verdict_is_right_whenever_its_interval_holds_the_truth():
    rng = np.random.default_rng(0)
    for low, high in np.sort(rng.uniform(-5, 5, (500, 2))):
        word = intervals.verdict(low, high, 2.0)
        for truth in np.linspace(low, high, 7):
            assert not claims_simulation.false_of(word, truth, 2.0), (word, low, high, truth)


def test_the_pair_that_departs_from_monotonic():
    assert intervals.departure_pair(np.array([1.0, 2.0, 5.0, 9.0])) is None
    assert intervals.departure_pair(np.array([9.0, 2.0, 1.0])) is None
    assert intervals.departure_pair(np.array([1.0, 7.0, 5.0])) == (1, 2)  # a fall of 2, a rise of 6
    assert intervals.departure_pair(np.array([7.0, 1.0, 5.0])) == (2, 1)  # a rise of 4, a fall of 6


def test_what_is_different_from_zero_alone_may_not_be_among_many():
    assert intervals.surviving([0.001, 0.9]) == [True, False]
    assert intervals.surviving([0.04] + [0.9] * 9) == [False] * 10
    assert intervals.surviving([0.04, 0.04]) == [False, False]  # each is .06 under any dependence
    assert intervals.surviving([]) == []


# Claims


@pytest.mark.parametrize("points, expected", [(20, "positive"), (1, "positive, below the margin"), (-20, "negative")])
@pytest.mark.parametrize("claim, score", [("C1", by_data), ("C2", by_size)])
def test_more_helps_or_does_not(claim, score, points, expected):
    one = verdict(claim, results(score(points)))
    assert one.verdict == expected and one.low < points < one.high and one.high - one.low < 2, one


@pytest.mark.parametrize("claim", ["C1", "C2"])
def test_nothing_helps(claim):
    assert verdict(claim, results(by_data(0))).verdict == "flat"
    assert verdict(claim, results(by_data(0), noise=0.2)).verdict == "undecided"


def test_a_line_names_its_methods_and_cells():
    one = verdict("C2", results(by_size(20), methods=METHODS[:3]))
    assert one.methods == ["lora", "parallel_adapter", "serial_adapter"] and one.n_seeds == 3
    assert one.cells[0] == "lora_head 2, 4, 8, 16, 32 at 16384 images" and len(one.cells) == 3
    assert verdict("C1", results(by_size(20))).cells[0] == "lora_head 8 at 64, 256, 1024, 4096, 16384 images"


def test_fewer_than_three_methods_or_points_are_not_a_test():
    one = verdict("C1", results(by_data(20), methods=("lora", "prefix")))
    assert one.verdict == "not tested" and round(one.effect) == 20
    assert one.note == "a test needs 3 methods with 3 points each on the data axis; here: lora, prefix"
    one = verdict("C1", [r for r in results(by_data(20)) if r.n_images in (64, 16384)])
    assert one.verdict == "not tested" and one.note.endswith("here no method has them")
    assert verdict("C2", results(by_size(20), seeds=1)).note == "too few seeds for an interval"


def test_only_seeds_that_every_cell_has_are_used():
    found = results(by_data(20))
    kept = [r for r in found if not (r.variant == "lora_head" and r.n_images == 64 and r.seed == 2)]
    assert verdict("C1", kept).n_seeds == 2 and verdict("C2", kept).n_seeds == 3


def test_claims_follow_what_a_setting_declares():
    """C1 and C2 are about inconsistent settings and C3 about consistent ones, whatever the task; nothing else is judged."""
    for task in ("vqa", "captioning"):
        found = results(by_data(20), task=task)
        assert {v.claim for v in claims.judge(found, [scale(task=task)])} >= {"C1", "C2", "C4"}
        consistent = claims.judge(found, [scale(task=task, consistent=True)])
        assert not {"C1", "C2"} & {v.claim for v in consistent}
        assert verdict("C3", found, scale(task=task, consistent=True)).verdict == "positive"
    assert verdict("C3", results(by_data(0)), scale(consistent=True)).verdict == "flat"
    assert claims.judge(found, [scale(consistent=None)]) == []


def hump(points):
    shape = dict(zip(SIZES, (0, 0.5, 1, 0.5, 0), strict=True))
    return lambda method, size, n: 0.5 + points / 100 * shape.get(size, 0)


@pytest.mark.parametrize("consistent", [True, False])
def test_a_hump_is_not_monotonic_and_a_ramp_is(consistent):
    one = verdict("C4", results(hump(20)), scale(consistent=consistent))
    assert one.verdict == "positive"
    assert one.cells[0] in ("lora_head 8 less 2 at 16384 images", "lora_head 8 less 32 at 16384 images")
    assert one.n_seeds == 2  # the first seed picks the sizes
    ramp = verdict("C4", results(by_size(20)), scale(consistent=consistent))
    assert ramp.verdict == "flat" and ramp.effect == 0 and ramp.cells[0] == "lora_head: monotonic on the first seed"


def test_the_margin_of_a_hump_is_the_noise_of_the_seeds():
    one = verdict("C4", results(hump(20), noise=0.01, seeds=40), scale())
    assert abs(one.margin - MARGINS["departure"] * 1.0) < 0.1  # a standard deviation of .01 is a point


def test_noise_alone_makes_no_hump():
    found = [claims.departure(results(by_size(0), noise=0.01, seed=s)).values for s in range(60)]
    assert abs(np.mean(found)) < 0.0015  # picked and measured on the same seed: .01


def layers(gap, prompt=0.0):
    return lambda method, size, n: 0.5 + gap / 100 * (method in claims.LAYER) + prompt / 100 * (method == "prompt")


@pytest.mark.parametrize("gap, expected", [(10, "positive"), (-10, "negative"), (0, "flat")])
def test_methods_on_layers_against_prefix(gap, expected):
    one = verdict("C5", results(layers(gap, prompt=-30)), word="prefix")
    assert one.verdict == expected and abs(one.effect - gap) < 1  # prompt tuning is far behind, and apart
    assert abs(verdict("C5", results(layers(gap, prompt=-30)), word="prompt").effect - gap - 30) < 1


def test_only_cells_of_equal_size_are_compared():
    """A prompt of an eighth of the parameters, whose score depends on size alone."""
    small = [dataclasses.replace(r, stored=r.stored // 8) if r.method == "prompt" else r for r in results(by_size(20))]
    one = verdict("C5", small, word="prompt")
    assert one.verdict == "not tested" and "with 2" in one.note  # sizes 16 and 32 meet 2 and 4
    alike = verdict("C5", results(by_size(20)), word="prompt")
    assert alike.verdict == "flat"
    apart = [dataclasses.replace(r, head="none") if r.method == "prompt" else r for r in results(by_size(20))]
    assert verdict("C5", apart, word="prompt").effect is None  # the others train the head as well


@pytest.mark.parametrize("full, expected", [(0.5, "positive"), (0.9, "negative")])
def test_the_best_peft_is_picked_on_validation_and_compared_with_full(full, expected):
    def score(method, size, n):
        return full if method == "full" else 0.6 + 0.1 * (size == 16)

    one = verdict("C6", results(score, methods=(*METHODS, "full")), word="16,384 images")
    assert one.verdict == expected and abs(one.effect - 100 * (0.7 - full)) < 1
    assert one.cells[-1] == "full at 16384 images" and " 16 at 16384 images" in one.cells[0]
    two = verdict("C6", results(score, methods=("lora", "prefix", "full")), word="16,384 images")
    assert two.verdict == "not tested" and two.note == "2 of 3 methods to pick from"
    assert not [v for v in claims.judge(results(score), [scale()]) if v.claim == "C6"]


def test_the_luck_of_a_run_does_not_pick_the_best():
    """25 equal cells, whose test scores equal their validation scores: the best of a seed is lucky on both."""
    found = [
        claims.best_less_full(results(lambda *_: 0.5, methods=(*METHODS, "full"), noise=0.01, seed=s), 16384).values
        for s in range(60)
    ]
    assert abs(np.mean(found)) < 0.003  # picked on all seeds: .01


def sides(inconsistent, consistent, tasks=("captioning",), **more):
    found, scales = [], []
    for i, task in enumerate(tasks):
        for name, score, yes in (("new", inconsistent, False), ("known", consistent, True)):
            found += results(score, f"{task}_{name}", task, seed=2 * i + yes, **more)
            scales.append(scale(f"{task}_{name}", task, yes))
    return found, scales


@pytest.mark.parametrize("first, second, expected", [(20, 0, "positive"), (0, 20, "negative"), (20, 20, "flat")])
def test_the_interaction_compares_settings_of_one_task(first, second, expected):
    found, scales = sides(by_data(first), by_data(second), ("captioning", "vqa"))
    one = verdict("C7 data", found, *scales)
    assert one.verdict == expected and abs(one.effect - (first - second)) < 1
    assert verdict("C7 size", found, *scales).verdict == "flat"


def test_captions_against_questions_is_no_test_of_consistency():
    found = results(by_data(20)) + results(by_data(0), "captions", "captioning")
    one = verdict("C7 data", found, scale(), scale("captions", "captioning", True))
    assert one.verdict == "not tested" and one.note == "no task has both a consistent and an inconsistent setting"


def test_an_interaction_takes_the_methods_that_both_sides_have():
    found, scales = sides(by_data(20), by_data(0))
    one = verdict("C7 data", [r for r in found if r.method == "lora" or "new" in r.setting], *scales)
    assert one.verdict == "not tested" and one.methods == ["lora"] and one.note.endswith("here: lora")


@pytest.mark.parametrize("consistent, expected", [(by_size(-20), "flat"), (hump(20), "positive")])
def test_a_ramp_is_no_closer_to_monotonic_than_another(consistent, expected):
    found, scales = sides(by_size(20), consistent)
    assert verdict("C4 difference", found, *scales).verdict == expected


def failed(found, setting, seed, **cell):
    """The results without a run: that of LoRA's smallest size with all images, or of another cell."""
    cell = {"method": "lora", "size": 2, "n_images": N_IMAGES[-1], **cell}
    lost = [one for one in found if (one.setting, one.seed) == (setting, seed)
            and all(getattr(one, key) == value for key, value in cell.items())]  # fmt: skip
    assert len(lost) == 1
    return [one for one in found if one is not lost[0]]


def seeded(found):
    """The results with a ramp and a hump along the size, which differ between seeds by far more than between settings."""
    at = dict(zip(SIZES, (0, 0.5, 1, 0.5, 0.25), strict=True))
    return [dataclasses.replace(one, score=one.score + (0.1 + 0.2 * one.seed) * at.get(one.size, 0)) for one in found]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("setting", ["captioning_new", "captioning_known"])
@pytest.mark.parametrize("effect", [lambda some: claims.trend(some, "size"), claims.departure])
def test_a_failed_run_leaves_seeds_paired(effect, setting, seed):
    """A contrast of .02 with every seed is .02 with the seeds that are left, whichever they are."""
    found, scales = sides(by_size(2) if effect is not claims.departure else hump(2), by_size(0), seeds=4, noise=0)
    found = failed(seeded(found), setting, seed)
    one = claims.contrast(found, scales, effect)
    np.testing.assert_allclose(one.values, 0.02 * np.ones(2 if effect is claims.departure else 3), atol=1e-12)
    assert one.seeds == tuple(sorted({0, 1, 2, 3} - {seed}))


def test_interactions_are_of_the_seeds_that_all_settings_have():
    found, scales = sides(by_size(2), by_size(0), seeds=4, noise=0)
    found = claims.interactions(failed(seeded(found), "captioning_new", 1), scales)
    for name in ("all", "lora_head"):
        np.testing.assert_allclose([found["size", name].low, found["size", name].high], 2, atol=1e-9)


def test_cells_without_a_common_seed_are_not_tested():
    """With two seeds: one cell lost the first, another the second."""
    found, scales = sides(by_size(20), by_size(0), methods=(*METHODS, "full"), seeds=2)
    for setting in ("captioning_new", "captioning_known"):
        found = failed(failed(found, setting, 0), setting, 1, size=8)
    said = claims.judge(found, scales)
    size = [one for one in said if one.claim in ("C2", "C4", "C5") or "16,384" in one.statement]
    assert len(size) == 9 and all(one.verdict == "not tested" and one.n_seeds == 0 for one in size)
    assert {one.note for one in size} == {"the cells have no seed in common"}
    between = [one.note for one in said if one.claim in ("C7 size", "C4 difference")]
    assert between == 2 * ["too little in common to both sides: the cells have no seed in common"]
    assert [one.n_seeds for one in said if one.claim == "C1"] == [1]  # size 8 is on the axis of data


def test_settings_without_a_common_seed_are_not_compared():
    found, scales = sides(by_size(20), by_size(0), seeds=2)
    found = failed(failed(found, "captioning_new", 0), "captioning_known", 1)
    one = claims.contrast(found, scales, lambda some: claims.trend(some, "size"))
    assert not len(one.values) and one.missing == "too little in common to both sides: no seed"
    assert claims.interactions(found, scales).keys() == {
        ("data", name) for name in ("all", *(f"{method}_head" for method in METHODS))
    } | {("size", f"{method}_head") for method in METHODS[1:]}


def test_points_run_from_blind_to_ceiling():
    one = Scale("x", "vqa", None, blind=0.4, ceiling=0.9)
    assert [round(one.points(x)) for x in (0.4, 0.65, 0.9, 0.3)] == [0, 50, 100, -20]
    found = results(by_data(20))
    wide = verdict("C1", found, dataclasses.replace(scale(), blind=0.25, ceiling=0.75))
    assert abs(wide.effect - 40) < 1


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("settings.vqa_stated.consistent", "yes", r"vqa_stated\.consistent is 'yes'; it must be True or False"),
        ("settings.vqa_stated.ceiling", -1.0, r"vqa_stated\.ceiling is -1\.0; it must be a score .* above 0"),
        ("margins.data", 0.0, r"config\.margins\.data is 0\.0; it must be a number above 0, in points"),
        (
            "margins.datum",
            1.0,
            "config.margins has data, datum, departure, method, size; it must have data, departure,",
        ),
    ],
)
def test_what_claims_cannot_be_judged_by_is_said(key, value, said):
    config = tiny.get_config("small=True")
    section, _, last = key.rpartition(".")
    place = config
    for part in section.split("."):
        place = place[part]
    with place.unlocked(), place.ignore_type():
        place[last] = value
    with pytest.raises(ValueError, match=said):
        grid.check(config)


def test_declarations_are_no_part_of_a_run():
    config = tiny.get_config("small=True")
    config.settings.vqa_stated.ceiling = 1.0
    run = grid.Run(grid.cells(config)[0], 0, 0.003, config)
    assert not {"consistent", "ceiling", "margins"} & set(run.config.keys())


# Studies whose truth is known: benchmarks/claims_simulation.py at full length


@pytest.fixture(scope="module")
def simulated():
    return {effect: claims_simulation.simulate(effect, 3, 60, 1) for effect in (0.0, 2.0)}


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say(simulated):
    for table, _ in simulated.values():
        assert len(table) == 9
        assert np.mean([row["coverage"] for row in table.values()]) > 0.92
        assert all(row["coverage"] > 0.83 and row["wrong"] < 0.17 for row in table.values())  # 60 studies, nine claims


def test_an_effect_of_two_margins_is_found_where_the_noise_allows(simulated):
    power = {claim: row["verdicts"].get("positive", 0) for claim, row in simulated[2.0][0].items()}
    assert power["C5 prefix"] > 0.9 and power["C2"] > 0.7 and power["C1"] > 0.5
    assert power["C3"] < 0.5 and power["C6"] < 0.5  # questions at three seeds


def test_rates_that_were_chosen_on_the_scored_split_are_caught(simulated):
    assert simulated[0.0][1] < 0.12  # nothing planted: 2.5 % of 60
    _, caught = claims_simulation.simulate(0.0, 3, 20, 1, choose="test")
    assert caught > 0.9
    assert claims.selection(results(by_data(0), seeds=2)) is None


def test_the_committed_simulation_is_what_the_page_says():
    kept = json.loads((ROOT / "results/claims_simulation.json").read_text())
    three = [p for p in kept["parts"] if p["seeds"] == 3 and not p["rates_chosen_on"]]
    assert [(p["effect"], p["studies"]) for p in three] == [(e, 1000) for e in claims_simulation.EFFECTS]
    for part in three:
        for claim, row in part["claims"].items():
            nominal = 0.05 if row["truth"] == 0 else 0.025
            assert row["coverage"] >= 0.93 and row["wrong"] <= nominal + 0.02, (part["effect"], claim)
    (planted,) = [p for p in kept["parts"] if p["rates_chosen_on"] == "test"]
    assert planted["selection_found"] > 0.95
    page = (ROOT / "docs/results/claims_simulation.md").read_text()
    assert all(table in page for table in "\n".join(claims_simulation.tables(kept)).split("\n\n"))


def test_scenes_full_judged_again_equals_the_recomputation(tmp_path):
    """To the printed digit, wherever both estimate the same; and the page has the script's table."""
    found = rejudge.study(tmp_path)
    page = (ROOT / "docs/results/which_method.md").read_text()
    rows = rejudge.same_estimand(found.results, found.scales)
    assert len(rows) == 27
    for what, said, values, digits, level in rows:
        assert rejudge.shown(values, digits, level) == said, what
        assert f"| {what} | {said} | {said} |" in page
    for line in rejudge.verdict_rows(found):
        assert line in page
