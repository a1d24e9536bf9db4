"""Splitting, joining, naming and comparing trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import tree
from jaxpeft.training import sharding

TREE = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}, "b": (jnp.ones(2), jnp.ones(1))}


def test_names_are_paths():
    assert tree.names(TREE) == {"a": {"bias": "a/bias", "kernel": "a/kernel"}, "b": ("b/0", "b/1")}


def test_split_leaves_holes_and_join_fills_them():
    tuned, frozen = tree.split(TREE, jax.tree.map(lambda name: "bias" in name or "b/0" in name, tree.names(TREE)))
    assert tuned["a"]["kernel"] is None and frozen["a"]["bias"] is None
    assert tree.count(tuned) == 5 and tree.count(frozen) == 7
    joined = tree.join(tuned, frozen)
    assert tree.digest(joined) == tree.digest(TREE)


@pytest.mark.parametrize("side", ["both", "neither"])
def test_join_refuses_overlap_and_gap(side):
    tuned, frozen = tree.split(TREE, jax.tree.map(lambda name: "bias" in name, tree.names(TREE)))
    tuned["a"]["bias"] = None if side == "neither" else tuned["a"]["bias"]
    frozen["a"]["bias"] = jnp.zeros(3) if side == "both" else None
    with pytest.raises(ValueError, match=f"a/bias: {side}"):
        tree.join(tuned, frozen)


def test_unflatten_inverts_flatten_and_lists_what_does_not_fit():
    flat = tree.flatten(TREE)
    assert tree.digest(tree.unflatten(TREE, flat)) == tree.digest(TREE)
    bad = flat | {"c": jnp.ones(1), "b/0": jnp.ones(5)}
    del bad["a/bias"]
    with pytest.raises(ValueError) as error:
        tree.unflatten(TREE, bad, "this file")
    for part in ("this file", "missing (1): a/bias", "unexpected (1): c", "b/0: expected (2,), got (5,)"):
        assert part in str(error.value)


def test_digest_sees_one_bit_a_name_and_a_dtype():
    changed = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    changed[1, 2] = np.nextafter(changed[1, 2], 10, dtype=np.float32)
    plain = {"a": TREE["a"]["kernel"]}
    digests = [{"a": changed}, {"b": plain["a"]}, {"a": plain["a"].astype(jnp.int32)}, {"a": plain["a"].T}]
    assert len({tree.digest(t) for t in [plain, *digests]}) == 5
    assert tree.digest({"a": np.asarray(plain["a"])}) == tree.digest(plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_has_one_digest_however_wide_it_is_in_memory(dtype, monkeypatch):
    """Values that 16 bits hold, also where a leaf is read in parts; rounded values are others."""
    narrow = {"a": np.random.default_rng(0).normal(size=(5, 7)).astype(dtype), "b": np.ones((), dtype)}
    wide = {name: x.astype(np.float32) for name, x in narrow.items()}
    expected = tree.digest(wide)
    monkeypatch.setattr(tree, "PART", 4)
    assert tree.digest(narrow) == tree.digest(wide) == expected
    wide["a"][2, 3] = np.nextafter(wide["a"][2, 3], np.float32(9))
    assert tree.digest(wide) != expected


def test_packed_words_hold_every_bit():
    odd = {"nan": np.array([np.nan, -np.nan, -0.0, np.inf], np.float32), "i": np.array([-1, 2**31 - 1], np.int32)}
    odd["nan"].view(np.uint32)[0] |= 12345  # a payload
    odd |= {
        "half": np.arange(7).astype(jnp.bfloat16),
        "ok": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }
    layout = tree.layout(odd)
    back = tree.unpack(np.asarray(sharding.packed([jnp.asarray(x) for x in odd.values()])), layout)
    assert tree.digest(back) == tree.digest(odd)
    with pytest.raises(ValueError, match="14 words of uint32, expected 15"):
        tree.unpack(np.zeros(14, np.uint32), layout)
    for dtype in ("O", "float64"):
        with pytest.raises(ValueError, match="32 bits at most"):
            tree.unpack(np.zeros(3, np.uint32), [["x", dtype, [3]]])
    with pytest.raises(ValueError, match="float64 does not fit|int64 does not fit"), jax.enable_x64(True):
        sharding.packed([jnp.zeros(3, jnp.int64)])


def test_nearest_ranks_by_likeness():
    assert tree.nearest("attention/quer$", ["mlp/up", "attention/query", "attention/key"], 1) == ["attention/query"]
