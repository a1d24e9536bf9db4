"""Small array operations, against the same by other means."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import ops

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 40)), jnp.float32)
TARGETS = jnp.asarray(np.random.default_rng(1).integers(0, 40, (3, 5)), jnp.int32)


def gathered(logits, targets):
    """The negative log-likelihood by a gather, whose gradient is a scatter."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def test_the_loss_of_a_token_is_what_a_gather_finds():
    """To the bit, also its gradient: all that is added is zeros."""
    np.testing.assert_array_equal(ops.token_nll(LOGITS, TARGETS), gathered(LOGITS, TARGETS))
    weights = jnp.asarray(np.random.default_rng(2).random((3, 5)), jnp.float32)
    mine, other = (jax.grad(lambda x, f=f: jnp.sum(f(x, TARGETS) * weights))(LOGITS) for f in (ops.token_nll, gathered))
    np.testing.assert_array_equal(mine, other)


def test_the_loss_needs_no_gather_and_no_scatter():
    program = jax.jit(jax.grad(lambda x: jnp.sum(ops.token_nll(x, TARGETS, 0.1)))).lower(LOGITS).as_text()
    assert "gather" not in program and "scatter" not in program
    assert "scatter" in jax.jit(jax.grad(lambda x: jnp.sum(gathered(x, TARGETS)))).lower(LOGITS).as_text()
