"""Optimizers by name: each is optax's own rule, decays what it should, and its state is stored and placed on a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toy
from tiny import config_of

from jaxpeft import config, tree
from jaxpeft.runtime import signals
from jaxpeft.training import loop, optim, run, sharding

LR, DECAY = 0.1, 0.01
REFERENCES = {
    "adamw": lambda mask: optax.adamw(LR, 0.9, 0.999, weight_decay=DECAY, mask=mask),
    "adafactor": lambda mask: optax.adafactor(
        LR, multiply_by_parameter_scale=False, weight_decay_rate=DECAY * LR, weight_decay_mask=mask
    ),
    "lion": lambda mask: optax.lion(LR, 0.9, 0.999, weight_decay=DECAY, mask=mask),
    "sgd": lambda mask: optax.chain(optax.add_decayed_weights(0.0), optax.sgd(LR, 0.9)),
    "muon": None,
}


def settings(name):
    c = config.get_config().optim
    c.name, c.lr, c.schedule, c.warmup, c.clip_norm, c.weight_decay = name, LR, "constant", 0.0, 0.0, DECAY
    return c


def leaves(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "kernel": (6, 4),
        "bias": (4,),
        "tower": {"blocks": {"kernel": (3, 6, 4), "bias": (3, 4)}},
        "scale": (),
        "scalar": (),
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def after(tx, params, n=3):
    state = tx.init(params)
    for i in range(n):
        updates, state = tx.update(leaves(i + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", [name for name, make in REFERENCES.items() if make])
def test_a_rule_is_that_of_optax(name):
    """Three steps of ours, whose rate is applied last, and of optax with the rate inside."""
    c, params = settings(name), leaves()
    mask = jax.tree.map(lambda name: not name.endswith(("bias", "scale")), tree.names(params))
    if name == "sgd":
        c.weight_decay = 0.0
    ours, theirs = after(optim.optimizer(c, params, 10), params), after(REFERENCES[name](mask), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, theirs)


def test_muon_makes_the_momentum_of_each_layer_orthogonal():
    """The update of a matrix, and of each layer of a stack, has singular values near one; that of a bias is NAdam's."""
    c, params = settings("muon"), leaves()
    c.weight_decay = 0.0
    moved = jax.tree.map(lambda a, b: (b - a) / LR, params, after(optim.optimizer(c, params, 10), params, n=1))
    for matrix in (moved["kernel"], *moved["tower"]["blocks"]["kernel"]):
        scale = np.sqrt(max(1, matrix.shape[1] / matrix.shape[0]))
        values = np.linalg.svd(np.asarray(matrix) / scale, compute_uv=False)
        assert values.min() > 0.5 and values.max() < 1.3, values
    adam = optax.nadam(1.0, 0.9, 0.999).update(leaves(1)["bias"], optax.nadam(1.0).init(params["bias"]))[0]
    np.testing.assert_allclose(moved["bias"], adam, rtol=1e-4)
    assert np.abs(moved["tower"]["blocks"]["bias"]).std() < 1e-3  # a stack of biases is no matrix
    alone = optim.optimizer(c, {"kernel": params["tower"]["blocks"]["kernel"][1]}, 10)
    grads = {"kernel": leaves(1)["tower"]["blocks"]["kernel"][1]}
    updates, _ = alone.update(grads, alone.init(grads), {"kernel": params["tower"]["blocks"]["kernel"][1]})
    np.testing.assert_allclose(updates["kernel"] / LR, moved["tower"]["blocks"]["kernel"][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_kernels_decay_and_biases_and_scales_do_not(name):
    """Without a gradient a step multiplies by 1 - rate * decay what decays, and leaves the rest alone."""
    params = leaves()
    tx = optim.optimizer(settings(name), params, 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -LR * DECAY * params["kernel"], rtol=1e-5)
    np.testing.assert_allclose(
        updates["tower"]["blocks"]["kernel"], -LR * DECAY * params["tower"]["blocks"]["kernel"], rtol=1e-5
    )
    assert not np.asarray(updates["bias"]).any() and updates["scale"] == 0


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_stopped_run_on_a_mesh_goes_on_bit_for_bit(tmp_path, name):
    """Also states that are not shaped as the leaves are: factors, coefficients, empty places."""
    c = toy.rarely(6, **{"optim.name": name, "mesh.fsdp": 2})
    rules = (("params/w$", ("fsdp", None)), ("", ()))
    whole, _ = toy.train(tmp_path / "whole", c, rules=rules)
    with pytest.raises(signals.Stopped):
        toy.train(tmp_path / "parts", c, rules=rules, change=toy.raise_at(4))
    said = []
    parts, _ = toy.train(tmp_path / "parts", c, said.append, rules=rules)
    assert "resumed from step 3" in said and whole.tuned["params"]["w"].sharding.spec == jax.P("fsdp", None)
    assert tree.digest(parts) == tree.digest(whole) and int(whole.step) == 6


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_every_leaf_of_a_state_of_blip_has_a_place_on_a_mesh(name):
    """And the moments of AdamW and Lion lie where their leaves do."""
    model, on = tiny.model(), sharding.mesh({"fsdp": 2})
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), model.example()))["params"]
    tuned = {"params": params}
    state = jax.eval_shape(
        functools.partial(loop.start, tx=optim.optimizer(settings(name), tuned, 10), seed=0, best=False), tuned
    )
    placed = sharding.shardings(state, model.sharding, on)
    where = tree.flatten(placed.tuned)
    for leaf, place in tree.flatten(placed.opt).items():
        if re.search("/(mu|nu)/params/", leaf) and name in ("adamw", "lion"):
            assert place.spec == where[leaf[leaf.index("params/") :]].spec, leaf


@pytest.mark.slow
def test_a_run_with_another_optimizer_learns_and_goes_on_to_more_steps(base, tmp_path):
    c = config_of(base, **{"optim.name": "adafactor", "optim.lr": 0.01, "mesh.fsdp": 2, "data.n_test": 2})
    c.eval.gallery, c.steps, said = False, 3, []
    run.run(c, tmp_path, lambda *_: None)
    c.steps = 6
    result = run.run(c, tmp_path, said.append, accept_changes=True)
    assert "resumed from step 3" in said and result["timing"]["steps"] == 6
    test = result["metrics"]["test"]
    assert np.isfinite(test["tuned"]["nll"]) and test["tuned"]["nll"] != test["base"]["nll"]


def test_groups_multiply_the_learning_rate_of_leaves_by_name():
    tuned = {"params": {"vision": {"a": jnp.ones(2)}, "text": {"b": jnp.ones(2)}}}
    c = settings("sgd")
    c.lr_groups, c.weight_decay, c.clip_norm, c.schedule, c.warmup = (
        ((r"^params/vision", 0.25),),
        0.0,
        0.0,
        "constant",
        0.0,
    )
    tx = optim.optimizer(c, tuned, 10)
    updates, _ = tx.update(tuned, tx.init(tuned), tuned)
    a, b = updates["params"]["vision"]["a"], updates["params"]["text"]["b"]
    np.testing.assert_allclose(a, 0.25 * b, rtol=1e-6)
    c.lr_groups = (("^vision", 0.5),)
    with pytest.raises(ValueError, match=r"lr_groups: '\^vision' matches no trained leaf, such as params/"):
        optim.optimizer(c, tuned, 10)
