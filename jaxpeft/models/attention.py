"""How attention is computed: written out by the layers, or by one fused kernel.

`StackConfig.attention` says which, and None decides by platform and dtype (`StackConfig.on`):

    plain   the layers write the scores (T, S) to memory, in float32
    parts   on CPU: as 'plain', but long sequences without a mask a few heads at a time, so that scores stay in the cache
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

KINDS = ("plain", "parts", "cudnn", "xla")
WRITTEN_OUT = ("plain", "parts")
LEAST = 64  # keys; the scores of fewer are small
MULTIPLE = 8
MOST_HEAD = 128  # the largest head size on every GPU that has the kernel
LONG = 128  # keys, from which on `in_parts` is used
WHOLE, PART = 1 << 24, 1 << 23  # bytes of scores: up to WHOLE in one part, and else at most PART in each


def padded(x_BSD: jax.Array, mask_BS: jax.Array | None, kind: str) -> tuple[jax.Array, jax.Array | None]:
    """A sequence and a mask of its keys as layers take it: (x, mask (B, 1, S)), unchanged, where no kernel reads it.

    Otherwise rows are appended until 8 divides the length -> (x, lengths (B,)). Rows whose padding is not at the end, which
    lengths cannot express, become NaN, so that this is noticed.
    """
    n_rows, n_keys, _ = x_BSD.shape
    if kind in WRITTEN_OUT or (kind == "cudnn" and n_keys < LEAST):
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
    if kind in WRITTEN_OUT or gain is not None or drops or (mask is not None and mask.ndim > 1):
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


def parts(kind: str, q_BNTH: jax.Array, k_BNSH: jax.Array) -> int:
    """How many parts `in_parts` should take. 0: none, because 'plain' is as fast, or because rows are on several devices."""
    (n_rows, n_heads, n_queries, _), n_keys = q_BNTH.shape, k_BNSH.shape[2]
    mesh = jax.sharding.get_abstract_mesh()
    if kind != "parts" or n_keys < LONG or q_BNTH.dtype != jnp.float32 or not (mesh.empty or mesh.size == 1):
        return 0
    n_bytes = 4 * n_rows * n_heads * n_queries * n_keys
    some = (n for n in range(1, n_rows * n_heads + 1) if n_rows * n_heads % n == 0)
    return 1 if n_bytes <= WHOLE else next((n for n in some if n_bytes <= n * PART), n_rows * n_heads)


def in_parts(n_parts: int, q_BNTH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> (B, N, T, H), for `n_parts` parts of the B * N heads after one another.

    Weights are divided by their sum after the product with v, which is smaller. Of several parts, the backward pass computes
    the scores again, which takes no longer than to keep them. Times: docs/results/step_time.md.
    """

    def part(qkv: tuple[jax.Array, ...]) -> jax.Array:
        q_CTH, k_CSH, v_CSH = qkv
        scores_CTS = products("CTH,CSH->CTS", q_CTH, k_CSH) * q_CTH.shape[-1] ** -0.5
        largest_CT1 = jax.lax.stop_gradient(scores_CTS.max(axis=-1, keepdims=True))
        weights_CTS = jnp.exp(scores_CTS - largest_CT1)
        return jnp.einsum("CTS,CSH->CTH", weights_CTS, v_CSH) / weights_CTS.sum(axis=-1, keepdims=True)

    shared = tuple(x.reshape(n_parts, -1, *x.shape[2:]) for x in (q_BNTH, k_BNSH, v_BNSH))
    y_PCTH = part(tuple(x[0] for x in shared))[None] if n_parts == 1 else jax.lax.map(jax.checkpoint(part), shared)
    return y_PCTH.reshape(q_BNTH.shape)


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
