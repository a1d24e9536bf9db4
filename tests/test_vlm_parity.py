"""Our PaliGemma and SmolVLM against transformers (numbers of golden/make_vlm.py): image tokens, logits, losses, gradients,
generated texts, every layout of files, and that these numbers can tell a wrong model from a right one."""

import dataclasses
import functools
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpeft import ops, tree
from jaxpeft.inputs import images
from jaxpeft.models import convert, decode, layers, loading, paligemma, smolvlm
from jaxpeft.models.base import MODELS

GOLDEN = pathlib.Path(__file__).parent / "golden"
LOGITS, LOSS, GRADIENT = 5e-5, 1e-5, 1e-4  # the last two relative, to the loss and to the largest entry of a tensor
PAD, END = 0, 3
KINDS = ("paligemma", "smolvlm")
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def loaded(kind):
    """(model, params, golden numbers)"""
    return *loading.load(GOLDEN / f"{kind}_tiny"), dict(np.load(GOLDEN / f"{kind}_tiny.npz"))


def prompts(golden, side):
    """Prompts padded on a side of every row: 'left', 'right', or 'mixed'."""
    rows = [row[row >= 0] for row in golden["prompts"]]
    out = np.full((len(rows), 1 + max(map(len, rows))), PAD, np.int32)
    for i, (to, row) in enumerate(zip(out, rows, strict=True)):
        on_left = side == "left" or side == "mixed" and i % 2 == 0
        to[slice(-len(row), None) if on_left else slice(len(row))] = row
    return out


def texts(golden):
    """(inputs with a placeholder in front (R, T), targets, True at tokens of a text)"""
    targets = np.maximum(golden["texts"], 0)
    return np.pad(targets[:, :-1], ((0, 0), (1, 0))), targets, golden["texts"] >= 0


@functools.partial(jax.jit, static_argnames=("model", "method"))
def run(model, method, params, *args):
    return model.apply({"params": params}, *args, method=method)


@functools.partial(jax.jit, static_argnames="model")
def image_tokens(model, params, image):
    return model.apply({"params": params}, {"image": image}, "image_tokens", method="stage")


def context_of(model, params, golden, side="mixed"):
    return run(model, "context", params, {"image": golden["images"], "prompt": prompts(golden, side)})


def rows(context, owner):
    """The context of every text: its own row."""
    memory = jax.tree.map(lambda x: x[:, owner], context.memory)
    return context._replace(memory=memory, **{k: getattr(context, k)[owner] for k in ("mask_BS", "next_B", "first_BV")})


def logits_of(model, params, golden, side="mixed"):
    context = rows(context_of(model, params, golden, side), golden["owner"])
    return np.asarray(run(model, "score", params, texts(golden)[0], context))


def far(a, b, where=...):
    """The largest difference."""
    return float(np.abs(np.asarray(a)[where] - np.asarray(b)[where]).max())


# ------------------------------------------------------------------------------------------- forward
@every_kind
def test_image_tokens(kind):
    model, params, golden = loaded(kind)
    image_BPD = image_tokens(model, params, golden["images"])
    assert far(image_BPD, golden["image_tokens"]) <= LOGITS
    assert image_BPD.shape[1] == model.config.n_image_tokens == {"paligemma": 16, "smolvlm": 4}[kind]


@every_kind
@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_logits_whatever_the_padding_side(kind, side):
    model, params, golden = loaded(kind)
    assert golden["float32"] < 2e-5  # transformers' own error in float32
    assert far(logits_of(model, params, golden, side), golden["logits"], texts(golden)[2]) <= LOGITS


@every_kind
def test_several_texts_behind_one_prefix_need_no_copies(kind):
    model, params, golden = loaded(kind)
    two = np.array([0, 1, 3, 4])  # two texts of prompt 0, two of prompt 2
    context = rows(context_of(model, params, golden), np.array([0, 2]))
    inputs, _, where = texts(golden)
    logits_RTV = run(model, "score", params, inputs[two], context)
    assert far(logits_RTV, golden["logits"][two], where[two]) <= LOGITS


@every_kind
def test_images_as_pixels(kind):
    """uint8 images are normalised to x / 127.5 - 1."""
    model, params, golden = loaded(kind)
    image = np.random.default_rng(0).integers(0, 256, golden["images"].shape).astype(np.uint8)
    floats = image_tokens(model, params, image / np.float32(127.5) - 1)
    np.testing.assert_allclose(image_tokens(model, params, image), floats, atol=1e-5)


# ------------------------------------------------------------------------------------------- loss and gradients
def loss_of(logits_RTV, golden):
    _, targets, where = texts(golden)
    return (ops.token_nll(logits_RTV, targets) * where).sum() / where.sum()


def loss_and_gradients(kind, golden):
    """(the loss, its gradients by the names of transformers)"""
    model, params, _ = loaded(kind)
    batch = {"image": golden["images"], "prompt": prompts(golden, "mixed")}

    def loss(params):
        context = rows(model.apply({"params": params}, batch, method="context"), golden["owner"])
        return loss_of(model.apply({"params": params}, texts(golden)[0], context, method="score"), golden)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    table = MODELS[kind]().table(model.config)
    table = dataclasses.replace(table, rules=[dataclasses.replace(rule, offset=0.0) for rule in table.rules])
    return value, convert.written(tree.flatten(gradients), table)


def gradient_errors(gradients, golden):
    """{name: the largest error of a gradient, relative to the largest entry}"""
    expected = {name.removeprefix("grad/"): x for name, x in golden.items() if name.startswith("grad/")}
    assert expected.keys() == gradients.keys()
    # a key's bias adds the same to all scores of a query, so its gradient is rounding in both
    scale = {name: np.abs(x).max() if not name.endswith("k_proj.bias") else 1.0 for name, x in expected.items()}
    return {name: far(gradients[name], x) / scale[name] for name, x in expected.items()}


@every_kind
@pytest.mark.slow
def test_loss_and_gradients(kind):
    golden = loaded(kind)[2]
    value, gradients = loss_and_gradients(kind, golden)
    assert far(value, golden["loss"]) <= LOSS * golden["loss"]
    for name, error in gradient_errors(gradients, golden).items():
        assert error <= GRADIENT, name


# ------------------------------------------------------------------------------------------- search
def written_texts(kind, golden, beams):
    """(tokens, their scores, the tokens of transformers)"""
    model, params, _ = loaded(kind)
    context = context_of(model, params, golden)
    search = decode.Search((), (END,), PAD, model.config.vocab_size, length=8, beams=beams)
    write = decode.greedy if beams == 1 else decode.beam_search
    tokens, score = write(model, {"params": params}, context, search)
    expected = golden["greedy" if beams == 1 else "beams"]
    return tokens, score, np.where(expected < 0, PAD, expected)


@every_kind
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_texts(kind, beams):
    golden = loaded(kind)[2]
    tokens, score, expected = written_texts(kind, golden, beams)
    np.testing.assert_array_equal(tokens, expected)
    if beams > 1:
        np.testing.assert_allclose(score, golden["beam_scores"], atol=1e-5)


# ------------------------------------------------------------------------------------------- negative controls
class CausalPaliGemma(paligemma.PaliGemma):
    causal = True


class BidirectionalSmolVLM(smolvlm.SmolVLM):
    causal = False


class Unscaled(paligemma.PaliGemmaConfig):
    word_scale = 1.0


class Scaled(smolvlm.SmolVLMConfig):
    word_scale = 24**0.5


def wrong(kind, mistake):
    """(model, params) with a mistake."""
    model, params, _ = loaded(kind)
    if mistake == "mask":
        cls = {"paligemma": CausalPaliGemma, "smolvlm": BidirectionalSmolVLM}[kind]
        return cls(model.config, model.processor), params
    if mistake == "word_scale":
        cls = {"paligemma": Unscaled, "smolvlm": Scaled}[kind]
        return type(model).build(cls(**dataclasses.asdict(model.config))), params
    if mistake == "norm_offset":  # w for 1 + w, or the other way round
        by = {"paligemma": -1, "smolvlm": 1}[kind]
        flat = tree.flatten(params)
        moved = {n: x + by if n.startswith("decoder/") and n.endswith("scale") else x for n, x in flat.items()}
        return model, convert.nested(moved)
    if mistake == "rope_theta":
        return model.replaced(rope_theta=10 * model.config.rope_theta), params
    if mistake == "text_eps":
        return model.replaced(text_eps=100 * model.config.text_eps), params
    return model, params


COMMON = ("mask", "norm_offset", "erf", "word_scale", "rope_theta", "text_eps")
MISTAKES = [*((kind, one) for kind in KINDS for one in COMMON), ("smolvlm", "image_first"), ("smolvlm", "one_resize")]


def moved(kind, mistake):
    """By how much a mistake moves the logits."""
    golden = loaded(kind)[2]
    right, given = golden["logits"], golden
    if mistake == "image_first":
        given = golden | {"prompts": np.stack([np.r_[row[3], row[:3], row[4:]] for row in golden["prompts"]])}
    if mistake == "one_resize":  # SmolVLM resizes the longer side first, here to 36
        sources = [np.random.default_rng(i).integers(0, 256, (37, 51, 3), np.uint8) for i in range(3)]
        once, twice = (np.stack([images.resize(x, 12, 1, longest) for x in sources]) for longest in (0, 36))
        right, given = logits_of(*loaded(kind)[:2], golden | {"images": twice}), golden | {"images": once}
    tanh = layers.ACTIVATIONS["gelu_tanh"]
    if mistake == "erf":
        layers.ACTIVATIONS["gelu_tanh"] = layers.ACTIVATIONS["gelu"]
        jax.clear_caches()  # the mistake is not part of a program's key
    try:
        found = logits_of(*wrong(kind, mistake), given)
    finally:
        layers.ACTIVATIONS["gelu_tanh"] = tanh
        if mistake == "erf":
            jax.clear_caches()
    return far(found, right, texts(golden)[2])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mistake"), MISTAKES)
def test_the_tolerance_tells_wrong_models_apart(kind, mistake):
    assert moved(kind, mistake) > 10 * LOGITS


# ------------------------------------------------------------------------------------------- sizes
SO400M = dict(vision_width=1152, vision_layers=27, vision_heads=16, vision_mlp=4304)
SMALL = smolvlm.SmolVLMConfig()
MIDDLE = dict(text_width=960, text_mlp=2560, text_layers=32, text_heads=15, kv_heads=5)


def test_pixels_after_the_last_whole_patch_are_ignored():
    """SmolVLM-2.2B: 384 pixels and patches of 14 make 27 x 27 patches, 9 x 9 image tokens."""
    config = smolvlm.SmolVLMConfig(**SO400M, image_size=384, patch_size=14, shuffle=3)
    assert (config.n_patches, config.n_image_tokens) == (729, 81)
    model, params, golden = loaded("smolvlm")
    wider = np.pad(golden["images"], ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=1)
    larger = model.replaced(image_size=14)
    found = image_tokens(larger, params, wider)
    assert far(found, golden["image_tokens"]) <= LOGITS


# ------------------------------------------------------------------------------------------- files
LAYOUTS = {
    "paligemma": {
        "hub": (("vision_tower.", "vision_tower.vision_model."),),
        "modules": (("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower."),
                    ("multi_modal_projector.", "model.multi_modal_projector.")),
    },
    "smolvlm": {"without head": (("model.", ""),)},
}  # fmt: skip


def written(kind, directory, change=None, **settings):
    """A copy of a golden checkpoint with changed tensors and settings."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = load_file(GOLDEN / f"{kind}_tiny" / "model.safetensors")
    save_file(change(dict(tensors)) if change else tensors, directory / "model.safetensors")
    said = json.loads((GOLDEN / f"{kind}_tiny" / "config.json").read_text())
    for key, value in settings.items():
        *parents, last = key.split("__")
        at = functools.reduce(dict.get, parents, said)
        at.pop(last, None)
        if value is not None:
            at[last] = value
    (directory / "config.json").write_text(json.dumps(said))
    return directory


def same(params, other):
    a, b = tree.flatten(params), tree.flatten(other)
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(b[name], np.float32), err_msg=name)


@pytest.mark.parametrize(("kind", "layout"), [(kind, name) for kind, some in LAYOUTS.items() for name in some])
def test_every_layout_of_names_is_read(tmp_path, kind, layout):
    def renamed(tensors):
        for old, new in LAYOUTS[kind][layout]:
            tensors = {new + n[len(old) :] if n.startswith(old) else n: x for n, x in tensors.items()}
        return tensors

    model, params = loading.load(written(kind, tmp_path / "base", renamed))
    assert model == loaded(kind)[0]
    same(params, loaded(kind)[1])


@every_kind
def test_files_in_bfloat16_are_read_as_they_are_or_wider(kind):
    stored = convert.opened(GOLDEN / f"{kind}_tiny")
    assert {x.dtype for x in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    _, narrow, _ = loading.read(GOLDEN / f"{kind}_tiny", param_dtype="bfloat16")
    flat = tree.flatten(loaded(kind)[1])
    for name, x in tree.flatten(narrow).items():
        assert x.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(x, np.asarray(flat[name]).astype(ml_dtypes.bfloat16), err_msg=name)


@every_kind
def test_both_directions(kind):
    """What is written is what was read: exactly, as 1 + w is exact for these w, or to the last bit of 1 + w."""
    model, params, _ = loaded(kind)
    table, stored = MODELS[kind]().table(model.config), convert.opened(GOLDEN / f"{kind}_tiny")
    names = table.renamed(stored, "golden")
    tensors = convert.written(tree.flatten(params), table)
    assert tensors.keys() == names.keys()
    for name, x in tensors.items():
        np.testing.assert_allclose(x, np.asarray(names[name][...], np.float32), atol=1.2e-7, rtol=0, err_msg=name)


@every_kind
def test_whether_the_head_is_tied_is_read_from_the_weights(tmp_path, kind):
    words = {
        "paligemma": "language_model.model.embed_tokens.weight",
        "smolvlm": "model.text_model.embed_tokens.weight",
    }[kind]

    def own(tensors):
        return tensors | {"lm_head.weight": tensors[words] * np.asarray(2, ml_dtypes.bfloat16)}

    def equal(tensors):
        return tensors | {"lm_head.weight": tensors[words].copy()}

    def none(tensors):
        return {name: x for name, x in tensors.items() if name != "lm_head.weight"}

    for name, change, untied in (("own", own, True), ("equal", equal, False), ("none", none, False)):
        for said in (True, False):
            model, params = loading.load(written(kind, tmp_path / name, change, tie_word_embeddings=said))
            assert model.config.untied_head == untied == ("head" in params["decoder"])
            assert bool(model.tied) != untied


@every_kind
def test_what_the_model_does_not_read_may_be_in_a_file(tmp_path, kind):
    def with_buffers(tensors):
        tower = "vision_tower.head" if kind == "paligemma" else "model.vision_model.head"
        rotary = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
        rotary = rotary if kind == "paligemma" else "model.text_model.layers.0.self_attn.rotary_emb.inv_freq"
        return tensors | {f"{tower}.probe": np.zeros((1, 1, 20), np.float32), rotary: np.zeros(5, np.float32)}

    same(loading.load(written(kind, tmp_path / "base", with_buffers))[1], loaded(kind)[1])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("paligemma", {"text_config__model_type": "gemma2"}, r"config\.json: text_config\.model_type is 'gemma2'; supp"),
        ("paligemma", {"text_config__hidden_act": "silu"}, r"text_config\.hidden_act is 'silu'"),
        ("smolvlm", {"text_config__hidden_act": "gelu"}, r"text_config\.hidden_act is 'gelu'; supported: 'silu'"),
        ("smolvlm", {"vision_config__hidden_act": "gelu"}, r"vision_config\.hidden_act is 'gelu'"),
        ("smolvlm", {"text_config__rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}},
         r"rotary positions of type 'linear'"),
        ("smolvlm", {"scale_factor": 3}, r"config\.json: 4 patches in a row are not divisible by scale_factor 3"),
        ("smolvlm", {"text_config__num_key_value_heads": 4}, r"num_attention_heads 6 is not divisible by \S+value_heads 4"),
        ("smolvlm", {"text_config__head_dim": 9}, r"text_config\.head_dim is 9; rotary positions need an even number"),
        ("paligemma", {"text_config__hidden_size": "24"}, r"text_config\.hidden_size is '24', expected an int"),
        ("paligemma", {"vision_config": None}, r"vision_config is None, expected an object"),
    ],
)  # fmt: skip
def test_settings_that_are_not_supported(tmp_path, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        loading.load(written(kind, tmp_path / "base", **settings))


def test_absent_settings_have_the_values_of_the_classes(tmp_path):
    """As in hub files, which leave out most of them."""
    gone = dict.fromkeys(("text_config__rms_norm_eps", "text_config__hidden_act", "text_config__rope_parameters",
                          "text_config__pad_token_id", "vision_config__layer_norm_eps", "tie_word_embeddings"))  # fmt: skip
    directory = written("paligemma", tmp_path / "base", **gone, text_config__eos_token_id=[3])
    model, params, report = loading.read(directory)
    assert model == loaded("paligemma")[0]
    assert set(report["defaults"]) >= {
        "text_config.rms_norm_eps",
        "text_config.rope_theta",
        "vision_config.layer_norm_eps",
    }
    same(params, loaded("paligemma")[1])
    assert loading.abstract(directory) == model
    old = written("smolvlm", tmp_path / "old", text_config__rope_parameters=None, text_config__rope_theta=1e5)
    assert loading.load(old)[0] == loaded("smolvlm")[0]
    for_idefics = written("smolvlm", tmp_path / "idefics3", model_type="idefics3")
    assert loading.load(for_idefics)[0] == loaded("smolvlm")[0]


@every_kind
def test_another_image_size_resizes_the_positions(kind):
    model, params, golden = loaded(kind)
    larger, resized = loading.load(GOLDEN / f"{kind}_tiny", image_size=24)
    assert larger.config.n_patches == 64 == resized["vision"]["position"].shape[0]
    # the mean of neighbours of a smooth grid is kept
    assert far(resized["vision"]["position"].mean(0), params["vision"]["position"].mean(0)) < 0.2
    image = np.repeat(np.repeat(golden["images"], 2, axis=1), 2, axis=2)
    found = image_tokens(larger, resized, image)
    assert found.shape[1] == larger.config.n_image_tokens and np.isfinite(found).all()
