"""One table of methods, properties over all its rows; then what single methods promise."""

import dataclasses
import functools
import re
from typing import Literal, Optional

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from methods_table import BASE, BY_NAME, ROWS, attached, every_row, perturbed

import jaxpeft as jp
from jaxpeft import methods, tasks, tree
from jaxpeft.adapt import sites
from jaxpeft.methods import METHODS, Head, LoRA, Selective, Site
from jaxpeft.training import loop


@functools.cache
def without_images():
    """A batch with the tokens of the base's image tower in place of the images."""
    batch, variables = tiny.batch(), {"params": tiny.params()}
    tokens = jax.jit(functools.partial(tiny.model().apply, method="encode_image"))(variables, batch.pop("image"))
    return batch | {"image_tokens": tokens}


def batch_of(variables):
    """One with images where a method acts in the image tower; others need not wait for its part of every program."""
    on = [name for name, moves in tree.flatten(jp.trainable(variables)).items() if moves]
    return tiny.batch() if any("/vision/" in name for name in on) else without_images()


@tiny.exact_jit
def logits_of(variables, batch):
    return tiny.model().apply(variables, batch)


def test_every_method_has_a_row():
    assert {row.name for row in ROWS} == {*METHODS, "scoped"}


@every_row
def test_identity_at_init_is_exact_or_known_not_to_be(row):
    variables, _ = attached(row)
    batch = batch_of(variables)
    differs = np.abs(logits_of(variables, batch) - logits_of({"params": tiny.params()}, batch)).max()
    assert differs > 1e-3 if row.identity is None else differs <= row.identity


@every_row
def test_exact_count_and_report(row):
    variables, mask = attached(row)
    assert sites.counts(variables, mask) == {"tuned": row.tuned, "stored": row.stored, "total": BASE}
    assert f"{row.tuned:,}  {row.stored:,}" in re.sub(" +", "  ", sites.describe(variables, mask).splitlines()[-2])


@every_row
def test_base_is_untouched_by_attach(row):
    variables, _ = attached(row)
    assert tree.digest(variables["params"]) == tree.digest(tiny.params())


UNSEEN = re.compile(r"key/(bias|@linear/0/ssf/t)$")  # what is added to every key alike, softmax does not see


@every_row
def test_every_tuned_leaf_matters(row):
    """Moving any tuned leaf moves some logit: no leaf is created, counted and then ignored."""
    variables, mask = attached(row)
    variables, dead, rng = perturbed(variables), [], np.random.default_rng(5)
    batch, leaves = batch_of(variables), tree.flatten(variables)
    logits = logits_of(variables, batch)
    for name in (name for name, on in tree.flatten(mask).items() if on):
        moved = leaves[name] + rng.normal(size=leaves[name].shape).astype(np.float32)
        if np.abs(logits_of(tree.unflatten(variables, {**leaves, name: moved}), batch) - logits).max() < 1e-5:
            dead.append(name)
    assert all(UNSEEN.search(name) for name in dead), dead


# with a tuned head, an MLP, fixed leaves, gates and leaves of several kinds, of some layers, of the base alone
@pytest.mark.parametrize("name", ["lora13", "prefix5", "vera20", "unipelt29", "scoped31", "bitfit32"])
@pytest.mark.slow
def test_training_moves_the_tuned_leaves_and_no_others(name):
    variables, mask = attached(BY_NAME[name])
    variables = perturbed(variables)
    tuned, frozen = jp.split(variables, mask)
    tx = optax.sgd(0.1)
    state = loop.TrainState(jnp.int32(0), tuned, tx.init(tuned))
    state, _ = _steps(state, frozen, tx, batch_of(variables))
    after = tree.flatten(tree.join(state.tuned, frozen))
    moved = {name for name, leaf in tree.flatten(variables).items() if not np.array_equal(leaf, after[name])}
    allowed = {name for name, on in tree.flatten(mask).items() if on}
    assert moved <= allowed
    assert all(UNSEEN.search(name) for name in allowed - moved), allowed - moved


def _steps(state, frozen, tx, batch):
    step = functools.partial(
        loop.train_step, loss=functools.partial(tasks.build("vqa").loss, tiny.model()), tx=tx, grad_accum=1
    )
    return jax.jit(step)(state, frozen, batch)


@every_row
def test_merge_equals_unmerged_or_is_refused(row):
    variables = perturbed(attached(row)[0])
    if row.refused:
        with pytest.raises(ValueError, match=row.refused):
            jp.merge(tiny.model(), variables)
        return
    merged, batch = jp.merge(tiny.model(), variables), batch_of(variables)
    if "image" not in batch:
        assert tree.digest(merged["vision"]) == tree.digest(tiny.params()["vision"])
    logits = logits_of(variables, batch)
    np.testing.assert_allclose(logits_of({"params": merged}, batch), logits, atol=1e-5, rtol=1e-4)
    if "peft" in variables and jax.tree.leaves(variables["peft"]):  # and the method did something
        assert np.abs(logits - logits_of({"params": tiny.params()}, batch)).max() > 1e-3


@every_row
def test_dtype_is_kept(row):
    variables = perturbed(attached(row)[0])
    half = functools.partial(tiny.model(dtype="bfloat16").apply, method="encode_image")
    assert jax.eval_shape(half, variables, tiny.batch()["image"]).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["peft"])} <= {jnp.dtype("float32")}


@every_row
def test_equal_methods_compile_once(row):
    traces = []

    @jax.jit
    def run(variables):
        traces.append(1)
        return jax.tree.leaves(variables)[0].sum()

    for seed in (0, 1):
        run(jp.attach(tiny.model(), tiny.params(), row.build(), jax.random.key(seed)))
    assert len(traces) == 1


def test_other_rank_is_another_program():
    """The control of the test above: a method is part of what jit keys on, not only its shapes."""
    one, other = (jp.attach(tiny.model(), tiny.params(), LoRA(rank=2, alpha=a), jax.random.key(0)) for a in (1.0, 2.0))
    assert jax.tree.structure(one) != jax.tree.structure(other)


@pytest.mark.parametrize(
    "method, message",
    [
        (LoRA(targets="text_decoder/blocks/self_attention/qurey$"), "nearest: .*self_attention/query"),
        (Selective(leaves="layer_norm"), "selective: 'layer_norm' matches no base leaf; nearest: .*norm"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(method, message):
    with pytest.raises(ValueError, match=message):
        jp.attach(tiny.model(), tiny.params(), method, jax.random.key(0))


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing would be trained"):
        jp.attach(tiny.model(), tiny.params(), (), jax.random.key(0))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: methods.build("lorra"),
            "unknown method 'lorra' .did you mean 'lora'.*; choose one of bitfit, compacter, dora",
        ),
        (lambda: methods.build("lora", ranks=3), r"unknown fields \['ranks'\]"),
        (lambda: methods.build("lora", head="all"), "unknown head 'all'; choose one of none, transform, untied"),
        (lambda: methods.build("head", head="untied"), "same leaves"),
        (lambda: LoRA(rank=0), "rank is 0"),
        (lambda: LoRA(dropout=1.0), "dropout is 1.0"),
        (lambda: Selective(), "`leaves` is empty"),
        (lambda: Head(matrix="tied"), "matrix is 'tied'; choose one of transform, untied"),
    ],
)
def test_bad_fields_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_adding_a_method_does_not_change_another_init():
    alone = tree.flatten(jp.attach(tiny.model(), tiny.params(), LoRA(rank=2), jax.random.key(0))["peft"])
    pair = jp.attach(tiny.model(), tiny.params(), (LoRA(rank=2), LoRA(rank=1, targets="query$")), jax.random.key(0))
    both = tree.flatten(pair["peft"])
    assert all(np.array_equal(leaf, both[name]) for name, leaf in alone.items())
    assert any(name.endswith("query/@linear/1/lora/a") for name in both)  # the second one stands beside the first


def test_lora_is_the_papers_equation():
    """x W + b + alpha / r * x A B at one linear, with A U(-1/sqrt(in), 1/sqrt(in)) and B zero at init."""
    method = LoRA(rank=3, alpha=6.0)
    params = method.init(jax.random.key(0), Site("x", "linear", (50, 7)), {})
    assert params["a"].shape == (50, 3) and not params["b"].any()
    bound = 50**-0.5
    assert np.abs(params["a"]).max() <= bound and np.abs(params["a"]).max() > 0.9 * bound
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in params.items()}
    x, kernel = rng.normal(size=(2, 4, 50)).astype(np.float32), rng.normal(size=(50, 7)).astype(np.float32)
    got = method.linear(params, jnp.asarray(x), jnp.asarray(x @ kernel), {}, None)
    np.testing.assert_allclose(got, x @ (kernel + 2.0 * params["a"] @ params["b"]), rtol=1e-4, atol=1e-4)


def test_loha_is_the_papers_equation():
    """x W + b + alpha / r * x ((A1 B1) * (A2 B2)), elementwise in the brackets."""
    rng = np.random.default_rng(0)
    shapes = {"a1": (5, 2), "b1": (2, 7), "a2": (5, 2), "b2": (2, 7)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x, y = rng.normal(size=(2, 4, 5)).astype(np.float32), rng.normal(size=(2, 4, 7)).astype(np.float32)
    got = jp.LoHa(rank=2, alpha=6.0).linear(params, jnp.asarray(x), jnp.asarray(y), {}, None)
    update = 3.0 * (params["a1"] @ params["b1"]) * (params["a2"] @ params["b2"])
    np.testing.assert_allclose(got, y + x @ update, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rank, alpha, stabilized, scale",
    [(8, "2r", False, 2.0), (8, "r", False, 1.0), (4, 16.0, False, 4.0), (16, "16", False, 1.0), (64, 16, True, 2.0)],
)
def test_lora_scale_policy(rank, alpha, stabilized, scale):
    assert LoRA(rank=rank, alpha=alpha, rank_stabilized=stabilized).scale == scale


def test_lora_scales_the_narrow_product():
    """Over the tokens of images, a product with s at the width of the result is a pass over memory of its own."""
    params = {"a": jnp.ones((64, 2)), "b": jnp.ones((2, 48))}
    program = jax.make_jaxpr(lambda x: LoRA(rank=2).update(params, x, None))(jnp.ones((5, 7, 64)))
    scaled = [x.outvars[0].aval.shape for x in program.eqns if x.primitive.name == "mul"]
    assert scaled == [(5, 7, 2)]


@pytest.mark.slow
def test_lora_dropout_acts_in_training_only():
    variables = perturbed(jp.attach(tiny.model(), tiny.params(), LoRA(rank=2, dropout=0.5), jax.random.key(0)))
    apply = jax.jit(functools.partial(tiny.model().apply, variables, tiny.batch()))
    plain = apply()
    np.testing.assert_array_equal(plain, apply())
    assert np.abs(apply(rngs={"dropout": jax.random.key(0)}) - plain).max() > 1e-3


def test_merge_into_a_tied_matrix_is_refused():
    variables = jp.attach(tiny.model(), tiny.params(), LoRA(targets="head/vocabulary$"), jax.random.key(0))
    with pytest.raises(ValueError, match="text_decoder/head/vocabulary and text_decoder/embed/word are one matrix"):
        jp.merge(tiny.model(), variables)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jp.LoRA(16), r"LoRA takes keyword arguments: LoRA\(rank=16\); it has targets, rank"),
        (lambda: jp.Prompt(8), r"Prompt\(length=8\)"),
        (lambda: jp.SerialAdapter(32, 2.0), r"SerialAdapter\(bottleneck=32\)"),
        (lambda: jp.LoRA(rank="8"), "LoRA: rank is '8'; expected int"),
        (lambda: jp.LoRA(rank=4.0), "LoRA: rank is 4.0; expected int"),
        (lambda: jp.LoRA(rank=True), "LoRA: rank is True; expected int"),
        (lambda: jp.LoRA(targets=16), "LoRA: targets is 16; expected str"),
        (lambda: jp.SerialAdapter(scale="2"), "SerialAdapter: scale is '2'; expected float"),
        (lambda: jp.LoRA(rank_stabilized=1), "rank_stabilized is 1; expected bool"),
        (lambda: jp.Scoped(method=jp.LoRA(), layers=1), r"layers is 1; expected tuple"),
    ],
)
def test_fields_are_named_and_of_their_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_whole_numbers_and_numpys_are_taken():
    assert jp.LoRA(alpha=16, rank=np.int64(4)).rank == 4 and jp.SerialAdapter(scale=2).scale == 2


def test_a_methods_own_fields_may_be_of_any_kind():
    @dataclasses.dataclass(frozen=True)
    class Mine(LoRA):
        kind: Literal["a", "b"] = "a"
        depth: Optional[int] = None  # noqa: UP045  as many people write it
        later: "int" = 3

    assert Mine(kind="b", depth=2, later=4).depth == 2 and Mine(depth=None).depth is None
    with pytest.raises(TypeError, match="kind is 'c'"):
        Mine(kind="c")


def test_other_collections_are_not_trained():
    variables = jp.attach(tiny.model(), tiny.params(), LoRA(), jax.random.key(0)) | {
        "batch_stats": {"mean": jnp.ones(3)}
    }
    assert jp.trainable(variables)["batch_stats"] == {"mean": False}


def test_a_tree_knows_its_methods():
    """PiSSA's starting factors are fixed and a method of base leaves has no leaves of its own: the tree knows both."""
    model, params = tiny.model(), tiny.params()
    methods = sites.resolved(model, (jp.PiSSA(rank=2), jp.BitFit(), jp.VeRA(targets="mlp/up$")))
    variables = jp.attach(model, params, methods, jax.random.key(0))
    assert sites.methods_of(variables) == sites.methods_of(jax.tree.map(lambda x: x + 1, variables)) == methods
    on = [name for name, moves in tree.flatten(jp.trainable(variables)).items() if moves]
    assert not any(name.endswith(("/a0", "/b0", "vera/a", "vera/b")) for name in on)
    assert {name.split("/")[-2] for name in on if name.startswith("peft/")} == {"pissa", "vera"}
    biases = {name for name in on if name.startswith("params/")}
    assert biases and all(name.endswith("bias") for name in biases)
    with pytest.raises(TypeError):
        jp.trainable(jp.LoRA(), variables)
    with pytest.raises(ValueError, match="nothing would be trained"):
        jp.trainable({"params": params})
