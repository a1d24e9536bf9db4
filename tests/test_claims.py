"""Verdicts on made-up results of which the truth is known: each is reached when it should be, and not otherwise."""

import dataclasses

import numpy as np
import pytest

from jaxpeft.metrics import bootstrap
from jaxpeft.study import claims
from jaxpeft.study.claims import Final

SIZES, N_IMAGES = (2, 4, 8, 16, 32), (256, 1024, 4096, 16384)
REPLICATES = 200


def finals(score, task="vqa", setting=None, methods=("lora", "prefix"), n=400, seeds=3, noise=0.3, seed=0):
    """Runs on both axes whose scores scatter around score(method, size, n_images)."""
    rng, out = np.random.default_rng(seed), []
    easy = rng.normal(0, noise, n)  # some examples are easier than others, for every run
    for method in methods:
        sizes = (0,) if method == "full" else SIZES
        for size in sizes:
            for n_images in N_IMAGES:
                if size not in (0, 8) and n_images != N_IMAGES[-1]:
                    continue
                for k in range(seeds):
                    mean = score(method, size, n_images)
                    each = mean + easy + rng.normal(0, 0.01) + rng.normal(0, noise / 2, n)
                    variant = method if method == "full" else f"{method}_head"
                    stored = 1000 * size or 10**6
                    out.append(
                        Final(setting or task, task, variant, method, size, n_images, stored, k, each, True, mean)
                    )  # fmt: skip
    return out


def verdict(claim, found):
    (one,) = [v for v in claims.judge(found, REPLICATES) if v.claim == claim]
    return one


def by_data(per_doubling):
    return lambda method, size, n: 0.6 + per_doubling * np.log2(n / 256)


def by_size(per_doubling):
    return lambda method, size, n: 0.6 + per_doubling * np.log2(max(size, 1) / 2)


@pytest.mark.parametrize(
    "claim, score, noise, expected",
    [
        ("C1", by_data(0.03), 0.3, "supported"),
        ("C1", by_data(0.0), 0.1, "refuted"),
        ("C1", by_data(-0.03), 0.3, "refuted"),
        ("C2", by_size(0.03), 0.3, "supported"),
        ("C2", by_size(0.0), 0.1, "refuted"),
        ("C2", by_size(-0.03), 0.3, "refuted"),
    ],
)
def test_more_helps_or_does_not(claim, score, noise, expected):
    one = verdict(claim, finals(score, noise=noise))
    assert one.verdict == expected, one
    assert one.low <= one.effect <= one.high


def test_a_slope_is_found_with_its_size():
    one = verdict("C1", finals(by_data(0.03), noise=0.1, n=2000))
    assert abs(one.effect - 0.03) < 0.005 and one.high - one.low < 0.02


def test_few_noisy_examples_decide_nothing():
    found = finals(by_data(0.001), n=20, noise=2.0, seeds=1)
    one = verdict("C1", found)
    assert one.verdict == "undecided" and "one seed" in one.note
    assert verdict("C2", found).verdict == "undecided"


@pytest.mark.parametrize(
    "per_doubling, noise, n, expected",
    [(0.0, 0.1, 1000, "supported"), (0.05, 0.1, 1000, "refuted"), (0.0, 3.0, 20, "undecided")],
)
def test_no_change_needs_an_interval_within_the_margin(per_doubling, noise, n, expected):
    one = verdict("C3", finals(by_data(per_doubling), task="captioning", noise=noise, n=n))
    assert one.verdict == expected, one


def hump(method, size, n):
    return 0.6 + 0.15 * (size == 8) - 0.05 * (size == 32)


def test_a_hump_is_not_monotonic_and_a_ramp_is():
    assert verdict("C4", finals(hump, task="captioning", noise=0.1)).verdict == "supported"
    ramp = verdict("C4", finals(by_size(0.05), task="captioning", noise=0.1))
    assert ramp.effect < 0 and ramp.verdict == "refuted"


def test_noise_alone_is_seldom_called_a_hump():
    found = [verdict("C4", finals(by_size(0.0), task="captioning", noise=0.3, n=100, seed=s)) for s in range(30)]
    assert [one.verdict for one in found].count("supported") <= 3  # 2.5 % of 30 is less than one
    assert np.mean([one.effect for one in found]) < 0.002  # pairs picked and measured on the same examples: 0.02


def test_replicates_have_the_variance_of_a_mean_over_few_seeds():
    found = [dataclasses.replace(f, each=np.full(4, float(f.seed))) for f in finals(by_data(0.0), methods=("lora",))]
    table, rng = claims.Table(found), np.random.default_rng(0)
    drawn = np.array([table.means(rng)[0] for _ in range(4000)])
    np.testing.assert_allclose(drawn.std(), 1 / np.sqrt(3), rtol=0.05)  # of 0, 1, 2 with n - 1


@pytest.mark.parametrize("gap, expected", [(0.1, "supported"), (-0.1, "refuted")])
def test_layer_against_embedding_composition(gap, expected):
    def score(method, size, n):
        return 0.5 + gap * (method in claims.LAYER)

    assert verdict("C5", finals(score, methods=("lora", "prompt"))).verdict == expected


@pytest.mark.parametrize("full, expected", [(0.5, "supported"), (0.9, "refuted")])
def test_the_best_peft_is_picked_on_validation_and_compared_with_full(full, expected):
    def score(method, size, n):
        return full if method == "full" else 0.6 + 0.1 * (size == 16)

    one = verdict("C6", finals(score, methods=("lora", "prefix", "full"), noise=0.1))
    assert one.verdict == expected
    assert abs(one.effect - (0.7 - full)) < 0.03


def test_no_full_fine_tuning_no_verdict_on_it():
    one = verdict("C6", finals(by_data(0.0)))
    assert one.verdict == "undecided" and one.effect is None and one.note == "no cells for it"


@pytest.mark.parametrize("vqa, captioning, expected", [(0.03, 0.0, "supported"), (0.0, 0.03, "refuted")])
def test_the_interaction_compares_slopes(vqa, captioning, expected):
    both = finals(by_data(vqa), noise=0.1) + finals(by_data(captioning), task="captioning", noise=0.1, seed=1)
    assert verdict("C7 data", both).verdict == expected


def test_only_seeds_that_every_cell_has_are_used():
    found = finals(by_data(0.03))
    assert verdict("C1", [f for f in found if not (f.variant == "lora_head" and f.seed == 2)]).n_seeds == 2


def test_a_cell_with_a_run_at_the_cap_is_left_out_whole():
    found = finals(by_data(0.03), seeds=2)
    found[0] = dataclasses.replace(found[0], converged=False)
    kept = claims.converged(found)
    assert len(kept) == len(found) - 2 and verdict("C1", kept).n_seeds == 2


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Coverage of the 95 % interval of a slope over 60 made-up studies with many seeds."""
    inside = 0
    for s in range(60):
        table = claims.Table(finals(by_data(0.02), methods=("lora",), n=100, seeds=8, seed=s))
        _, low, high = bootstrap.interval(claims.trend(table, "data", ["lora_head"]), REPLICATES)
        inside += low <= 0.02 <= high
    assert inside >= 50  # 57 are expected; few seeds make percentile intervals a little short
