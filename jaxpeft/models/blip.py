"""BLIP (Li et al. 2022, arXiv 2201.12086): a ViT, a text decoder and, for VQA, a question encoder.

Captioning:  image -> encode_image -> score(caption)
VQA:         image -> encode_image -> encode_question -> score(answer), which attends to the question states only

The ViT is pre-norm, the text stacks are post-norm like BERT; every text layer has self-attention, cross-attention and an
MLP. The vocabulary matrix is tied to the word embedding. Stages are separate methods, so a frozen one can be computed once.
All widths, epsilons and head counts are explicit: a wrong epsilon changes logits by 1e-4 but no shape.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpeft.adapt import sites
from jaxpeft.inputs import images
from jaxpeft.inputs.processor import Processor, Template
from jaxpeft.inputs.tokenizer import clean_caption, clean_question
from jaxpeft.models.base import Cache, Context, Stage, VisionLanguageModel
from jaxpeft.models.blip_tokens import BlipTokenizer
from jaxpeft.models.layers import Attention, Dense, LayerNorm, Mlp, TiedDense, dropout
from jaxpeft.ops import by_rows

_INIT = nn.initializers.normal(0.02)
UNROLLED = 4  # layers
REMAT = {"none": None, "full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def position_init(key, shape, dtype=jnp.float32):
    """(1 + side^2, D) position embeddings that distinguish rows and columns from the first step: sines and cosines of both,
    with wavelengths of 1 to 20 grid sides, centred over the patches; noise for the class token and the last D mod 4 columns.

    Used only to train from scratch (pre-training and `init=scratch`). In a small tower the noise of std 0.02 that BLIP adds to
    an ImageNet ViT is too weak beside patches whose brightness alone has ten times its norm: a base that was pre-trained from
    it could not tell left from right, unlike this one (docs/results/scenes.md).
    """
    side, waves = math.isqrt(shape[0] - 1), shape[1] // 4
    waves_F = 2 * np.pi / side / 20 ** (np.arange(waves) / waves)
    angles_PF = [steps.reshape(-1, 1) * waves_F for steps in np.indices((side, side))]
    position_PD = np.concatenate([wave(angle) for angle in angles_PF for wave in (np.sin, np.cos)], axis=1)
    return _INIT(key, shape, dtype).at[1:, : 4 * waves].set((position_PD - position_PD.mean(0)).astype(dtype))


# upper limits, so that an untrusted config cannot exhaust memory; 1 << 20 for other fields
MOST = {"image_size": 4096, "vision_layers": 256, "text_layers": 256, "vision_width": 1 << 14, "text_width": 1 << 14}
MOST_PATCHES = 1 << 14


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """BLIP-base by default. `dropout` acts in the text stacks (BLIP trains with 0.1, transformers' default is 0)."""

    image_size: int = 384
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_mlp: int = 3072
    vision_eps: float = 1e-6
    vocab_size: int = 30524
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_mlp: int = 3072
    max_positions: int = 512
    text_eps: float = 1e-12
    pad_id: int = 0
    cls_id: int = 101
    sep_id: int = 102
    bos_id: int = 30522  # [DEC], the first token of the decoder
    enc_id: int = 30523  # [ENC], the first token of a question
    question_encoder: bool = False
    new_words: int = 0  # number of words, the last of the vocabulary, that were added; their rows are separate leaves
    untied_head: bool = False  # own vocabulary matrix, as in BLIPs that were fully fine-tuned with transformers 4.40
    image_mean: tuple = tuple(images.MEAN_C.tolist())  # per channel of pixels in [0, 1]: CLIP's, which BLIP keeps
    image_std: tuple = tuple(images.STD_C.tolist())
    image_resample: int = images.BICUBIC  # number of the Pillow filter that resizes images to squares
    dropout: float = 0.0
    dtype: str = "float32"
    unroll: int | None = None  # unroll stacks with at most this number of layers; None: UNROLLED
    remat: str = "none"  # what the backward pass recomputes: 'full', whole layers; 'dots', all but matrix products

    def __post_init__(self):
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, images.per_channel(name, getattr(self, name)))
        if self.image_resample not in images.FILTERS:
            raise ValueError(f"image_resample is {self.image_resample!r}; expected a Pillow filter, {images.FILTERS}")
        for name, kind in type(self).__annotations__.items():
            value, most = getattr(self, name), MOST.get(name, 1 << 20)
            least = 0 if name.endswith(("_id", "_resample", "new_words")) else 1
            if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (
                kind is bool
            ):
                raise ValueError(f"{name} is {value!r:.80}, expected {'an' if kind is int else 'a'} {kind.__name__}")
            if kind is int and not least <= value <= most:
                raise ValueError(f"{name} is {value:.3g}; it must be between {least} and {most:,}")
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width {width} is not divisible by {tower}_heads {heads}")
        if self.new_words >= self.vocab_size:
            raise ValueError(f"new_words is {self.new_words}; it must be below vocab_size {self.vocab_size}")
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}; choose one of {', '.join(REMAT)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.n_patches > MOST_PATCHES:
            raise ValueError(f"{self.n_patches:,} patches per image; the limit is {MOST_PATCHES:,}")

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def _stack(block, config: BlipConfig, n_layers: int):
    """Scan `block` over stacked layers: one compilation, one (L, ...) leaf per weight, a path without layer index.

    Short stacks are unrolled inside the scan: the tree is the same, and XLA on CPU then fuses operations of several layers
    (tiny ViT, batch 64, gradient: 309 ms instead of 462 ms). For twelve layers the step time is the same and compilation
    takes longer.
    """
    if config.remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT[config.remat])
    return nn.scan(
        block,
        variable_axes={True: 0},
        split_rngs={True: True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
        length=n_layers,
        unroll=n_layers if n_layers <= (UNROLLED if config.unroll is None else config.unroll) else 1,
    )


class PatchEmbed(nn.Module):
    """Patch embedding: the strided convolution of a ViT as one matrix product over non-overlapping patches. Site: linear."""

    config: BlipConfig

    @nn.compact
    def __call__(self, image_BYXC):
        c = self.config
        p, grid = c.patch_size, c.image_size // c.patch_size
        if image_BYXC.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"images are {image_BYXC.shape[1:]}; expected ({c.image_size}, {c.image_size}, 3)")
        kernel = self.param("kernel", _INIT, (p, p, 3, c.vision_width)).reshape(-1, c.vision_width)
        bias = self.param("bias", nn.initializers.zeros, (c.vision_width,))
        x = image_BYXC.astype(c.dtype).reshape(-1, grid, p, grid, p, 3).swapaxes(2, 3).reshape(-1, grid**2, p * p * 3)
        return sites.linear(self, x, kernel, bias)


class VisionBlock(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x))."""

    config: BlipConfig

    @nn.compact
    def __call__(self, x_BPD, *_):
        c = self.config
        norm = [LayerNorm(epsilon=c.vision_eps, dtype=c.dtype, name=f"norm{i}") for i in (1, 2)]
        attention = Attention(c.vision_width, c.vision_heads, dtype=c.dtype, name="attention")
        mlp = Mlp(c.vision_width, c.vision_mlp, c.dtype, name="mlp")
        x_BPD = sites.block(self, x_BPD)
        h_BPD = norm[0](x_BPD)
        x_BPD = x_BPD + attention(h_BPD, *attention.keys_values(h_BPD), stream=x_BPD.__add__)
        x_BPD = x_BPD + mlp(norm[1](x_BPD), stream=x_BPD.__add__)
        return x_BPD, None


class Vision(nn.Module):
    """image_BYXC (normalised float) -> tokens (B, 1 + P, D): class token and patches, all read by the text stacks."""

    config: BlipConfig

    @nn.compact
    def __call__(self, image_BYXC):
        c = self.config
        x_BPD = PatchEmbed(c, name="patch")(image_BYXC)
        cls_D = self.param("class_embedding", _INIT, (c.vision_width,)).astype(c.dtype)
        position_PD = self.param("position", position_init, (1 + c.n_patches, c.vision_width))
        cls_B1D = jnp.broadcast_to(cls_D, (x_BPD.shape[0], 1, c.vision_width))
        x_BPD = by_rows(jnp.concatenate([cls_B1D, x_BPD], axis=1) + position_PD.astype(c.dtype)[None])
        n_tokens = x_BPD.shape[1]
        x_BPD, _ = sites.embed(self, x_BPD, None)
        x_BPD, _ = _stack(VisionBlock, c, c.vision_layers)(c, name="blocks")(x_BPD, None, None, None, None, None)
        return LayerNorm(epsilon=c.vision_eps, dtype=c.dtype, name="norm")(x_BPD[:, -n_tokens:])


class TextBlock(nn.Module):
    """x = norm(x + self_attention); x = norm(x + cross_attention); x = norm(x + mlp).

    `cache` holds one layer's 'self' keys and values (B,N,S,H) up to a fixed length and, once computed, the 'cross' ones
    of the context. It is immutable; the updated cache is returned.
    """

    config: BlipConfig

    @nn.compact
    def __call__(self, x_BTD, cache, context_BSD, context_mask_BTS, mask_BTS, position):
        c = self.config

        def attention(name):
            return Attention(c.text_width, c.text_heads, c.dropout, c.dtype, name=name)

        def add(x, name):
            """y -> norm(x + y), for the residual add and for methods that read its result."""
            norm = LayerNorm(epsilon=c.text_eps, dtype=c.dtype, name=name)
            return lambda y: norm(x + y)

        attend, new_cache = attention("self_attention"), None
        k_BNSH, v_BNSH = attend.keys_values(x_BTD)
        if cache is not None:
            k_BNSH, v_BNSH = (
                _write(old, new, position) for old, new in zip(cache["self"], (k_BNSH, v_BNSH), strict=True)
            )
            new_cache = {"self": (k_BNSH, v_BNSH)}
        stream = add(x_BTD, "self_norm")
        x_BTD = stream(dropout(self, attend(x_BTD, k_BNSH, v_BNSH, mask_BTS, stream=stream), c.dropout))
        if context_BSD is not None or (cache and "cross" in cache):  # text-only otherwise, as in BERT
            attend = attention("cross_attention")
            if cache and "cross" in cache:
                cross = cache["cross"]
            else:
                cross = attend.keys_values(context_BSD)
                new_cache = new_cache and new_cache | {"cross": cross}
            stream = add(x_BTD, "cross_norm")
            x_BTD = stream(dropout(self, attend(x_BTD, *cross, context_mask_BTS, stream=stream), c.dropout))
        stream, mlp = add(x_BTD, "mlp_norm"), Mlp(c.text_width, c.text_mlp, c.dtype, name="mlp")
        x_BTD = stream(dropout(self, mlp(x_BTD, stream=stream), c.dropout))
        return x_BTD, new_cache


def _write(old_BNSH, new_BNTH, position):
    return jax.lax.dynamic_update_slice_in_dim(old_BNSH, new_BNTH.astype(old_BNSH.dtype), position, axis=2)


class Embed(nn.Module):
    """Word plus absolute position embedding, LayerNorm; no token types."""

    config: BlipConfig

    def setup(self):
        c = self.config
        self.word = self.param("word", _INIT, (c.vocab_size - c.new_words, c.text_width))
        if c.new_words:
            self.word = jnp.concatenate([self.word, self.param("new_word", _INIT, (c.new_words, c.text_width))])
        self.position = self.param("position", _INIT, (c.max_positions, c.text_width))
        self.norm = LayerNorm(epsilon=c.text_eps, dtype=c.dtype)

    def place(self, words_BTD, start):
        """Word embeddings (B, T, D) or (1, K, D) at positions start, start + 1, ..."""
        n_tokens = words_BTD.shape[1]
        if n_tokens > self.config.max_positions:
            raise ValueError(f"{n_tokens} tokens exceed max_positions {self.config.max_positions}")
        return self.norm(words_BTD + jax.lax.dynamic_slice_in_dim(self.position, start, n_tokens)[None])

    def __call__(self, tokens_BT, start):
        return dropout(self, self.place(self.word[tokens_BT], start), self.config.dropout), self.word


class Head(nn.Module):
    """States to logits (float32): dense, GELU, LayerNorm, the vocabulary matrix (tied or its own) and a free bias."""

    config: BlipConfig

    @nn.compact
    def __call__(self, x_BTD, word_VD):
        c = self.config
        h_BTD = nn.gelu(Dense(c.text_width, c.dtype, name="dense")(x_BTD), approximate=False)
        h_BTD = LayerNorm(epsilon=c.text_eps, dtype=c.dtype, name="norm")(h_BTD)
        bias_V = self.param("bias", nn.initializers.zeros, (c.vocab_size - c.new_words,))
        if c.new_words:
            bias_V = jnp.concatenate([bias_V, self.param("new_bias", nn.initializers.zeros, (c.new_words,))])
        if c.untied_head:
            logits_BTV = Dense(c.vocab_size - c.new_words, c.dtype, use_bias=False, name="vocabulary")(h_BTD)
            if c.new_words:
                matrix_ND = self.param("new_matrix", _INIT, (c.new_words, c.text_width))
                logits_BTV = jnp.concatenate([logits_BTV, h_BTD @ matrix_ND.T.astype(c.dtype)], axis=-1)
        else:
            logits_BTV = TiedDense(c.dtype, name="vocabulary")(h_BTD, word_VD)
        return logits_BTV.astype(jnp.float32) + bias_V[None, None]


class TextStack(nn.Module):
    """Embedding and scanned blocks; with `head`, logits instead of states. Sites: embed, and those of its layers."""

    config: BlipConfig
    head: bool

    @nn.compact
    def __call__(self, tokens_BT, mask_BT, context_BSD, context_mask_BS, causal, cache=None, cache_length=0):
        """-> (states_BTD or logits_BTV, cache). mask_BT: True at real tokens, None where all are.

        `cache_length` > 0 starts a cache for that number of tokens; with a cache only the last token's output is returned.
        Tokens that methods add in front get no position embedding and never leave the stack.
        """
        c = self.config
        start, embed = sites.shift(self), Embed(c, name="embed")
        if start + max(tokens_BT.shape[1], cache_length) > c.max_positions:
            raise ValueError(
                f"{start} shifted positions and {max(tokens_BT.shape[1], cache_length)} tokens exceed "
                f"max_positions {c.max_positions}"
            )
        if cache is not None:
            start += cache["index"] - cache["added"]
        x_BTD, word_VD = embed(tokens_BT, start)
        n_added = 0
        if cache is None:
            n_tokens = x_BTD.shape[1]
            x_BTD, mask_BT = sites.embed(self, x_BTD, mask_BT, lambda rows_KD: embed.place(rows_KD[None], 0)[0])
            n_added = x_BTD.shape[1] - n_tokens
        if cache_length:
            size = (c.text_layers, x_BTD.shape[0], c.text_heads, cache_length + n_added, c.text_width // c.text_heads)
            layers = {"self": (jnp.zeros(size, c.dtype), jnp.zeros(size, c.dtype))}
            cache = {"layers": layers, "index": jnp.int32(0), "added": jnp.int32(n_added)}
        layers, index = (None, 0) if cache is None else (cache["layers"], cache["index"])
        mask_BTS = None if mask_BT is None else mask_BT[:, None, :]
        if causal:
            n_keys = x_BTD.shape[1] if cache is None else layers["self"][0].shape[3]
            causal_1TS = jnp.arange(n_keys)[None, None] <= index + jnp.arange(x_BTD.shape[1])[None, :, None]
            mask_BTS = causal_1TS if mask_BTS is None else mask_BTS & causal_1TS
        context_mask_BTS = None if context_mask_BS is None else context_mask_BS[:, None, :]
        blocks = _stack(TextBlock, c, c.text_layers)(c, name="blocks")
        x_BTD, new = blocks(x_BTD, layers, context_BSD, context_mask_BTS, mask_BTS, index)
        if cache is not None:
            cache = cache | {"layers": layers | new, "index": index + x_BTD.shape[1]}
        x_BTD = x_BTD[:, n_added:] if cache is None else x_BTD[:, -1:]
        return Head(c, name="head")(x_BTD, word_VD) if self.head else x_BTD, cache


# Mesh axes of the last dimensions of leaves: heads, hidden units and words over 'tensor', as in Megatron; the other side of
# every matrix over 'fsdp'; a stack's L is never sharded. '@': adapter parameters (see jaxpeft/training/sharding.py).
SHARDING = (
    (r"(query|key|value|mlp/up)/kernel$", ("fsdp", "tensor")),
    (r"(query|key|value|mlp/up)/bias$", ("tensor",)),
    (r"(attention/out|mlp/down)/kernel$", ("tensor", "fsdp")),
    (r"head/(dense|vocabulary)/kernel$", ("fsdp", "tensor")),
    (r"embed/word$", ("tensor", "fsdp")),
    (r"head/(bias|dense/bias)$", ("tensor",)),
    (r"/new_(word|bias|matrix)$", ()),
    (r"(position|patch/kernel|itm/kernel)$", (None, "fsdp")),
    (r"@kv$", ("tensor", None)),
    (r"@(sublayer|block|embed)$", ("fsdp",)),
    (r"(norm\d?/(bias|scale)|(out|down|patch|itm)/bias|class_embedding)$", ()),
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


class Blip(VisionLanguageModel):
    """BLIP. The context of a captioning model is its image tokens; with a question encoder it is the question states."""

    config: BlipConfig
    sharding: ClassVar = SHARDING
    targets: ClassVar = TARGETS | TRAINED
    model_type: ClassVar = "blip"  # the key in MODELS

    @property
    def tied(self) -> dict[str, str]:
        return {} if self.config.untied_head else {"text_decoder/head/vocabulary": "text_decoder/embed/word"}

    @property
    def stages(self) -> tuple[Stage, ...]:
        image = Stage("image_tokens", ("image",), "image")
        states = Stage("question_states", ("image_tokens", "prompt"), "example")
        return (image, states) if self.config.question_encoder else (image,)

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("vqa",) if self.config.question_encoder else ("captioning",)

    @property
    def positions(self) -> int:
        return self.config.max_positions

    @nn.nowrap
    def replaced(self, tokenizer: BlipTokenizer | None = None, **fields) -> "Blip":
        return build(dataclasses.replace(self.config, **fields), tokenizer or self.tokenizer)

    @nn.nowrap
    def unrolled(self) -> "Blip":
        return self.replaced(unroll=max(self.config.vision_layers, self.config.text_layers))

    @nn.nowrap
    def for_task(self, task: str) -> "Blip":
        if task == "vqa" and not self.config.question_encoder:
            raise ValueError("this BLIP has no question encoder, which task 'vqa' needs")
        return self.replaced(question_encoder=task == "vqa")

    def setup(self):
        self.vision = Vision(self.config)
        self.text_decoder = TextStack(self.config, head=True)
        if self.config.question_encoder:
            self.text_encoder = TextStack(self.config, head=False)

    def encode_image(self, image_BYXC):
        """uint8 images, or normalised floats -> image tokens (B, 1 + P, vision_width)."""
        if image_BYXC.dtype == jnp.uint8:
            c = self.config
            mean_C, std_C = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (c.image_mean, c.image_std))
            image_BYXC = (image_BYXC.astype(jnp.float32) / 255 - mean_C) / std_C
        return self.vision(image_BYXC)

    def encode_question(self, image_BPD, prompt_BT, mask_BT=None):
        """Question ids (starting with enc_id) -> question states (B, T, text_width); the default mask excludes padding."""
        mask_BT = prompt_BT != self.config.pad_id if mask_BT is None else mask_BT
        return self.text_encoder(prompt_BT, mask_BT, image_BPD, None, causal=False)[0]

    def stage(self, batch, name):
        if name == "image_tokens":
            return self.encode_image(batch["image"])
        return self.encode_question(batch["image_tokens"], batch["prompt"])

    def context(self, batch):
        for stage in self.stages:
            if stage.name not in batch and not (stage.name == "image_tokens" and "question_states" in batch):
                batch = batch | {stage.name: self.stage(batch, stage.name)}
        if not self.config.question_encoder:
            memory_BSD, mask_BS = batch["image_tokens"], None
        else:
            memory_BSD, mask_BS = batch["question_states"], batch["prompt"] != self.config.pad_id
        return Context(memory_BSD, mask_BS, jnp.zeros(memory_BSD.shape[0], jnp.int32))

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


def _captioning(tokenizer: BlipTokenizer, prompt: str | None = None, max_words: int = 0) -> Template:
    """[DEC] a picture of <caption> [SEP]."""
    words = "a picture of" if prompt is None else prompt
    return Template(
        tokenizer,
        start=(tokenizer.bos_id, *tokenizer.pieces(words)),
        start_text=words,
        stop=(tokenizer.sep_id,),
        pad=tokenizer.pad_id,
        clean_text=functools.partial(clean_caption, max_words=max_words or 10**6),
    )


def _vqa(tokenizer: BlipTokenizer) -> Template:
    """[ENC] <question> [SEP] into the encoder; the decoder writes [DEC] <answer> [SEP]."""
    return Template(
        tokenizer,
        start=(tokenizer.bos_id,),
        stop=(tokenizer.sep_id,),
        pad=tokenizer.pad_id,
        before=(tokenizer.enc_id,),
        after=(tokenizer.sep_id,),
        clean_question=clean_question,
    )


def processor(config: BlipConfig, tokenizer: BlipTokenizer | None) -> Processor:
    """The processor with BLIP's templates, `tokenizer`, and the image settings of `config`."""
    templates = {"captioning": _captioning, "vqa": _vqa}
    templates = {name: functools.partial(make, tokenizer) for name, make in templates.items()}
    return Processor(tokenizer, config.image_size, config.image_resample, config.image_mean, templates)


def build(config: BlipConfig, tokenizer: BlipTokenizer | None = None) -> Blip:
    """The model with its processor."""
    return Blip(config, processor(config, tokenizer))
