"""What BLIP and mPLUG share: a text decoder that attends to a context of image tokens or of states of image and question.

A subclass says how the context is made: `stages`, `stage`, and in which of them the decoder reads.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.models.base import Cache, Context, VisionLanguageModel
from jaxpeft.models.bert import BertConfig, TextStack
from jaxpeft.models.vit import Vision, VitConfig, normalised


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(VitConfig, BertConfig):
    """The fields of an image tower and of text stacks."""

    most: ClassVar = VitConfig.most | BertConfig.most

    @property
    def asks(self) -> bool:
        """Whether the model reads questions."""
        raise NotImplementedError


# Mesh axes of the last dimensions of leaves: heads, hidden units and words over 'tensor', as in Megatron; the other side of
# every matrix over 'fsdp'; a stack's L is never sharded. '@': adapter parameters (see jaxpeft/training/sharding.py).
SHARDING = (
    (r"(query|key|value|mlp/up)/kernel$", ("fsdp", "tensor")),
    (r"(query|key|value|mlp/up)/bias$", ("tensor",)),
    (r"(attention/out|mlp/down)/kernel$", ("tensor", "fsdp")),
    (r"(head/(dense|vocabulary)|projector/dense)/kernel$", ("fsdp", "tensor")),
    (r"embed/word$", ("tensor", "fsdp")),
    (r"(head/bias|head/dense/bias|projector/dense/bias)$", ("tensor",)),
    (r"/new_(word|bias|matrix)$", ()),
    (r"(position|token_type|patch/kernel|itm/kernel)$", (None, "fsdp")),
    (r"@kv$", ("tensor", None)),
    (r"@(sublayer|block|embed)$", ("fsdp",)),
    (r"(norm\d?/(bias|scale)|norm_in/(bias|scale)|(out|down|patch|itm)/bias|class_embedding)$", ()),
)
TARGETS = {
    "text": r"^text_",
    "text.stack": r"^text_(encoder|decoder)$",
    "text.attention": r"^text_.*attention$",
    "text.attention.qv": r"^text_.*attention/(query|value)$",
    "text.attention.kv_mlp.down": r"^text_.*(attention/(key|value)|mlp/down)$",
    "text.blocks": r"^text_.*blocks/",
    "text.mlp": r"^text_.*mlp$",
    "vision": r"^vision",
    "head": r"^text_decoder/head/vocabulary$",
}
TRAINED = {  # groups of base leaves
    "head.transform": r"^params/text_decoder/head/(?!vocabulary/)",
    "new_words": r"^params/text_.*/new_(word|bias|matrix)$",
}


class EncoderDecoder(VisionLanguageModel):
    """Image tower and text decoder; see the subclasses."""

    config: EncoderDecoderConfig
    sharding: ClassVar = SHARDING
    targets: ClassVar = TARGETS | TRAINED

    @property
    def tied(self) -> dict[str, str]:
        return {} if self.config.untied_head else {"text_decoder/head/vocabulary": "text_decoder/embed/word"}

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("vqa",) if self.config.asks else ("captioning",)

    @property
    def positions(self) -> int:
        return self.config.max_positions

    def setup(self):
        self.vision = Vision(self.config)
        self.text_decoder = TextStack(self.config, self.config.text_layers, head=True)

    def encode_image(self, image_BYXC):
        """uint8 images, or normalised floats -> image tokens (B, 1 + P, vision_width)."""
        return self.vision(normalised(image_BYXC, self.config))

    def context(self, batch):
        """From the output of the last stage, for which missing ones are computed."""
        memory_BSD = self._output(dict(batch), self.stages[-1].name)
        return Context(memory_BSD, self.memory_mask(batch), jnp.zeros(memory_BSD.shape[0], jnp.int32))

    def memory_mask(self, batch) -> jax.Array | None:
        """The mask (B, S) of what the decoder attends to; None if all of it is real."""
        raise NotImplementedError

    def _output(self, batch: dict, name: str):
        """The output of a stage: the batch's, or computed from those that it reads, which are added to the batch."""
        if name not in batch:
            reads = next(stage.reads for stage in self.stages if stage.name == name)
            for one in reads:
                if any(stage.name == one for stage in self.stages):
                    self._output(batch, one)
            batch[name] = self.stage(batch, name)
        return batch[name]

    def score(self, tokens_RT, context):
        return self.text_decoder(tokens_RT, None, context.memory, context.mask_BS, causal=True)[0]

    def masked_lm(self, tokens_BT):
        """The decoder as a bidirectional masked language model without image -> logits_BTV. For text-only warm-up."""
        return self.text_decoder(tokens_BT, tokens_BT != self.config.pad_id, None, None, causal=False)[0]

    def start(self, tokens_RS, context, room):
        logits_RSV, cache = self.text_decoder(
            tokens_RS, None, context.memory, context.mask_BS, causal=True, cache_length=room
        )
        return logits_RSV[:, -1], _cache(cache)

    def step(self, token_R, cache, context):
        cache = cache.shared | {"layers": cache.rows | cache.shared["layers"]}
        logits_R1V, cache = self.text_decoder(token_R[:, None], None, None, context.mask_BS, causal=True, cache=cache)
        return logits_R1V[:, -1], _cache(cache)

    def example(self):
        size = self.config.image_size
        image_BYXC = jnp.zeros((1, size, size, 3), jnp.uint8)
        return {"image": image_BYXC, "prompt": jnp.ones((1, 2), jnp.int32), "tokens": jnp.ones((1, 1, 2), jnp.int32)}


def _cache(cache: dict) -> Cache:
    """Split the text stack's cache for beam search: keys and values of texts are per row, those of the context are shared."""
    layers = cache["layers"]
    return Cache({"self": layers["self"]}, cache | {"layers": {"cross": layers["cross"]}})
