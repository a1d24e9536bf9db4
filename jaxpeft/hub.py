"""Base checkpoints in and out: our own directories and Hugging Face BLIP directories.

Ours: manifest.json (model config, digest, where it came from, held-out scores), model.safetensors (leaves by name) and
vocab.txt. `aliases` in the manifest name subtrees that share another's leaves and are not stored twice.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import budget, images, results, text, tree, untrusted
from jaxpeft.models import blip_port
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.text import Tokenizer
from jaxpeft.tree import Tree

ASSETS = Path(__file__).parent / "assets"
RUNTIME = ("dtype", "remat", "dropout")  # config fields that a user may set on any checkpoint


def load(path: str | Path = "tiny", *, question_encoder: bool | None = None, image_size: int | None = None, **runtime):
    """(model, params) of a checkpoint: 'tiny' (shipped), a directory of ours, or a Hugging Face BLIP directory.

    `question_encoder`: True for VQA (from a captioning checkpoint the encoder starts from the decoder's layers), False
    for captioning, None for what the checkpoint holds. `image_size` resizes the position embedding. `runtime`: dtype,
    remat, dropout. Raises ValueError naming file and key for anything missing, unread or misshaped.
    """
    model, params, _ = read(path, question_encoder=question_encoder, image_size=image_size, **runtime)
    return model, params


def read(path, *, question_encoder=None, image_size=None, **runtime) -> tuple[Blip, Tree, dict]:
    """`load` and a report of where each part came from."""
    _check_runtime(runtime)
    directory = _directory(path)
    if (directory / "manifest.json").exists():
        config, params, report = _read_ours(directory, question_encoder, image_size)
    elif (directory / "config.json").exists():
        config, params, report = blip_port.read_directory(
            directory, image_size=image_size, question_encoder=question_encoder
        )
        config = _with_processor(config, directory, image_size)
    else:
        raise _missing(path)
    config, tokenizer = _with_tokenizer(config, directory, report.get("defaults", {}))
    return Blip(dataclasses.replace(config, **runtime), tokenizer), params, report


def abstract(path, *, question_encoder: bool = False, image_size: int | None = None, **runtime) -> Blip:
    """The model of `load` from manifest.json or config.json alone, for planning: weights need not be there."""
    _check_runtime(runtime)
    directory, defaults = _directory(path), {}
    if (directory / "manifest.json").exists():
        _, config = _manifest(directory)
    elif (directory / "config.json").exists():
        config, defaults = blip_port.read_config(directory / "config.json", question_encoder)
        config = _with_processor(config, directory, image_size)
    else:
        raise _missing(path)
    size = {} if image_size is None else {"image_size": image_size}
    config = dataclasses.replace(config, question_encoder=question_encoder, **size)
    config, tokenizer = _with_tokenizer(config, directory, defaults)
    return Blip(dataclasses.replace(config, **runtime), tokenizer)


def _check_runtime(runtime: dict) -> None:
    if unknown := set(runtime) - set(RUNTIME):
        raise ValueError(f"unknown model options {sorted(unknown)}; choose from {', '.join(RUNTIME)}")


def _directory(path) -> Path:
    return ASSETS / str(path) if (ASSETS / str(path) / "manifest.json").exists() else Path(path).expanduser()


def _missing(path) -> ValueError:
    shipped = sorted(p.parent.name for p in ASSETS.glob("*/manifest.json"))
    return ValueError(
        f"no checkpoint at {str(path)!r}: a directory with manifest.json (ours) or config.json (Hugging Face) is "
        f"needed, or one of the shipped names: {', '.join(shipped) or 'none'}"
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
    if not any((directory / name).exists() for name in text.FILES):
        return config, None
    tokenizer = Tokenizer.from_file(directory)
    spare = 0 if config.question_encoder else 1  # a captioning model never reads [ENC], which may be without a row
    if len(tokenizer) - spare * (tokenizer.enc_id == len(tokenizer) - 1) > config.vocab_size:
        raise ValueError(f"{directory}: {len(tokenizer)} words for a vocabulary matrix of {config.vocab_size} rows")
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id", "bos_id", "enc_id")}
    absent = {field for field, section, key, _ in blip_port.CONFIG if f"{section}.{key}" in defaults}
    for field in blip_port.used_ids(vars(config)):
        if field not in absent and getattr(config, field) != ids[field]:
            token = tokenizer.vocabulary[ids[field]]
            raise ValueError(
                f"{directory}: the configuration says {field} {getattr(config, field)}, and {token} is number {ids[field]} of "
                f"the tokenizer; put the tokenizer that the weights were trained with beside them"
            )
    return dataclasses.replace(config, **ids), tokenizer


def _read_ours(directory: Path, question_encoder, image_size):
    manifest, config = _manifest(directory)
    arrays, _ = untrusted.read_safetensors(directory / "model.safetensors")
    flat = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    for copy, source in manifest["aliases"].items():
        flat |= {copy + name[len(source) :]: x for name, x in flat.items() if name.startswith(source + "/")}
    if question_encoder is not None and question_encoder != config.question_encoder:
        if question_encoder:
            raise ValueError(f"{directory} holds no question encoder, which the vqa task needs")
        config = dataclasses.replace(config, question_encoder=False)
        flat = {name: x for name, x in flat.items() if not name.startswith("text_encoder/")}
    if image_size not in (None, config.image_size):
        config, flat["vision/position"] = blip_port.resized(config, flat["vision/position"], image_size)
    params = tree.unflatten(budget.abstract_params(Blip(config)), flat, str(directory / "model.safetensors"))
    return config, params, {"source": str(manifest.get("name", directory.name)), "digest": manifest["digest"]}


def _manifest(directory: Path) -> tuple[dict, BlipConfig]:
    path = directory / "manifest.json"
    with untrusted.reading(path, "is not a manifest of ours"):
        manifest = untrusted.read_json(path)
        aliases = {str(copy): source + "" for copy, source in manifest["aliases"].items()}
        return manifest | {"aliases": aliases, "digest": manifest["digest"] + ""}, BlipConfig(**manifest["config"])


def scratch(config: BlipConfig, tokenizer: Tokenizer, seed: int) -> tuple[Blip, Tree]:
    """A model with random weights: the control for what pre-training gives."""
    model = Blip(config, tokenizer)
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
    with results.whole_directory(directory, (*text.FILES, "model.safetensors", "manifest.json")) as new:
        results.write_tensors(new / "model.safetensors", {name: np.asarray(x, dtype) for name, x in flat.items()})
        for name, content in model.tokenizer.files().items():
            results.write_text(new / name, content)
        results.write_text(new / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return Path(directory)


def extend_vocabulary(model: Blip, params: Tree, words, seed: int) -> tuple[Blip, Tree, list[str]]:
    """The model with whole words added that its vocabulary lacks, and those words; their rows are N(0, 0.02).

    New rows are random, so whoever adds words must also train the word embedding.
    """
    tokenizer, new = model.tokenizer.extended(words)
    if not new:
        return model, params, []
    config = dataclasses.replace(model.config, vocab_size=max(len(tokenizer), model.config.vocab_size))
    rng = np.random.Generator(np.random.Philox(key=seed))
    flat = tree.flatten(params)
    for name in flat:
        if name.endswith(("embed/word", "head/bias", "head/vocabulary/kernel")):
            old = flat[name].T if name.endswith("kernel") else flat[name]
            room = (config.vocab_size - old.shape[0], *old.shape[1:])
            rows = np.zeros(room) if name.endswith("bias") else rng.normal(0, 0.02, room)
            new_rows = jnp.concatenate([old, jnp.asarray(rows, jnp.float32)])
            flat[name] = new_rows.T if name.endswith("kernel") else new_rows
    return (
        Blip(config, tokenizer),
        tree.unflatten(budget.abstract_params(Blip(config)), flat, "extended vocabulary"),
        new,
    )
