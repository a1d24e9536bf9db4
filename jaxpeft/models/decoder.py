"""The decoder of prefix language models: Gemma 1 (Gemma Team 2024, arXiv 2403.08295) and Llama (Touvron et al. 2023,
arXiv 2302.13971).

    x = word[ids] * word_scale                          sqrt(D) in Gemma, 1 in Llama
    x += attention(norm1(x));  x += mlp(norm2(x))       RMSNorm, rotary positions, grouped heads, a gated MLP; no biases
    logits = norm(x) head                               head: the word matrix (tied) or its own

A prefix (image tokens and a prompt) is read once; the keys and values of all its layers are the context of its texts:

    attention of a text token:  softmax(q [k_learned; k_prefix; k_text]^T / sqrt(H)) [v_learned; v_prefix; v_text]

A texts of one prefix share its keys and values, without copies: this equals A separate sequences, as if they were packed behind
one prefix with a block mask. Query head n reads key head n // M. Head size H is a field of its own: N * H may differ from D.

Rotary positions (Su et al. 2021, arXiv 2104.09864) turn the halves (x1, x2) of queries and keys by position * theta^(-2i/H).
They are relative, so the padding side does not matter, and texts may follow prompts of different lengths. Learned prompts
get the positions before the prefix; keys of a learned prefix are not turned, which is position 0.

Deviation: a scale holds what the norm multiplies by (files of Gemma hold scale - 1), in float32; in bfloat16, transformers'
Llama rounds before this product, and Gemma after it, as here.

Gemma 2 and 3 need more norms per layer, soft caps, and layers with a sliding window: a flag per layer would enter `Block`
beside `layer`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.adapt import sites
from jaxpeft.models import attention
from jaxpeft.models.base import Cache, Context
from jaxpeft.models.layers import INIT, Dense, GatedMlp, RMSNorm, Stored, TiedDense, dropout, written
from jaxpeft.models.stack import StackConfig, stack
from jaxpeft.ops import by_rows


@dataclasses.dataclass(frozen=True)
class DecoderConfig(StackConfig):
    """The fields of a decoder. `dropout` acts on the outputs of attentions and MLPs; both families train with 0."""

    vocab_size: int = 257216
    text_width: int = 2048
    text_layers: int = 18
    text_heads: int = 8
    kv_heads: int = 1
    head_size: int = 256
    text_mlp: int = 16384
    text_eps: float = 1e-6
    rope_theta: float = 1e4
    max_positions: int = 8192  # of image tokens, prompt and text together
    pad_id: int = 0
    untied_head: bool = False
    dropout: float = 0.0

    activation: ClassVar[str]  # of the MLPs, a key of `layers.ACTIVATIONS`
    new_words: ClassVar[int] = 0  # a byte-level vocabulary can write every word
    most: ClassVar = StackConfig.most | {"text_layers": 256, "text_width": 1 << 14}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_heads % self.kv_heads:
            raise ValueError(f"text_heads {self.text_heads} is not divisible by kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size is {self.head_size}; rotary positions need an even number")

    @property
    def word_scale(self) -> float:
        """The factor of word embeddings that enter the decoder; image tokens enter as they are."""
        return 1.0


def rotated(x_BNTH, position_BT, theta: float):
    """Turn the two halves of every head by position * theta^(-2i/H)."""
    size = x_BNTH.shape[-1]
    turns_H = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle_BNTH = position_BT[:, None, :, None].astype(jnp.float32) * turns_H[None, None, None]
    cos, sin = jnp.cos(angle_BNTH).astype(x_BNTH.dtype), jnp.sin(angle_BNTH).astype(x_BNTH.dtype)
    x1, x2 = jnp.split(x_BNTH, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


class Attention(nn.Module):
    """Grouped heads over [learned; context; own] keys and values. Sites: kv, sublayer, and its four linears.

    Only prefixes are read by a fused kernel (attention.py): a text is short, and its keys are in two arrays.
    """

    config: DecoderConfig
    causal: bool

    def setup(self):
        c = self.config
        self.query = Dense(c.text_heads * c.head_size, c.dtype, use_bias=False)
        self.key = Dense(c.kv_heads * c.head_size, c.dtype, use_bias=False)
        self.value = Dense(c.kv_heads * c.head_size, c.dtype, use_bias=False)
        self.out = Dense(c.text_width, c.dtype, use_bias=False)

    def _heads(self, x_RTD):
        return x_RTD.reshape(*x_RTD.shape[:2], -1, self.config.head_size).swapaxes(1, 2)

    def keys_values(self, x_RTD, position_RT):
        """(k, v) (R, G, T, H) of tokens, the keys turned by their positions."""
        k_RGTH = rotated(self._heads(self.key(x_RTD)), position_RT, self.config.rope_theta)
        return k_RGTH, self._heads(self.value(x_RTD))

    def __call__(self, x_RTD, position_RT, context, mask, own=None, own_mask_1TS=None, *, stream):
        """`context`: (k, v) (B, G, S, H) with their mask (B, T or 1, S); rows b*A .. b*A+A-1 of x belong to its row b. `own`:
        (k, v) (R, G, S', H) of the same texts, and their mask. Both go through one softmax. For a prefix that reads itself
        `mask` may be lengths (B,), see `layers.Attention`, and excludes what comes after a query if `causal`."""
        n_rows, n_tokens, _ = x_RTD.shape
        n_context = context[0].shape[0]
        n_texts = n_rows // n_context
        q_RNTH = rotated(self._heads(self.query(x_RTD)), position_RT, self.config.rope_theta)
        q_BAGMTH = q_RNTH.reshape(n_context, n_texts, self.config.kv_heads, -1, n_tokens, self.config.head_size)
        folded_BTD = x_RTD.reshape(n_context, -1, x_RTD.shape[-1])  # what methods see as the context's queries
        lengths_B, mask_BTS = (mask, None) if mask.ndim == 1 else (None, mask)
        k_BGSH, v_BGSH, mask_BTS, gain_BTS = sites.kv(self, folded_BTD, *context, mask_BTS)
        if lengths_B is not None:
            n_added = k_BGSH.shape[2] - n_tokens  # keys of methods, in front
            lengths_B += n_added
            kind = "plain" if self.causal and n_added else self.config.attention_here
            if attention.fuses(kind, k_BGSH, mask_BTS, gain_BTS, drops=False):
                lengths_B = None if self.causal else lengths_B  # no query before the padding sees it
                y_RTNH = attention.fused(kind, q_RNTH, k_BGSH, v_BGSH, lengths_B, self.causal)
                return self._after(x_RTD, y_RTNH, stream)
            real_BTS = attention.real(lengths_B, k_BGSH.shape[2])
            if self.causal:
                real_BTS = real_BTS & jnp.tril(jnp.ones((1, n_tokens, n_tokens + n_added), bool), n_added)
            mask_BTS = real_BTS if mask_BTS is None else mask_BTS & real_BTS
        gain = None if gain_BTS is None else _per_text(gain_BTS, n_texts)
        scores = _product("BAGMTH,BGSH->BAGMTS", q_BAGMTH, k_BGSH)
        if gain is not None:
            scores *= gain
        scores = _masked(scores, _per_text(mask_BTS, n_texts))
        if own is not None:
            k_BAGSH, v_BAGSH = (x.reshape(n_context, n_texts, *x.shape[1:]) for x in own)
            mine = _product("BAGMTH,BAGSH->BAGMTS", q_BAGMTH, k_BAGSH)
            scores = jnp.concatenate([scores, _masked(mine, _per_text(own_mask_1TS, 1))], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)
        over_context = weights[..., : k_BGSH.shape[2]]
        if gain is not None:
            over_context *= gain
        y_BATGMH = jnp.einsum("BAGMTS,BGSH->BATGMH", over_context.astype(v_BGSH.dtype), v_BGSH)
        if own is not None:
            weights = weights[..., k_BGSH.shape[2] :].astype(v_BGSH.dtype)
            y_BATGMH += jnp.einsum("BAGMTS,BAGSH->BATGMH", weights, v_BAGSH)
        return self._after(x_RTD, y_BATGMH, stream)

    def _after(self, x_RTD, y, stream):
        y_RTD = by_rows(self.out(y.reshape(*x_RTD.shape[:2], -1)))
        return sites.sublayer(self, x_RTD, y_RTD, stream)


def _product(axes: str, q, k):
    """The scores q k / sqrt(H) in float32."""
    return attention.products(axes, q, k) * q.shape[-1] ** -0.5


def _masked(scores, mask):
    # finite, so that a row without allowed keys, such as padding, gives a mean instead of NaN
    return jnp.where(mask, scores, jnp.finfo(jnp.float32).min / 2)


def _per_text(x_BTS, n_texts: int):
    """(B, A*T or 1, S) -> (B, A or 1, 1, 1, T or 1, S), to broadcast over heads."""
    n_rows, n_queries, n_keys = x_BTS.shape
    return x_BTS.reshape(n_rows, 1 if n_queries == 1 else n_texts, 1, 1, -1, n_keys)


class Block(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x)).

    `layer`: None while the prefix is read, whose keys and values are returned; {'context': (k, v)} for whole texts; with 'own'
    for the next token of each text, whose keys and values are written there at `index`, and returned.
    """

    config: DecoderConfig
    causal: bool

    @nn.compact
    def __call__(self, x_RTD, layer, position_RT, mask, own_mask_1TS, index):
        c = self.config
        norm1, norm2 = (RMSNorm(c.text_eps, c.dtype, name=f"norm{i}") for i in (1, 2))
        attend = Attention(c, self.causal, name="attention")
        h_RTD = norm1(x_RTD)
        new = attend.keys_values(h_RTD, position_RT)
        if layer is None:
            context, own, kept = new, None, new
        elif "own" in layer:
            own = tuple(written(old, one, index) for old, one in zip(layer["own"], new, strict=True))
            context, kept = layer["context"], own
        else:
            context, own, kept = layer["context"], new, None
        y_RTD = attend(h_RTD, position_RT, context, mask, own, own_mask_1TS, stream=x_RTD.__add__)
        x_RTD = x_RTD + dropout(self, y_RTD, c.dropout)
        mlp = GatedMlp(c.text_width, c.text_mlp, c.dtype, c.activation, name="mlp")
        x_RTD = x_RTD + dropout(self, mlp(norm2(x_RTD), stream=x_RTD.__add__), c.dropout)
        return x_RTD, kept


class Embed(Stored):
    """Word embeddings, times `word_scale` in the dtype of the products."""

    config: DecoderConfig

    def setup(self):
        self.word = self.param("word", INIT, (self.config.vocab_size, self.config.text_width))

    def __call__(self, tokens_RT):
        c = self.config
        return by_rows(self.word[tokens_RT].astype(c.dtype) * jnp.asarray(c.word_scale, c.dtype))


class Decoder(nn.Module):
    """Embedding, scanned blocks and head. Sites: embed, where learned tokens join the prefix, and those of its parts."""

    config: DecoderConfig
    causal: bool  # whether prefixes are read from left to right; otherwise every token attends to all of them

    def setup(self):
        c = self.config
        self.embed = Embed(c)
        self.blocks = stack(Block, c, c.text_layers, 4)(c, self.causal)
        self.norm = RMSNorm(c.text_eps, c.dtype)
        self.head = Dense(c.vocab_size, c.dtype, use_bias=False) if c.untied_head else TiedDense(c.dtype)

    def words(self, tokens_RT):
        """Embeddings (R, T, D) of ids, as they enter the first block."""
        return self.embed(tokens_RT)

    def _logits(self, x_RTD):
        x_RTD = self.norm(x_RTD)
        logits_RTV = self.head(x_RTD) if self.config.untied_head else self.head(x_RTD, self.embed.word)
        return logits_RTV.astype(jnp.float32)

    def read(self, x_BSD, mask_BS) -> Context:
        """The context of prefixes: embeddings, with padding (mask False) on either side, or at the end where attention is
        fused."""
        start = sites.shift(self)
        position_BS = start + jnp.cumsum(mask_BS, axis=1) - mask_BS
        next_B, n_tokens = start + mask_BS.sum(axis=1), x_BSD.shape[1]
        # rows of prompts are used as they are: they live on the scale of scaled embeddings
        x_BSD, mask_BS = sites.embed(self, x_BSD, mask_BS, lambda rows_KD: rows_KD)
        if n_added := x_BSD.shape[1] - n_tokens:
            added_BK = jnp.broadcast_to(jnp.arange(start - n_added, start)[None], (x_BSD.shape[0], n_added))
            position_BS = jnp.concatenate([added_BK, position_BS], axis=1)
        x_BSD, mask = attention.padded(x_BSD, mask_BS, self.config.attention_here)
        if n_more := x_BSD.shape[1] - mask_BS.shape[1]:
            mask_BS, position_BS = (jnp.pad(x, ((0, 0), (0, n_more))) for x in (mask_BS, position_BS))
        if mask.ndim > 1 and self.causal:
            mask = mask & jnp.tril(jnp.ones((1, x_BSD.shape[1], x_BSD.shape[1]), bool))
        x_BSD, memory = self.blocks(x_BSD, None, position_BS, mask, None, 0)
        last_B = mask_BS.shape[1] - 1 - jnp.argmax(mask_BS[:, ::-1], axis=1)
        last_B1D = jnp.take_along_axis(x_BSD, last_B[:, None, None], axis=1)
        return Context(memory, mask_BS, next_B, self._logits(last_B1D)[:, 0])

    def _positions(self, n_rows: int, context: Context, at):
        """Positions (R, T) of text tokens number `at` (T,), the first of which follows the prefix."""
        return jnp.repeat(context.next_B, n_rows // context.next_B.shape[0])[:, None] + at[None]

    def score(self, tokens_RT, context: Context):
        """See `VisionLanguageModel.score`."""
        n_rows, n_tokens = tokens_RT.shape
        first_R1V = jnp.repeat(context.first_BV, n_rows // context.next_B.shape[0], axis=0)[:, None]
        if n_tokens == 1:
            return first_R1V
        n_tokens -= 1  # without the placeholder
        own_mask_1TS = jnp.tril(jnp.ones((1, n_tokens, n_tokens), bool))
        position_RT = self._positions(n_rows, context, jnp.arange(n_tokens))
        x_RTD, layers = self.words(tokens_RT[:, 1:]), {"context": context.memory}
        x_RTD, _ = self.blocks(x_RTD, layers, position_RT, context.mask_BS[:, None], own_mask_1TS, 0)
        return jnp.concatenate([first_R1V, self._logits(x_RTD)], axis=1)

    def start(self, context: Context, room: int) -> tuple[jax.Array, Cache]:
        """See `VisionLanguageModel.start`."""
        n_layers, n_rows, n_heads, _, size = context.memory[0].shape
        rows = tuple(jnp.zeros((n_layers, n_rows, n_heads, room, size), x.dtype) for x in context.memory)
        return context.first_BV, Cache(rows, jnp.int32(0))

    def step(self, token_R, cache: Cache, context: Context) -> tuple[jax.Array, Cache]:
        """See `VisionLanguageModel.step`."""
        index, room = cache.shared, cache.rows[0].shape[3]
        own_mask_1TS = (jnp.arange(room) <= index)[None, None]
        position_R1 = self._positions(token_R.shape[0], context, index[None])
        x_R1D, layers = self.words(token_R[:, None]), {"context": context.memory, "own": cache.rows}
        x_R1D, rows = self.blocks(x_R1D, layers, position_R1, context.mask_BS[:, None], own_mask_1TS, index)
        return self._logits(x_R1D)[:, 0], Cache(rows, index + 1)
