"""Fused attention against the written-out form, on the same weights: here with JAX's own kernel (`xla`) in cuDNN's place, which
takes the same lengths and padding. tests/test_accelerator.py runs cuDNN's."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mplug
import tiny
import tiny_vlm
from methods_table import perturbed

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.models import attention, stack
from jaxpeft.models.vit import VitConfig


def right_padded(kind):
    """A batch of `tiny_vlm` with the padding of its prompts at the end."""
    batch, pad = tiny_vlm.batch(kind), tiny_vlm.tokenizer(kind).pad_id
    rows = [np.concatenate([row[row != pad], row[row == pad]]) for row in batch["prompt"]]
    return batch | {"prompt": np.stack(rows)}


@functools.cache
def case(name):
    """(a function from fields to a model, its params, a batch)"""
    if name in tiny_vlm.KINDS:
        return functools.partial(tiny_vlm.model, name), tiny_vlm.params(name), right_padded(name)
    batch = tiny.batch(3, n_texts=2)
    if name == "mplug":
        return test_mplug.SHORT.replaced, test_mplug.short_params(), batch
    return functools.partial(tiny.model, False), tiny.params(False), batch


def logits_and_gradients(model, variables, batch, collection="params"):
    """With respect to the leaves of a collection."""

    def loss(leaves, variables):
        logits = model.apply(variables | {collection: leaves}, batch)
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables[collection], variables)
    return logits, tree.flatten(gradients)


def check_same(found, expected, tolerance=1e-6):
    """Logits and gradients up to `tolerance` of their largest value."""
    np.testing.assert_allclose(found[0], expected[0], atol=tolerance * np.abs(expected[0]).max())
    largest = max(float(np.abs(x).max()) for x in expected[1].values())
    for name, leaf in expected[1].items():
        np.testing.assert_allclose(found[1][name], leaf, atol=tolerance * largest, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mplug", "paligemma"])
def test_the_kernel_changes_nothing(name, monkeypatch):
    """Every leaf, of an encoder-decoder and of a decoder-only model; the next test has the other two."""
    make, params, batch = case(name)
    fused, calls = attention.fused, []
    monkeypatch.setattr(attention, "fused", lambda *a, **k: calls.append(a[1].shape) or fused(*a, **k))
    expected = logits_and_gradients(make(), {"params": params}, batch)
    assert not calls
    found = logits_and_gradients(make(attention="xla"), {"params": params}, batch)
    towers = {shape[2] % 8 for shape in calls if shape[2] >= 8}
    assert len(calls) >= 2 and 0 in towers  # tower and text; tokens of images in multiples of 8
    check_same(found, expected)


METHODS = {
    "keys and tokens in front": (jp.Prefix(length=3), jp.Prefix(length=3, targets="vision"), jp.VPT(length=2)),
    "gates": jp.UniPELT(),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["blip_caption", "smolvlm"])
def test_methods_act_alike(name, method):
    make, params, batch = case(name)
    variables = perturbed(jp.attach(make(), params, METHODS[method], jax.random.key(0)))
    plain, fused = (logits_and_gradients(make(**on), variables, batch, "peft") for on in ({}, {"attention": "xla"}))
    check_same(fused, plain, 1e-5)  # float32 and random weights


@pytest.mark.parametrize("n_parts", [1, 3])
def test_attention_in_parts_is_the_one_that_is_written_out(n_parts):
    arrays = [jax.random.normal(jax.random.key(i), (2, 3, n, 8)) for i, n in enumerate((130, 150, 150))]

    def written_out(q, k, v):
        scores_BNTS = jnp.einsum("bnth,bnsh->bnts", 8 * q, k) / 8**0.5  # scores up to 80: their exponentials overflow
        return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(scores_BNTS), v)

    def in_parts(q, k, v):
        return attention.in_parts(n_parts, 8 * q, k, v)

    for found, expected in zip(
        *(jax.vjp(f, *arrays)[1](jnp.cos(f(*arrays))) + (f(*arrays),) for f in (in_parts, written_out)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_the_number_of_parts():
    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((*sizes, 64), dtype)

    for n_rows, n_tokens, expected in ((8, 197, 1), (4, 1024, 24), (1, 2000, 12), (8, 127, 0)):
        x = shape(n_rows, 12, n_tokens)
        assert attention.parts("parts", x, x) == expected
    assert attention.parts("plain", *[shape(4, 12, 577)] * 2) == 0
    assert attention.parts("parts", *[shape(4, 12, 577, dtype=jnp.bfloat16)] * 2) == 0
    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        assert attention.parts("parts", *[shape(8, 12, 577)] * 2) == 0


@pytest.mark.slow
def test_a_tower_with_many_tokens_is_read_in_parts(monkeypatch):
    """Its logits and gradients, with dropout, and with a mask, which are not."""
    make, params, batch = case("smolvlm")
    expected = logits_and_gradients(make(), {"params": params}, batch)
    in_parts, calls = attention.in_parts, []
    monkeypatch.setattr(attention, "in_parts", lambda n, *a: calls.append(n) or in_parts(n, *a))
    monkeypatch.setattr(attention, "LONG", 8)
    monkeypatch.setattr(attention, "WHOLE", 1 << 10)
    monkeypatch.setattr(attention, "PART", 1 << 10)
    found = logits_and_gradients(make(), {"params": params}, batch)
    assert calls and min(calls) > 1
    check_same(found, expected, 2e-6)


def test_padding_in_front_is_nan_and_no_wrong_number():
    x_BSD, mask_BS = jnp.ones((3, 70, 4)), jnp.arange(70)[None] < jnp.array([[70], [60], [70]])
    mask_BS = mask_BS.at[2, :3].set(False)
    padded_BSD, lengths_B = attention.padded(x_BSD, mask_BS, "cudnn")
    assert padded_BSD.shape == (3, 72, 4)
    np.testing.assert_array_equal(lengths_B, [70, 60, 67])
    np.testing.assert_array_equal(np.isnan(padded_BSD[:, 0, 0]), [False, False, True])


@pytest.mark.parametrize("causal", [False, True])
def test_an_odd_number_of_keys_without_lengths(causal):
    """The kernel's lengths are even; the key that is added must get no weight."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 5, 8)) for i, n in enumerate((4, 2, 2)))
    found = attention.fused("xla", q, k, v, None, causal)
    scores_BNTS = jnp.einsum("bnth,bnsh->bnts", q, jnp.repeat(k, 2, 1)) / 8**0.5
    if causal:
        scores_BNTS = jnp.where(jnp.tri(5, dtype=bool)[None, None], scores_BNTS, -jnp.inf)
    expected = jnp.einsum("bnts,bnsh->btnh", jax.nn.softmax(scores_BNTS), jnp.repeat(v, 2, 1))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_short_and_plain_sequences_stay():
    for n_keys, kind in ((70, "plain"), (attention.LEAST - 1, "cudnn")):
        x_BSD, mask_BS = jnp.ones((2, n_keys, 4)), jnp.ones((2, n_keys), bool)
        same, mask = attention.padded(x_BSD, mask_BS, kind)
        assert same is x_BSD and mask.shape == (2, 1, n_keys)


def test_what_the_kernel_does_not_take():
    k, mask = jnp.ones((2, 3, 577, 64)), jnp.ones((2, 1, 577), bool)
    assert attention.fuses("cudnn", k, None, None, False)
    assert attention.fuses("cudnn", k, jnp.ones(2, jnp.int32), None, False)
    assert not attention.fuses("plain", k, None, None, False)
    assert not attention.fuses("cudnn", k, mask, None, False)
    assert not attention.fuses("cudnn", k, None, jnp.ones((1, 1, 577)), False)
    assert not attention.fuses("cudnn", k, None, None, True)
    assert not attention.fuses("cudnn", k[..., :60], None, None, False)  # a head size that 8 does not divide
    assert not attention.fuses("cudnn", jnp.ones((2, 3, 577, 136)), None, None, False)
    assert not attention.fuses("cudnn", k[:, :, :20], None, None, False)


def test_dropped_weights_are_written_out(monkeypatch):
    make, params, batch = case("blip_caption")
    fused, sizes = attention.fused, []
    monkeypatch.setattr(attention, "fused", lambda *a, **k: sizes.append(a[1].shape[2]) or fused(*a, **k))
    apply = functools.partial(make(dropout=0.5, attention="xla").apply, {"params": params}, batch)
    jax.eval_shape(apply)
    assert set(sizes) == {8}  # the queries of the tower, and 2 x 4 of texts
    n_both = len(sizes)
    jax.eval_shape(functools.partial(apply, rngs={"dropout": jax.random.key(0)}))
    assert len(sizes) == n_both + n_both // 2  # the tower drops nothing


def test_what_none_stands_for():
    half, full = VitConfig(dtype="bfloat16"), VitConfig()
    assert half.on("gpu") == {"unroll": stack.MOST, "attention": "cudnn"}
    assert full.on("gpu")["attention"] == half.on("tpu")["attention"] == "plain"
    assert full.on("cpu")["attention"] == half.on("cpu")["attention"] == "parts"
    assert half.on("cpu")["unroll"] == stack.UNROLLED
    assert VitConfig(attention="xla", unroll=2).on("gpu") == {"unroll": 2, "attention": "xla"}
    assert half.attention_here == "parts"  # tests run on CPU
    with pytest.raises(ValueError, match="attention is 'flash'; choose one of plain, parts, cudnn, xla"):
        VitConfig(attention="flash")


def test_no_product_of_float32_in_the_backward_pass():
    """In bfloat16 every product, also those of the scores' gradient, has bfloat16 operands."""
    make, params, batch = case("blip_caption")
    model = make(dtype="bfloat16")

    def loss(params):
        return jnp.sum(model.apply({"params": params}, batch))

    program = jax.jit(jax.grad(loss)).lower(params).as_text()
    found = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", program)
    assert len(found) > 20 and set(found) == {("bf16", "bf16")}, found


def test_the_gradient_of_the_scores_is_that_of_float32():
    rng = np.random.default_rng(0)
    q, k, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 8, 4), (2, 3, 6, 4), (2, 3, 8, 6)))

    def gradients(q, k):
        return jax.vjp(lambda q, k: attention.products("BNTH,BNSH->BNTS", q, k), q, k)[1](g)

    exact, half = gradients(q, k), gradients(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16))
    for a, b in zip(exact, half, strict=True):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_allclose(a, b.astype(jnp.float32), atol=0.02 * np.abs(a).max())
