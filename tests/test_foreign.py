"""Methods on Linen models that know nothing of sites: plain, remat, scan and setup-style; and the traps."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from methods_table import perturbed

import jaxpeft as jp
from jaxpeft.adapt import sites

D, L = 8, 3


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="down")(nn.gelu(nn.Dense(2 * D, name="up")(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=D, name="attention")(
            nn.LayerNorm(name="norm")(x)
        )
        return x + Mlp(name="mlp")(x), None


class SetupBlock(nn.Module):
    def setup(self):
        self.norm, self.mlp = nn.LayerNorm(), Mlp()
        self.attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=D)

    def __call__(self, x, _=None):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x), None


class Model(nn.Module):
    style: str
    axes: object = None

    @nn.compact
    def __call__(self, x):
        block = {"remat": nn.remat(Block), "setup": SetupBlock, "scan remat": nn.remat(Block)}.get(self.style, Block)
        if self.style.startswith("scan"):
            axes = self.axes or {True: 0}
            x, _ = nn.scan(block, variable_axes=axes, split_rngs={True: True}, length=L)(name="blocks")(x, None)
        else:
            x, _ = block(name="block")(x)
        return nn.Dense(5, name="head")(x)


METHODS = (
    jp.LoRA(targets=r"attention/(query|value|out)$", rank=2),
    jp.IA3(targets=r"attention/key$|mlp/down$"),
    jp.SerialAdapter(targets="", bottleneck=3, placement="pfeiffer"),
    jp.ParallelAdapter(targets=r"attention$", bottleneck=2),
    jp.BitFit(targets="head"),
)
MERGEABLE = (
    jp.LoRA(targets=r"attention/(query|out)$|mlp/", rank=2),
    jp.SSF(targets=r"norm$|up$"),
    jp.OFT(targets="value$", block=4),
)
STYLES = ("plain", "remat", "setup", "scan", "scan remat")
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, D)), jnp.float32)


def start(style, methods):
    model = Model(style)
    params = model.init(jax.random.key(0), X)["params"]
    bridge = jp.intercept(methods)
    return model, params, bridge, bridge.attach(model, params, jax.random.key(1), X)


moved = functools.partial(perturbed, scale=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_identity_then_effect_and_every_leaf_matters(style):
    model, params, bridge, variables = start(style, METHODS)
    plain = model.apply({"params": params}, X)
    np.testing.assert_array_equal(bridge.apply(model, variables, X), plain)
    run = jax.jit(lambda v: bridge.apply(model, v, X))
    assert np.abs(run(moved(variables)) - plain).max() > 1e-2
    tuned, frozen = jp.split(moved(variables), jp.trainable(variables))
    grads = jax.jit(jax.grad(lambda t: jnp.sum(bridge.apply(model, jp.join(t, frozen), X) ** 2)))(tuned)
    assert all(np.any(g != 0) for g in jax.tree.leaves(grads))
    if "scan" in style:
        assert {leaf.shape[0] for leaf in jax.tree.leaves(variables["peft"])} == {L}


@pytest.mark.slow
@pytest.mark.parametrize("style", ["setup", "scan"])
def test_merged_equals_intercepted(style):
    model, _, bridge, variables = start(style, MERGEABLE)
    variables = moved(variables)
    merged = bridge.merge(model, variables, X)
    np.testing.assert_allclose(
        model.apply({"params": merged}, X), bridge.apply(model, variables, X), atol=1e-5, rtol=1e-4
    )


def test_lora_here_is_the_equation():
    """One Dense by hand: x W + b + s x A B."""
    model, params, bridge, variables = start("plain", jp.LoRA(targets="head$", rank=2))
    variables = moved(variables)
    (bound,) = variables["peft"]["head"]["@linear"]
    model_without_head = model.apply({"params": params}, X)
    hidden = []

    def keep(call, args, kwargs, context):
        if context.module.name == "head":
            hidden.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        model.apply({"params": params}, X)
    expected = model_without_head + 2.0 * hidden[0] @ bound.params["a"] @ bound.params["b"]
    np.testing.assert_allclose(bridge.apply(model, variables, X), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [jp.Prefix(), jp.Prompt(), jp.VPT(), jp.MAM(), jp.UniPELT()])
def test_what_cannot_be_seen_is_refused(method):
    with pytest.raises(ValueError, match="supported here are linear, norm, sublayer"):
        jp.intercept(method)


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(ValueError, match="lora: targets='attention/qurey' matches none .* nearest: .*attention/query"):
        start("plain", jp.LoRA(targets="attention/qurey"))


# ---------------------------------------------------------------- traps


@pytest.mark.parametrize("axes", [{"params": 0}, {"params": 0, "peft": 1}])
def test_a_scan_that_hides_or_turns_the_collection_is_an_error(axes):
    model = Model("scan", nn.FrozenDict(axes) if hasattr(nn, "FrozenDict") else axes)
    params = Model("scan").init(jax.random.key(0), X)["params"]
    message = "does not carry the collection 'peft'" if len(axes) == 1 else "only one scan along axis 0"
    with pytest.raises(ValueError, match=message):
        jp.intercept(METHODS[0]).attach(model, params, jax.random.key(1), X)


def test_a_module_level_nn_jit_that_answers_from_its_cache_is_an_error():
    cached_mlp = nn.jit(Mlp)

    class Cached(nn.Module):
        @nn.compact
        def __call__(self, x):
            return cached_mlp(name="mlp")(x)

    model = Cached()
    params = model.init(jax.random.key(0), X)["params"]
    bridge = jp.intercept(jp.LoRA(targets="mlp/up$", rank=2))
    try:
        variables = moved(bridge.attach(model, params, jax.random.key(1), X))
    except ValueError as error:  # the table itself came from the cache
        assert "not visible, as they do not belong to a Dense layer: mlp/" in str(error)
        return
    model.apply(variables, X)  # compiled without the interceptor, for the same arguments
    with pytest.raises(ValueError, match="1 sites were not reached: mlp/up .*nn.jit"):
        bridge.apply(model, variables, X)


def test_jit_around_apply_is_never_stale():
    """The trap is a function jitted outside the interceptor and called inside; `apply` enters it itself."""
    model, params, bridge, variables = start("scan", METHODS[0])
    plain = jax.jit(lambda v: model.apply({"params": v["params"]}, X))
    tuned = jax.jit(lambda v: bridge.apply(model, v, X))
    variables = moved(variables)
    before = plain(variables)
    assert np.abs(tuned(variables) - before).max() > 1e-2
    np.testing.assert_array_equal(plain(variables), before)


def test_threads_see_it():
    model, _, bridge, variables = start("plain", METHODS[0])
    variables, found = moved(variables), []
    thread = threading.Thread(target=lambda: found.append(bridge.apply(model, variables, X)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], bridge.apply(model, variables, X))


def test_an_unreached_site_is_an_error_unless_allowed():
    class Two(nn.Module):
        def setup(self):
            self.one, self.other = nn.Dense(D), nn.Dense(D)

        def __call__(self, x):
            return self.other(self.one(x))

        def half(self, x):
            return self.one(x)

    model = Two()
    params = model.init(jax.random.key(0), X)["params"]
    bridge = jp.intercept(jp.LoRA(targets="", rank=2))
    variables = bridge.attach(model, params, jax.random.key(1), X)
    with pytest.raises(ValueError, match=r"1 sites were not reached: other \(linear\)"):
        bridge.apply(model, variables, X, method="half")
    assert bridge.apply(model, variables, X, method="half", strict=False).shape == X.shape


class Mixed(nn.Module):
    """As many models are in bfloat16: the norms compute in float32, the products in the type of the residual stream."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(dtype=jnp.float32, name="norm")(x)
        return x + nn.Dense(D, dtype=jnp.bfloat16, name="up")(h), None


@pytest.mark.parametrize("cls, fields", [
    (jp.LoRA, {}), (jp.DoRA, {}), (jp.VeRA, {}), (jp.OFT, {"block": 4}), (jp.SSF, {"targets": "norm$"}),
])  # fmt: skip
def test_a_layer_keeps_its_type(cls, fields):
    """Under a scan too, whose carry must."""
    method = cls(**{"targets": "up$"} | fields)
    model = nn.scan(Mixed, variable_axes={True: 0}, split_rngs={True: True}, length=L)()
    x = X.astype(jnp.bfloat16)
    params, bridge = model.init(jax.random.key(0), x, None)["params"], jp.intercept(method)
    variables = bridge.attach(model, params, jax.random.key(1), x, None)
    got, _ = bridge.apply(model, variables, x, None)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, model.apply({"params": params}, x, None)[0])


def test_counts_of_a_foreign_model():
    _, params, _, variables = start("scan", METHODS[0])
    counts = sites.counts(variables, jp.trainable(variables))
    assert counts["tuned"] == L * 3 * 2 * (D + D)


@pytest.mark.filterwarnings("ignore")  # of the other package
def test_a_vision_transformer_of_another_package():
    """UViT of flaxdiff 0.2.11, where it is installed (pip install --no-deps flaxdiff einops): identity, learning, merging."""
    UViT = pytest.importorskip(
        "flaxdiff.models.simple_vit", reason="a ViT that is not ours: pip install --no-deps flaxdiff"
    ).UViT
    rng = np.random.default_rng(0)
    x, t, text = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 8, 8, 3), (2,), (2, 5, 24)))
    with jax.numpy_rank_promotion("allow"):
        model = UViT(patch_size=4, emb_features=24, num_layers=2, num_heads=2, dropout_rate=0.0)
        fresh = model.init(jax.random.key(0), x, t, text)["params"]
        params = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), fresh)
        linear = (jp.LoRA(targets=r"to_(q|v)$", rank=2), jp.IA3(targets=r"to_k$|ff/net_2$", feedforward="net_2"))
        many = (*linear, jp.ParallelAdapter(targets=r"Attention/ff$", bottleneck=2), jp.LayerNorms(targets=""))
        bridge = jp.intercept(many)
        variables = bridge.attach(model, params, jax.random.key(1), x, t, text)
        assert sum(site.kind == "linear" for site in bridge.sites(model, x, t, text)) == 23
        plain = model.apply({"params": params}, x, t, text)
        np.testing.assert_array_equal(bridge.apply(model, variables, x, t, text), plain)
        tuned, frozen = jp.split(variables, jp.trainable(variables))

        tx = optax.adam(1e-2)

        @jax.jit
        def step(tuned, opt):
            loss = lambda v: jnp.mean((bridge.apply(model, jp.join(v, frozen), x, t, text) - 1) ** 2)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(tuned)
            updates, opt = tx.update(grads, opt)
            return optax.apply_updates(tuned, updates), opt, value

        losses, opt = [], tx.init(tuned)
        for _ in range(40):
            tuned, opt, value = step(tuned, opt)
            losses.append(float(value))
        assert losses[-1] < 0.7 * losses[0]
        bridge = jp.intercept(linear)
        variables = moved(bridge.attach(model, params, jax.random.key(1), x, t, text))
        merged = model.apply({"params": bridge.merge(model, variables, x, t, text)}, x, t, text)
        tuned = bridge.apply(model, variables, x, t, text)
        assert np.abs(tuned - plain).max() > 1e-3
        np.testing.assert_allclose(merged, tuned, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- subclasses, keywords, what cannot be seen


class Doubled(nn.Dense):
    """A subclass around Dense's own product."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Normalised(nn.Dense):
    """A subclass with a product of its own."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (inputs.shape[-1], self.features))
        return inputs @ (kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True))


class One(nn.Module):
    """A layer called `layer`, in one of many ways."""

    make: object
    call: object = lambda layer, x: layer(x)

    @nn.compact
    def __call__(self, x):
        return self.call(self.make(name="layer"), x)


def bound(model, method=None, x=X):
    params = model.init(jax.random.key(0), x)["params"]
    bridge = jp.intercept(method or jp.LoRA(targets="layer$", rank=2))
    return params, bridge, moved(bridge.attach(model, params, jax.random.key(1), x))


@pytest.mark.parametrize(
    "model, factor",
    [
        (One(lambda name: Doubled(5, name=name)), 2),
        (One(lambda name: nn.Dense(5, name=name), lambda layer, x: layer(inputs=x)), 1),
        (One(lambda name: nn.DenseGeneral((5,), name=name), lambda layer, x: layer(inputs=x)), 1),
    ],
    ids=["subclass", "keyword", "general keyword"],
)
def test_a_linear_gets_its_method_once_however_it_is_made_and_called(model, factor):
    params, bridge, variables = bound(model)
    (one,) = variables["peft"]["layer"]["@linear"]
    expected = model.apply({"params": params}, X) + factor * 2.0 * X @ one.params["a"] @ one.params["b"]
    np.testing.assert_allclose(bridge.apply(model, variables, X), expected, atol=1e-5, rtol=1e-4)
    merged = model.apply({"params": bridge.merge(model, variables, X)}, X)
    np.testing.assert_allclose(merged, expected, atol=1e-5, rtol=1e-4)


def test_a_sublayer_and_a_norm_get_their_method_once():
    class Louder(Mlp):
        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Shifted(nn.LayerNorm):
        def __call__(self, x):
            return super().__call__(x) + 1

    model = One(lambda name: Louder(name=name))
    params, bridge, variables = bound(model, jp.ParallelAdapter(targets="layer$", bottleneck=2, scale=1.0))
    (one,) = variables["peft"]["layer"]["@sublayer"]
    t, plain = one.params, model.apply({"params": params}, X)
    adapter = nn.relu(X @ t["down"] + t["down_bias"][None, None]) @ t["up"] + t["up_bias"][None, None]
    np.testing.assert_allclose(bridge.apply(model, variables, X), plain + adapter, atol=1e-5, rtol=1e-4)
    model = One(lambda name: Shifted(name=name))
    params, bridge, variables = bound(model, jp.SSF(targets="layer$"))
    merged = model.apply({"params": bridge.merge(model, variables, X)}, X)
    np.testing.assert_allclose(bridge.apply(model, variables, X), merged, atol=1e-5, rtol=1e-4)


def test_merging_names_what_it_cannot_find():
    """A module under nn.jit answers from Flax's cache the second time, without its sites: they were dropped silently."""
    jitted = nn.jit(Mlp)

    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, name="out")(jitted(name="mlp")(x))

    model = Jitted()
    _, bridge, variables = bound(model, jp.LoRA(targets="mlp/up$|out$", rank=2))
    with pytest.raises(
        ValueError, match=r"1 sites that methods are bound to were not found .*: lora at mlp/up \(linear\)"
    ):
        bridge.merge(model, variables, X)


def test_foreign_names_of_sublayers_take_serial_adapters():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=D)(x)
            return x + Mlp(name="FeedForward_3")(x)

    model = Block()
    for placement, expected in (
        ("houlsby", {"MultiHeadDotProductAttention_0", "FeedForward_3"}),
        ("pfeiffer", {"FeedForward_3"}),
    ):
        method = jp.SerialAdapter(targets="", bottleneck=2, placement=placement)
        params, bridge, variables = bound(model, method)
        assert set(variables["peft"]) == expected | {sites.SHARED}
        plain = model.apply({"params": params}, X)
        assert np.abs(bridge.apply(model, variables, X) - plain).max() > 1e-2


def test_an_adapter_that_finds_no_sublayer_says_what_it_looks_for():
    model = One(lambda name: Mlp(name=name))
    message = (
        "targets='layer' matches layer, but it acts at sublayers named attention or mlp .placement='houlsby'. only"
    )
    with pytest.raises(ValueError, match=message):
        bound(model, jp.SerialAdapter(targets="layer", bottleneck=2))


class Raw(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.ones, (x.shape[-1], D))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda name: nn.Conv(5, (3,), name=name), r"a Dense layer: layer/kernel \(Conv\)"),
        (lambda name: Raw(name=name), r"a Dense layer: layer/w \(Raw\)"),
        (lambda name: Normalised(5, name=name), r"a Dense layer: layer/kernel \(Normalised\)"),
    ],
    ids=["conv", "raw parameter", "own product"],
)
def test_what_is_out_of_reach_is_named_with_its_class(make, message):
    with pytest.raises(ValueError, match="targets='layer.' matches none of the 0 linear sites.*" + message):
        bound(One(make))


def test_parameters_with_partitions_are_adapted():
    """`init` boxes them, and a user passes them without their boxes."""
    model = One(
        lambda name: nn.Dense(5, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "mp")), name=name)
    )
    params = nn.unbox(model.init(jax.random.key(0), X))["params"]
    bridge = jp.intercept(jp.LoRA(targets="", rank=2))
    variables = bridge.attach(model, params, jax.random.key(0), X)
    np.testing.assert_allclose(bridge.apply(model, variables, X), model.apply({"params": params}, X), atol=1e-6)


def test_nnx_modules_and_other_things_are_refused():
    try:
        from flax import nnx
    except AttributeError as error:
        pytest.skip(f"flax.nnx of this version does not fit jax: {error}")

    bridge = jp.intercept(jp.LoRA(targets="", rank=2))
    with pytest.raises(ValueError, match="Linear is a flax.nnx module; only flax.linen modules are supported"):
        bridge.attach(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), {}, jax.random.key(0), X)
    with pytest.raises(ValueError, match="function is not a flax.linen module"):
        bridge.attach(lambda x: x, {}, jax.random.key(0), X)


@pytest.mark.parametrize("shared", [False, True])
def test_vmap_carries_the_collection_or_is_an_error(shared):
    """nn.vmap over two copies: a leaf each, or one for both."""

    class Both(nn.Module):
        axes: object

        @nn.compact
        def __call__(self, x):
            return nn.vmap(Mlp, variable_axes=dict(self.axes), split_rngs={"params": not shared})(name="layer")(x)

    axis = None if shared else 0
    model, hidden = Both(((True, axis),)), Both((("params", axis),))
    params, bridge, variables = bound(model, jp.LoRA(targets="up$", rank=2))
    plain = model.apply({"params": params}, X)
    adapted = bridge.apply(model, variables, X)
    assert np.abs(adapted - plain).max() > 1e-2
    np.testing.assert_allclose(
        model.apply({"params": bridge.merge(model, variables, X)}, X), adapted, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(ValueError, match="layer/up is in a scan or vmap that does not carry the collection 'peft'"):
        jp.intercept(jp.LoRA(targets="up$", rank=2)).attach(hidden, params, jax.random.key(1), X)
