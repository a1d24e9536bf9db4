"""Load and save base checkpoints: jaxpeft directories, Hugging Face directories, and Hugging Face hub repositories.

A jaxpeft directory has manifest.json (model type and config, digest, origin, held-out scores), model.safetensors (leaves by
name) and vocab.txt. `aliases` in the manifest name subtrees that share another's leaves and are not stored twice.
`model_type` selects the model (`MODELS`), whose converter has everything specific to it.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.adapt import budget
from jaxpeft.inputs.tokenizer import FILES as TOKENIZER_FILES
from jaxpeft.models import convert, downloads
from jaxpeft.models.base import MODELS
from jaxpeft.models.convert import Converter, Dtype, Place, Rule, Table
from jaxpeft.runtime import files, registry, renamed
from jaxpeft.tree import Tree

ASSETS = Path(__file__).parents[1] / "assets"
RUNTIME = ("dtype", "remat", "dropout", "unroll", "attention")  # config fields that a user may set on any checkpoint


def load(
    path: str | Path = "tiny",
    *,
    task: str | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    **runtime: Any,
) -> tuple[Any, Tree]:
    """Load (model, params) of a checkpoint: a shipped one by name ('tiny', 'tiny_mplug', 'tiny_decoder'), a jaxpeft or Hugging
    Face directory, mPLUG's file of weights or directory, or a repository on the Hugging Face hub as 'owner/name' or
    'owner/name@revision'. A directory of that name takes precedence.

    `task`: 'vqa' (of a captioning BLIP, the decoder's layers initialize the question encoder), 'captioning', or None for that
    of the checkpoint. `image_size` resizes the position embedding. `revision`: a commit, branch or tag of a repository, None
    for its default branch; a full commit in the cache is read without a request, and HF_HUB_OFFLINE=1 disables all requests.
    `runtime`: dtype, remat, dropout, unroll, attention.

    Raises ValueError naming file and key for missing or unexpected tensors and wrong shapes; naming the repository if it cannot
    be downloaded; and if `revision` is given with a directory, or differs from the one in `path`.
    """
    model, params, _ = read(path, task=task, image_size=image_size, revision=revision, **runtime)
    return model, params


def read(
    path: str | Path,
    *,
    task: str | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    place: Place = convert.on_device,
    param_dtype: Dtype = "float32",
    **runtime: Any,
) -> tuple[Any, Tree, dict[str, Any]]:
    """`load`, and a report of the origin of each part. For a hub repository `source` is its name and `revision` the full
    commit that was read, with which the same files can be loaded again.

    Leaves are read one at a time, in `param_dtype` (of all, or a function of a leaf's name), and placed by `place`: on the
    first device, or as `sharding.placing` does.
    """
    _check_runtime(runtime)
    directory, downloaded = _located(path, revision)
    kind, manifest = _kind(directory, path)
    if manifest is None:
        config, params, report = kind.read_directory(directory, task, image_size, place, param_dtype)
    else:
        config, params, report = _read_ours(directory, kind, manifest, task, image_size, place, param_dtype)
    model = kind.model(config, directory, report.get("defaults", ()), image_size)
    tree.check_same(shapes(model), tree.flatten(params), f"{directory}: what the converter made")
    return model.replaced(**runtime), params, report | downloaded


def abstract(
    path: str | Path,
    *,
    task: str | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    **runtime: Any,
) -> Any:
    """The model of `load` from manifest.json or config.json alone, for planning: weights may be missing, and those of a
    repository are not downloaded."""
    _check_runtime(runtime)
    directory, _ = _located(path, revision, weights=False)
    kind, manifest = _kind(directory, path)
    if manifest is None:
        config, defaults = kind.read_config(directory, task)
    else:
        config, defaults = kind.for_task(manifest["config"], task, str(directory)), {}
    model = kind.model(kind.resize(config, image_size)[0], directory, defaults, image_size)
    return model.replaced(**runtime)


def is_ours(path: str | Path, revision: str | None = None) -> bool:
    """Whether a checkpoint is in jaxpeft's own format, which transformers does not load."""
    return (_located(path, revision, weights=False)[0] / "manifest.json").exists()


def _check_runtime(runtime: dict[str, Any]) -> None:
    for old in set(runtime) & set(renamed.LOADING):
        raise TypeError(f"load() has no argument {old}: {renamed.LOADING[old]}")
    if unknown := set(runtime) - set(RUNTIME):
        raise ValueError(f"unknown model options {sorted(unknown)}; choose from {', '.join(RUNTIME)}")


def _kind(directory: Path, path: str | Path) -> tuple[Converter, dict[str, Any] | None]:
    """(converter of a directory's model, manifest with its config parsed, or None for a Hugging Face directory).

    Raises ValueError for an unknown model type.
    """
    file = directory / "manifest.json"
    ours = file.exists()
    if not ours and not (file := directory / "config.json").exists():
        for model_type in MODELS:
            if (kind := MODELS[model_type]()).claims(directory):
                return kind, None
        raise _missing(path)
    said = files.read_json(file)
    model_type = said.get("model_type", "blip" if ours else None)  # manifests of 0.1 do not have it; all are BLIP
    try:
        kind = MODELS.find(str(model_type))()
    except registry.Unknown:
        known = ", ".join(sorted(MODELS))
        raise ValueError(f"{file}: model_type {model_type!r} is unsupported; choose one of {known}") from None
    if not ours:
        return kind, None
    with files.reading(file, "is not a jaxpeft manifest"):
        aliases = {str(copy): source + "" for copy, source in said["aliases"].items()}
        known = {"aliases": aliases, "digest": said["digest"] + "", "config": kind.settings(**said["config"])}
        return kind, said | known


def _located(path: str | Path, revision: str | None, *, weights: bool = True) -> tuple[Path, dict[str, str]]:
    """(the checkpoint's directory, additions to its report: source and revision of a repository)."""
    shipped = ASSETS / str(path)
    directory = shipped if (shipped / "manifest.json").exists() else Path(path).expanduser()
    if directory.exists():
        if revision is not None:
            raise ValueError(
                f"revision {revision} was given, but {str(path)!r} is a local checkpoint and has no revisions; leave "
                f"the revision out"
            )
        return directory, {}
    repository = downloads.parse(str(path), revision)
    if repository is None:
        raise _missing(path)
    directory, commit = downloads.fetch(*repository, check=_check_settings, weights=weights)
    return directory, {"source": repository[0], "revision": commit}


def _check_settings(directory: Path) -> None:
    """Raise ValueError unless manifest.json or config.json describes a supported model."""
    if not any((directory / name).exists() for name in downloads.FIRST):
        raise ValueError("config.json is missing; it belongs beside the weights of a Hugging Face checkpoint")
    kind, manifest = _kind(directory, directory)
    if manifest is None:
        kind.read_config(directory, None)


def _missing(path: str | Path) -> ValueError:
    shipped = sorted(p.parent.name for p in ASSETS.glob("*/manifest.json"))
    return ValueError(
        f"no checkpoint at {str(path)!r}: expected a directory with manifest.json (jaxpeft) or config.json (Hugging Face), "
        f"a file of mPLUG's weights (.pth), or one of the shipped names: {', '.join(shipped) or 'none'}; or owner/name or "
        f"owner/name@revision of the Hugging Face hub"
    )


def _read_ours(
    directory: Path,
    kind: Converter,
    manifest: dict[str, Any],
    task: str | None,
    image_size: int | None,
    place: Place,
    dtype: Dtype,
) -> tuple[Any, Tree, dict[str, Any]]:
    """(config, params, report) of a jaxpeft directory, whose tensors have the names of the leaves."""
    config = kind.for_task(manifest["config"], task, str(directory))
    wanted = shapes(kind.model(config))
    whole = wanted if config == manifest["config"] else shapes(kind.model(manifest["config"]))
    tensors = convert.opened(directory, ("model.safetensors",))
    copies = {}
    for copy, source in manifest["aliases"].items():
        copies |= {copy + name[len(source) :]: name for name in whole if name.startswith(source + "/")}
    copies = {copy: name for copy, name in copies.items() if copy in whole and copy not in tensors}
    rules = [Rule(name, (name,), x.shape) for name, x in whole.items() if name not in copies]
    config, changes = kind.resize(config, image_size)
    params = convert.read(
        tensors, Table(rules), tensors.source, place=place, dtype=dtype, changes=changes, copies=copies, wanted=wanted
    )
    report = {"source": str(manifest.get("name", directory.name)), "digest": manifest["digest"]}
    return config, convert.nested(params), report


def shapes(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a model by name, as shapes."""
    return tree.flatten(budget.abstract_params(model))


def scratch(model: Any, seed: int) -> Tree:
    """Random weights, the control for the effect of pre-training."""
    return jax.jit(lambda: model.init(jax.random.key(seed), model.example()))()["params"]


def save(
    directory: str | Path, model: Any, params: Tree, *, aliases: dict[str, str], dtype: str = "float16", **facts: Any
) -> Path:
    """Write a jaxpeft checkpoint directory without the leaves under an alias, which must equal those of its source."""
    flat = tree.flatten(params)
    for copy, source in aliases.items():
        for name in [name for name in flat if name.startswith(copy + "/")]:
            if not np.array_equal(flat[name], flat[source + name[len(copy) :]]):
                raise ValueError(f"{name} differs from that of {source}, of which it is an alias")
            del flat[name]
    config = {k: v for k, v in dataclasses.asdict(model.config).items() if k not in RUNTIME}
    stored = {name: np.asarray(x, dtype).astype(np.float32) for name, x in flat.items()}
    manifest = {
        "model_type": model.model_type,
        "config": config,
        "aliases": aliases,
        "digest": tree.digest(stored),
        **facts,
    }
    with files.whole_directory(
        directory, (*TOKENIZER_FILES, "tokenizer_config.json", "model.safetensors", "manifest.json")
    ) as new:
        files.write_tensors(new / "model.safetensors", {name: np.asarray(x, dtype) for name, x in flat.items()})
        for name, content in model.tokenizer.files().items():
            files.write_text(new / name, content)
        files.write_text(new / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return Path(directory)


def wider(model: Any, words: Iterable[str]) -> tuple[Any, list[str]]:
    """(the model with the words that its vocabulary lacks added as whole words, those words); their rows are separate leaves.

    Rows of the base's matrix that do not belong to a word are dropped.
    """
    tokenizer, new = model.tokenizer.extended(words)
    if not new:
        return model, []
    known = min(len(model.tokenizer), model.config.vocab_size)
    return model.replaced(tokenizer, vocab_size=len(tokenizer), new_words=len(tokenizer) - known), list(new)


def extend_vocabulary(model: Any, params: Tree, words: Iterable[str], seed: int) -> tuple[Any, Tree, list[str]]:
    """`wider` with parameters: those of the base unchanged, new rows N(0, 0.02) and new biases 0.

    New rows are random, so they must be trained (`methods.NewWords`).
    """
    extended, new = wider(model, words)
    if not new:
        return model, params, []
    n_known = extended.config.vocab_size - extended.config.new_words
    rng = np.random.Generator(np.random.Philox(key=seed))
    flat = {}
    for name, leaf in tree.flatten(budget.abstract_params(extended)).items():
        folder, _, last = name.rpartition("/")
        if last.startswith("new_"):
            rows = np.zeros(leaf.shape) if last == "new_bias" else rng.normal(0, 0.02, leaf.shape)
            flat[name] = jnp.asarray(rows, jnp.float32)
    for name, leaf in tree.flatten(params).items():
        if name.endswith(("embed/word", "head/bias")):
            leaf = leaf[:n_known]
        flat[name] = leaf[:, :n_known] if name.endswith("head/vocabulary/kernel") else leaf
    return extended, tree.unflatten(budget.abstract_params(extended), flat, "extended vocabulary"), new


def joined(model: Any, params: Tree) -> tuple[Any, Tree]:
    """The model with added words joined to the base's: whole matrices, as other programs expect them."""
    if not model.config.new_words:
        return model, params
    whole = model.replaced(new_words=0)
    flat = tree.flatten(params)
    for name in [name for name in flat if name.rpartition("/")[2].startswith("new_")]:
        rows, matrix = flat.pop(name), name.replace("new_matrix", "vocabulary/kernel").replace("new_", "")
        both = [flat[matrix], rows.T if matrix.endswith("kernel") else rows]
        flat[matrix] = jnp.concatenate(both, axis=int(matrix.endswith("kernel")))
    return whole, tree.unflatten(budget.abstract_params(whole), flat, "joined vocabulary")
