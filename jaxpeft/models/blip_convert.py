"""BLIP checkpoints: transformers' names and layout <-> our parameter tree.

One table says which reference tensor becomes which leaf; both directions, the expected shapes and the list of keys that
must be present are read from it. Every key of a checkpoint is used or named in an error. Salesforce's own names
(`visual_encoder.*`) are accepted. The reference fuses query, key and value of the vision blocks, keeps kernels as
(out, in), convolutions as OIHW, and stores the tied vocabulary matrix and bias sometimes twice.
"""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  teaches numpy, and so safetensors, the name bfloat16
import numpy as np

from jaxpeft import tree
from jaxpeft.inputs import images
from jaxpeft.models.blip import BlipConfig
from jaxpeft.runtime import files
from jaxpeft.runtime.torch_files import load_pickle

# (kind, reference name, our path, reference kernel shape), {} stands for the layer; a matrix is a dense without bias.
# Sizes: D width, 3D fused, F MLP,
# C width of the cross-attention's context, P image positions, p patch size, V vocabulary, T text positions.
VISION = (
    ("leaf", "embeddings.class_embedding", "class_embedding", "1 1 D"),
    ("leaf", "embeddings.position_embedding", "position", "1 P D"),
    ("conv", "embeddings.patch_embedding", "patch", "D 3 p p"),
    ("norm", "encoder.layers.{}.layer_norm1", "blocks/norm1", "D"),
    ("qkv", "encoder.layers.{}.self_attn.qkv", "blocks/attention", "3D D"),
    ("dense", "encoder.layers.{}.self_attn.projection", "blocks/attention/out", "D D"),
    ("norm", "encoder.layers.{}.layer_norm2", "blocks/norm2", "D"),
    ("dense", "encoder.layers.{}.mlp.fc1", "blocks/mlp/up", "F D"),
    ("dense", "encoder.layers.{}.mlp.fc2", "blocks/mlp/down", "D F"),
    ("norm", "post_layernorm", "norm", "D"),
)
TEXT = (
    ("leaf", "embeddings.word_embeddings.weight", "embed/word", "V D"),
    ("leaf", "embeddings.position_embeddings.weight", "embed/position", "T D"),
    ("norm", "embeddings.LayerNorm", "embed/norm", "D"),
    ("dense", "encoder.layer.{}.attention.self.query", "blocks/self_attention/query", "D D"),
    ("dense", "encoder.layer.{}.attention.self.key", "blocks/self_attention/key", "D D"),
    ("dense", "encoder.layer.{}.attention.self.value", "blocks/self_attention/value", "D D"),
    ("dense", "encoder.layer.{}.attention.output.dense", "blocks/self_attention/out", "D D"),
    ("norm", "encoder.layer.{}.attention.output.LayerNorm", "blocks/self_norm", "D"),
    ("dense", "encoder.layer.{}.crossattention.self.query", "blocks/cross_attention/query", "D D"),
    ("dense", "encoder.layer.{}.crossattention.self.key", "blocks/cross_attention/key", "D C"),
    ("dense", "encoder.layer.{}.crossattention.self.value", "blocks/cross_attention/value", "D C"),
    ("dense", "encoder.layer.{}.crossattention.output.dense", "blocks/cross_attention/out", "D D"),
    ("norm", "encoder.layer.{}.crossattention.output.LayerNorm", "blocks/cross_norm", "D"),
    ("dense", "encoder.layer.{}.intermediate.dense", "blocks/mlp/up", "F D"),
    ("dense", "encoder.layer.{}.output.dense", "blocks/mlp/down", "D F"),
    ("norm", "encoder.layer.{}.output.LayerNorm", "blocks/mlp_norm", "D"),
)
HEAD = (
    ("dense", "cls.predictions.transform.dense", "head/dense", "D D"),
    ("norm", "cls.predictions.transform.LayerNorm", "head/norm", "D"),
    ("leaf", "cls.predictions.bias", "head/bias", "V"),
)
UNTIED = ("matrix", "cls.predictions.decoder", "head/vocabulary", "V D")  # where it is not the word embedding
TIED = {  # a second name of a tensor -> the name that is kept
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
RENAMES = (  # Salesforce's vision names; its text names are the same
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision_model\.encoder\.layers\.\d+)\.norm([12])\.", r"\1.layer_norm\2."),
)
# (our field, section, key, transformers' class default). BLIP-base has 12 text heads and vision eps 1e-6, unlike these.
CONFIG = (
    ("image_size", "vision_config", "image_size", 384),
    ("patch_size", "vision_config", "patch_size", 16),
    ("vision_width", "vision_config", "hidden_size", 768),
    ("vision_layers", "vision_config", "num_hidden_layers", 12),
    ("vision_heads", "vision_config", "num_attention_heads", 12),
    ("vision_mlp", "vision_config", "intermediate_size", 3072),
    ("vision_eps", "vision_config", "layer_norm_eps", 1e-5),
    ("vocab_size", "text_config", "vocab_size", 30524),
    ("text_width", "text_config", "hidden_size", 768),
    ("text_layers", "text_config", "num_hidden_layers", 12),
    ("text_heads", "text_config", "num_attention_heads", 8),
    ("text_mlp", "text_config", "intermediate_size", 3072),
    ("max_positions", "text_config", "max_position_embeddings", 512),
    ("text_eps", "text_config", "layer_norm_eps", 1e-12),
    ("pad_id", "text_config", "pad_token_id", 0),
    ("sep_id", "text_config", "sep_token_id", 102),  # not eos_token_id, whose class default 2 is no end of anything
    ("bos_id", "text_config", "bos_token_id", 30522),
    ("cls_id", "text_config", "cls_token_id", 101),  # the last two are no keys of transformers'
    ("enc_id", "text_config", "enc_token_id", 30523),
    ("dropout", "text_config", "hidden_dropout_prob", 0.0),
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclasses.dataclass(frozen=True)
class Row:
    """One reference tensor (one per layer where `layers`), its shape, and the leaf or the three leaves it holds."""

    reference: str
    leaves: tuple[str, ...]
    kind: str  # kernel: transposed; conv: OIHW -> HWIO; leaf: as it is, without leading axes of size 1
    shape: tuple[int, ...]
    layers: int

    def names(self) -> list[str]:
        return [self.reference.format(i) for i in range(self.layers)] if self.layers else [self.reference]

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        if self.kind == "leaf":
            return x.reshape(x.shape[sum(n == 1 for n in self.shape[:-1]) :])
        return x.T if self.kind == "kernel" else x.transpose(2, 3, 1, 0)

    def to_reference(self, x: np.ndarray) -> np.ndarray:
        if self.kind == "leaf":
            return x.reshape((1,) * sum(n == 1 for n in self.shape[:-1]) + x.shape)
        return x.T if self.kind == "kernel" else x.transpose(3, 2, 0, 1)


def table(config: BlipConfig) -> list[Row]:
    """The rows of a model: `VISION`, `TEXT` and `HEAD` with sizes filled in and weights and biases apart."""
    c = config
    vision = {"D": c.vision_width, "F": c.vision_mlp, "P": 1 + c.n_patches, "p": c.patch_size}
    text = {"D": c.text_width, "F": c.text_mlp, "C": c.vision_width, "V": c.vocab_size, "T": c.max_positions}
    answer = text | {"C": c.text_width if c.question_encoder else c.vision_width}
    rows = _rows(VISION, "vision_model.", "vision/", vision, c.vision_layers)
    rows += _rows(TEXT, "text_decoder.bert.", "text_decoder/", answer, c.text_layers)
    rows += _rows((*HEAD, UNTIED) if c.untied_head else HEAD, "text_decoder.", "text_decoder/", answer, 0)
    if c.question_encoder:
        rows += _rows(TEXT, "text_encoder.", "text_encoder/", text, c.text_layers)
    return rows


def _rows(lines, reference_prefix, our_prefix, sizes, n_layers):
    sizes = sizes | {"3D": 3 * sizes["D"], "1": 1, "3": 3}
    rows = []
    for kind, reference, ours, dims in lines:
        reference, ours = reference_prefix + reference, our_prefix + ours
        shape = tuple(sizes[dim] for dim in dims.split())
        layers = n_layers if "{}" in reference else 0
        if kind == "leaf":
            rows.append(Row(reference, (ours,), "leaf", shape, layers))
            continue
        parts = [f"{ours}/{part}" for part in ("query", "key", "value")] if kind == "qkv" else [ours]
        weight, how = {"norm": ("scale", "leaf"), "conv": ("kernel", "conv")}.get(kind, ("kernel", "kernel"))
        rows.append(Row(f"{reference}.weight", tuple(f"{part}/{weight}" for part in parts), how, shape, layers))
        if kind != "matrix":
            rows.append(Row(f"{reference}.bias", tuple(f"{part}/bias" for part in parts), "leaf", shape[:1], layers))
    return rows


def from_hf(tensors: dict[str, np.ndarray], config: BlipConfig, source: str = "checkpoint") -> dict:
    """Reference tensors -> our params (numpy, same dtypes, stacked layers).

    Raises one ValueError with the keys that nothing reads, the leaves that nothing fills and the shapes that differ.
    """
    tensors = _canonical(tensors, source, config.untied_head)
    rows = table(config)
    expected = {name: np.broadcast_to(np.int8(0), row.shape) for row in rows for name in row.names()}
    tree.check_same(expected, tensors, f"{source} (unexpected: keys that nothing reads; missing: leaves left unfilled)")
    params = {}
    for row in rows:
        layers = [[row.to_ours(x) for x in np.split(tensors[name], len(row.leaves))] for name in row.names()]
        for i, path in enumerate(row.leaves):
            one = [parts[i] for parts in layers]
            _put(params, path, np.stack(one) if row.layers else np.ascontiguousarray(one[0]))
    return params


def to_hf(params: dict, config: BlipConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`, with transformers' names; tied tensors once, under the name that it keeps."""
    flat = tree.flatten(params)
    tensors = {}
    for row in table(config):
        arrays = [np.asarray(flat[path]) for path in row.leaves]
        for i, name in enumerate(row.names()):
            parts = [row.to_reference(x[i] if row.layers else x) for x in arrays]
            tensors[name] = np.ascontiguousarray(np.concatenate(parts))
    return tensors


def hf_config(config: BlipConfig) -> dict:
    """config.json of a transformers BLIP with this architecture: what `_read_config` reads, with nothing left to defaults."""
    sections = {"vision_config": {"model_type": "blip_vision_model"}, "text_config": {"model_type": "blip_text_model"}}
    for field, section, key, _ in CONFIG:
        sections[section][key] = getattr(config, field)
    sections["vision_config"] |= {"hidden_act": "gelu", "attention_dropout": 0.0}
    tied = not config.untied_head
    sections["text_config"] |= {
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "is_decoder": True,
        "encoder_hidden_size": config.vision_width, "eos_token_id": config.sep_id, "tie_word_embeddings": tied,
    }  # fmt: skip
    kind = "BlipForQuestionAnswering" if config.question_encoder else "BlipForConditionalGeneration"
    facts = {"architectures": [kind], "model_type": "blip", "dtype": "float32", "tie_word_embeddings": tied}
    return facts | {"label_smoothing": 0.0} | sections


def _put(params, path, leaf):
    *parents, last = path.split("/")
    for key in parents:
        params = params.setdefault(key, {})
    params[last] = leaf


def _renamed(tensors, source) -> dict:
    """Tensors by transformers' names, without buffers."""
    renamed = {}
    for name, x in tensors.items():
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        if name in renamed:
            raise ValueError(f"{source}: two keys mean {name}; keep one of them")
        if not name.endswith("embeddings.position_ids"):
            renamed[name] = x
    return renamed


def has_untied_head(tensors, source) -> bool:
    """Whether the head's vocabulary matrix is another one than the word embedding."""
    second, first = next(iter(TIED.items()))
    tensors = _renamed(tensors, source)
    return {second, first} <= tensors.keys() and not np.array_equal(tensors[second], tensors[first])


def _canonical(tensors, source, untied: bool):
    """`_renamed` without second names of tied tensors, which must equal the first."""
    renamed = _renamed(tensors, source)
    for second, first in TIED.items():
        if second in renamed and not (untied and second.endswith("weight")):
            x = renamed.pop(second)
            if not np.array_equal(renamed.setdefault(first, x), x):
                raise ValueError(
                    f"{source}: {second} differs from {first}, to which it is tied; this model has one of them"
                )
    return renamed


def read_directory(path, *, image_size: int | None = None, question_encoder: bool | None = None):
    """A transformers BLIP directory -> (BlipConfig, float32 params, report).

    `image_size` resizes the position embedding. `question_encoder=True` on a captioning checkpoint starts the question
    encoder, and the decoder that reads its states, from the captioning decoder. The report tells which files were read,
    which configuration keys were absent (class defaults were used) and where each group of leaves came from. Raises
    ValueError naming file and key.
    """
    path = pathlib.Path(path)
    tensors, files = _read_weights(path)
    has_encoder = any(name.startswith("text_encoder.") for name in tensors)
    config, defaults = read_config(path / "config.json", has_encoder)
    config = dataclasses.replace(config, untied_head=has_untied_head(tensors, str(path / files[0])))
    if has_encoder and question_encoder is False:
        raise ValueError(f"{path}: the decoder of a VQA checkpoint reads question states; take a captioning checkpoint")
    params = from_hf(tensors, config, str(path / files[0]))
    sources = {group: "checkpoint" for group in _groups(params)}
    if question_encoder and not has_encoder:
        config, params, started = start_question_encoder(config, params)
        sources |= started
    report = {"source": path.name, "files": files, "defaults": defaults, "initialised": sources}
    if image_size not in (None, config.image_size):
        report["resized"] = f"position embedding from {config.image_size} to {image_size} pixels"
        config, params["vision"]["position"] = resized(config, params["vision"]["position"], image_size)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return config, params, report | {"digest": tree.digest(params)}


def resized(config: BlipConfig, position_PD, image_size: int):
    """(config, position embedding) for another image size."""
    if image_size % config.patch_size or image_size < config.patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {config.patch_size}")
    position_PD = images.resize_positions(np.asarray(position_PD, np.float32), image_size // config.patch_size)
    return dataclasses.replace(config, image_size=image_size), position_PD


def start_question_encoder(config: BlipConfig, params: dict):
    """Captioning (config, params) -> the same for VQA, and {group of leaves: where it started}.

    The encoder gets the decoder's embeddings and blocks; the answer decoder keeps its own. Its cross-attention read
    image tokens and now reads question states, so both must have the same width.
    """
    if config.vision_width != config.text_width:
        raise ValueError(
            "text_decoder/blocks/cross_attention/{key,value}/kernel cannot start from the captioning checkpoint: they "
            f"take image tokens of width {config.vision_width} there and question states of width {config.text_width} "
            "in VQA; take a checkpoint with equal widths or a VQA checkpoint"
        )
    encoder = {name: part for name, part in params["text_decoder"].items() if name != "head"}
    params = params | {"text_encoder": jax.tree.map(np.copy, encoder)}
    started = {g: g.replace("text_encoder", "text_decoder") for g in _groups(params) if g.startswith("text_encoder")}
    return dataclasses.replace(config, question_encoder=True), params, started


def _groups(params) -> list[str]:
    """'vision/patch', 'text_decoder/blocks/self_attention', ...: what a report speaks about."""
    return list(dict.fromkeys(re.match(r"[^/]+/(blocks/)?[^/]+", name)[0] for name in tree.flatten(params)))


def _read_json(path):
    if not path.exists():
        raise ValueError(f"{path} is missing; a transformers BLIP directory has it beside the weights")
    return files.read_json(path)


def read_config(path, question_encoder) -> tuple[BlipConfig, dict]:
    """(config, {'section.key': class default used because the file does not have it})"""
    with files.reading(path, "is no BLIP's configuration"):
        return _read_config(path, question_encoder)


def _read_config(path, question_encoder):
    raw = _read_json(path)
    kinds = ("BlipForConditionalGeneration", "BlipForQuestionAnswering")
    if raw.get("model_type") != "blip" or not set(raw.get("architectures") or kinds) <= set(kinds):
        found = f"model_type {raw.get('model_type')!r}, architectures {raw.get('architectures')}"
        raise ValueError(f"{path}: {found}; only model_type 'blip' with one of {', '.join(kinds)} can be read")
    for section in ("vision_config", "text_config"):
        if not isinstance(raw.get(section), dict):
            raise ValueError(f"{path}: {section} is {raw.get(section)!r}, expected an object; save the config in full")
        if raw[section].get("hidden_act", "gelu") != "gelu":
            raise ValueError(
                f"{path}: {section}.hidden_act is {raw[section]['hidden_act']!r}; only 'gelu' is supported"
            )
    fields, defaults = {"question_encoder": question_encoder}, {}
    for field, section, key, default in CONFIG:
        if key not in raw[section]:
            defaults[f"{section}.{key}"] = default
        value = raw[section].get(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]  # sizes may be written [height, width]
        smallest = 0 if field.endswith("_id") or isinstance(default, float) else 1
        good = isinstance(value, int) or (isinstance(default, float) and isinstance(value, float))
        if not good or isinstance(value, bool) or not value >= smallest:
            raise ValueError(
                f"{path}: {section}.{key} is {value!r}, expected a {type(default).__name__} such as {default}"
            )
        fields[field] = value
    for field, section, key, _ in CONFIG:
        known = f"{section}.{key}" not in defaults  # else the tokenizer says it
        if field.endswith("_id") and known and fields[field] >= fields["vocab_size"] and field in used_ids(fields):
            raise ValueError(
                f"{path}: {section}.{key} {fields[field]} is outside the vocabulary of {fields['vocab_size']}"
            )
    try:
        return BlipConfig(**fields), defaults
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def used_ids(fields: dict) -> tuple[str, ...]:
    """The special ids that a model of this configuration reads or writes."""
    return ("pad_id", "sep_id", "bos_id", *(("enc_id",) if fields["question_encoder"] else ()))


def _read_weights(directory) -> tuple[dict, list[str]]:
    """(tensors, names of the files read)"""
    found = [name for name in WEIGHTS if (directory / name).exists()]
    if not found:
        raise ValueError(f"{directory}: no weights; expected one of {', '.join(WEIGHTS)}")
    if not found[0].endswith(".index.json"):
        return _read_file(directory / found[0]), found[:1]
    index = _read_json(directory / found[0])
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{directory / found[0]}: weight_map is missing")
    names = set(map(str, index["weight_map"].values()))
    shards = {name: _read_file(files.beside(directory, name)) for name in sorted(names)}
    for key, name in index["weight_map"].items():
        if key not in shards[name]:
            raise ValueError(f"{directory / name}: {key} is not in it, though {found[0]} says so")
    return {key: x for shard in shards.values() for key, x in shard.items()}, [found[0], *shards]


def _read_file(path) -> dict:
    if not path.exists():
        raise ValueError(f"{path} is missing, though the index beside it names it; fetch it again")
    if path.suffix == ".safetensors":
        return files.read_safetensors(path)[0]
    tensors = load_pickle(path)
    tensors = tensors["model"] if isinstance(tensors.get("model"), dict) else tensors
    other = [str(key) for key, x in tensors.items() if not isinstance(x, np.ndarray)]
    if other:
        raise ValueError(f"{path}: {', '.join(other[:10])} ({len(other)}) are no tensors; save the state_dict alone")
    return tensors
