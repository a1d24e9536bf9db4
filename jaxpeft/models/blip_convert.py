"""BLIP checkpoints: names and layout of transformers <-> our parameter tree.

One table maps reference tensors to leaves (`convert`). Salesforce's original names (`visual_encoder.*`) are accepted too. The
reference fuses query, key and value of the vision blocks, stores kernels as (out, in), convolutions as OIHW, and sometimes
the tied vocabulary matrix and bias twice.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxpeft.inputs.tokenizer import FILES as TOKENIZER_FILES
from jaxpeft.models import config_json, convert
from jaxpeft.models.bert_convert import DROPPED, HEAD, TEXT, TIED, UNTIED
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.models.blip_hf import HEAD_PLACE, BlipInTransformers
from jaxpeft.models.blip_tokens import BlipTokenizer
from jaxpeft.models.convert import Checkpoint, Converter, Rule, Table
from jaxpeft.models.hf import Decoder
from jaxpeft.runtime import files

VISION = (
    ("leaf", "embeddings.class_embedding", "class_embedding", "1 1 D"),
    ("leaf", "embeddings.position_embedding", "position", "1 P D"),
    ("dense", "embeddings.patch_embedding", "patch", "D 3 p p"),
    ("norm", "encoder.layers.{}.layer_norm1", "blocks/norm1", "D"),
    ("qkv", "encoder.layers.{}.self_attn.qkv", "blocks/attention", "3D D"),
    ("dense", "encoder.layers.{}.self_attn.projection", "blocks/attention/out", "D D"),
    ("norm", "encoder.layers.{}.layer_norm2", "blocks/norm2", "D"),
    ("dense", "encoder.layers.{}.mlp.fc1", "blocks/mlp/up", "F D"),
    ("dense", "encoder.layers.{}.mlp.fc2", "blocks/mlp/down", "D F"),
    ("norm", "post_layernorm", "norm", "D"),
)
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
    ("sep_id", "text_config", "sep_token_id", 102),  # not eos_token_id, whose class default 2 is not the end token
    ("bos_id", "text_config", "bos_token_id", 30522),
    ("cls_id", "text_config", "cls_token_id", 101),  # cls_ and enc_token_id are not keys of transformers
    ("enc_id", "text_config", "enc_token_id", 30523),
    ("dropout", "text_config", "hidden_dropout_prob", 0.0),
)
FIXED = (
    ("", "model_type", ("blip",)),
    ("vision_config", "hidden_act", ("gelu",)),
    ("text_config", "hidden_act", ("gelu",)),
)
KINDS = ("BlipForConditionalGeneration", "BlipForQuestionAnswering")  # without and with a question encoder


def hf_config(config: BlipConfig) -> dict:
    """config.json of a transformers BLIP with this architecture: everything that `_read_config` reads, without defaults."""
    raw, tied = config_json.written(config, CONFIG, FIXED), not config.untied_head
    raw["vision_config"] |= {"model_type": "blip_vision_model", "attention_dropout": 0.0}
    raw["text_config"] |= {
        "model_type": "blip_text_model", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "is_decoder": True, "encoder_hidden_size": config.vision_width, "eos_token_id": config.sep_id,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    kind = KINDS[config.question_encoder]
    return raw | {"architectures": [kind], "dtype": "float32", "tie_word_embeddings": tied, "label_smoothing": 0.0}


def start_question_encoder(config: BlipConfig, rules: Iterable[Rule]) -> tuple[BlipConfig, dict[str, str]]:
    """Captioning config -> (config for VQA, {leaf of the question encoder: leaf of the decoder that initializes it}).

    The encoder gets the decoder's embeddings and blocks; the answer decoder keeps its own. Its cross-attention, trained on
    image tokens, now reads question states, so both must have the same width.
    """
    if config.vision_width != config.text_width:
        raise ValueError(
            "text_decoder/blocks/cross_attention/{key,value}/kernel cannot be initialized from the captioning checkpoint: "
            f"it has image tokens of width {config.vision_width}, VQA has question states of width {config.text_width}; "
            "use a checkpoint with equal widths or a VQA checkpoint"
        )
    leaves = [leaf for rule in rules for leaf in rule.leaves if leaf.startswith("text_decoder/")]
    copies = {x.replace("text_decoder", "text_encoder"): x for x in leaves if not x.startswith("text_decoder/head/")}
    return dataclasses.replace(config, question_encoder=True), copies


def _read_config(path: Path, task: str | None) -> tuple[BlipConfig, dict]:
    raw = files.read_json(path)
    kinds = raw.get("architectures") or [KINDS[0]]
    if not set(kinds) <= set(KINDS):
        raise ValueError(f"{path}: architectures is {kinds}; supported: {', '.join(KINDS)}")
    asks = kinds[0] == KINDS[1] if task is None else task == "vqa"
    config, defaults = config_json.read(path, raw, BlipConfig, CONFIG, FIXED, question_encoder=asks)
    for field, section, key, _ in CONFIG:
        known = f"{section}.{key}" not in defaults  # otherwise the id comes from the tokenizer
        if field in used_ids(config) and known and getattr(config, field) >= config.vocab_size:
            raise ValueError(
                f"{path}: {section}.{key} {getattr(config, field)} is outside the vocabulary of {config.vocab_size} tokens"
            )
    return config, defaults


def used_ids(config: BlipConfig) -> tuple[str, ...]:
    """The special token ids that a model with this configuration uses."""
    return ("pad_id", "sep_id", "bos_id", *(("enc_id",) if config.question_encoder else ()))


class _Converter(Converter):
    """VQA needs the question encoder, captioning must not have it."""

    kind, settings = Blip, BlipConfig
    head = next(iter(TIED.items()))

    def table(self, config: BlipConfig) -> Table:
        c = config
        vision = {"D": c.vision_width, "F": c.vision_mlp, "P": 1 + c.n_patches, "p": c.patch_size}
        text = {"D": c.text_width, "F": c.text_mlp, "C": c.vision_width, "V": c.vocab_size, "T": c.max_positions}
        answer = text | {"C": c.text_width if c.question_encoder else c.vision_width}
        rules = convert.rules(VISION, "vision_model.", "vision/", vision, range(c.vision_layers))
        rules += convert.rules(TEXT, "text_decoder.bert.", "text_decoder/", answer, range(c.text_layers))
        rules += convert.rules((*HEAD, UNTIED) if c.untied_head else HEAD, "text_decoder.", "text_decoder/", answer)
        if c.question_encoder:
            rules += convert.rules(TEXT, "text_encoder.", "text_encoder/", text, range(c.text_layers))
        tied = {second: first for second, first in TIED.items() if not (c.untied_head and second.endswith("weight"))}
        return Table(rules, RENAMES, DROPPED, tied)

    def for_task(self, config: BlipConfig, task: str | None, source: str) -> BlipConfig:
        config = super().for_task(config, task, source)
        if task == "vqa" and not config.question_encoder:
            raise ValueError(f"{source} has no question encoder, which task 'vqa' needs")
        return config if task is None else dataclasses.replace(config, question_encoder=task == "vqa")

    def read_config(self, directory: Path, task: str | None) -> tuple[BlipConfig, dict]:
        super().for_task(None, task, "")
        with files.reading(directory / "config.json", "is not a BLIP configuration"):
            return _read_config(directory / "config.json", task)

    def stored(self, tensors: Checkpoint, config: Any, task: str | None) -> tuple[Any, Table, dict[str, str]]:
        """`task='vqa'` on a captioning checkpoint initializes the question encoder, and the decoder that reads its states, from
        the captioning decoder."""
        has_encoder = any(name.startswith("text_encoder.") for name in tensors)
        config = dataclasses.replace(
            config, question_encoder=has_encoder, untied_head=self.has_own_head(tensors, config)
        )
        if has_encoder and task == "captioning":
            raise ValueError(
                f"{tensors.source}: the decoder of a VQA checkpoint needs question states; use a captioning checkpoint"
            )
        table, copies = self.table(config), {}
        if task == "vqa" and not has_encoder:
            config, copies = start_question_encoder(config, table.rules)
        return config, table, copies

    def with_tokenizer(
        self, config: BlipConfig, directory: Path, defaults: Iterable[str]
    ) -> tuple[BlipConfig, BlipTokenizer | None]:
        if not any((directory / name).exists() for name in TOKENIZER_FILES):
            return config, None
        tokenizer = BlipTokenizer.from_file(directory)
        spare = 0 if config.question_encoder else 1  # a captioning model does not use [ENC], which may have no row
        if len(tokenizer) - spare * (tokenizer.enc_id == len(tokenizer) - 1) > config.vocab_size:
            raise ValueError(
                f"{directory}: {len(tokenizer)} tokens exceed vocab_size {config.vocab_size} of the weights"
            )
        ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id", "bos_id", "enc_id")}
        absent = {field for field, section, key, _ in CONFIG if f"{section}.{key}" in defaults}
        for field in used_ids(config):
            if field not in absent and getattr(config, field) != ids[field]:
                token = tokenizer.vocabulary[ids[field]]
                raise ValueError(
                    f"{directory}: {field} is {getattr(config, field)} in the configuration, but {token} is {ids[field]} in "
                    f"the tokenizer; use the tokenizer that the weights were trained with"
                )
        return dataclasses.replace(config, **ids), tokenizer

    def hf(self, model: Blip) -> BlipInTransformers:
        c = model.config
        attention = "text_decoder/blocks/self_attention"
        decoder = Decoder("text_decoder", attention, c.text_width, c.text_heads, c.text_layers)
        return BlipInTransformers(model, self.table(c), HEAD_PLACE, decoder, hf_config(c))


CONVERTER = _Converter()
