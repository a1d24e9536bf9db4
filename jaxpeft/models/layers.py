"""The layers of the models; only they and the models call sites.

Axis legend, for array names everywhere in this package (`x_BTD` has axes B, T, D):
    B batch            T query or target tokens    S key or source tokens    P image patches     A texts per image
    D width            F MLP hidden                N attention heads         H head size         V vocabulary
    L stacked layers   R rank or bottleneck        K prompt or prefix length image_BYXC images
    G key and value heads, each read by M query heads (N = G * M); in files of decoders, R = B * A rows of texts

Parameters are float32; `dtype` is that of the matrix products. Dropout acts if and only if an rng named 'dropout' is passed
to `apply`, so evaluation cannot leave it on.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.adapt import sites
from jaxpeft.models import attention
from jaxpeft.ops import by_rows, per_feature

INIT = nn.initializers.normal(0.02)  # BERT's and BLIP's


def written(old_BNSH, new_BNTH, index):
    """Keys or values of a cache with those of new tokens at `index`."""
    return jax.lax.dynamic_update_slice_in_dim(old_BNSH, new_BNTH.astype(old_BNSH.dtype), index, axis=2)


def dropout(module: nn.Module, x, rate: float):
    """Inverted dropout if an rng named 'dropout' is given; otherwise the identity."""
    if rate == 0 or not module.has_rng("dropout"):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


class Stored(nn.Module):
    """A module whose parameters have the shape that is the first argument of their initializers.

    Flax's `param` finds that shape by tracing the initializer, again in every program: a tenth of the time to trace a step.
    """

    def param(self, name, init_fn, shape, *args, **kwargs):
        found = self.get_variable("params", name)
        if found is not None and found.shape == tuple(shape):
            return found
        return super().param(name, init_fn, shape, *args, **kwargs)  # which names the leaf where shapes differ


class Dense(Stored):
    """x (..., in) @ kernel (in, features) + bias. Site: linear."""

    features: int
    dtype: str = "float32"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", INIT, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        return sites.linear(self, x.astype(self.dtype), kernel, bias)


class TiedDense(nn.Module):
    """x (..., D) @ embedding_VD.T for a matrix stored elsewhere. Site: linear (methods cannot be merged into it)."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, embedding_VD):
        return sites.linear(self, x.astype(self.dtype), embedding_VD.T)


class LayerNorm(Stored, nn.LayerNorm):
    """LayerNorm with the two-pass variance: the one-pass form loses digits that parity with torch needs. Site: norm."""

    use_fast_variance: bool = False

    @nn.compact
    def __call__(self, x):
        # In bfloat16, as GPUs train, on rows in one axis: with two, XLA transposes at every norm in the backward pass
        # (docs/results/h100_program.md). In float32 the results of one image and of several would differ by rounding.
        rows = x.reshape(-1, x.shape[-1]) if self.dtype == "bfloat16" else x
        return sites.norm(self, by_rows(super().__call__(rows).reshape(x.shape)))


class RMSNorm(Stored):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467). Site: norm."""

    epsilon: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return sites.norm(self, by_rows((y * per_feature(scale_D, y)).astype(self.dtype)))


class Attention(nn.Module):
    """Multi-head attention over keys and values given by `keys_values`. Sites: kv, sublayer, and its four linears.

    `attention`: a key of attention.py. What is not fused is written out here.

    `rows` of the query batch may be a multiple A of the context batch (several texts per image, several beams): they
    are folded into the query axis, so keys and values are never repeated.

    Heads come before positions, the layout of the two products: otherwise XLA on CPU transposes their results (BLIP-base ViT
    layer, batch 8, two cores: 27 ms instead of 16 ms for these lines), and caches would be transposed at every token.
    """

    width: int
    heads: int
    dropout: float = 0.0
    dtype: str = "float32"
    attention: str = "plain"

    def setup(self):
        self.query = Dense(self.width, self.dtype)
        self.key = Dense(self.width, self.dtype)
        self.value = Dense(self.width, self.dtype)
        self.out = Dense(self.width, self.dtype)

    def _heads(self, x_BTD):
        return x_BTD.reshape(*x_BTD.shape[:-1], self.heads, -1).swapaxes(1, 2)

    def keys_values(self, context_BSD):
        """(k_BNSH, v_BNSH) of a context."""
        return self._heads(self.key(context_BSD)), self._heads(self.value(context_BSD))

    def __call__(self, x_BTD, k_BNSH, v_BNSH, mask=None, *, stream):
        """`mask`: (B, T, S), True where a query may attend, which broadcasts over B, T; or (B,), the number of keys, which all
        padding follows; None for everywhere. `stream`: see sites."""
        n_rows, n_tokens, _ = x_BTD.shape
        folded_BTD = x_BTD.reshape(k_BNSH.shape[0], -1, x_BTD.shape[-1])  # fold texts of one context into T
        q_BNTH = self._heads(self.query(folded_BTD))
        lengths_B, mask_BTS = (mask, None) if mask is not None and mask.ndim == 1 else (None, mask)
        n_keys = k_BNSH.shape[2]
        k_BNSH, v_BNSH, mask_BTS, gain_BTS = sites.kv(self, folded_BTD, k_BNSH, v_BNSH, mask_BTS)
        if lengths_B is not None:
            lengths_B += k_BNSH.shape[2] - n_keys  # methods add keys in front
        masked = any(x is not None for x in (lengths_B, mask_BTS, gain_BTS))
        drops = self.dropout > 0 and self.has_rng("dropout")
        if attention.fuses(self.attention, k_BNSH, mask_BTS, gain_BTS, drops):
            y_BTNH = attention.fused(self.attention, q_BNTH, k_BNSH, v_BNSH, lengths_B)
        elif not (masked or drops) and (n_parts := attention.parts(self.attention, q_BNTH, k_BNSH)):
            y_BTNH = attention.in_parts(n_parts, q_BNTH, k_BNSH, v_BNSH).swapaxes(1, 2)
        else:
            if lengths_B is not None:
                real_B1S = attention.real(lengths_B, k_BNSH.shape[2])
                mask_BTS = real_B1S if mask_BTS is None else mask_BTS & real_B1S
            y_BTNH = self._written_out(q_BNTH, k_BNSH, v_BNSH, mask_BTS, gain_BTS).swapaxes(1, 2)
        y_BTD = y_BTNH.reshape(n_rows, n_tokens, self.width)
        return sites.sublayer(self, x_BTD, by_rows(self.out(y_BTD)), stream)

    def _written_out(self, q_BNTH, k_BNSH, v_BNSH, mask_BTS, gain_BTS):
        scores_BNTS = attention.products("BNTH,BNSH->BNTS", q_BNTH, k_BNSH)
        scores_BNTS *= q_BNTH.shape[-1] ** -0.5
        if gain_BTS is not None:
            scores_BNTS *= gain_BTS[:, None]
        if mask_BTS is not None:
            # finite, so that a row without allowed positions gives a mean instead of NaN
            scores_BNTS = jnp.where(mask_BTS[:, None], scores_BNTS, jnp.finfo(jnp.float32).min / 2)
        weights_BNTS = dropout(self, jax.nn.softmax(scores_BNTS, axis=-1), self.dropout)
        if gain_BTS is not None:
            weights_BNTS *= gain_BTS[:, None]
        return jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS.astype(self.dtype), v_BNSH)


ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),  # the exact one, by erf
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "silu": nn.silu,
}


class Mlp(nn.Module):
    """down(activation(up(x))). Site: sublayer, and its two linears."""

    width: int
    hidden: int
    dtype: str = "float32"
    activation: str = "gelu"  # a key of ACTIVATIONS

    @nn.compact
    def __call__(self, x_BTD, *, stream):
        h_BTF = ACTIVATIONS[self.activation](Dense(self.hidden, self.dtype, name="up")(x_BTD))
        return sites.sublayer(self, x_BTD, by_rows(Dense(self.width, self.dtype, name="down")(h_BTF)), stream)


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)) without biases (Shazeer 2020, arXiv 2002.05202). Site: sublayer, and its linears."""

    width: int
    hidden: int
    dtype: str
    activation: str  # a key of ACTIVATIONS

    @nn.compact
    def __call__(self, x_BTD, *, stream):
        def linear(features, name):
            return Dense(features, self.dtype, use_bias=False, name=name)

        h_BTF = ACTIVATIONS[self.activation](linear(self.hidden, "gate")(x_BTD)) * linear(self.hidden, "up")(x_BTD)
        return sites.sublayer(self, x_BTD, by_rows(linear(self.width, "down")(h_BTF)), stream)
