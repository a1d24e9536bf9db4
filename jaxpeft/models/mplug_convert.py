"""mPLUG checkpoints: names and layout of the release (X-PLUG/mPLUG, and modelscope's copy) <-> our parameter tree.

A base is a directory or a bare file of weights:

    DIR/config.yaml, DIR/config_bert.json, DIR/pytorch_model.bin, DIR/vocab.txt     as modelscope publishes mPLUG
    DIR/mplug_base.pth, DIR/vocab.txt                                               as the release does: base=DIR/mplug_base.pth

The vocabulary is that of bert-base-uncased. A bare file is one of `KINDS`, which its shapes tell; `kind` must agree with them.
Both layouts of the release are read: that of pre-training, whose names contain 'fusion.' and 'bert.' once more, and that of
fine-tuning. Tensors that a task does not read are dropped by the rules below; any other is an error.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxpeft import tree
from jaxpeft.inputs.tokenizer import FILES as TOKENIZER_FILES
from jaxpeft.inputs.tokenizer import Tokenizer
from jaxpeft.models import bert_convert, config_json, convert
from jaxpeft.models.convert import Checkpoint, Converter, Table
from jaxpeft.models.mplug import KINDS, Mplug, MplugConfig
from jaxpeft.runtime import files

VISION = (
    ("leaf", "class_embedding", "class_embedding", "D"),
    ("leaf", "positional_embedding", "position", "P D"),
    ("matrix", "conv1", "patch", "D 3 p p"),
    ("norm", "ln_pre", "norm_in", "D"),
    ("norm", "transformer.resblocks.{}.ln_1", "blocks/norm1", "D"),
    ("qkv", "transformer.resblocks.{}.attn.in_proj_*", "blocks/attention", "3D D"),
    ("dense", "transformer.resblocks.{}.attn.out_proj", "blocks/attention/out", "D D"),
    ("norm", "transformer.resblocks.{}.ln_2", "blocks/norm2", "D"),
    ("dense", "transformer.resblocks.{}.mlp.c_fc", "blocks/mlp/up", "F D"),
    ("dense", "transformer.resblocks.{}.mlp.c_proj", "blocks/mlp/down", "D F"),
    ("norm", "ln_post", "norm", "D"),
)
PROJECTOR = (("dense", "visn_fc", "dense", "D C"), ("norm", "visn_layer_norm", "norm", "D"))
EMBEDDINGS = (
    *bert_convert.EMBEDDINGS,
    ("leaf", "embeddings.token_type_embeddings.weight", "embed/token_type", "2 D"),
)
ENCODER = (*EMBEDDINGS, *bert_convert.SELF_ATTENTION, *bert_convert.MLP)
DECODER = (*EMBEDDINGS, *bert_convert.SELF_ATTENTION, *bert_convert.CROSS_ATTENTION, *bert_convert.MLP)
CROSS = (*bert_convert.SELF_ATTENTION, *bert_convert.CROSS_ATTENTION, *bert_convert.MLP)
JOINT = (*bert_convert.SELF_ATTENTION, *bert_convert.MLP)
RENAMES = (
    (r"^(module\.)?model\.", ""),  # modelscope's fine-tuned files
    (r"^(text_encoder|fusion_encoder)\.((fusion|bert)\.)+", r"\1."),  # the layout of pre-training
)
DROPPED = (
    *bert_convert.DROPPED,
    (r"^\w+_m\.", "a momentum copy, for distillation; its weight in the release's loss is 0"),
    (r"^visual_encoder\.(?!visual\.)", "CLIP's text tower"),
    (r"^visual_encoder\.visual\.proj$", "CLIP's projection; the text stacks read the tokens before it"),
    (r"^fusion_encoder\.embeddings\.", "the fusion stack begins with text states"),
    (r"^(text|fusion)_encoder\.(pooler|cls)\.", "a head of pre-training"),
    (
        r"^(vision_proj|text_proj|itm_head|temp|image_queue|text_queue|idx_queue|queue_ptr|ptr_queue)\b",
        "contrast and matching",
    ),
)
# config_bert.json (see config_json.py), with the defaults of BERT-base
BERT = (
    ("vocab_size", "", "vocab_size", 30522),
    ("text_width", "", "hidden_size", 768),
    ("text_heads", "", "num_attention_heads", 12),
    ("text_mlp", "", "intermediate_size", 3072),
    ("max_positions", "", "max_position_embeddings", 512),
    ("text_eps", "", "layer_norm_eps", 1e-12),
    ("pad_id", "", "pad_token_id", 0),
    ("text_layers", "", "text_decode_layers", 12),
    ("encoder_layers", "", "text_encoder_layers", 6),
    ("fusion_layers", "", "fusion_layers", 6),
    ("stride", "", "stride_layer", 3),
)
FIXED = (("", "hidden_act", ("gelu",)),)
# (our field, key of config.yaml): what `clip_name` does not say
TOWER = (
    ("image_size", "image_res"),
    ("vision_width", "clip_vision_width"),
    ("vision_layers", "clip_vision_layers"),
    ("patch_size", "clip_vision_patch_size"),
)
CLIP = {"ViT-B-16": KINDS["mplug-base"], "ViT-L-14": KINDS["mplug-large"]}


def first_layer(names: Iterable[str], config: MplugConfig) -> int:
    """The number of the first fusion layer that acts: the last `fusion_layers` of the stored ones do."""
    layer = re.compile(r"(?:^|\.)fusion_encoder\.(?:(?:fusion|bert)\.)*encoder\.layer\.(\d+)\.")
    found = map(layer.search, names)
    n_stored = 1 + max((int(one[1]) for one in found if one), default=config.fusion_layers - 1)
    return n_stored - config.fusion_layers


class _Converter(Converter):
    """VQA needs text encoder and fusion stack, captioning must not have them."""

    kind, settings, resize_mode = Mplug, MplugConfig, "bilinear"

    def table(self, config: MplugConfig, first: int = 6) -> Table:
        """`first`: the number in the checkpoint of the first fusion layer that acts; BERT's layers before it are stored and not
        used."""
        c = config
        vision = {"D": c.vision_width, "F": c.vision_mlp, "P": 1 + c.n_patches, "p": c.patch_size}
        text = {"D": c.text_width, "F": c.text_mlp, "C": c.text_width, "V": c.vocab_size, "T": c.max_positions, "2": 2}
        head = (*bert_convert.HEAD, bert_convert.UNTIED) if c.untied_head else bert_convert.HEAD
        rules = convert.rules(VISION, "visual_encoder.visual.", "vision/", vision, range(c.vision_layers))
        if c.vision_width != c.text_width:
            rules += convert.rules(PROJECTOR, "", "projector/", text | {"C": c.vision_width})
        rules += convert.rules(DECODER, "text_decoder.bert.", "text_decoder/", text, range(c.text_layers))
        rules += convert.rules(head, "text_decoder.", "text_decoder/", text)
        dropped = list(DROPPED)
        if c.fusion:
            rules += convert.rules(ENCODER, "text_encoder.", "text_encoder/", text, range(c.encoder_layers))
            for i, (kind, layers) in enumerate(c.runs):
                numbers = [first + layer for layer in layers]
                lines = CROSS if kind == "cross" else JOINT
                rules += convert.rules(lines, "fusion_encoder.", f"text_fusion/{kind}{i}/", text, numbers)
                if kind == "joint":
                    dropped.append(
                        (rf"^fusion_encoder\.encoder\.layer\.{numbers[0]}\.crossattention\.", "a joint layer has none")
                    )
            if first:
                before = "|".join(map(str, range(first)))
                dropped.append((rf"^fusion_encoder\.encoder\.layer\.({before})\.", "a layer before those that act"))
        else:
            dropped.append((r"^(text_encoder|fusion_encoder)\.", "captioning reads neither text encoder nor fusion"))
        tied = {a: b for a, b in bert_convert.TIED.items() if not (c.untied_head and a.endswith("weight"))}
        return Table(rules, RENAMES, tuple(dropped), tied)

    def for_task(self, config: MplugConfig, task: str | None, source: str) -> MplugConfig:
        config = super().for_task(config, task, source)
        if task == "vqa" and not config.fusion:
            raise ValueError(f"{source} has no text encoder and no fusion stack, which task 'vqa' needs")
        return config if task is None else dataclasses.replace(config, fusion=task == "vqa")

    def claims(self, path: Path) -> bool:
        return path.suffix in (".pth", ".bin", ".pt") and path.is_file() or (path / "config_bert.json").is_file()

    def read_config(self, directory: Path, task: str | None) -> tuple[MplugConfig, dict]:
        config, defaults = read_config(directory)
        return self.for_task(config, task, str(directory)), defaults

    def stored(self, tensors: Checkpoint, config: Any, task: str | None) -> tuple[Any, Table, dict[str, str]]:
        return config, self.table(config, first_layer(tensors, config)), {}

    def with_processor(self, config: MplugConfig, directory: Path, image_size: int | None) -> MplugConfig:
        return config  # a checkpoint has no settings of images

    def with_tokenizer(
        self, config: MplugConfig, directory: Path, defaults: Iterable[str]
    ) -> tuple[MplugConfig, Tokenizer | None]:
        directory = directory.parent if directory.is_file() else directory
        if not any((directory / name).exists() for name in TOKENIZER_FILES):
            return config, None
        tokenizer = Tokenizer.from_file(directory)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"{directory}: {len(tokenizer)} tokens exceed vocab_size {config.vocab_size} of the weights"
            )
        ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id")}
        return dataclasses.replace(config, **ids), tokenizer


CONVERTER = _Converter()


def to_release(params: tree.Tree, config: MplugConfig, first: int = 6) -> dict[str, np.ndarray]:
    """The tensors of a model in the layout of fine-tuning; tied tensors under both names. The release and modelscope load it
    with strict=False: what they never read is not written. `first`: the number of the first fusion layer."""
    table = CONVERTER.table(config, first)
    tensors = convert.written(tree.flatten(params), table)
    return tensors | {second: tensors[first] for second, first in table.tied.items()}


def read_config(path: Path) -> tuple[MplugConfig, dict]:
    """(configuration with fusion stack unless the directory says captioning, keys absent in its files with their defaults)."""
    return (_kind_of(path), {}) if path.is_file() else _read_directory_config(path)


def _kind_of(path: Path) -> MplugConfig:
    """The configuration of a bare file: one of KINDS by the shape of its patch embedding, its image size by its positions."""
    tensors = convert.opened(path.parent, (path.name,))
    shapes = {re.sub(*RENAMES[0], name): tuple(x.shape) for name, x in tensors.items()}
    found = shapes.get("visual_encoder.visual.conv1.weight")
    for config in KINDS.values():
        if found == (config.vision_width, 3, config.patch_size, config.patch_size):
            n_positions = shapes.get("visual_encoder.visual.positional_embedding", (1,))[0]
            side = math.isqrt(n_positions - 1)
            if side < 1 or side**2 != n_positions - 1:
                raise ValueError(f"{path}: {n_positions} image positions; expected one and a square number")
            return dataclasses.replace(config, image_size=side * config.patch_size, fusion=True)
    raise ValueError(
        f"{path}: visual_encoder.visual.conv1.weight has the shape {found}, which is none of {', '.join(KINDS)}; put the "
        f"weights as pytorch_model.bin into a directory with config.yaml and config_bert.json, and give that directory"
    )


def _read_directory_config(directory: Path) -> tuple[MplugConfig, dict]:
    path = directory / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{path} is missing; it belongs beside config_bert.json in a directory of mPLUG")
    with files.reading(path, "is not a configuration of mPLUG"):
        said = yaml.safe_load(path.read_text("utf-8"))
        if not isinstance(said, dict):
            raise ValueError(f"{path}: expected keys and values, such as image_res: 384")
        name = str(said.get("clip_name", "ViT-L-14"))
        if name not in CLIP:
            raise ValueError(f"{path}: clip_name is {name!r}; choose one of {', '.join(CLIP)}")
        fields = {field: said.get(key, getattr(CLIP[name], field)) for field, key in TOWER}
        fields["vision_heads"] = said.get("clip_vision_heads", fields["vision_width"] // 64)
        fields["vision_mlp"] = 4 * fields["vision_width"]
        fields["fusion"] = said.get("task") != "image-captioning"
    path = directory / "config_bert.json"
    return config_json.read(f"{path} and config.yaml", files.read_json(path), MplugConfig, BERT, FIXED, **fields)
