"""Axes of a study beside method, size and number of images: any keys of a run's config.

`config.axes` holds them, nested as in a run's config: `axes.optim.weight_decay = (0.0, 0.05)`. Every variant is crossed with
every combination of their values. The values are part of the variant's name, as in 'weight_decay=0.05-lora_head', and so of the
ids of its runs, of their rows and of every table of the report. In results.jsonl a row has them as `axes` too.

A variant may also set keys itself, nested in its `config`.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from jaxpeft.runtime.registry import did_you_mean

# what the grid sets in a run's config, and the keys of a study that say it
OF_GRID = {
    "task": "settings", "base": "settings", "name": "settings", "seed": "seeds", "data.subset_seed": "seeds",
    "size": "variants.NAME.sizes", "head": "variants.NAME.head", "data.n_images": "n_images", "optim.lr": "learning_rates",
}  # fmt: skip


def flat(nested: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots between them: {'optim.lr': ...}."""
    found = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return found


def variants(config) -> Mapping[str, Mapping]:
    """The study's variants by name: with axes, one for each combination of their values, which is in its `axes`."""
    axes = flat(config.get("axes", {}))
    if not axes:
        return config.variants
    names = [key.rpartition(".")[2] for key in axes]
    short = {key: name if names.count(name) == 1 else key for key, name in zip(axes, names, strict=True)}
    found = {}
    for name, variant in config.variants.items():
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            said = [f"{short[key]}={_text(value)}" for key, value in chosen.items()]
            found["-".join([*said, name])] = dict(variant.items()) | {"axes": chosen}
    return found


def keys(variant: Mapping) -> dict[str, Any]:
    """The config keys that a variant sets, with dots: those of its `config`, then the values of the axes."""
    return flat(variant.get("config", {})) | dict(variant.get("axes", {}))


def _text(value: Any) -> str:
    """A value as a part of a file name: 0.05, web, color+shape."""
    if isinstance(value, list | tuple):
        return "+".join(map(_text, value)) or "none"
    return re.sub(r"[^\w.+-]", "_", f"{value:g}" if isinstance(value, float) else str(value))


def check(config) -> None:
    """Raise ValueError for a key of an axis or of a variant's `config` that a run's config lacks, or that the grid sets, and
    for values that it cannot take or that have the same name."""
    axes = flat(config.get("axes", {}))
    for key, values in axes.items():
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"config.axes.{key} is {values!r}; it must be a tuple of values")
        if len(set(map(_text, values))) < len(values):
            raise ValueError(f"config.axes.{key} is {values!r}; two of its values have the same name")
        for value in values:
            check_key(config, "axes", key, value)
    for name, variant in config.variants.items():
        for key, value in flat(variant.get("config", {})).items():
            check_key(config, f"variants.{name}.config", key, value)


def check_key(config, where: str, key: str, value: Any) -> None:
    """Raise ValueError where `key` of a run's config does not exist, is set by the grid, or cannot be `value`."""
    if key.startswith("method."):
        raise ValueError(f"config.{where} has {key}; fields of a method are set in config.variants.NAME.fields")
    if key in OF_GRID:
        raise ValueError(f"config.{where} has {key}, which the grid sets; use config.{OF_GRID[key]}")
    for task, point in config.points.items():
        known = flat(point)
        if key not in known:
            raise ValueError(
                f"config.{where} has {key}, but a run's config (points.{task}) has no such key{did_you_mean(key, known)}"
            )
        try:
            point.copy_and_resolve_references().update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config.{where} has {key}={value!r}, which is not of the type of {known[key]!r}"
            ) from error
