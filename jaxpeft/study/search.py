"""The search of a cell: what is tried with seed 0, of which the best on validation is trained with all seeds.

By default that is a grid of learning rates: the variant's `lr` times each of `learning_rates`. Two things can be set:

    config.extend = 4      where the best rate is the smallest or the largest that was tried, the next one outwards is tried,
                           by the factor between the last two, until the best lies inside, but at most 4 more in a cell
    config.random = {"draws": 20, "seed": 0, "ranges": {"optim": {"lr": (1 / 9, 9.0, "log"), "weight_decay": (0.0, 0.1)}}}
                           instead of a grid, 20 draws from ranges (low, high), even in the logarithm with 'log'. The range of
                           optim.lr is of factors of the variant's rate. The draws of all cells are equal up to that rate.

`search_steps`, a share of the steps such as 0.25, makes the search shorter than the runs with the chosen values. The chosen
run of the search is then a control of the budget: how much the score gains by the rest of the steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.study import axes

Trials = dict[float, dict[str, Any]]  # learning rate -> the other keys of a run's config that were drawn with it


def middle_rate(variant: Mapping, setting: Mapping, size: int) -> float:
    """The middle learning rate of a cell: the variant's `lr` times the setting's `lr_scale`. With `lr_size`, the variant's `lr`
    is for that size, and falls with the square root of the size."""
    rate = variant["lr"] * setting.get("lr_scale", 1.0)
    return rate * (variant["lr_size"] / size) ** 0.5 if variant.get("lr_size") else rate


def trials(config, middle: float) -> Trials:
    """What a cell with this middle learning rate tries at first. Rates have three digits, and no two are equal."""
    if not config.get("random"):
        return {_rounded(middle * factor): {} for factor in config.learning_rates}
    ranges = axes.flat(config.random.ranges)
    rng, found = np.random.default_rng(config.random.seed), {}
    for _ in range(1000 * config.random.draws):
        values = {key: _drawn(rng, *one) for key, one in ranges.items()}
        found.setdefault(_rounded(middle * values.pop("optim.lr")), values)
        if len(found) == config.random.draws:
            return found
    raise ValueError(f"config.random.ranges.optim.lr is too narrow for {config.random.draws} rates of three digits")


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _drawn(rng: np.random.Generator, low: float, high: float, scale: str = "") -> float | int:
    """A value of a range with three digits, so that it can be read and typed; between integers one of them."""
    if isinstance(low, int) and isinstance(high, int) and not scale:
        return int(rng.integers(low, high + 1))
    value = float(np.exp(rng.uniform(np.log(low), np.log(high))) if scale else rng.uniform(low, high))
    return _rounded(value)


def beyond(tried: list[float], best: float) -> float | None:
    """The next rate outwards where `best` is the smallest or the largest of the rates; None where it lies inside."""
    rates = sorted(tried)
    if best == rates[0]:
        return _rounded(rates[0] * rates[0] / rates[1])
    return _rounded(rates[-1] * rates[-1] / rates[-2]) if best == rates[-1] else None


def budget_gains(rows: list[dict], searched: list[dict]) -> dict[str, float]:
    """Id of a run with seed 0 -> by how many nats per token it is better on validation than its short run in the search.

    `rows`, `searched`: those of results.jsonl and search.jsonl. About 0 where the budget was enough: the control that replaces
    a rule for convergence.
    """
    short = {row["id"].removesuffix("-search"): row for row in searched if row["status"] == "done"}
    return {
        row["id"]: short[row["id"]]["validation"]["kept"] - row["validation"]["kept"]
        for row in rows if row["id"] in short and row["status"] == "done"
    }  # fmt: skip


def check(config) -> None:
    """Raise ValueError for settings of the search that cannot be carried out."""
    extend, share, random = config.get("extend", 0), config.get("search_steps", 1.0), config.get("random")
    if not isinstance(extend, int) or extend < 0:
        raise ValueError(f"config.extend is {extend!r}; it must be the number of rates to add at most, 0 or more")
    if not 0 < share <= 1:
        raise ValueError(f"config.search_steps is {share!r}; it must be a share of the steps, above 0 and at most 1")
    if extend and (random or len(set(config.learning_rates)) < 2):
        raise ValueError(
            "config.extend needs a grid of at least two learning_rates, whose factor it repeats; set extend = 0"
        )
    if random:
        _check_random(config)


def _check_random(config) -> None:
    ranges = axes.flat(config.random.get("ranges", {}))
    if "optim.lr" not in ranges:
        raise ValueError("config.random.ranges must have optim.lr, factors of each variant's rate: (1 / 9, 9.0, 'log')")
    if not config.random.get("draws", 0) > 0:
        raise ValueError(f"config.random.draws is {config.random.get('draws')!r}; it must be a number above 0")
    for key, one in ranges.items():
        if len(one) not in (2, 3) or tuple(one[2:]) not in ((), ("log",)) or not one[0] < one[1]:
            raise ValueError(f"config.random.ranges.{key} is {one!r}; expected (low, high) or (low, high, 'log')")
        if len(one) == 3 and one[0] <= 0:
            raise ValueError(f"config.random.ranges.{key} is {one!r}; with 'log', low must be above 0")
        if key != "optim.lr":
            axes.check_key(config, "random.ranges", key, one[0])
