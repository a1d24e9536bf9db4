"""Base checkpoints in and out: our own directories, Hugging Face BLIP directories, and repositories of the Hugging Face hub.

Ours: manifest.json (model config, digest, where it came from, held-out scores), model.safetensors (leaves by name) and
vocab.txt. `aliases` in the manifest name subtrees that share another's leaves and are not stored twice.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.adapt import budget
from jaxpeft.inputs import images
from jaxpeft.inputs.tokenizer import FILES as TOKENIZER_FILES
from jaxpeft.inputs.tokenizer import Tokenizer
from jaxpeft.models import blip_convert, downloads
from jaxpeft.models.blip import Blip, BlipConfig, build
from jaxpeft.runtime import files
from jaxpeft.tree import Tree

ASSETS = Path(__file__).parents[1] / "assets"
RUNTIME = ("dtype", "remat", "dropout", "unroll")  # config fields that a user may set on any checkpoint


def load(
    path: str | Path = "tiny",
    *,
    task: str | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    **runtime,
):
    """(model, params) of a checkpoint: 'tiny' (shipped), a directory of ours, a Hugging Face BLIP directory, or a repository
    of the Hugging Face hub as 'owner/name' or 'owner/name@revision'. A directory of that name comes first.

    `question_encoder`: True for VQA (from a captioning checkpoint the encoder starts from the decoder's layers), False
    for captioning, None for what the checkpoint holds. `image_size` resizes the position embedding. `revision`: a commit,
    branch or tag of a repository, None for its default branch; with a full commit that is in the cache nothing is asked of
    the hub, and with HF_HUB_OFFLINE=1 it is never asked. `runtime`: dtype, remat, dropout.

    Raises ValueError naming file and key for anything missing, unread or misshaped; naming the repository for what cannot
    be downloaded; and where `revision` is given with a directory, or differs from the one in `path`.
    """
    model, params, _ = read(path, task=task, image_size=image_size, revision=revision, **runtime)
    return model, params


def read(path, *, task=None, image_size=None, revision=None, **runtime) -> tuple[Blip, Tree, dict]:
    """`load` and a report of where each part came from. For a repository of the hub `source` is its name and `revision` the
    full commit that was read: given as `revision`, the same files are read again."""
    question_encoder = None if task is None else task == "vqa"
    _check_runtime(runtime)
    directory, downloaded = _located(path, revision)
    if (directory / "manifest.json").exists():
        config, params, report = _read_ours(directory, question_encoder, image_size)
    elif (directory / "config.json").exists():
        config, params, report = blip_convert.read_directory(
            directory, image_size=image_size, question_encoder=question_encoder
        )
        config = _with_processor(config, directory, image_size)
    else:
        raise _missing(path)
    config, tokenizer = _with_tokenizer(config, directory, report.get("defaults", {}))
    return build(dataclasses.replace(config, **runtime), tokenizer), params, report | downloaded


def abstract(
    path,
    *,
    task: str = "captioning",
    image_size: int | None = None,
    revision: str | None = None,
    **runtime,
) -> Blip:
    """The model of `load` from manifest.json or config.json alone, for planning: weights need not be there, and those of a
    repository are not downloaded."""
    question_encoder = task == "vqa"
    _check_runtime(runtime)
    (directory, _), defaults = _located(path, revision, weights=False), {}
    if (directory / "manifest.json").exists():
        _, config = _manifest(directory)
    elif (directory / "config.json").exists():
        config, defaults = blip_convert.read_config(directory / "config.json", question_encoder)
        config = _with_processor(config, directory, image_size)
    else:
        raise _missing(path)
    size = {} if image_size is None else {"image_size": image_size}
    config = dataclasses.replace(config, question_encoder=question_encoder, **size)
    config, tokenizer = _with_tokenizer(config, directory, defaults)
    return build(dataclasses.replace(config, **runtime), tokenizer)


def is_ours(path, revision: str | None = None) -> bool:
    """Whether a checkpoint is in our own format, which transformers does not load."""
    return (_located(path, revision, weights=False)[0] / "manifest.json").exists()


def _check_runtime(runtime: dict) -> None:
    if unknown := set(runtime) - set(RUNTIME):
        raise ValueError(f"unknown model options {sorted(unknown)}; choose from {', '.join(RUNTIME)}")


def _located(path, revision: str | None, *, weights: bool = True) -> tuple[Path, dict]:
    """(the checkpoint's directory, what a report says of it beside the rest: source and revision of a repository)."""
    shipped = ASSETS / str(path)
    directory = shipped if (shipped / "manifest.json").exists() else Path(path).expanduser()
    if directory.exists():
        if revision is not None:
            raise ValueError(
                f"revision {revision} was asked for, and {str(path)!r} is a local checkpoint and has no revisions; leave "
                f"the revision out"
            )
        return directory, {}
    repository = downloads.parse(str(path), revision)
    if repository is None:
        raise _missing(path)
    directory, commit = downloads.fetch(*repository, check=_check_settings, weights=weights)
    return directory, {"source": repository[0], "revision": commit}


def _check_settings(directory: Path) -> None:
    """Raise ValueError unless manifest.json or config.json describes a model that can be read."""
    if (directory / "manifest.json").exists():
        _manifest(directory)
    else:
        blip_convert.read_config(directory / "config.json", False)


def _missing(path) -> ValueError:
    shipped = sorted(p.parent.name for p in ASSETS.glob("*/manifest.json"))
    return ValueError(
        f"no checkpoint at {str(path)!r}: a directory with manifest.json (ours) or config.json (Hugging Face) is "
        f"needed, or one of the shipped names: {', '.join(shipped) or 'none'}; owner/name or owner/name@revision of the "
        f"Hugging Face hub works too"
    )


def _with_processor(config: BlipConfig, directory: Path, image_size: int | None) -> BlipConfig:
    """The configuration with what the directory's image processor does to pictures."""
    said = images.processor_settings(directory)
    size = said.pop("image_size", config.image_size)
    if image_size is None and size != config.image_size:
        raise ValueError(
            f"{directory}: the image processor makes pictures of {size} pixels and config.json says {config.image_size}; "
            f"choose one with image_size={size} (--config.model.image_size={size}), which resizes the position embedding"
        )
    return dataclasses.replace(config, **said)


def _with_tokenizer(config: BlipConfig, directory: Path, defaults: dict) -> tuple[BlipConfig, Tokenizer | None]:
    """The directory's tokenizer, and the configuration with its special ids where config.json does not have them
    (`defaults`). Raises ValueError where the two contradict each other."""
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return config, None
    tokenizer = Tokenizer.from_file(directory)
    spare = 0 if config.question_encoder else 1  # a captioning model never reads [ENC], which may be without a row
    if len(tokenizer) - spare * (tokenizer.enc_id == len(tokenizer) - 1) > config.vocab_size:
        raise ValueError(f"{directory}: {len(tokenizer)} words for a vocabulary matrix of {config.vocab_size} rows")
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id", "bos_id", "enc_id")}
    absent = {field for field, section, key, _ in blip_convert.CONFIG if f"{section}.{key}" in defaults}
    for field in blip_convert.used_ids(vars(config)):
        if field not in absent and getattr(config, field) != ids[field]:
            token = tokenizer.vocabulary[ids[field]]
            raise ValueError(
                f"{directory}: the configuration says {field} {getattr(config, field)}, and {token} is number {ids[field]} of "
                f"the tokenizer; put the tokenizer that the weights were trained with beside them"
            )
    return dataclasses.replace(config, **ids), tokenizer


def _read_ours(directory: Path, question_encoder, image_size):
    manifest, config = _manifest(directory)
    arrays, _ = files.read_safetensors(directory / "model.safetensors")
    flat = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    for copy, source in manifest["aliases"].items():
        flat |= {copy + name[len(source) :]: x for name, x in flat.items() if name.startswith(source + "/")}
    if question_encoder is not None and question_encoder != config.question_encoder:
        if question_encoder:
            raise ValueError(f"{directory} holds no question encoder, which the vqa task needs")
        config = dataclasses.replace(config, question_encoder=False)
        flat = {name: x for name, x in flat.items() if not name.startswith("text_encoder/")}
    if image_size not in (None, config.image_size):
        config, flat["vision/position"] = blip_convert.resized(config, flat["vision/position"], image_size)
    params = tree.unflatten(budget.abstract_params(Blip(config)), flat, str(directory / "model.safetensors"))
    return config, params, {"source": str(manifest.get("name", directory.name)), "digest": manifest["digest"]}


def _manifest(directory: Path) -> tuple[dict, BlipConfig]:
    path = directory / "manifest.json"
    with files.reading(path, "is not a manifest of ours"):
        manifest = files.read_json(path)
        aliases = {str(copy): source + "" for copy, source in manifest["aliases"].items()}
        return manifest | {"aliases": aliases, "digest": manifest["digest"] + ""}, BlipConfig(**manifest["config"])


def scratch(config: BlipConfig, tokenizer: Tokenizer, seed: int) -> tuple[Blip, Tree]:
    """A model with random weights: the control for what pre-training gives."""
    model = build(config, tokenizer)
    return model, jax.jit(lambda: model.init(jax.random.key(seed), model.example()))()["params"]


def save(directory, model: Blip, params: Tree, *, aliases: dict[str, str], dtype: str = "float16", **facts) -> Path:
    """Write a checkpoint directory of ours; leaves under an alias are dropped (they equal their source's)."""
    flat = tree.flatten(params)
    for copy, source in aliases.items():
        for name in [name for name in flat if name.startswith(copy + "/")]:
            if not np.array_equal(flat[name], flat[source + name[len(copy) :]]):
                raise ValueError(f"{name} differs from {source}'s, which the alias says it equals")
            del flat[name]
    config = {k: v for k, v in dataclasses.asdict(model.config).items() if k not in RUNTIME}
    stored = {name: np.asarray(x, dtype).astype(np.float32) for name, x in flat.items()}
    manifest = {"config": config, "aliases": aliases, "digest": tree.digest(stored), **facts}
    with files.whole_directory(directory, (*TOKENIZER_FILES, "model.safetensors", "manifest.json")) as new:
        files.write_tensors(new / "model.safetensors", {name: np.asarray(x, dtype) for name, x in flat.items()})
        for name, content in model.tokenizer.files().items():
            files.write_text(new / name, content)
        files.write_text(new / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return Path(directory)


def wider(model: Blip, words) -> tuple[Blip, list[str]]:
    """The model with whole words added that its vocabulary lacks, and those words; their rows are leaves of their own.

    Rows that a base's matrix has beyond its own words are dropped.
    """
    tokenizer, new = model.tokenizer.extended(words)
    if not new:
        return model, []
    known = min(len(model.tokenizer), model.config.vocab_size)
    config = dataclasses.replace(model.config, vocab_size=len(tokenizer), new_words=len(tokenizer) - known)
    return build(config, tokenizer), list(new)


def extend_vocabulary(model: Blip, params: Tree, words, seed: int) -> tuple[Blip, Tree, list[str]]:
    """`wider` with parameters: the base's as they are, new rows N(0, 0.02) and new biases 0.

    New rows are random, so whoever adds words must also train them (`methods.NewWords`).
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


def joined(model: Blip, params: Tree) -> tuple[Blip, Tree]:
    """The model whose added words are words like others: each matrix whole, as other programs have it."""
    if not model.config.new_words:
        return model, params
    whole = build(dataclasses.replace(model.config, new_words=0), model.tokenizer)
    flat = tree.flatten(params)
    for name in [name for name in flat if name.rpartition("/")[2].startswith("new_")]:
        rows, matrix = flat.pop(name), name.replace("new_matrix", "vocabulary/kernel").replace("new_", "")
        both = [flat[matrix], rows.T if matrix.endswith("kernel") else rows]
        flat[matrix] = jnp.concatenate(both, axis=int(matrix.endswith("kernel")))
    return whole, tree.unflatten(budget.abstract_params(whole), flat, "joined vocabulary")
