"""Token cross-entropy as sums and counts, never means: batches, microbatches and devices then add up exactly."""

import jax
import jax.numpy as jnp


def token_nll(logits_BTV, targets_BT, smoothing: float = 0.0):
    """Negative log-likelihood per token, in nats; with label smoothing e: (1 - e) nll + e mean_v(-log p_v)."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    nll_BT = -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    if smoothing:
        nll_BT = (1 - smoothing) * nll_BT - smoothing * log_probs_BTV.mean(axis=-1)
    return nll_BT


def token_loss(logits_BTV, targets_BT, weights_BT, smoothing: float = 0.0):
    """(weighted sum of token losses, sum of weights). A token of weight 0 is not scored."""
    return jnp.sum(token_nll(logits_BTV, targets_BT, smoothing) * weights_BT), jnp.sum(weights_BT)
