"""What the converters of BLIP and mPLUG share: tensor names of BERT's text stacks (see `convert.rules` for the lines), tasks
and image sizes."""

import dataclasses
from typing import Any, TypeVar

import numpy as np

from jaxpeft.inputs import images
from jaxpeft.models.convert import Change

POSITION = "vision/position"
TASKS = ("captioning", "vqa")
C = TypeVar("C", bound=Any)  # a configuration

EMBEDDINGS = (
    ("leaf", "embeddings.word_embeddings.weight", "embed/word", "V D"),
    ("leaf", "embeddings.position_embeddings.weight", "embed/position", "T D"),
    ("norm", "embeddings.LayerNorm", "embed/norm", "D"),
)
SELF_ATTENTION = (
    ("dense", "encoder.layer.{}.attention.self.query", "blocks/self_attention/query", "D D"),
    ("dense", "encoder.layer.{}.attention.self.key", "blocks/self_attention/key", "D D"),
    ("dense", "encoder.layer.{}.attention.self.value", "blocks/self_attention/value", "D D"),
    ("dense", "encoder.layer.{}.attention.output.dense", "blocks/self_attention/out", "D D"),
    ("norm", "encoder.layer.{}.attention.output.LayerNorm", "blocks/self_norm", "D"),
)
CROSS_ATTENTION = (
    ("dense", "encoder.layer.{}.crossattention.self.query", "blocks/cross_attention/query", "D D"),
    ("dense", "encoder.layer.{}.crossattention.self.key", "blocks/cross_attention/key", "D C"),
    ("dense", "encoder.layer.{}.crossattention.self.value", "blocks/cross_attention/value", "D C"),
    ("dense", "encoder.layer.{}.crossattention.output.dense", "blocks/cross_attention/out", "D D"),
    ("norm", "encoder.layer.{}.crossattention.output.LayerNorm", "blocks/cross_norm", "D"),
)
MLP = (
    ("dense", "encoder.layer.{}.intermediate.dense", "blocks/mlp/up", "F D"),
    ("dense", "encoder.layer.{}.output.dense", "blocks/mlp/down", "D F"),
    ("norm", "encoder.layer.{}.output.LayerNorm", "blocks/mlp_norm", "D"),
)
TEXT = (*EMBEDDINGS, *SELF_ATTENTION, *CROSS_ATTENTION, *MLP)
HEAD = (
    ("dense", "cls.predictions.transform.dense", "head/dense", "D D"),
    ("norm", "cls.predictions.transform.LayerNorm", "head/norm", "D"),
    ("leaf", "cls.predictions.bias", "head/bias", "V"),
)
UNTIED = ("matrix", "cls.predictions.decoder", "head/vocabulary", "V D")  # if it is not the word embedding
TIED = {  # second name of a tensor -> the name that is kept
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
DROPPED = ((r"embeddings\.position_ids$", "a buffer: the numbers 0, 1, 2, ..."),)


def asks(task: str | None, name: str) -> bool | None:
    """Whether a task needs the parts of a model that read questions; None for None. `name`: of the model, for the error."""
    if task not in (None, *TASKS):
        raise ValueError(
            f"task is {task!r}; {name} supports {' or '.join(map(repr, TASKS))}, or None for that of the checkpoint"
        )
    return None if task is None else task == "vqa"


def resized(config: C, image_size: int | None, mode: str) -> tuple[C, dict[str, Change]]:
    """(config for another image size, changes of leaves as they are read). `mode`: see `images.resize_positions`."""
    if image_size in (None, config.image_size):
        return config, {}
    if image_size % config.patch_size or image_size < config.patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {config.patch_size}")
    side = image_size // config.patch_size
    change = lambda position_PD: images.resize_positions(np.asarray(position_PD, np.float32), side, mode)  # noqa: E731
    return dataclasses.replace(config, image_size=image_size), {POSITION: change}
