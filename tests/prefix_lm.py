"""A small prefix-LM behind the model protocol: image tokens and a question in one bidirectional block, then a causal text.

Unlike BLIP in all that the protocol abstracts from: no cross-attention, 4 query heads on 2 key heads, N * H != D, the first
token of a text comes from the prompt, and questions of different lengths stand in one batch. `whole` is the reference: one
sequence, one mask, no cache, nothing shared or padded.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import linen as nn

from jaxpeft.adapt import sites
from jaxpeft.inputs.processor import Processor, Template
from jaxpeft.models.base import Cache, Context, Stage, VisionLanguageModel
from jaxpeft.models.layers import Dense, LayerNorm, Mlp, dropout

INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Config:
    image_size: int = 16
    patch: int = 8
    width: int = 16
    layers: int = 2
    heads: int = 4
    groups: int = 2
    head_size: int = 6
    mlp: int = 20
    vocab_size: int = len(tiny.TOKENIZER)
    positions: int = 40
    pad_id: int = 0
    dropout: float = 0.0


class Attention(nn.Module):
    """Grouped heads over [learned prefix; context; own]: `kv` adds once, in front of the context."""

    config: Config

    def setup(self):
        c = self.config
        self.query, self.out = Dense(c.heads * c.head_size), Dense(c.width)
        self.key, self.value = Dense(c.groups * c.head_size), Dense(c.groups * c.head_size)

    def keys_values(self, x_BSD):
        shape = (*x_BSD.shape[:2], self.config.groups, -1)
        return tuple(y.reshape(shape).swapaxes(1, 2) for y in (self.key(x_BSD), self.value(x_BSD)))

    def __call__(self, x_RTD, context, mask_BTS, own=None, own_mask_RTS=None, *, stream):
        """`context`: (k, v) (B, G, S, H), shared by rows b*A..; `own`: (k, v) (R, G, T', H) of the same sequence."""
        (n_rows, n_tokens, _), (k_BGSH, v_BGSH) = x_RTD.shape, context
        folded_BTD = x_RTD.reshape(k_BGSH.shape[0], -1, x_RTD.shape[-1])
        k_BGSH, v_BGSH, mask_BTS, gain_BTS = sites.kv(self, folded_BTD, k_BGSH, v_BGSH, mask_BTS)
        q = self.query(folded_BTD).reshape(*folded_BTD.shape[:2], self.config.groups, -1, self.config.head_size)
        scores = jnp.einsum("BTGMH,BGSH->BGMTS", q, k_BGSH) * self.config.head_size**-0.5
        if gain_BTS is not None:
            scores *= gain_BTS[:, None, None]
        if mask_BTS is not None:
            scores = jnp.where(mask_BTS[:, None, None], scores, -1e30)
        n_context = scores.shape[-1]
        if own is not None:
            q_R = q.reshape(n_rows, n_tokens, *q.shape[2:])
            mine = jnp.einsum("RTGMH,RGSH->RGMTS", q_R, own[0]) * self.config.head_size**-0.5
            mine = jnp.where(own_mask_RTS[:, None, None], mine, -1e30)
            scores = jnp.concatenate([_unfolded(scores, n_rows), mine], axis=-1)
        weights = dropout(self, jax.nn.softmax(scores, axis=-1), self.config.dropout)
        over_context = weights[..., :n_context]
        if own is not None:
            over_context = _folded(over_context, k_BGSH.shape[0])
        if gain_BTS is not None:
            over_context *= gain_BTS[:, None, None]
        y = jnp.einsum("BGMTS,BGSH->BTGMH", over_context, v_BGSH).reshape(n_rows, n_tokens, -1)
        if own is not None:
            y += jnp.einsum("RGMTS,RGSH->RTGMH", weights[..., n_context:], own[1]).reshape(y.shape)
        return sites.sublayer(self, x_RTD, self.out(y), stream)


def _unfolded(x, n_rows):
    """(B, G, M, A*T, S) -> (B*A, G, M, T, S)."""
    n, g, m, t, s = x.shape
    return x.reshape(n, g, m, n_rows // n, -1, s).transpose(0, 3, 1, 2, 4, 5).reshape(n_rows, g, m, -1, s)


def _folded(x, n):
    """The inverse."""
    rows, g, m, t, s = x.shape
    return x.reshape(n, rows // n, g, m, t, s).transpose(0, 2, 3, 1, 4, 5).reshape(n, g, m, -1, s)


class Block(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x))."""

    config: Config

    def setup(self):
        self.norm1, self.norm2 = LayerNorm(), LayerNorm()
        self.attention, self.mlp = Attention(self.config), Mlp(self.config.width, self.config.mlp)

    def __call__(self, x_BTD, context, mask_BTS, own_kv=None, own_mask=None):
        """-> (states, the keys and values of x); `context` None: x itself is the context."""
        x_BTD = sites.block(self, x_BTD)
        h_BTD = self.norm1(x_BTD)
        new = self.attention.keys_values(h_BTD)
        own = own_kv(*new) if own_kv else None
        x_BTD += self.attention(h_BTD, context or new, mask_BTS, own, own_mask, stream=x_BTD.__add__)
        x_BTD += self.mlp(self.norm2(x_BTD), stream=x_BTD.__add__)
        return x_BTD, own or new


class Decoder(nn.Module):
    """Words, positions, blocks and logits. Sites: embed, and those of its blocks."""

    config: Config

    def setup(self):
        c = self.config
        self.words = self.param("words", INIT, (c.vocab_size, c.width))
        self.positions = self.param("positions", INIT, (c.positions, c.width))
        self.blocks = [Block(c, name=f"block{i}") for i in range(c.layers)]
        self.norm, self.head = LayerNorm(), Dense(c.vocab_size)

    def place(self, x_BTD, position_BT):
        return x_BTD + self.positions[position_BT]

    def logits(self, x_BTD):
        return self.head(self.norm(x_BTD)).astype(jnp.float32)

    def first(self, image_BPD, prompt_BQ):
        """The prefix: (states, mask (B, S), keys and values of every block, position of the next token)."""
        mask_BQ = prompt_BQ != self.config.pad_id
        n_image = image_BPD.shape[1]
        position_BQ = n_image + jnp.cumsum(mask_BQ, axis=1) - mask_BQ  # whatever the padding side
        image_BPD = self.place(image_BPD, jnp.broadcast_to(jnp.arange(n_image), image_BPD.shape[:2]))
        x_BSD = jnp.concatenate([image_BPD, self.place(self.words[prompt_BQ], position_BQ)], axis=1)
        mask_BS = jnp.concatenate([jnp.ones(image_BPD.shape[:2], bool), mask_BQ], axis=1)
        x_BSD, mask_BS = sites.embed(self, x_BSD, mask_BS)
        return x_BSD, mask_BS, n_image + mask_BQ.sum(axis=1)


class PrefixLM(VisionLanguageModel):
    config: Config
    stages: ClassVar = (Stage("image_tokens", ("image",), "image"),)
    targets: ClassVar = {"text": "^decoder", "text.attention.qv": "attention/(query|value)$", "text.attention": "attention$",
                         "text.mlp": "mlp$", "vision": "^vision"}  # fmt: skip
    sharding: ClassVar = ((r"(query|key|value|up)/kernel$", ("fsdp", "tensor")), (r"(out|down)/kernel$", ("tensor", "fsdp")),
                          (r"", ()))  # fmt: skip

    tasks = property(lambda self: ("vqa", "captioning"))
    positions = property(lambda self: self.config.positions)

    def setup(self):
        self.vision, self.decoder = Dense(self.config.width), Decoder(self.config)

    def example(self):
        size = self.config.image_size
        return {"image": jnp.zeros((1, size, size, 3), jnp.uint8), "prompt": jnp.ones((1, 2), jnp.int32),
                "tokens": jnp.ones((1, 1, 3), jnp.int32)}  # fmt: skip

    def stage(self, batch, name):
        p, image = self.config.patch, batch["image"].astype(jnp.float32) / 255
        n = self.config.image_size // p
        return self.vision(image.reshape(-1, n, p, n, p, 3).swapaxes(2, 3).reshape(-1, n * n, p * p * 3))

    def context(self, batch):
        image_BPD = batch["image_tokens"] if "image_tokens" in batch else self.stage(batch, "image_tokens")
        x_BSD, mask_BS, next_B = self.decoder.first(image_BPD, batch["prompt"])
        memory = []
        for block in self.decoder.blocks:
            x_BSD, kv = block(x_BSD, None, mask_BS[:, None])
            memory.append(kv)
        last_B = mask_BS.shape[1] - 1 - jnp.argmax(mask_BS[:, ::-1], axis=1)
        last_B1D = jnp.take_along_axis(x_BSD, last_B[:, None, None], axis=1)
        return Context(tuple(memory), mask_BS, next_B, self.decoder.logits(last_B1D)[:, 0])

    def score(self, tokens_RT, context):
        n_texts = tokens_RT.shape[0] // context.next_B.shape[0]
        first_R1V = jnp.repeat(context.first_BV, n_texts, axis=0)[:, None]
        if tokens_RT.shape[1] == 1:
            return first_R1V
        tokens_RT = tokens_RT[:, 1:]  # behind the placeholder
        n_tokens = tokens_RT.shape[1]
        position_RT = jnp.repeat(context.next_B, n_texts)[:, None] + jnp.arange(n_tokens)[None]
        x_RTD = self.decoder.place(self.decoder.words[tokens_RT], position_RT)
        causal = jnp.tril(jnp.ones((1, n_tokens, n_tokens), bool))
        for block, kv in zip(self.decoder.blocks, context.memory, strict=True):
            x_RTD, _ = block(x_RTD, kv, context.mask_BS[:, None], lambda k, v: (k, v), causal)
        return jnp.concatenate([first_R1V, self.decoder.logits(x_RTD)], axis=1)

    def start(self, tokens_RS, context, room):
        c, n_rows = self.config, context.next_B.shape[0]
        size = (c.layers, n_rows, c.groups, room, c.head_size)
        return context.first_BV, Cache((jnp.zeros(size), jnp.zeros(size)), jnp.int32(0))

    def step(self, token_R, cache, context):
        n_texts, index, room = token_R.shape[0] // context.next_B.shape[0], cache.shared, cache.rows[0].shape[3]
        position_R1 = jnp.repeat(context.next_B, n_texts)[:, None] + index
        x_R1D = self.decoder.place(self.decoder.words[token_R[:, None]], position_R1)
        mask, rows = (jnp.arange(room) <= index)[None, None], []
        for i, (block, kv) in enumerate(zip(self.decoder.blocks, context.memory, strict=True)):

            def with_past(k, v, i=i):
                return tuple(jax.lax.dynamic_update_slice_in_dim(old[i], new, index, axis=2)
                             for old, new in zip(cache.rows, (k, v), strict=True))  # fmt: skip

            x_R1D, own = block(x_R1D, kv, context.mask_BS[:, None], with_past, mask)
            rows.append(own)
        rows = tuple(jnp.stack(some) for some in zip(*rows, strict=True))
        return self.decoder.logits(x_R1D)[:, 0], Cache(rows, index + 1)

    def whole(self, image_YXC, prompt_Q, text_T):
        """The reference: logits (T, V) of every token of one text, as one sequence with one mask."""
        batch = {"image": image_YXC[None], "prompt": prompt_Q[None]}
        x_1SD, mask_1S, next_1 = self.decoder.first(self.stage(batch, "image_tokens"), batch["prompt"])
        n_prefix, n_text = x_1SD.shape[1], text_T.shape[0] - 1  # the last token predicts nothing that is asked
        more = self.decoder.place(self.decoder.words[text_T[None, :-1]], next_1[:, None] + jnp.arange(n_text)[None])
        x_1SD = jnp.concatenate([x_1SD, more], axis=1)
        at = jnp.arange(n_prefix + n_text)
        mask_1SS = ((at[None] < n_prefix) | (at[None] <= at[:, None]))[None]
        for block in self.decoder.blocks:
            x_1SD, _ = block(x_1SD, None, mask_1SS)
        return self.decoder.logits(x_1SD[:, n_prefix - 1 :])[0]


def _template(tokenizer, **_) -> Template:
    return Template(tokenizer, start=(), stop=(tokenizer.sep_id,), pad=tokenizer.pad_id, after=(tokenizer.enc_id,))


@functools.cache
def model(**overrides) -> PrefixLM:
    config = Config(**overrides)
    templates = dict.fromkeys(("vqa", "captioning"), functools.partial(_template, tiny.TOKENIZER))
    return PrefixLM(config, Processor(tiny.TOKENIZER, config.image_size, templates=templates))


@functools.cache
def params(seed: int = 0):
    """Random weights far from zero, so that every leaf matters."""
    net = model()
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), net.example()))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes)
