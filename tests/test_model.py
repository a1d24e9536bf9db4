"""Properties of the ported model that no golden number states: causality, scanning, remat."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import errors, traverse_util
from flax import linen as nn
from jax._src.cudnn import fused_attention_stablehlo

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.models import layers, stack
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.models.vit import position_init
from jaxpeft.training import evaluate

VARIABLES = {"params": tiny.params()}
BATCH = tiny.batch(3, n_texts=2)


@functools.cache
def logits(**overrides):
    return jax.jit(tiny.model(**overrides).apply)(VARIABLES, BATCH)


@pytest.mark.slow
def test_decoder_is_causal_and_looks_at_everything_before():
    """The loss of position t has gradient at word embeddings of positions <= t only, and at each of them."""
    model, one = tiny.model(), {name: BATCH[name][:1] for name in ("image", "prompt")}
    context = jax.jit(functools.partial(model.apply, method="context"))(VARIABLES, one)
    tokens = np.array([[7, 8, 9, 10]], np.int32)  # distinct words, so an embedding row is a position

    def loss(word_VD, t):
        flat = tree.flatten(VARIABLES["params"]) | {"text_decoder/embed/word": word_VD}
        params = tree.unflatten(VARIABLES["params"], flat)
        logits = model.apply({"params": params}, tokens, context, method="score")
        return jnp.sum(logits[0, t] * jnp.cos(jnp.arange(logits.shape[-1])) * (jnp.arange(logits.shape[-1]) > 10))

    word_VD, gradient = VARIABLES["params"]["text_decoder"]["embed"]["word"], jax.jit(jax.grad(loss))
    for t in range(4):
        grad = np.abs(gradient(word_VD, t)).max(axis=1)[tokens[0]]
        assert np.all(grad[: t + 1] > 1e-6) and np.all(grad[t + 1 :] == 0)


def results(model):
    """Logits, and gradients of the sum of their squares."""

    def loss(params):
        logits = model.apply({"params": params}, BATCH)
        return jnp.sum(logits**2), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(VARIABLES["params"])
    return logits, tree.flatten(grads)


@functools.cache
def scanned():
    assert stack.UNROLLED == 0  # conftest
    return results(tiny.model())


@pytest.mark.slow
@pytest.mark.parametrize("change", ["unrolled", "remat"])
def test_unrolled_layers_and_remat_change_nothing(change, monkeypatch):
    plain, grads = scanned()
    if change == "unrolled":
        monkeypatch.setattr(stack, "UNROLLED", 4)
    changed, changed_grads = results(tiny.model(remat="full" if change == "remat" else "none"))
    np.testing.assert_allclose(changed, plain, atol=1e-6)
    for name, leaf in grads.items():
        np.testing.assert_allclose(changed_grads[name], leaf, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_layers_apart_share_their_memory_and_compute_the_same():
    model = tiny.model(unroll=4)
    apart = stack.apart(model.config, VARIABLES)
    found = jax.tree_util.tree_leaves_with_path(apart, is_leaf=lambda x: isinstance(x, stack.Layers))
    layers = {tree.path_name(path): leaf.arrays for path, leaf in found if isinstance(leaf, stack.Layers)}
    assert set(layers) == {name for name, x in tree.flatten(VARIABLES).items() if "/blocks/" in name and x.ndim > 1}
    name = "params/text_decoder/blocks/mlp/up/kernel"
    whole = tree.flatten(VARIABLES)[name]
    bytes_of_layer = whole.nbytes // len(whole)
    for i, layer in enumerate(layers[name]):
        assert layer.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + i * bytes_of_layer
    assert jax.tree.structure(stack.apart(model.config, apart)) == jax.tree.structure(apart)
    same = jax.tree.map(np.array_equal, stack.together(apart), VARIABLES)
    assert all(jax.tree.leaves(same))
    program = jax.jit(model.apply)
    np.testing.assert_array_equal(program(apart, BATCH), program(VARIABLES, BATCH))
    # a loop, which would first have to stack them, and rows on several devices
    assert jax.tree.structure(stack.apart(tiny.model().config, VARIABLES)) == jax.tree.structure(VARIABLES)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8), "data")
    spread = jax.device_put(VARIABLES, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    assert jax.tree.structure(stack.apart(model.config, spread)) == jax.tree.structure(VARIABLES)


def test_a_program_copies_no_layer_that_is_apart():
    """The reason for `apart`: slices of stacked arguments are copies."""
    model = tiny.model(unroll=4)
    shape = VARIABLES["params"]["text_decoder"]["blocks"]["mlp"]["up"]["kernel"].shape

    def slices(variables):
        text = jax.jit(model.apply).lower(variables, BATCH).compile().as_text()
        return len(re.findall(rf"f32\[(1,)?{shape[1]},{shape[2]}\]\S* slice\(", text))

    assert slices(VARIABLES) >= shape[0]
    assert slices(stack.apart(model.config, VARIABLES)) == 0


def test_uint8_pictures_are_normalised_as_blip_does():
    from jaxpeft.inputs import images

    model = tiny.model()
    normalised = (BATCH["image"] / np.float32(255) - images.MEAN_C) / images.STD_C
    states = [model.apply(VARIABLES, x, method="encode_image") for x in (BATCH["image"], normalised)]
    np.testing.assert_allclose(*states, atol=1e-5)


@pytest.mark.slow
def test_dropout_needs_an_rng():
    model = tiny.model(dropout=0.5)
    np.testing.assert_array_equal(logits(dropout=0.5), logits())
    dropped = jax.jit(model.apply)(VARIABLES, BATCH, rngs={"dropout": jax.random.key(0)})
    assert np.abs(dropped - logits()).max() > 1e-2


@pytest.mark.slow
def test_bfloat16_is_close_and_logits_stay_float32():
    half, full = logits(dtype="bfloat16"), logits()
    assert half.dtype == jnp.float32
    error = np.abs(half - full)
    assert 1e-5 < error.max() < 0.15 * np.std(full) * 4


def test_a_base_loaded_twice_is_compiled_once():
    """The processor is no part of the jit key."""
    (one, params), (two, _) = jp.load("tiny", task="captioning"), jp.load("tiny", task="captioning")
    assert one == two and hash(one) == hash(two) and one.processor is not two.processor
    before = evaluate.contexts._cache_size()
    for model in (one, two):
        evaluate.contexts(model, {"params": params}, {"image": np.zeros((1, 64, 64, 3), np.uint8)})
    assert evaluate.contexts._cache_size() == before + 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: BlipConfig(text_heads=7), "text_width 768 is not divisible by text_heads 7"),
        (lambda: BlipConfig(image_size=100), "image_size 100 is not divisible by patch_size 16"),
        (lambda: tiny.model().apply(VARIABLES, np.zeros((1, 24, 24, 3), np.uint8), method="encode_image"), "24, 24, 3"),
        (
            lambda: Blip.build(tiny.model().config).apply(VARIABLES, np.ones((1, 17), np.int32), method="masked_lm"),
            "17 tokens",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(3, 12), (2, 3, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_of_rows_is_that_of_flax(shape, dtype):
    """Also in bfloat16, where rows are in one axis: equal up to its last digit."""
    rng = np.random.default_rng(0)
    x, leaves = jnp.float32(rng.normal(1, 2, shape)), {"scale": rng.normal(size=12), "bias": rng.normal(size=12)}
    variables = {"params": jax.tree.map(jnp.float32, leaves)}
    ours = layers.LayerNorm(epsilon=1e-6, dtype=dtype).apply(variables, x)
    theirs = nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False).apply(variables, x)
    assert ours.dtype == theirs.dtype == dtype and ours.shape == shape
    np.testing.assert_allclose(np.float32(ours), np.float32(theirs), rtol=2**-8 if dtype == "bfloat16" else 1e-6)


def test_what_the_backward_pass_keeps_with_remat_dots():
    """Products of weights and the fused attention, whose name is JAX's own; not written-out attention."""
    keeps, rows = stack.REMAT["dots"], (((1,), (0,)), ((), ()))
    assert keeps(fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper)
    assert keeps(jax.lax.dot_general_p, dimension_numbers=rows)
    assert not keeps(jax.lax.dot_general_p, dimension_numbers=(((2,), (2,)), ((0,), (0,))))
    assert not keeps(jax.lax.exp_p)


def test_positions_start_apart():
    """Every patch has a position of its own, rows and columns alike in size, and nothing is added to the mean patch."""
    positions = np.asarray(position_init(jax.random.key(0), (1 + 64, 32)))[1:]
    np.testing.assert_allclose(positions.mean(0), 0, atol=1e-6)
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1) + 9 * np.eye(64)
    assert apart.min() > 0.5
    grid = positions.reshape(8, 8, 32)
    np.testing.assert_allclose(grid[..., :16], np.broadcast_to(grid[:, :1, :16], (8, 8, 16)), atol=1e-6)  # of the row
    np.testing.assert_allclose(grid[..., 16:], grid.swapaxes(0, 1)[..., :16], atol=1e-6)  # of the column
    np.testing.assert_allclose(grid[:, 0, 0], np.sin(np.arange(8) * np.pi / 4), atol=1e-6)  # one wave over the grid


def test_positions_of_a_width_that_four_does_not_divide():
    positions = np.asarray(position_init(jax.random.key(0), (1 + 9, 10)))
    assert positions.shape == (10, 10) and np.abs(positions[0]).max() < 0.2
    assert np.abs(positions[1:, :8]).max() > 0.5 and 0 < np.abs(positions[:, 8:]).max() < 0.2


@pytest.mark.parametrize("leaf", ["vision/patch/bias", "vision/norm/scale", "text_decoder/blocks/mlp/up/bias"])
def test_parameters_of_another_size_are_refused(leaf):
    leaves = tree.flatten(tiny.params())
    wider = jnp.concatenate([leaves[leaf]] * 2, axis=-1)
    params = traverse_util.unflatten_dict(leaves | {leaf: wider}, sep="/")
    with pytest.raises(errors.ScopeParamShapeError, match=f'"{leaf.rpartition("/")[2]}"'):
        jax.eval_shape(tiny.model().apply, {"params": params}, tiny.batch())
