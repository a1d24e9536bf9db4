"""Our own files of a tuned tree, for any method: manifest.json and tuned.safetensors.

The manifest names methods with their fields, the digest of the base leaves that were left alone, every target and a
digest per leaf; the metadata of the weights file hold a digest of the manifest, so a changed alpha is noticed.
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
    """A method as JSON: its name and fields; 'scoped' and 'gated' hold the method inside."""
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
        raise Unknown(f"unknown method {value.get('name')!r} in a manifest; known: {', '.join(sorted(known))}")
    unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} in a manifest has unknown fields {sorted(unknown)}")
    if isinstance(fields.get("method"), dict):
        fields["method"] = from_json(fields["method"])
    return cls(**fields)


def _subclasses(cls: type) -> Iterator[type]:
    """Every class made from `cls`, one's own too, whoever imported it; of one name the last counts."""
    for one in cls.__subclasses__():
        yield one
        yield from _subclasses(one)


def frozen_digest(variables: Tree, methods: Iterable[Method]) -> str:
    """The digest of the base leaves that the methods leave alone: what a tuned tree must be put on again."""
    many = tuple(methods)
    flat = tree.flatten(variables["params"])
    return tree.digest({n: x for n, x in flat.items() if not any(one.trains(f"params/{n}") for one in many)})


def sha(value: object) -> str:
    """A short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def save_tuned(model: VisionLanguageModel, variables: Tree, directory: str | Path) -> Path:
    """Write what tuning made: own leaves (a prefix's MLP folded into its prefix) and trained base leaves, float32.

    Refuses to write into a directory that holds something else.
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
    """(variables, methods) of what `save_tuned` wrote, on the base it was tuned on; bit for bit what was saved.

    Raises ValueError when the base is another one, when a leaf is missing, extra, misshaped or damaged, and when the
    manifest is not the one that was written.
    """
    with files.reading(directory, "holds no tuned tree of ours"):
        return _load_tuned(model, params, Path(directory))


def _load_tuned(model, params, directory: str | Path):
    manifest, arrays, metadata = read(directory, MANIFEST, TUNED)
    said = sha([manifest.get(key) for key in ("methods", "frozen_digest", "leaves")])
    if metadata.get("jaxpeft") != said:
        raise ValueError(
            f"{directory / MANIFEST} was changed after it was written ({TUNED} knows another one); restore it"
        )
    many = tuple(from_json(one) for one in manifest["methods"])
    variables = jax.eval_shape(lambda: sites.attach(model, params, many, jax.random.key(0)))
    many = sites.methods_of(variables)
    mask = tree.flatten(sites.trainable(variables))
    flat = {name: x for name, x in tree.flatten(variables).items() if mask[name] or name.startswith("peft/")}
    tree.check_same(flat, arrays, str(directory / TUNED))
    bad = [name for name, x in arrays.items() if tree.digest({"": x}) != manifest["leaves"].get(name)]
    if bad:
        raise ValueError(f"{directory / TUNED}: {len(bad)} leaves are not what was saved: {', '.join(bad[:5])}")
    base = {f"params/{name}": x for name, x in tree.flatten(params).items()}
    variables = tree.unflatten(variables, base | {name: jnp.asarray(x) for name, x in arrays.items()})
    check_base(variables, many, manifest["frozen_digest"], directory)
    return variables, many


def check_base(variables: Tree, methods: Iterable[Method], digest: str, directory: str | Path) -> None:
    """Raise ValueError when the frozen part of the base is not the one that was tuned on."""
    here = frozen_digest(variables, methods)
    if digest != here:
        raise ValueError(f"{directory} was tuned on another base: its frozen part has digest {digest}, this one {here}")


def write(
    directory: str | Path,
    config_name: str,
    config: dict[str, Any],
    weights_name: str,
    arrays: dict[str, np.ndarray],
    metadata: dict[str, str],
    beside: Beside | None = None,
) -> Path:
    """Write a JSON and a safetensors file into a new directory, or one that holds only such a pair, both or neither.

    `beside`: file or directory -> a function that writes it at a path, as part of the whole.
    """
    beside = beside or {}
    # the last name: what version 0.1 left where it was killed
    with files.whole_directory(directory, (config_name, weights_name, f".{weights_name}", *beside)) as new:
        files.write_tensors(new / weights_name, arrays, metadata)
        files.write_text(new / config_name, json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name, write_one in beside.items():
            write_one(new / name)
    return Path(directory)


def read(
    directory: Path, config_name: str, weights_name: str
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """(JSON object, arrays, metadata) of a pair of files; ValueError naming the file for what cannot be read."""
    for name in (config_name, weights_name):
        if not (directory / name).is_file():
            raise ValueError(f"{directory / name} is missing")
    return files.read_json(directory / config_name), *files.read_safetensors(directory / weights_name)
