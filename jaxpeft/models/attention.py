"""How attention is computed: written out by the layers, or by one fused kernel.

`StackConfig.attention` says which, and None decides by platform and dtype (`StackConfig.on`):

    plain   the layers write the scores (T, S) to memory, in float32
    cudnn   the flash attention of cuDNN, on NVIDIA GPUs, in bfloat16: no scores in memory
    xla     the same function of JAX written out by XLA, on any device: to test what is around the kernel

The kernel takes no gain, no dropout and no mask but the lengths of its rows, so padding must be at the end. What it cannot take
is written out (`fuses`). Its lengths must be even in training, and products are faster where 8 divides them: towers append rows
once (`padded`), instead of in every layer. On TPUs JAX has no such kernel in this function.
"""

import functools

import jax
import jax.numpy as jnp

from jaxpeft.ops import by_rows

KINDS = ("plain", "cudnn", "xla")
LEAST = 64  # keys; the scores of fewer are small
MULTIPLE = 8
MOST_HEAD = 128  # the largest head size on every GPU that has the kernel


def padded(x_BSD: jax.Array, mask_BS: jax.Array | None, kind: str) -> tuple[jax.Array, jax.Array | None]:
    """A sequence and a mask of its keys as layers take it: (x, mask (B, 1, S)) unchanged for 'plain' and for short ones.

    Otherwise rows are appended until 8 divides the length -> (x, lengths (B,)). Rows whose padding is not at the end, which
    lengths cannot express, become NaN, so that this is noticed.
    """
    n_rows, n_keys, _ = x_BSD.shape
    if kind == "plain" or (kind == "cudnn" and n_keys < LEAST):
        return x_BSD, None if mask_BS is None else mask_BS[:, None]
    lengths_B = jnp.full(n_rows, n_keys, jnp.int32)
    if mask_BS is not None:
        lengths_B = mask_BS.sum(axis=1, dtype=jnp.int32)
        at_the_end_B = jnp.all(mask_BS == real(lengths_B, n_keys)[:, 0], axis=1)
        x_BSD = jnp.where(at_the_end_B[:, None, None], x_BSD, jnp.nan)
    return by_rows(jnp.pad(x_BSD, ((0, 0), (0, -n_keys % MULTIPLE), (0, 0)))), by_rows(lengths_B)


def real(lengths_B: jax.Array, n_keys: int) -> jax.Array:
    """Lengths as a mask (B, 1, S)."""
    return jnp.arange(n_keys)[None, None] < lengths_B[:, None, None]


def fuses(kind: str, k_BGSH: jax.Array, mask: jax.Array | None, gain: jax.Array | None, drops: bool) -> bool:
    """Whether `fused` can compute an attention. `mask`: see `layers.Attention`; `drops`: whether weights are dropped."""
    if kind == "plain" or gain is not None or drops or (mask is not None and mask.ndim > 1):
        return False
    _, _, n_keys, size = k_BGSH.shape
    return kind == "xla" or (n_keys >= LEAST and size % 8 == 0 and size <= MOST_HEAD)


def fused(
    kind: str,
    q_BNTH: jax.Array,
    k_BGSH: jax.Array,
    v_BGSH: jax.Array,
    lengths_B: jax.Array | None,
    causal: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> (B, T, N, H), over the first `lengths_B` keys, None for all; `causal`: query t over the
    keys up to t. Query head n reads key head n // (N / G)."""
    (n_rows, _, n_queries, _), n_keys, lengths = q_BNTH.shape, k_BGSH.shape[2], {}
    if n_keys % 2 and lengths_B is None and not causal:  # causal queries do not see the row that is added
        lengths_B = jnp.full(n_rows, n_keys, jnp.int32)
    if lengths_B is not None:  # of both, by rows: JAX would make those of the queries for all devices' rows
        both = {"key_value": lengths_B, "query": jnp.full(n_rows, n_queries + n_queries % 2, jnp.int32)}
        lengths = {f"{name}_seq_lengths": by_rows(x) for name, x in both.items()}
    # the kernel needs queries, keys and values sharded alike
    n_tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    heads = 2 if k_BGSH.shape[1] % n_tensor == 0 else None
    q_BTNH, k_BSGH, v_BSGH = (by_rows(_even(x).swapaxes(1, 2), heads) for x in (q_BNTH, k_BGSH, v_BGSH))
    y_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSGH, v_BSGH, is_causal=causal, implementation=kind, **lengths)
    return y_BTNH[:, :n_queries]


def _even(x_BNTH: jax.Array) -> jax.Array:
    return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, x_BNTH.shape[2] % 2), (0, 0)))


def products(axes: str, q: jax.Array, k: jax.Array) -> jax.Array:
    """The einsum `axes` of queries and keys in float32."""
    if q.dtype == jnp.float32:
        return jnp.einsum(axes, q, k, preferred_element_type=jnp.float32)
    return _products(axes, q, k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(axes: str, q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum(axes, q, k, preferred_element_type=jnp.float32)


def _forward(axes: str, q: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _products(axes, q, k), (q, k)


def _backward(axes: str, saved: tuple[jax.Array, jax.Array], scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In the dtype of q and k. JAX's own rule converts both to float32: products at half of the speed, and larger copies."""
    q, k = saved
    return jax.vjp(functools.partial(jnp.einsum, axes), q, k)[1](scores.astype(q.dtype))


_products.defvjp(_forward, _backward)
