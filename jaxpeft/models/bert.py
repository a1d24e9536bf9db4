"""BERT's text stack (Devlin et al. 2018, arXiv 1810.04805) as encoder or decoder: post-norm layers with self-attention,
cross-attention to a context, if there is one, and an MLP. The vocabulary matrix of the head is tied to the word embedding.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.adapt import sites
from jaxpeft.models import attention
from jaxpeft.models.layers import INIT, Attention, Dense, LayerNorm, Mlp, Stored, TiedDense, dropout, written
from jaxpeft.models.stack import StackConfig, stack


@dataclasses.dataclass(frozen=True)
class BertConfig(StackConfig):
    """The fields of text stacks. `dropout` acts at BERT's places; BLIP and mPLUG train with 0.1."""

    vocab_size: int = 30522
    text_width: int = 768
    text_layers: int = 12  # of the decoder
    text_heads: int = 12
    text_mlp: int = 3072
    max_positions: int = 512
    text_eps: float = 1e-12
    pad_id: int = 0
    cls_id: int = 101
    sep_id: int = 102
    new_words: int = 0  # number of words, the last of the vocabulary, that were added; their rows are separate leaves
    untied_head: bool = False  # own vocabulary matrix, as in BLIPs that were fully fine-tuned with transformers 4.40
    dropout: float = 0.0

    token_types: ClassVar[int] = 0  # rows of the token type embedding; the first is added to every position
    most: ClassVar = StackConfig.most | {"text_layers": 256, "text_width": 1 << 14}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads("text")
        if self.new_words >= self.vocab_size:
            raise ValueError(f"new_words is {self.new_words}; it must be below vocab_size {self.vocab_size}")


class TextBlock(nn.Module):
    """x = norm(x + self_attention); x = norm(x + cross_attention); x = norm(x + mlp).

    `cache` holds one layer's 'self' keys and values (B,N,S,H) up to a fixed length and, once computed, the 'cross' ones
    of the context. It is immutable; the updated cache is returned. `context_mask`, `mask`: see `Attention`.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, x_BTD, cache, context_BSD, context_mask, mask, position):
        c = self.config
        kind = c.attention_here if cache is None else "plain"  # the queries of a step are too few

        def heads(name):
            return Attention(c.text_width, c.text_heads, c.dropout, c.dtype, kind, name=name)

        def add(x, name):
            """y -> norm(x + y), for the residual add and for methods that read its result."""
            norm = LayerNorm(epsilon=c.text_eps, dtype=c.dtype, name=name)
            return lambda y: norm(x + y)

        attend, new_cache = heads("self_attention"), None
        k_BNSH, v_BNSH = attend.keys_values(x_BTD)
        if cache is not None:
            k_BNSH, v_BNSH = (
                written(old, new, position) for old, new in zip(cache["self"], (k_BNSH, v_BNSH), strict=True)
            )
            new_cache = {"self": (k_BNSH, v_BNSH)}
        stream = add(x_BTD, "self_norm")
        x_BTD = stream(dropout(self, attend(x_BTD, k_BNSH, v_BNSH, mask, stream=stream), c.dropout))
        if context_BSD is not None or (cache and "cross" in cache):  # text-only otherwise, as in BERT
            attend = heads("cross_attention")
            if cache and "cross" in cache:
                cross = cache["cross"]
            else:
                cross = attend.keys_values(context_BSD)
                new_cache = new_cache and new_cache | {"cross": cross}
            stream = add(x_BTD, "cross_norm")
            x_BTD = stream(dropout(self, attend(x_BTD, *cross, context_mask, stream=stream), c.dropout))
        stream, mlp = add(x_BTD, "mlp_norm"), Mlp(c.text_width, c.text_mlp, c.dtype, name="mlp")
        x_BTD = stream(dropout(self, mlp(x_BTD, stream=stream), c.dropout))
        return x_BTD, new_cache


class Embed(Stored):
    """Word plus absolute position embedding and, in some models, the embedding of token type 0; LayerNorm."""

    config: BertConfig

    def setup(self):
        c = self.config
        self.word = self.param("word", INIT, (c.vocab_size - c.new_words, c.text_width))
        if c.new_words:
            self.word = jnp.concatenate([self.word, self.param("new_word", INIT, (c.new_words, c.text_width))])
        self.position = self.param("position", INIT, (c.max_positions, c.text_width))
        if c.token_types:
            self.token_type = self.param("token_type", INIT, (c.token_types, c.text_width))
        self.norm = LayerNorm(epsilon=c.text_eps, dtype=c.dtype)

    def place(self, words_BTD, start):
        """Word embeddings (B, T, D) or (1, K, D) at positions start, start + 1, ..."""
        n_tokens = words_BTD.shape[1]
        if n_tokens > self.config.max_positions:
            raise ValueError(f"{n_tokens} tokens exceed max_positions {self.config.max_positions}")
        position_TD = jax.lax.dynamic_slice_in_dim(self.position, start, n_tokens)
        if self.config.token_types:
            position_TD = position_TD + self.token_type[:1]
        return self.norm(words_BTD + position_TD[None])

    def __call__(self, tokens_BT, start):
        return dropout(self, self.place(self.word[tokens_BT], start), self.config.dropout), self.word


class Head(Stored):
    """States to logits (float32): dense, GELU, LayerNorm, the vocabulary matrix (tied or its own) and a free bias."""

    config: BertConfig

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
                matrix_ND = self.param("new_matrix", INIT, (c.new_words, c.text_width))
                logits_BTV = jnp.concatenate([logits_BTV, h_BTD @ matrix_ND.T.astype(c.dtype)], axis=-1)
        else:
            logits_BTV = TiedDense(c.dtype, name="vocabulary")(h_BTD, word_VD)
        return logits_BTV.astype(jnp.float32) + bias_V[None, None]


class TextStack(nn.Module):
    """Embedding and `layers` scanned blocks; with `head`, logits instead of states. Sites: embed, and those of its layers."""

    config: BertConfig
    layers: int
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
            size = (self.layers, x_BTD.shape[0], c.text_heads, cache_length + n_added, c.text_width // c.text_heads)
            layers = {"self": (jnp.zeros(size, c.dtype), jnp.zeros(size, c.dtype))}
            cache = {"layers": layers, "index": jnp.int32(0), "added": jnp.int32(n_added)}
        layers, index = (None, 0) if cache is None else (cache["layers"], cache["index"])
        mask_BTS = None if mask_BT is None else mask_BT[:, None, :]
        if causal:
            n_keys = x_BTD.shape[1] if cache is None else layers["self"][0].shape[3]
            causal_1TS = jnp.arange(n_keys)[None, None] <= index + jnp.arange(x_BTD.shape[1])[None, :, None]
            mask_BTS = causal_1TS if mask_BTS is None else mask_BTS & causal_1TS
        context_mask = None if context_mask_BS is None else context_mask_BS[:, None, :]
        if context_BSD is not None and cache is None:
            context_BSD, context_mask = attention.padded(context_BSD, context_mask_BS, c.attention_here)
        blocks = stack(TextBlock, c, self.layers, 4)(c, name="blocks")
        x_BTD, new = blocks(x_BTD, layers, context_BSD, context_mask, mask_BTS, index)
        if cache is not None:
            cache = cache | {"layers": layers | new, "index": index + x_BTD.shape[1]}
        x_BTD = x_BTD[:, n_added:] if cache is None else x_BTD[:, -1:]
        return Head(c, name="head")(x_BTD, word_VD) if self.head else x_BTD, cache
