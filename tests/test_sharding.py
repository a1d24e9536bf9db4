"""Devices: eight of them equal one, the memory of frozen weights falls with their number, and what they exchange is known."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import jaxpeft as jp
from jaxpeft import methods, tasks, tree
from jaxpeft.adapt import sites
from jaxpeft.data.base import Examples
from jaxpeft.training import evaluate, loop, sharding

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}
# every mesh with every base leaf trained, and those that split weights with leaves of methods: of linears, keys and sublayers
PAIRS = [("full", "data"), ("full", "fsdp"), ("full", "all"), ("lora", "fsdp"), ("lora", "all"), ("mam", "all")]
# lengths that the axes divide
SIZES = {
    "vision_width": 16,
    "vision_heads": 4,
    "vision_mlp": 32,
    "text_width": 16,
    "text_heads": 4,
    "text_mlp": 32,
    "vocab_size": 28,
}
TX = optax.sgd(1.0)
TASK = tasks.build("vqa")
MODEL = tiny.model(**SIZES)


@functools.cache
def params():
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), MODEL.example()))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes)


def mesh(name):
    return sharding.mesh(dict(zip(sharding.AXES, MESHES[name], strict=True)))


def halves(method):
    """(tuned, frozen), with own leaves moved off their start so that all of them matter."""
    chosen = methods.build(method)
    variables = sites.attach(MODEL, params(), chosen, jax.random.key(1))
    rng = np.random.default_rng(1)
    if "peft" in variables:
        moved = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), variables["peft"])
        variables = variables | {"peft": moved}
    return tree.split(variables, sites.trainable(variables))


def start(tuned):
    return loop.TrainState(jnp.int32(0), tuned, TX.init(tuned), jnp.uint32(0), None, jnp.bool_(True))


STEP = functools.partial(loop.train_step, loss=functools.partial(TASK.loss, MODEL), tx=TX, grad_accum=1)


@functools.cache
def compiled(method, name):
    """(step, state, frozen, batch, where things are) on a mesh."""
    on, (tuned, frozen) = mesh(name), halves(method)
    placed = sharding.shardings(jax.eval_shape(start, tuned), MODEL.sharding, on)
    state = sharding.put(start(tuned), placed)
    frozen = sharding.put(frozen, sharding.shardings(frozen, MODEL.sharding, on))
    batch = sharding.shard_batch(tiny.batch(8), on)
    step = jax.jit(STEP, out_shardings=(placed, sharding.replicated(on)))
    with sharding.using(state):
        return step.lower(state, frozen, batch).compile(), state, frozen, batch


@functools.cache
def alone(method):
    tuned, frozen = halves(method)
    after, metrics = jax.jit(STEP)(start(tuned), frozen, tiny.batch(8))
    return jax.device_get((after.tuned, metrics))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_eight_devices_equal_one(method, name):
    step, state, frozen, batch = compiled(method, name)
    after, metrics = step(state, frozen, batch)
    expected, m = alone(method)
    np.testing.assert_allclose(metrics["loss"], m["loss"], rtol=1e-6)
    flat, before = tree.flatten(expected), tree.flatten(halves(method)[0])
    for leaf, x in tree.flatten(after.tuned).items():
        np.testing.assert_allclose(x, flat[leaf], atol=1e-6, rtol=1e-6, err_msg=leaf)
    assert max(np.abs(flat[leaf] - before[leaf]).max() for leaf in flat) > 1e-3  # the step was one


def n_bytes_here(x):
    return x.addressable_shards[0].data.nbytes


@pytest.mark.parametrize("name", ["fsdp", "all"])
def test_the_memory_of_frozen_matrices_falls_with_the_number_of_devices(name):
    _, _, frozen, _ = compiled("lora", name)
    on = mesh(name)
    matrices = {leaf: x for leaf, x in tree.flatten(frozen).items() if leaf.endswith(("/kernel", "embed/word"))}
    assert len(matrices) > 20
    for leaf, x in matrices.items():
        parts = on.shape["fsdp"] if "patch" in leaf else sharding.n_split(on)
        assert n_bytes_here(x) * parts == x.nbytes, leaf
    placed = jax.tree.map(lambda x: x.sharding, frozen)
    assert sharding.bytes_per_device(frozen, placed) == sum(map(n_bytes_here, jax.tree.leaves(frozen)))
    assert sharding.whole(frozen, placed, at_least=1000) == []


GATHER = re.compile(r"= (?:\()?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(")


def gathered(step):
    """The shapes of all-gathered values in a compiled step."""
    return [tuple(map(int, dims.split(","))) if dims else () for dims in GATHER.findall(step.as_text())]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_weights_are_gathered_a_layer_at_a_time_and_at_most_twice_a_step(method, name):
    """Forward and backward; never a whole stack, which would undo what splitting saves. Nothing where weights are whole."""
    shapes = gathered(compiled(method, name)[0])
    leaves = {leaf: x for half in halves(method) for leaf, x in tree.flatten(half).items()}
    one_layer = [x.size // (x.shape[0] if "/blocks/" in leaf else 1) for leaf, x in leaves.items()]
    if name == "data":
        assert shapes == []
    else:
        sizes = [int(np.prod(shape)) for shape in shapes]
        assert sizes and max(sizes) <= max(one_layer) and sum(sizes) <= 2 * sum(one_layer)


@pytest.mark.parametrize("name", MESHES)
def test_methods_leaves_inherit_from_what_they_adapt(name):
    on, (tuned, _) = mesh(name), halves("lora")
    placed = tree.flatten(sharding.shardings(tuned, MODEL.sharding, on))
    flat = tree.flatten(tuned)
    where = {leaf: placed[leaf].spec for leaf in flat if "/self_attention/query/" in leaf}
    assert len(where) >= 2
    fsdp, tensor = (axis if on.shape[axis] > 1 else None for axis in ("fsdp", "tensor"))
    for leaf, spec in where.items():  # A (L, in, R) as the kernel's input, B (L, R, out) as its output
        kept = tuple(axis if axis and on.shape[axis] > 1 else None for axis in spec)
        assert kept == ((None, fsdp, None) if leaf.endswith("/a") else (None, None, tensor)), leaf


def test_a_leaf_without_a_rule_is_named():
    on = mesh("fsdp")
    with pytest.raises(ValueError, match="no sharding rule covers 2 leaves: params/new/a, params/new/b; add a rule"):
        sharding.shardings({"params": {"new": {"a": jnp.ones(3), "b": jnp.ones(3)}}}, MODEL.sharding, on)


def test_what_every_device_holds_whole_is_reported():
    on = mesh("fsdp")
    tree_ = {"params": {"embed": {"word": jnp.ones((30, 17))}, "x": {"kernel": jnp.ones((16, 16))}}}
    placed = sharding.shardings(tree_, (("kernel", ("fsdp", None)), ("word", ("tensor", "fsdp"))), on)
    assert sharding.whole(tree_, placed, at_least=1) == ["params/embed/word (0.0 MB)"]
    assert sharding.bytes_per_device(tree_, placed) == 4 * (30 * 17 + 16 * 16 // 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_evaluation_on_a_mesh_is_that_of_one_device(name):
    """Batches that the mesh does not divide are padded, and every case counts once."""
    on = mesh(name)
    variables = {"params": params()}
    there = sharding.put(variables, sharding.shardings(variables, MODEL.sharding, on))
    pictures = list(tiny.batch(5)["image"])
    examples = Examples({"image_index": np.arange(5)}, pictures, [])
    tokens = [evaluate.stage_outputs(MODEL, one, examples, "image_tokens", batch_size=3) for one in (variables, there)]
    assert len(tokens[0]) == 5
    np.testing.assert_allclose(*tokens, atol=2e-6)
    questions = ["w1 w2", "w3", "w4", "w5 w6 w7", "w8"]
    options = {"beams": 2, "batch_size": 3}
    assert jp.generate(MODEL, there, pictures, questions, **options) == jp.generate(
        MODEL, variables, pictures, questions, **options
    )


@pytest.mark.slow
def test_accumulation_splits_every_device_alike():
    """A microbatch is every n-th row, so that no row changes its device."""
    on = mesh("data")
    (tuned, frozen), batch = halves("lora"), tiny.batch(16)
    step = functools.partial(STEP.func, **STEP.keywords | {"grad_accum": 2})
    placed = jax.device_put((start(tuned), frozen), sharding.replicated(on))
    program = jax.jit(step).lower(*placed, sharding.shard_batch(batch, on)).compile()
    assert not re.search(r"all-to-all|all-gather|collective-permute", program.as_text())
    after, _ = program(*placed, sharding.shard_batch(batch, on))
    alone, _ = jax.jit(STEP)(start(tuned), frozen, batch)
    for leaf, x in tree.flatten(after.tuned).items():
        np.testing.assert_allclose(x, tree.flatten(alone.tuned)[leaf], atol=1e-6, rtol=1e-6, err_msg=leaf)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "mam"])
def test_frozen_matrices_in_bfloat16_change_nothing_where_products_are_in_bfloat16(method):
    """Bit for bit: loss and gradients are those of frozen float32, which every product rounds in the same way."""
    model = tiny.model(**SIZES, dtype="bfloat16")
    chosen = methods.build(method)
    variables = sites.attach(model, params(), chosen, jax.random.key(1))
    mask = sites.trainable(variables)
    batch, found = tiny.batch(4), []
    for dtype in ("float32", "bfloat16"):
        tuned, frozen = tree.split(sites.narrowed(model, variables, dtype, mask), mask)

        def loss(tuned, frozen=frozen):
            return TASK.loss(model, tree.join(tuned, frozen), batch, None)[0]

        found.append(jax.jit(jax.value_and_grad(loss))(tuned))
        halved = [x for x in jax.tree.leaves(frozen) if x.dtype == jnp.bfloat16]
    assert halved
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mesh_takes_some_axes_and_no_other():
    assert dict(sharding.mesh({"fsdp": 4}).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    with pytest.raises(ValueError, match="unknown mesh axis fdsp"):
        sharding.mesh({"fdsp": 4})
