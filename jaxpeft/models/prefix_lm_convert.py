"""What converters of prefix language models share: tensor names of SigLIP and of the decoder, and reading config.json.

A model's own file has the names around these parts, and the defaults of its classes in transformers.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxpeft.inputs import images
from jaxpeft.inputs.bpe import Bpe
from jaxpeft.models import config_json, convert
from jaxpeft.models.convert import Checkpoint, Converter, Rule, Table
from jaxpeft.models.hf import HeadPlace
from jaxpeft.models.prefix_lm import PrefixLM, PrefixLMConfig
from jaxpeft.models.prefix_lm_hf import PrefixLMInTransformers
from jaxpeft.runtime import files

VISION = (
    ("dense", "embeddings.patch_embedding", "patch", "D 3 p p"),
    ("leaf", "embeddings.position_embedding.weight", "position", "P D"),
    ("norm", "encoder.layers.{}.layer_norm1", "blocks/norm1", "D"),
    ("dense", "encoder.layers.{}.self_attn.q_proj", "blocks/attention/query", "D D"),
    ("dense", "encoder.layers.{}.self_attn.k_proj", "blocks/attention/key", "D D"),
    ("dense", "encoder.layers.{}.self_attn.v_proj", "blocks/attention/value", "D D"),
    ("dense", "encoder.layers.{}.self_attn.out_proj", "blocks/attention/out", "D D"),
    ("norm", "encoder.layers.{}.layer_norm2", "blocks/norm2", "D"),
    ("dense", "encoder.layers.{}.mlp.fc1", "blocks/mlp/up", "F D"),
    ("dense", "encoder.layers.{}.mlp.fc2", "blocks/mlp/down", "D F"),
    ("norm", "post_layernorm", "norm", "D"),
)
DECODER = (  # Q: N * H, K: G * H; 'scale' stands for the kind of the norms
    ("leaf", "embed_tokens.weight", "embed/word", "V D"),
    ("scale", "layers.{}.input_layernorm", "blocks/norm1", "D"),
    ("matrix", "layers.{}.self_attn.q_proj", "blocks/attention/query", "Q D"),
    ("matrix", "layers.{}.self_attn.k_proj", "blocks/attention/key", "K D"),
    ("matrix", "layers.{}.self_attn.v_proj", "blocks/attention/value", "K D"),
    ("matrix", "layers.{}.self_attn.o_proj", "blocks/attention/out", "D Q"),
    ("scale", "layers.{}.post_attention_layernorm", "blocks/norm2", "D"),
    ("matrix", "layers.{}.mlp.gate_proj", "blocks/mlp/gate", "F D"),
    ("matrix", "layers.{}.mlp.up_proj", "blocks/mlp/up", "F D"),
    ("matrix", "layers.{}.mlp.down_proj", "blocks/mlp/down", "D F"),
    ("scale", "norm", "norm", "D"),
)
HEAD = (("matrix", "lm_head", "head", "V D"),)
DROPPED = (
    (r"rotary_emb\.inv_freq$", "a buffer: the wavelengths of rotary positions"),
    (r"embeddings\.position_ids$", "a buffer: the numbers 0, 1, 2, ..."),
    (r"^model\.vision_(tower|model)\.head\.", "SigLIP's pooling head; the decoder reads all patches"),
)
# config.json (see config_json.py); the values of absent keys are `defaults` of a converter
CONFIG = (
    ("image_size", "vision_config", "image_size"),
    ("patch_size", "vision_config", "patch_size"),
    ("vision_width", "vision_config", "hidden_size"),
    ("vision_layers", "vision_config", "num_hidden_layers"),
    ("vision_heads", "vision_config", "num_attention_heads"),
    ("vision_mlp", "vision_config", "intermediate_size"),
    ("vision_eps", "vision_config", "layer_norm_eps"),
    ("vocab_size", "text_config", "vocab_size"),
    ("text_width", "text_config", "hidden_size"),
    ("text_layers", "text_config", "num_hidden_layers"),
    ("text_heads", "text_config", "num_attention_heads"),
    ("kv_heads", "text_config", "num_key_value_heads"),
    ("head_size", "text_config", "head_dim"),
    ("text_mlp", "text_config", "intermediate_size"),
    ("text_eps", "text_config", "rms_norm_eps"),
    ("max_positions", "text_config", "max_position_embeddings"),
    ("rope_theta", "text_config", "rope_theta"),
    ("pad_id", "text_config", "pad_token_id"),
)


def rules(config: PrefixLMConfig, vision: str, decoder: str, scale: str) -> list[Rule]:
    """The rules of tower, decoder and, if it is not tied, head. `vision`, `decoder`: prefixes of names; `scale`: kind of the
    decoder's norms, see `convert.rules`."""
    c = config
    sizes = {"D": c.vision_width, "F": c.vision_mlp, "P": c.n_patches, "p": c.patch_size}
    found = convert.rules(VISION, vision, "vision/", sizes, range(c.vision_layers))
    sizes = {"D": c.text_width, "F": c.text_mlp, "V": c.vocab_size}
    sizes |= {"Q": c.text_heads * c.head_size, "K": c.kv_heads * c.head_size}
    lines = [(scale if kind == "scale" else kind, *rest) for kind, *rest in DECODER]
    found += convert.rules(lines, decoder, "decoder/", sizes, range(c.text_layers))
    return found + (convert.rules(HEAD, "", "decoder/", sizes) if c.untied_head else [])


class PrefixLMConverter(Converter):
    """See `convert.Converter`. Every model of this kind supports both tasks."""

    fields: tuple[tuple[str, str, str], ...] = CONFIG
    defaults: dict[str, Any]  # our field -> the value of the class in transformers, for keys that a file does not have
    fixed: tuple[tuple[str, str, tuple], ...]  # see config_json.py
    form: type[PrefixLMInTransformers]

    def read_config(self, directory: Path, task: str | None) -> tuple[Any, dict[str, Any]]:
        path = directory / "config.json"
        with files.reading(path, f"is not a configuration of {self.kind.__name__}"):
            raw = files.read_json(path)
            text = raw["text_config"] = _with_rope(config_json.part(path, raw, "text_config"), path)
            tie = raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))
            untied = not (self.defaults["tied"] if tie is None else tie)
            config, defaults = config_json.read(path, raw, self.settings, self._lines, self.fixed, untied_head=untied)
        return self.for_task(config, task, str(directory)), defaults

    def stored(self, tensors: Checkpoint, config: Any, task: str | None) -> tuple[Any, Table, dict[str, str]]:
        config = dataclasses.replace(config, untied_head=self.has_own_head(tensors, config))
        return config, self.table(config), {}

    def with_tokenizer(self, config: Any, directory: Path, defaults: Iterable[str]) -> tuple[Any, Bpe | None]:
        if not (directory / "tokenizer.json").exists():
            return config, None
        tokenizer = Bpe.from_file(directory)
        if tokenizer.ids.get("<image>") != config.image_id:
            key = next(key for field, _, key in self.fields if field == "image_id")
            raise ValueError(
                f"{directory}: {key} is {config.image_id} in the configuration, but <image> is "
                f"{tokenizer.ids.get('<image>')} in the tokenizer; use the tokenizer that the weights were trained with"
            )
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"{directory}: {len(tokenizer)} tokens exceed vocab_size {config.vocab_size} of the weights"
            )
        return dataclasses.replace(config, pad_id=tokenizer.pad_id), tokenizer

    def with_processor(self, config: Any, directory: Path, image_size: int | None) -> Any:
        config, n_tokens = super().with_processor(config, directory, image_size), images.image_tokens(directory)
        if image_size is None and n_tokens not in (None, config.n_image_tokens):
            raise ValueError(
                f"{directory}: the processor writes {n_tokens} image tokens per image, but with config.json there are "
                f"{config.n_image_tokens}; copy both files from the same model"
            )
        return config

    def hf(self, model: PrefixLM) -> PrefixLMInTransformers:
        return self.form(model, self.table(model.config), self._head(), None, self._raw(model.config))

    def _head(self) -> HeadPlace:
        """The last norm and the vocabulary matrix."""
        head, words = (name.removesuffix(".weight") for name in self.head)
        decoder = words.removesuffix(".embed_tokens")
        return HeadPlace(
            saved_as=(f"{decoder.removeprefix('model.')}.norm", head),
            tensors=(f"{decoder}.norm.weight",),
            linear=head,
            vocabulary="decoder/head",
            embedding="decoder/embed/word",
        )

    @property
    def _lines(self) -> list[config_json.Line]:
        return [(*line, self.defaults[line[0]]) for line in self.fields]

    def _raw(self, config: Any) -> dict[str, Any]:
        """The content of config.json, of which `read_config` makes this configuration."""
        raw = config_json.written(config, self._lines, self.fixed)
        raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = not config.untied_head
        return raw


def _with_rope(text: dict, path: Path) -> dict:
    """A decoder's configuration with `rope_theta`, which newer files have inside `rope_parameters`."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path}: text_config has rotary positions of type {kind!r}; only 'default' is supported")
    return text | ({"rope_theta": rope["rope_theta"]} if rope.get("rope_theta") is not None else {})
