"""What PaliGemma and SmolVLM share: a decoder reads image tokens and a prompt as the prefix of a text.

    image -> SigLIP -> projector -> image tokens -.
    prompt -> words ------------------------------+-> prefix -> Decoder.read -> context -> score(text)

A subclass says how image tokens are made of the tower's (`project`) and where they stand in the prompt (`joined`).
"""

import dataclasses
from typing import ClassVar, Self

import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.models.base import Stage, VisionLanguageModel
from jaxpeft.models.decoder import Decoder, DecoderConfig
from jaxpeft.models.siglip import Siglip, SiglipConfig
from jaxpeft.models.vit import normalised


@dataclasses.dataclass(frozen=True)
class PrefixLMConfig(SiglipConfig, DecoderConfig):
    """The fields of an image tower and of a decoder."""

    most: ClassVar = SiglipConfig.most | DecoderConfig.most

    @property
    def n_image_tokens(self) -> int:
        """The number of image tokens in a prefix."""
        return self.n_patches


# As in encoder_decoder.py. The few key and value heads of the decoder are not split over 'tensor': there may be only one.
SHARDING = (
    (r"decoder/.*(key|value)/kernel$", ("fsdp", None)),
    (r"(query|key|value|mlp/(gate|up))/kernel$", ("fsdp", "tensor")),
    (r"(query|key|value|mlp/up)/bias$", ("tensor",)),
    (r"(attention/out|mlp/down)/kernel$", ("tensor", "fsdp")),
    (r"(head|projector)/kernel$", ("fsdp", "tensor")),
    (r"projector/bias$", ("tensor",)),
    (r"embed/word$", ("tensor", "fsdp")),
    (r"(position|patch/kernel)$", (None, "fsdp")),
    (r"vision/.*@kv$", ("tensor", None)),
    (r"@(sublayer|block|embed)$", ("fsdp",)),
    (r"(norm\d?/(bias|scale)|(out|down|patch)/bias|@kv)$", ()),
)
TARGETS = {
    "text": r"^decoder",
    "text.stack": r"^decoder$",
    "text.attention": r"^decoder.*attention$",
    "text.attention.qv": r"^decoder.*attention/(query|value)$",
    "text.attention.kv_mlp.down": r"^decoder.*(attention/(key|value)|mlp/down)$",
    "text.blocks": r"^decoder.*blocks/",
    "text.mlp": r"^decoder.*mlp$",
    "vision": r"^vision",
    "projector": r"^projector",
    "head": r"^decoder/head$",
    "head.transform": r"^params/decoder/norm/",  # base leaves: what stands before the vocabulary matrix
}


class PrefixLM(VisionLanguageModel):
    """Image tower, projector and decoder; see the subclasses."""

    config: PrefixLMConfig
    stages: ClassVar = (Stage("image_tokens", ("image",), "image"),)
    sharding: ClassVar = SHARDING
    targets: ClassVar = TARGETS
    tasks: ClassVar = ("captioning", "vqa")
    narrow: ClassVar = r"(kernel|embed/word)$"
    causal: ClassVar[bool]  # whether prefixes are read from left to right

    @property
    def tied(self) -> dict[str, str]:
        return {} if self.config.untied_head else {"decoder/head": "decoder/embed/word"}

    @property
    def word_scale(self) -> float:
        return self.config.word_scale

    @property
    def positions(self) -> int:
        return self.config.max_positions - self.config.n_image_tokens

    @nn.nowrap
    def for_task(self, task: str) -> Self:
        if task not in self.tasks:
            raise ValueError(f"task is {task!r}; {type(self).__name__} supports {' and '.join(self.tasks)}")
        return self

    def setup(self):
        self.vision = Siglip(self.config)
        self.decoder = Decoder(self.config, self.causal)

    def project(self, x_BPD):
        """The tower's tokens (B, n_patches, vision_width) -> image tokens (B, n_image_tokens, text_width)."""
        raise NotImplementedError

    def joined(self, image_BPD, words_BQD, prompt_BQ):
        """Image tokens, embeddings of the prompt and its ids -> (prefix (B, S, D), True at its real entries (B, S))."""
        raise NotImplementedError

    def stage(self, batch, name):
        return self.project(self.vision(normalised(batch["image"], self.config)))

    def context(self, batch):
        image_BPD = batch["image_tokens"] if "image_tokens" in batch else self.stage(batch, "image_tokens")
        words_BQD = self.decoder.words(batch["prompt"])
        return self.decoder.read(*self.joined(image_BPD, words_BQD, batch["prompt"]))

    def score(self, tokens_RT, context):
        return self.decoder.score(tokens_RT, context)

    def start(self, tokens_RS, context, room):
        return self.decoder.start(context, room)

    def step(self, token_R, cache, context):
        return self.decoder.step(token_R, cache, context)

    def example(self):
        size = self.config.image_size
        image_BYXC = jnp.zeros((1, size, size, 3), jnp.uint8)
        prompt_BQ = jnp.full((1, 2), self.config.pad_id + 1, jnp.int32)
        return {"image": image_BYXC, "prompt": prompt_BQ, "tokens": jnp.ones((1, 1, 3), jnp.int32)}
