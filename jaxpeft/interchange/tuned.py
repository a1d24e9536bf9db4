"""Our own format for a tuned tree of any method: manifest.json and tuned.safetensors.

The manifest holds the methods with their fields, the digest of the frozen base leaves, every target and a digest per leaf.
The metadata of the weights file hold a digest of the manifest, so that a changed alpha is detected.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.adapt import sites
from jaxpeft.methods import Gated, Method, Scoped
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime import files, host, renamed
from jaxpeft.runtime.registry import Unknown
from jaxpeft.tree import Tree

MANIFEST, TUNED = "manifest.json", "tuned.safetensors"
Beside = dict[str, Callable[[Path], None]]


def to_json(method: Method) -> dict:
    """A method as JSON: its name and fields; `Scoped` and `Gated` hold their inner method."""
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    if isinstance(method, Scoped | Gated):
        fields["method"] = to_json(method.method)
    return {"name": type(method).__name__} | fields


def from_json(value: dict) -> Method:
    """The inverse of `to_json`. Raises ValueError for an unknown name or field."""
    known = {one.__name__: one for one in _subclasses(Method)}
    fields = {renamed.FIELDS.get(key, key): x for key, x in value.items()}
    cls = known.get(fields.pop("name", None))
    if cls is None:
        raise Unknown(f"unknown method {value.get('name')!r} in a manifest; known methods: {', '.join(sorted(known))}")
    unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} in a manifest has unknown fields {sorted(unknown)}")
    if isinstance(fields.get("method"), dict):
        fields["method"] = from_json(fields["method"])
    return cls(**fields)


def _subclasses(cls: type) -> Iterator[type]:
    """All subclasses of `cls`, users' own included; of several with one name the last counts."""
    for one in cls.__subclasses__():
        yield one
        yield from _subclasses(one)


def frozen_digest(variables: Tree, methods: Iterable[Method]) -> str:
    """The digest of the base leaves that the methods keep frozen, which identifies the base of a tuned tree."""
    many = tuple(methods)
    flat = tree.flatten(variables["params"])
    return tree.digest({n: x for n, x in flat.items() if not any(one.trains(f"params/{n}") for one in many)})


def sha(value: object) -> str:
    """A short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def save_tuned(model: VisionLanguageModel, variables: Tree, directory: str | Path) -> Path:
    """Write adapter parameters (a prefix's MLP folded into its prefix) and trained base leaves, float32.

    Raises ValueError if the directory holds other files.
    """
    variables = sites.fold(variables)
    many = sites.methods_of(variables)
    mask = tree.flatten(sites.trainable(variables))
    flat = {name: x for name, x in tree.flatten(variables).items() if mask[name] or name.startswith("peft/")}
    arrays = {name: np.ascontiguousarray(tree.fetch(x), np.float32) for name, x in flat.items()}
    manifest = {
        "format": "jaxpeft tuned tree, 1",
        "methods": [to_json(one) for one in many],
        "frozen_digest": frozen_digest(variables, many),
        "targets": [
            {"path": s.path, "kind": s.kind, "shape": s.shape, "layers": s.layers, "method": one.name}
            for one in many
            for s in sites.sites(model)
            if one.selects(s)
        ],
        "leaves": {name: tree.digest({"": x}) for name, x in arrays.items()},
        "versions": host.versions(),
    }
    metadata = {"jaxpeft": sha([manifest[key] for key in ("methods", "frozen_digest", "leaves")])}
    return write(directory, MANIFEST, manifest, TUNED, arrays, metadata)


def load_tuned(model: VisionLanguageModel, params: Tree, directory: str | Path) -> tuple[Tree, tuple[Method, ...]]:
    """Load what `save_tuned` wrote, bit for bit, on the base that it was trained on -> (variables, methods).

    Raises ValueError if the base is another one, if a leaf is missing, unexpected, damaged or has a wrong shape, and if the
    manifest was changed.
    """
    with files.reading(directory, "is not a tuned tree of jaxpeft"):
        return _load_tuned(model, params, Path(directory))


def _load_tuned(model, params, directory: str | Path):
    manifest, arrays, metadata = read(directory, MANIFEST, TUNED)
    said = sha([manifest.get(key) for key in ("methods", "frozen_digest", "leaves")])
    if metadata.get("jaxpeft") != said:
        raise ValueError(
            f"{directory / MANIFEST} was changed after it was written (its digest differs from that in {TUNED}); restore it"
        )
    many = tuple(from_json(one) for one in manifest["methods"])
    variables = jax.eval_shape(lambda: sites.attach(model, params, many, jax.random.key(0)))
    many = sites.methods_of(variables)
    mask = tree.flatten(sites.trainable(variables))
    flat = {name: x for name, x in tree.flatten(variables).items() if mask[name] or name.startswith("peft/")}
    tree.check_same(flat, arrays, str(directory / TUNED))
    bad = [name for name, x in arrays.items() if tree.digest({"": x}) != manifest["leaves"].get(name)]
    if bad:
        raise ValueError(f"{directory / TUNED}: {len(bad)} leaves differ from what was saved: {', '.join(bad[:5])}")
    base = {f"params/{name}": x for name, x in tree.flatten(params).items()}
    variables = tree.unflatten(variables, base | {name: jnp.asarray(x) for name, x in arrays.items()})
    check_base(variables, many, manifest["frozen_digest"], directory)
    return variables, many


def check_base(variables: Tree, methods: Iterable[Method], digest: str, directory: str | Path) -> None:
    """Raise ValueError if the frozen part of the base has another digest."""
    here = frozen_digest(variables, methods)
    if digest != here:
        raise ValueError(f"{directory} was tuned on another base: its frozen part has digest {digest}, not {here}")


def write(
    directory: str | Path,
    config_name: str,
    config: dict[str, Any],
    weights_name: str,
    arrays: dict[str, np.ndarray],
    metadata: dict[str, str],
    beside: Beside | None = None,
) -> Path:
    """Write a JSON and a safetensors file atomically into a new directory, or over one that holds only such a pair.

    `beside`: name of another file or directory -> a function that writes it at a path.
    """
    beside = beside or {}
    # f".{weights_name}" may be left from a killed process of version 0.1
    with files.whole_directory(directory, (config_name, weights_name, f".{weights_name}", *beside)) as new:
        files.write_tensors(new / weights_name, arrays, metadata)
        files.write_text(new / config_name, json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name, write_one in beside.items():
            write_one(new / name)
    return Path(directory)


def read(
    directory: Path, config_name: str, weights_name: str
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """(JSON object, arrays, metadata) of a pair of files; raises ValueError naming the file if one cannot be read."""
    for name in (config_name, weights_name):
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing")
    return files.read_json(directory / config_name), *files.read_safetensors(directory / weights_name)
