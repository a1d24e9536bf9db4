"""What methods are equal to: each other, a formula, or themselves computed another way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from methods_table import BY_NAME, ROWS, attached, perturbed
from test_methods import logits_of, without_images

import jaxpeft as jp
from jaxpeft import tasks, tree
from jaxpeft.adapt import budget, sites
from jaxpeft.methods import Gated, Scoped, Site
from jaxpeft.models import decode, layers
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.training import loop, optim

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def attach(method, params=None):
    return jp.attach(tiny.model(), params or tiny.params(), method, jax.random.key(1))


def logits(variables):
    """About given image tokens: no method of these tests acts in the image tower."""
    assert "vision" not in variables.get("peft", {})
    assert tree.digest(variables["params"]["vision"]) == tree.digest(tiny.params()["vision"])
    return logits_of(variables, without_images())


def row_named(name, index=0):
    return [row for row in ROWS if row.name == name][index]


# ---------------------------------------------------------------- one method against its formula


def test_parallel_adapter_without_nonlinearity_is_lora_on_that_map():
    params = {"down": normal(12, 3), "down_bias": jnp.zeros(3), "up": normal(3, 12), "up_bias": jnp.zeros(12)}
    x, y = normal(2, 4, 12), normal(2, 4, 12)
    adapter = jp.ParallelAdapter(bottleneck=3, activation="linear", scale=2.0)
    lora = jp.LoRA(rank=3, alpha="2r")
    got = adapter.sublayer(params, x, y, None)
    expected = lora.linear({"a": params["down"], "b": params["up"]}, x, y, {}, None)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def attention(x, k_BSNH, v_BSNH, peft=None):
    module, inputs = layers.Attention(12, 2), (x, k_BSNH.swapaxes(1, 2), v_BSNH.swapaxes(1, 2))
    params = module.init(jax.random.key(0), *inputs, stream=None)["params"]
    return module.apply({"params": params} | ({"peft": peft} if peft else {}), *inputs, stream=None), params


def bound_kv(method, params):
    return {"@kv": (sites.Bound(method, Site("", "kv", (12, 2, 6)), params, True),)}


def test_prefix_is_the_gated_sum_of_two_attentions():
    """He et al. 2021, eq. 7: (1 - g) Attn(q, K, V) + g Attn(q, P_k, P_v), g the softmax mass of the prefix."""
    x, k, v, pk, pv = normal(2, 3, 12), normal(2, 5, 2, 6), normal(2, 5, 2, 6), normal(4, 2, 6), normal(4, 2, 6)
    got, params = attention(x, k, v, bound_kv(jp.Prefix(length=4), {"k": pk, "v": pv}))
    q = (x @ params["query"]["kernel"]).reshape(2, 3, 2, 6)

    def exp_scores(keys):
        return jnp.exp(jnp.einsum("BTNH,BSNH->BNTS", q, keys) / 6**0.5)

    own, prefix = exp_scores(k), exp_scores(jnp.broadcast_to(pk[None], (2, 4, 2, 6)))
    own_sum, prefix_sum = own.sum(-1, keepdims=True), prefix.sum(-1, keepdims=True)
    g = prefix_sum / (own_sum + prefix_sum)
    mixed = (1 - g) * jnp.einsum("BNTS,BSNH->BNTH", own / own_sum, v)
    mixed += g * jnp.einsum("BNTS,SNH->BNTH", prefix / prefix_sum, pv)
    expected = mixed.swapaxes(1, 2).reshape(2, 3, 12) @ params["out"]["kernel"]
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-4)


def test_gated_prefix_scales_scores_and_values_per_query():
    x, k, v, pk, pv = normal(2, 3, 12), normal(2, 5, 2, 6), normal(2, 5, 2, 6), normal(4, 2, 6), normal(4, 2, 6)
    gate, bias = normal(12, 1), normal(1)
    method = Gated(method=jp.Prefix(length=4))
    got, params = attention(x, k, v, bound_kv(method, {"k": pk, "v": pv, "gate": gate, "gate_bias": bias}))
    q = (x @ params["query"]["kernel"]).reshape(2, 3, 2, 6)
    g = jax.nn.sigmoid(x @ gate + bias[None, None])[:, None]  # (B, 1, T, 1)
    scores = jnp.concatenate([g * jnp.einsum("BTNH,KNH->BNTK", q, pk), jnp.einsum("BTNH,BSNH->BNTS", q, k)], axis=-1)
    w = jax.nn.softmax(scores / 6**0.5, axis=-1)
    out = g * jnp.einsum("BNTK,KNH->BNTH", w[..., :4], pv) + jnp.einsum("BNTS,BSNH->BNTH", w[..., 4:], v)
    expected = out.swapaxes(1, 2).reshape(2, 3, 12) @ params["out"]["kernel"]
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-4)


def test_serial_adapter_equation_and_pfeiffers_input():
    """y + U relu(D h + d) + u with h = y (Houlsby) or the residual stream after y is added (Pfeiffer)."""
    params = {"down": normal(12, 3), "down_bias": normal(3), "up": normal(3, 12), "up_bias": normal(12)}
    x, y = normal(2, 4, 12), normal(2, 4, 12)
    for placement, h in (("houlsby", y), ("pfeiffer", jnp.tanh(x + y))):
        method = jp.SerialAdapter(bottleneck=3, placement=placement)
        got = method.sublayer(params, x, y, lambda out: jnp.tanh(x + out))
        hidden = jnp.maximum(h @ params["down"] + params["down_bias"][None, None], 0)
        np.testing.assert_allclose(got, y + hidden @ params["up"] + params["up_bias"][None, None], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_pfeiffer_reads_what_the_block_normalises():
    """In a post-norm text block that is LayerNorm(x + y) with the block's own scale; zeroing the scale shows it."""
    method = jp.SerialAdapter(
        targets="text_decoder", bottleneck=3, placement="pfeiffer", init_weights="normal", std=1.0
    )
    params = tiny.params()
    flat = dict(tree.flatten(params))
    for name in ("scale", "bias"):
        flat[f"text_decoder/blocks/mlp_norm/{name}"] = jnp.zeros((2, 12))
    params = tree.unflatten(params, flat)
    variables = attach(method, params)
    (bound,) = variables["peft"]["text_decoder"]["blocks"]["mlp"]["@sublayer"]
    np.testing.assert_array_equal(logits(variables), logits({"params": params}))  # reads zeros, biases are zero
    assert np.any(bound.params["down"] != 0)


def test_compacter_is_a_sum_of_kronecker_products():
    method = jp.Compacter(bottleneck=4, n=2)
    params = {f"down_{p}": normal(*s) for p, s in (("s", (2, 6, 1)), ("t", (2, 1, 2)))}
    params |= {f"up_{p}": normal(*s) for p, s in (("s", (2, 2, 1)), ("t", (2, 1, 6)))}
    params |= {"down_bias": normal(4), "up_bias": normal(12)}
    rule = normal(2, 2, 2)
    full = method.expand(params, {"rule": rule}, Site("", "sublayer", (12,)))
    for part in ("down", "up"):
        expected = sum(np.kron(rule[i], params[f"{part}_s"][i] @ params[f"{part}_t"][i]) for i in range(2))
        np.testing.assert_allclose(full[part], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_std_of_compacter_is_that_of_its_matrices():
    site, key = Site("", "sublayer", (64,)), jax.random.key(0)

    def drawn(std):
        """The lower and the upper matrix from 400 keys."""

        def one(key):
            method, (a, b) = jp.Compacter(bottleneck=32, init_weights="normal", std=std), jax.random.split(key)
            full = method.expand(method.init(a, site, {}), method.init_shared(b, [site]), site)
            return jnp.stack([full["down"], full["up"].T])

        return jax.jit(jax.vmap(one))(jax.random.split(key, 400))

    small, large = drawn(0.02), drawn(0.08)
    np.testing.assert_allclose(large, 4 * small, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(small.std(axis=(0, 2, 3)), 0.02, rtol=0.05)


def test_oft_turns_blocks_without_stretching_them():
    method = jp.OFT(block=4)
    params = method.expand({"q": normal(3, 6)}, {}, Site("", "linear", (12, 5)))
    for r in params["r"]:
        np.testing.assert_allclose(r @ r.T, np.eye(4), atol=1e-5)
        assert np.linalg.det(r) > 0
    x = normal(2, 3, 12)
    turned = method.inputs(params, x)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    block = jax.scipy.linalg.block_diag(*params["r"])
    np.testing.assert_allclose(turned, x @ block, atol=1e-5)


def test_dora_with_the_norms_of_the_updated_kernel_is_lora():
    lora, dora = attach(jp.LoRA(rank=2)), attach(jp.DoRA(rank=2))
    lora = perturbed(lora)
    flat, fresh = tree.flatten(lora["peft"]), dict(tree.flatten(dora["peft"]))
    base = tree.flatten(tiny.params())
    for name in fresh:
        if not name.endswith("/m"):
            fresh[name] = flat[name.replace("/dora/", "/lora/")]
    for name in [n for n in fresh if n.endswith("/m")]:
        kernel = base[name.split("/@linear")[0] + "/kernel"]
        delta = 2.0 * fresh[name[:-1] + "a"] @ fresh[name[:-1] + "b"]
        fresh[name] = jnp.linalg.norm(kernel + delta, axis=1)
    dora = dora | {"peft": tree.unflatten(dora["peft"], fresh)}
    np.testing.assert_allclose(logits(dora), logits(lora), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [3, 9])
def test_pissa_starts_from_the_principal_part(rank):
    """s A0 B0 is the best rank-r approximation of the kernel, and the base with it left out is the paper's residual."""
    kernel, method = normal(12, 9), jp.PiSSA(rank=rank, alpha=6.0)
    params = method.init(jax.random.key(0), Site("x", "linear", (12, 9)), {"kernel": kernel, "bias": None})
    left, values, right = np.linalg.svd(kernel)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    np.testing.assert_allclose(method.scale * params["a"] @ params["b"], best, atol=1e-5)
    moved = params | {"a": params["a"] + 0.1, "b": params["b"] - 0.1}
    expected = (kernel - best) + method.scale * moved["a"] @ moved["b"]
    np.testing.assert_allclose(kernel + method.delta(moved), expected, atol=1e-5)


def test_vera_equation_and_one_pair_of_matrices():
    variables = attach(jp.VeRA(rank=5))
    (shared,) = variables["peft"][sites.SHARED].values()
    assert {k: v.shape for k, v in shared.params.items()} == {"a": (12, 5), "b": (5, 12)}
    params = {"a": normal(12, 5), "b": normal(5, 7), "d": normal(5), "l": normal(7)}
    x, y = normal(2, 3, 12), normal(2, 3, 7)
    got = jp.VeRA(rank=5).linear(params, x, y, {}, None)
    expected = y + ((x @ params["a"]) * params["d"][None, None]) @ params["b"] * params["l"][None, None]
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-4)


def test_vpt_deep_puts_fresh_rows_at_every_layer():
    method, x = jp.VPT(length=2, depth="deep"), normal(3, 7, 12)
    rows = normal(2, 12)
    out = method.block({"rows": rows}, x)
    np.testing.assert_array_equal(out[:, :2], jnp.broadcast_to(rows[None], (3, 2, 12)))
    np.testing.assert_array_equal(out[:, 2:], x[:, 2:])
    bound = np.sqrt(6 / (3 * 8**2 + 12))
    params = jp.VPT(length=50, patch=8).init(jax.random.key(0), Site("vision", "embed", (12,)), {})
    assert 0.95 * bound < np.abs(params["rows"]).max() <= bound


@pytest.mark.parametrize(
    "other", [jp.VPT(length=3, depth="deep"), jp.VPT(length=3), jp.Prompt(targets="vision", init_weights="normal")]
)
def test_vpt_deep_is_alone_in_its_tower(other):
    """It replaces the first tokens at every layer, which would be those of the other method."""
    for methods in ((jp.VPT(depth="deep"), other), (other, jp.VPT(depth="deep"))):
        with pytest.raises(ValueError, match="both add tokens to vision, and vpt with depth='deep'"):
            attach(methods)
    attach((other, dataclasses.replace(other, length=7) if "block" not in other.kinds else jp.Prompt()))


def test_prompts_start_as_words_look_to_the_stack():
    """'vocabulary' and 'text' rows are normalised as the embedding does it; position embeddings are not added."""
    flat = tree.flatten(tiny.params())
    word, scale, bias = (flat[f"text_decoder/embed/{n}"] for n in ("word", "norm/scale", "norm/bias"))
    variables = attach(jp.Prompt(targets="^text_decoder$", length=3, init_weights="text", text="w3 w5"))
    (bound,) = variables["peft"]["text_decoder"]["@embed"]
    ids = tiny.TOKENIZER.encode("w3 w5")[1:-1]
    rows = word[jnp.array([ids[0], ids[1], ids[0]])]
    rows = (rows - rows.mean(-1, keepdims=True)) / rows.std(-1, keepdims=True)
    np.testing.assert_allclose(bound.params["rows"], rows * scale[None] + bias[None], atol=1e-5)


def test_a_prompt_may_start_from_a_word_of_zeros():
    """As the row of [PAD] is where a model was trained from scratch with torch."""
    params = tiny.params()
    zeros = tree.unflatten(
        params, tree.flatten(params) | {"text_decoder/embed/word": jnp.zeros((len(tiny.TOKENIZER), 12))}
    )
    (bound,) = attach(jp.Prompt(targets="^text_decoder$", length=3), zeros)["peft"]["text_decoder"]["@embed"]
    bias = tree.flatten(params)["text_decoder/embed/norm/bias"]
    np.testing.assert_allclose(bound.params["rows"], np.tile(bias, (3, 1)))


@pytest.mark.parametrize(
    "method", [jp.Full(targets="vision"), jp.Selective(leaves="bias$", targets="vision")], ids=type
)
def test_targets_restrict_which_base_leaves_are_trained(method):
    on = [name for name, moves in tree.flatten(jp.trainable(attach(method))).items() if moves]
    every = [name for name in on if name.startswith("params/vision/")]
    assert on == every and any(name.endswith("bias") for name in on)
    assert any(name.endswith("kernel") for name in on) == isinstance(method, jp.Full)


@pytest.mark.parametrize("name", ["norm", "norm1", "norm10", "norm_in"])
def test_every_layer_norm_is_one(name):
    method = jp.LayerNorms(targets="vision")
    assert method.trains(f"params/vision/{name}/scale") and not method.trains(f"params/text_decoder/{name}/scale")
    assert not method.trains(f"params/vision/{name}_up/kernel")


# ---------------------------------------------------------------- a method against itself


def test_folded_prefix_equals_unfolded():
    variables = perturbed(attached(row_named("prefix", 2))[0])
    folded = jp.fold(variables)
    assert {name.rsplit("/", 1)[1] for name in tree.flatten(folded["peft"])} == {"k", "v"}
    np.testing.assert_allclose(logits(folded), logits(variables), atol=1e-6)


def test_prefix_mlp_is_the_papers_reparameterisation():
    """P = tanh(E W1 + b1) W2 + b2, cut into keys and values per layer."""
    method = jp.Prefix(length=3, mlp=5)
    params = {"embedding": normal(3, 12), "w1": normal(12, 5), "b1": normal(5)}
    params |= {"w2": normal(4, 5, 2, 2, 6), "b2": normal(4, 2, 2, 6)}
    flat = method.expand(params, {}, Site("", "kv", (12, 2, 6), 4))
    hidden = np.tanh(params["embedding"] @ params["w1"] + np.asarray(params["b1"])[None])
    for layer in range(4):
        both = hidden @ params["w2"][layer].reshape(5, -1) + np.asarray(params["b2"][layer]).reshape(1, -1)
        both = both.reshape(3, 2, 2, 6)
        np.testing.assert_allclose(flat["k"][layer], both[:, 0], atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(flat["v"][layer], both[:, 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [jp.IA3(), jp.SSF(), jp.DoRA(rank=2)], ids=lambda m: m.name)
def test_scoped_leaves_the_other_layers_alone(method):
    """Zeros fill the leaves of other layers, and for these methods zeros are far from the identity: the gate decides."""
    fresh = attach(Scoped(method=method, layers=(1,)))
    np.testing.assert_allclose(logits(fresh), logits({"params": tiny.params()}), atol=1e-5)


def test_mam_equals_its_parts():
    parts = (
        jp.Prefix(targets="^text_.*attention$", length=2),
        jp.ParallelAdapter(targets="^text_.*mlp$", bottleneck=4),
    )
    both = perturbed(attach(parts)), perturbed(attached(row_named("mam"))[0])
    np.testing.assert_array_equal(logits(both[0]), logits(both[1]))


def test_a_scoped_prefix_keeps_its_shift():
    whole = jp.Prefix(targets="^text_decoder/.*self_attention$", length=2, positions="shift")
    scoped = Scoped(method=dataclasses.replace(whole, targets="^text_decoder"), targets="self_attention$")
    np.testing.assert_array_equal(*(logits(perturbed(attach(one))) for one in (scoped, whole)))


def test_scoped_to_layers_equals_identity_in_the_others():
    """LoRA in layer 1 only is LoRA everywhere with B zero in layer 0."""
    scoped = perturbed(attach(Scoped(method=jp.LoRA(rank=2), layers=(1,))))
    whole = attach(jp.LoRA(rank=2))
    some, every = tree.flatten(scoped["peft"]), dict(tree.flatten(whole["peft"]))
    for name, leaf in some.items():
        assert leaf.shape[0] == 1
        every[name] = jnp.concatenate([jnp.zeros_like(leaf), leaf])
    whole = whole | {"peft": tree.unflatten(whole["peft"], every)}
    np.testing.assert_array_equal(logits(scoped), logits(whole))


@pytest.mark.slow
def test_scoped_prefix_hides_in_the_other_layers():
    """A prefix in layer 1 only: with that layer's leaves in a prefix of all layers, hiding layer 0 gives the same."""
    method = jp.Prefix(targets="^text_encoder.*cross_attention$", length=2)
    scoped = sites.expand(perturbed(attach(Scoped(method=method, layers=(1,)))))
    (bound,) = scoped["peft"]["text_encoder"]["blocks"]["cross_attention"]["@kv"]
    assert bound.params["on"].tolist() == [False, True] and bound.params["k"].shape[0] == 2
    moved = bound.params | {"k": bound.params["k"].at[0].set(7.0), "v": bound.params["v"].at[0].set(-7.0)}
    other = jax.tree.map(lambda b: dataclasses.replace(b, params=moved), scoped["peft"], is_leaf=sites.is_bound)
    np.testing.assert_array_equal(logits(scoped), logits(scoped | {"peft": other}))
    assert np.abs(logits(scoped) - logits({"params": tiny.params()})).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        jp.LoRA(rank=2), jp.SerialAdapter(bottleneck=3), jp.Prefix(length=2), jp.OFT(block=4),
        jp.IA3(targets="^text_.*mlp/down$"), jp.SSF(targets="^text_decoder.*query$"),
    ],
    ids=lambda m: m.name,
)  # fmt: skip
def test_an_open_gate_is_the_method_inside(method):
    inner, gated = perturbed(attach(method)), attach(Gated(method=method))
    flat, plain = dict(tree.flatten(gated["peft"])), tree.flatten(inner["peft"])
    for name in flat:
        flat[name] = plain[name] if name in plain else jnp.full_like(flat[name], 40.0 * name.endswith("gate_bias"))
    gated = gated | {"peft": tree.unflatten(gated["peft"], flat)}
    np.testing.assert_allclose(logits(gated), logits(inner), atol=1e-5, rtol=1e-4)


THROUGH_CACHE = [r for r in ROWS if r.name in ("prompt", "prefix", "unipelt", "scoped", "oft")]


@pytest.mark.parametrize("row", THROUGH_CACHE, ids=lambda row: row.name)
def test_cached_decoding_equals_the_uncached_forward(row):
    """Prompts, prefixes, gates and adapters through the KV cache: logits of every step equal the whole forward's."""

    @jax.jit
    def both_ways(variables, batch):
        apply = functools.partial(tiny.model().apply, variables)
        context, tokens = apply(batch, method="context"), batch["tokens"][:, 0]
        first, cache = apply(tokens[:, :2], context, 4, method="start")
        second, _ = apply(tokens[:, 2], cache, context, method="step")
        return apply(tokens, context, method="score"), first, second

    whole, first, second = both_ways(perturbed(attached(row)[0]), tiny.batch())
    np.testing.assert_allclose(first, whole[:, 1], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(second, whole[:, 2], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_order_of_methods_at_a_linear():
    """OFT turns the input of everything; LoRA adds to the turned map; IA3 then scales it: merged in that order."""
    many = (
        jp.OFT(targets="decoder.*value$", block=4),
        jp.LoRA(targets="decoder.*value$", rank=2),
        jp.IA3(targets="decoder.*value$"),
    )
    variables = perturbed(attach(many))
    merged = jp.merge(tiny.model(), variables)
    np.testing.assert_allclose(logits({"params": merged}), logits(variables), atol=1e-5, rtol=1e-4)
    other = jp.merge(tiny.model(), perturbed(attach((many[2], many[1], many[0]))))
    assert np.abs(logits({"params": other}) - logits({"params": merged})).max() > 1e-3  # order matters and is kept


def test_dora_must_come_first():
    with pytest.raises(ValueError, match="dora reads the base kernel of .*: put it before lora"):
        attach((jp.LoRA(rank=2), jp.DoRA(rank=2)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Scoped(targets="text_decoder"), "Scoped wraps another method"),
        (lambda: Gated(), "Gated wraps another method"),
        (lambda: Gated(method=jp.Prompt()), "gated: prompt acts at embed; expected a method at linears"),
        (lambda: Gated(method=jp.Prefix(positions="shift")), "gated: prefix acts at kv, embed; expected"),
        (lambda: Gated(method=jp.BitFit()), "gated: bitfit acts at base leaves; expected"),
        (lambda: Scoped(method=jp.BitFit(), layers=(0,)), "bitfit trains base leaves.*restrict it with `targets`"),
        (lambda: Scoped(method=jp.LoRA(), layers=(-1,)), "expected layer numbers of at least 0"),
        (lambda: Scoped(method=jp.VPT(depth="deep"), layers=(0,)), "vpt adds its tokens at the input of a stack"),
        (lambda: Scoped(method=jp.Prompt(), layers=(0,)), "prompt adds its tokens at the input.*leave out `layers`"),
        (lambda: attach(Scoped(method=jp.LoRA(), layers=(2,))), "no layer 2 in .*; it has layers 0..1"),
        (lambda: attach(jp.OFT(block=5)), "block is 5; it must divide the 12 inputs of"),
        (lambda: attach(jp.PiSSA(rank=13)), "rank is 13; .* allows at most 12"),
        (lambda: attach(jp.Compacter(bottleneck=6)), "n=4 must divide width 12 and bottleneck 6"),
        (lambda: attach(jp.Prompt(targets="^vision$")), "has no word embedding to start from"),
        (lambda: jp.Prompt(init_weights="text"), "must be set if and only if init_weights='text'"),
        (lambda: jp.Prefix(positions="both"), "positions is 'both'; choose one of keep, shift"),
        (lambda: jp.SerialAdapter(placement="middle"), "placement is 'middle'"),
        (lambda: jp.ParallelAdapter(activation="tanh"), "activation is 'tanh'"),
        (lambda: jp.LoRA(alpha="3r"), "alpha is '3r'; expected a number, 'r' or '2r'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_scoped_prefix_with_an_mlp_folds():
    variables = perturbed(attach(Scoped(method=jp.Prefix(length=2, mlp=3), targets="encoder", layers=(1,))))
    folded = jp.fold(variables)
    assert {leaf.shape for leaf in jax.tree.leaves(folded["peft"])} == {(1, 2, 2, 6)}
    np.testing.assert_allclose(logits(folded), logits(variables), atol=1e-6)


def test_the_same_method_twice_is_an_error():
    with pytest.raises(ValueError, match="the same method twice"):
        attach((jp.LoRA(rank=2), jp.LoRA(rank=2)))


# ---------------------------------------------------------------- many at once


# a prompt, fixed leaves that all sites share, and prefix, adapter and LoRA behind gates
@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt0", "vera20", "unipelt29"])
def test_eight_devices_and_vmap_over_tuned_trees_equal_one_device(name):
    """One step of gradient descent: two tuned trees in one program whose batch lies on eight devices, and each tree alone."""
    variables, mask = attached(BY_NAME[name])
    trees = [jp.split(perturbed(variables, seed=seed), mask) for seed in (1, 2)]
    frozen, batch, tx = trees[0][1], tiny.batch(n=8), optax.sgd(0.1)
    if any(not np.array_equal(x, y) for x, y in zip(*(jax.tree.leaves(t[1]) for t in trees), strict=True)):
        frozen = jp.split(variables, mask)[1]  # fixed leaves that a method brings (VeRA's): one set for both

    def step(tuned, frozen, batch):
        state = loop.TrainState(jnp.int32(0), tuned, tx.init(tuned))
        loss = functools.partial(tasks.build("vqa").loss, tiny.model())
        return loop.train_step(state, frozen, batch, loss=loss, tx=tx, grad_accum=1)[0].tuned

    alone = jax.jit(step)
    apart = [alone(tuned, frozen, batch) for tuned, _ in trees]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, spread = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(t[0] for t in trees))
    together = jax.jit(jax.vmap(step, in_axes=(0, None, None)))(
        *jax.device_put((stacked, frozen), everywhere), jax.device_put(batch, spread)
    )
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(together))
    for i, one in enumerate(apart):
        for (name, x), y in zip(tree.flatten(one).items(), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(y[i], x, atol=1e-6, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "beams"), [(jp.LoRA(rank=2), 3), (jp.Prefix(length=2, mlp=3), 1)], ids=lambda x: getattr(x, "name", None)
)
def test_several_trees_in_one_batch_write_what_each_writes_alone(method, beams):
    """Hot use: row i of the batch is written by the tree that adapter_ids says, and trees do not mix."""
    model, pictures = tiny.model(), list(tiny.batch(n=6)["image"])
    trees = [perturbed(attach(method), scale=0.5, seed=seed) for seed in range(3)]
    ids = [0, 2, 1, 1, 0, 2]
    write = functools.partial(jp.generate, model, images=pictures, prompts="w1 w2", beams=beams, batch_size=4)
    alone = [write(variables=one) for one in trees]
    mixed = write(variables=jp.stack(trees), adapter_ids=ids)
    assert mixed == [alone[i][k] for k, i in enumerate(ids)]
    assert len({tuple(texts) for texts in alone}) == 3


def test_switching_trees_does_not_compile_again():
    model, pictures = tiny.model(), list(tiny.batch(n=2)["image"])
    trees = [perturbed(attach(jp.LoRA(rank=2)), seed=seed) for seed in range(2)]
    jp.generate(model, trees[0], pictures, "w1", beams=1)
    before = decode.greedy._cache_size()
    jp.generate(model, trees[1], pictures, "w1", beams=1)
    assert decode.greedy._cache_size() == before


def test_a_stack_of_different_trees_is_refused():
    one = attach(jp.LoRA(rank=2))
    with pytest.raises(ValueError, match="other methods or sites"):
        jp.stack([one, attach(jp.LoRA(rank=3))])
    with pytest.raises(ValueError, match="other base leaves"):
        jp.stack([one, attach(jp.LoRA(rank=2), jax.tree.map(lambda x: x + 1, tiny.params()))])
    with pytest.raises(
        ValueError, match=r"adapter_ids is \[0, 2\]; expected one index per image \(2\), each below 2, the number"
    ):
        jp.generate(tiny.model(), jp.stack([one, one]), list(tiny.batch(n=2)["image"]), "w1", adapter_ids=[0, 2])


# ---------------------------------------------------------------- optimizer and budget


@pytest.mark.parametrize("kind", [jp.LoRA, jp.LoHa])
def test_lora_plus_moves_b_faster(kind):
    """One AdamW step of two runs that differ in lr_ratio: A moves alike, B `lr_ratio` times as far."""
    settings = {
        "lr": 1e-2,
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "no_decay": "",
        "clip_norm": 1.0,
        "b1": 0.9,
        "b2": 0.999,
    }
    moved = {}
    for ratio in (1.0, 4.0):
        variables = perturbed(attach(kind(rank=2, lr_ratio=ratio)))
        tuned, _ = jp.split(variables, jp.trainable(variables))
        tx = optim.optimizer(ml_collections.ConfigDict(settings), tuned, 10)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, tuned), tx.init(tuned), tuned)
        moved[ratio] = tree.flatten(updates)
    for name in moved[1.0]:
        factor = 4.0 if name.endswith(("/b", "/b1", "/b2")) else 1.0
        np.testing.assert_allclose(moved[4.0][name], factor * moved[1.0][name], rtol=1e-6)


def test_lora_of_rank_r_equals_prefix_of_length_2r():
    """peft.md 1.8: 4 r d n_attn L == 2 l d n_attn L at l = 2 r, at any width."""
    for rank in (1, 3, 8):
        lora = budget.abstract_counts(tiny.model(), jp.LoRA(rank=rank))["stored"]
        assert lora == budget.abstract_counts(tiny.model(), jp.Prefix(length=2 * rank))["stored"]


@pytest.mark.parametrize(
    "row", [row_named(n) for n in ("prompt", "prefix", "compacter", "lora", "oft", "mam", "vera")], ids=lambda r: r.name
)
def test_solve_size_finds_the_size_that_stores_this_much(row):
    method = row.build()
    method = method[0] if len(method) == 1 else method
    field = [one for one in sites.as_methods(method) if one.size_field][-1]
    size = getattr(getattr(field, "method", field), field.size_field)
    found = jp.solve_size(tiny.model(), method, row.stored)
    assert (found.size, found.stored, found.gap, found.method) == (size, row.stored, 0, method)


def test_solve_size_chooses_the_closest_of_all_sizes():
    """Also where counts are not linear in the size: OFT's blocks of 2, 3, 4, 6 and 12."""
    counts = {b: budget.abstract_counts(tiny.model(), jp.OFT(block=b))["stored"] for b in (2, 3, 4, 6, 12)}
    assert len(set(np.diff([*counts.values()]))) > 1
    for wanted in range(1, 1200, 37):
        found = jp.solve_size(tiny.model(), jp.OFT(), wanted)
        assert found.size == min(counts, key=lambda b: abs(counts[b] - wanted))


@pytest.mark.parametrize("jump", [0, 10**9], ids=["linear", "with a jump"])
def test_solve_size_counts_few_of_many_sizes(monkeypatch, jump):
    """VeRA has 1,048,575 ranks here, and each stores 40 scalars. Doubling to rank 500,000 takes 19 counts; few more are needed.
    Where the count jumps at rank 510,000, interpolation alone would need thousands."""
    counted, count = [], budget.abstract_counts

    def jumping(model, methods):
        counted.append(methods[0].rank)
        assert len(counted) <= (60 if jump else 25)  # here, or a slow search would go on
        return {"stored": count(model, methods)["stored"] + jump * (methods[0].rank > 510_000)}

    monkeypatch.setattr(budget, "abstract_counts", jumping)
    found = jp.solve_size(tiny.model(), jp.VeRA(), 40 * 505_000)
    assert abs(found.stored - found.budget) <= 20 and len(counted) == len(set(counted))


def test_solve_size_names_what_it_does_not_find():
    for method in (
        jp.LoRA(targets="nonsense"),
        jp.OFT(targets="nonsense"),
        (jp.BitFit(), jp.PiSSA(targets="nonsense")),
    ):
        with pytest.raises(ValueError, match="targets='nonsense' matches none of the .* sites; nearest"):
            jp.solve_size(tiny.model(), method, 1000)


def test_solve_size_reports_gap_and_cap():
    near = jp.solve_size(tiny.model(), jp.LoRA(), 1000)  # 384 per unit of rank: 3 ranks are 1152, 2 are 768
    assert (near.size, near.stored, near.capped) == (3, 1152, False) and "+15.20 %" in str(near)
    prompt = jp.solve_size(tiny.model(), jp.Prompt(targets="decoder"), 10_000)
    assert (prompt.size, prompt.stored, prompt.capped) == (16, 16 * 12, True) and "the most" in str(prompt)
    with pytest.raises(ValueError, match="bitfit: no size"):
        jp.solve_size(tiny.model(), jp.BitFit(), 1000)


@pytest.mark.parametrize(
    "method, count",
    [
        (jp.LoRA(), 589_824),
        (jp.DoRA(), 626_688),
        (jp.VeRA(), 49_152 + 2 * 256 * 768),
        (jp.IA3(), 73_728),
        (jp.OFT(), 571_392),
        (jp.LayerNorms(), 58_368),
        (jp.BitFit(), 180_284),
        (jp.BitFit(targets="vision"), 102_912),
        (jp.SerialAdapter(placement="pfeiffer", bottleneck=32), 599_424),
        (jp.ParallelAdapter(bottleneck=64), 1_189_632),
        (jp.SerialAdapter(bottleneck=16), 912_960),
        (jp.Prefix(length=16), 589_824),
        (jp.Prefix(targets="self_attention", length=16), 294_912),
        (jp.Prompt(length=100), 76_800),
        (jp.LoRA(targets=r"attention/(query|value)$"), 589_824 + 12 * 2 * 2 * 768 * 8),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_counts_at_blip_base(method, count):
    """The formulas of the literature, from shapes alone. VeRA stores its shared matrices beside 49,152 trained."""
    assert budget.abstract_counts(Blip.build(BlipConfig()), method)["stored"] == count
