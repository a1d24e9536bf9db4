"""Our mPLUG against the reference (numbers of golden/make_mplug.py): states, logits, losses, gradients, the release's beam
search, and that these numbers can tell a wrong model from a right one."""

import dataclasses
import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from test_vlm_parity import far, run

from jaxpeft import ops, tree
from jaxpeft.inputs import images
from jaxpeft.models import convert, decode, loading, mplug_convert
from jaxpeft.models.mplug import KINDS, Mplug

GOLDEN = pathlib.Path(__file__).parent / "golden"
LOGITS, LOSS, GRADIENT = 5e-5, 1e-5, 1e-4  # the last relative to the largest entry of its tensor
FIRST = 1  # the first fusion layer of the golden checkpoints that acts
every_kind = pytest.mark.parametrize("kind", ["base", "large"])
TASKS = pytest.mark.parametrize("task", ["vqa", "caption"])
NAMES = {"vqa": "vqa", "caption": "captioning"}
LIVE = all(importlib.util.find_spec(name) for name in ("modelscope", "torch", "transformers"))


@functools.cache
def loaded(kind, task="vqa"):
    """(model, params, golden numbers)"""
    golden = dict(np.load(GOLDEN / f"mplug_{kind}_tiny.npz"))
    model, params = loading.load(GOLDEN / f"mplug_{kind}_tiny", task=NAMES[task])
    golden["images"] = golden["images"].astype(np.float32)
    golden["prompt"] = np.where(golden["question_mask"] == 1, golden["questions"], 0)
    return model, params, golden


def from_release(tensors, config):
    table = mplug_convert.CONVERTER.table(config, mplug_convert.first_layer(tensors, config))
    return convert.nested(convert.read(tensors, table, "golden", place=convert.in_memory, dtype="float32"))


def context_of(model, params, golden):
    return run(model, "context", params, {"image": golden["images"], "prompt": golden["prompt"]})


def rows(context, owner):
    return context._replace(**{k: getattr(context, k)[owner] for k in ("memory", "mask_BS", "next_B")})


@functools.cache
def outputs(kind, task):
    """(context, logits of the golden texts)"""
    model, params, golden = loaded(kind, task)
    context = context_of(model, params, golden)
    if task == "caption":
        return context, np.asarray(run(model, "score", params, golden["captions"], context))
    return context, np.asarray(run(model, "score", params, golden["answers"], rows(context, golden["owner"])))


def valid(kind, task):
    return loaded(kind)[2][{"vqa": "answer_mask", "caption": "caption_mask"}[task]] == 1


# ------------------------------------------------------------------------------------------- forward
@every_kind
def test_image_tokens_and_text_states(kind):
    model, params, golden = loaded(kind)
    image_BPD = run(model, "encode_image", params, golden["images"])
    assert far(image_BPD, golden["vqa/image_tokens"]) <= LOGITS
    text_BTD = run(model, "encode_text", params, golden["prompt"])
    assert far(text_BTD, golden["vqa/text_states"], golden["question_mask"] == 1) <= LOGITS


@every_kind
@pytest.mark.slow
def test_fusion_moves_the_image_tokens_only_where_a_layer_joins(kind):
    model, _, golden = loaded(kind)
    kinds = [name for name, _ in model.config.runs]
    assert kinds == {"base": ["cross", "joint", "cross", "joint"], "large": ["cross"]}[kind]
    context, _ = outputs(kind, "vqa")
    n_image = golden["vqa/image_tokens"].shape[1]
    image_BPD, text_BTD = context.memory[:, :n_image], context.memory[:, n_image:]
    assert far(image_BPD, golden["vqa/layers/image"][-1]) <= LOGITS
    assert far(text_BTD, golden["vqa/layers/text"][-1], golden["question_mask"] == 1) <= LOGITS
    moved = far(golden["vqa/layers/image"][-1], golden["vqa/image_tokens"])
    assert moved > 1 if kind == "base" else moved == 0


@every_kind
@TASKS
def test_logits(kind, task):
    assert far(outputs(kind, task)[1], loaded(kind)[2][f"{task}/logits"], valid(kind, task)) <= LOGITS


@every_kind
def test_one_context_for_several_answers_needs_no_copies(kind):
    model, params, golden = loaded(kind)
    context, expected = outputs(kind, "vqa")
    answers = np.array([0, 1, 3, 4])  # two answers of question 0, two of question 2
    logits_BTV = run(model, "score", params, golden["answers"][answers], rows(context, np.array([0, 2])))
    assert far(logits_BTV, expected[answers], valid(kind, "vqa")[answers]) <= 1e-5


@every_kind
def test_padding_of_a_question_does_not_matter(kind):
    model, params, golden = loaded(kind)
    context, _ = outputs(kind, "vqa")
    n_image, n_words = golden["vqa/image_tokens"].shape[1], int(golden["question_mask"][1].sum())
    assert n_words < golden["prompt"].shape[1]
    alone = {"image": golden["images"][1:2], "prompt": golden["prompt"][1:2, :n_words]}
    one = run(model, "context", params, alone)
    assert far(one.memory, np.asarray(context.memory)[1:2, : n_image + n_words]) <= 1e-5
    assert one.mask_BS.all() and context.mask_BS[1].sum() == n_image + n_words


# ------------------------------------------------------------------------------------------- losses and gradients
def loss_of(logits_BTV, golden, task):
    """VQA: weighted sums over tokens, divided by the number of images; captioning: the mean over tokens."""
    texts, mask = ("answers", "answer_mask") if task == "vqa" else ("captions", "caption_mask")
    scored_BT = golden[mask][:, 1:] == 1
    nll_BT = ops.token_nll(logits_BTV[:, :-1], golden[texts][:, 1:]) * scored_BT
    if task == "caption":
        return nll_BT.sum() / scored_BT.sum()
    return (nll_BT.sum(1) * golden["answer_weights"]).sum() / len(golden["images"])


@every_kind
@TASKS
def test_losses(kind, task):
    golden = loaded(kind)[2]
    assert far(loss_of(outputs(kind, task)[1], golden, task), golden[f"{task}/loss"]) <= LOSS * golden[f"{task}/loss"]


@pytest.mark.slow
@every_kind
@TASKS
def test_gradients(kind, task):
    model, params, golden = loaded(kind, task)

    def loss(params):
        context = model.apply(
            {"params": params}, {"image": golden["images"], "prompt": golden["prompt"]}, method="context"
        )
        context = context if task == "caption" else rows(context, golden["owner"])
        texts = golden["captions" if task == "caption" else "answers"]
        return loss_of(model.apply({"params": params}, texts, context, method="score"), golden, task)

    ours = mplug_convert.to_release(jax.jit(jax.grad(loss))(params), model.config, first=FIRST)
    names = [name.removeprefix(f"{task}/grad/") for name in golden if name.startswith(f"{task}/grad/")]
    assert len(names) >= 9 and set(names) <= set(ours)
    for name in names:
        expected = golden[f"{task}/grad/{name}"]
        assert far(ours[name], expected) <= GRADIENT * np.abs(expected).max(), name
    if task == "vqa":  # row 0 is added to every position
        types, positions = (
            ours[f"text_decoder.bert.embeddings.{one}_embeddings.weight"] for one in ("token_type", "position")
        )
        np.testing.assert_allclose(types[0], positions.sum(0), atol=1e-4)
        assert not types[1].any()


# ------------------------------------------------------------------------------------------- search


@pytest.mark.slow
@TASKS
@pytest.mark.parametrize(
    ("kind", "beams", "least", "most"), [("base", 1, 0, 6), ("base", 3, 1, 8), ("base", 5, 4, 9), ("large", 5, 4, 9)]
)
def test_the_beam_search_of_the_release(kind, task, beams, least, most):
    model, params, golden = loaded(kind, task)
    search = decode.Search(
        (101,), (102,), 0, model.config.vocab_size, length=1 + most, min_length=1 + least, beams=beams, kind="mplug"
    )
    context = context_of(model, params, golden)
    tokens_BKT, score_BK = decode.beam_search(model, {"params": params}, context, search)
    expected = golden[f"{task}/beam{beams}_{least}_{most}/ids"]
    np.testing.assert_array_equal(tokens_BKT, np.where(expected < 0, 0, expected))
    np.testing.assert_allclose(score_BK, golden[f"{task}/beam{beams}_{least}_{most}/scores"], atol=1e-4)
    if beams == 1:  # greedy search writes the same words; its score has no penalty
        np.testing.assert_array_equal(decode.greedy(model, {"params": params}, context, search)[0], tokens_BKT[:, 0])


def test_a_beam_goes_on_after_its_end_and_the_other_search_writes_other_texts():
    """Otherwise the comparison above could not tell the two searches apart."""
    model, params, golden = loaded("base", "caption")
    expected = golden["caption/beam5_4_9/ids"]
    assert any(102 in row[:-1][row[1:] >= 0] for row in expected.reshape(-1, expected.shape[-1]))
    search = decode.Search((101,), (102,), 0, model.config.vocab_size, length=10, min_length=5, beams=5)
    other, _ = decode.beam_search(model, {"params": params}, context_of(model, params, golden), search)
    assert not np.array_equal(other, np.where(expected < 0, 0, expected))


def test_templates_name_the_search():
    model = loading.load("tiny", task="vqa")[0]
    assert model.processor.template("vqa").beam_search == "transformers"
    ours = Mplug.build(KINDS["mplug-base"], model.tokenizer)
    for task in ("vqa", "captioning"):
        assert decode.Search.of(ours.processor.template(task), 5, beams=3).kind == "mplug"


# ------------------------------------------------------------------------------------------- negative controls
MISTAKES = {
    "vision_eps": {"vision_eps": 1e-6},
    "text_eps": {"text_eps": 1e-5},
    "text_heads": {"text_heads": 2},
    "no_joint": {"stride": 100},
    "stride": {"stride": 2},
}
N_WRONG = 3  # rows stored of wrong logits
SAME = {("large", "no_joint"), ("large", "no_outer_residual")}  # the large model has no joint layer


@every_kind
@pytest.mark.parametrize("mistake", [*MISTAKES, "gelu", "no_outer_residual", "question_mask"])
def test_the_tolerance_tells_wrong_models_apart(kind, mistake):
    wrong = loaded(kind)[2][f"wrong/{mistake}"]
    distance = far(outputs(kind, "vqa")[1][:N_WRONG], wrong, valid(kind, "vqa")[:N_WRONG])
    assert distance <= LOGITS if (kind, mistake) in SAME else distance > 10 * LOGITS


@pytest.mark.parametrize(("kind", "mistake"), [("base", "no_joint"), ("base", "vision_eps"), ("large", "text_eps"),
                                               ("base", "text_heads")])  # fmt: skip
def test_our_model_with_the_same_mistake_agrees_with_the_wrong_reference(kind, mistake):
    model, params, golden = loaded(kind)
    config = dataclasses.replace(model.config, **MISTAKES[mistake])
    tensors = convert.opened(GOLDEN / f"mplug_{kind}_tiny")
    if mistake == "no_joint":  # then every layer is a cross layer
        params = from_release(tensors, config)
    context = context_of(Mplug.build(config), params, golden)
    logits = run(Mplug.build(config), "score", params, golden["answers"], rows(context, golden["owner"]))
    wrong = golden[f"wrong/{mistake}"]
    assert far(np.asarray(logits)[:N_WRONG], wrong, valid(kind, "vqa")[:N_WRONG]) <= 2 * LOGITS


# ------------------------------------------------------------------------------------------- sizes and positions
def test_positions_at_another_image_size():
    numbers = np.load(GOLDEN / "mplug_positions.npz")
    for side in (3, 6):
        found = images.resize_positions(numbers["before"], side, "bilinear")
        np.testing.assert_allclose(found, numbers[f"after{side}"], atol=1e-6)
        assert np.abs(found - images.resize_positions(numbers["before"], side)).max() > 0.01  # bicubic is another


def test_both_directions():
    for kind in ("base", "large"):
        model, params, _ = loaded(kind)
        tensors = mplug_convert.to_release(params, model.config, first=FIRST)
        stored = convert.opened(GOLDEN / f"mplug_{kind}_tiny")
        for name, x in tensors.items():
            np.testing.assert_array_equal(x, np.asarray(stored[name][...], np.float32), err_msg=name)
        again = from_release(tensors, model.config)
        for name, x in tree.flatten(again).items():
            np.testing.assert_array_equal(x, tree.flatten(params)[name], err_msg=name)


@pytest.mark.slow
@every_kind
def test_live_against_modelscope(kind):
    """Other weights and texts than those of the stored numbers, in float32, where modelscope and torch are installed."""
    if not LIVE:
        pytest.skip("needs torch, transformers and `pip install --no-deps modelscope==1.40.2`")
    from golden import make_mplug as make

    module, clip = make.reference()
    theirs, data = make.build(kind, "vqa", module, clip, seed=5), make.inputs()
    expected = make.vqa_numbers(theirs, data)
    config = loaded(kind)[0].config
    tensors = {name: x.numpy().astype(np.float32) for name, x in theirs.state_dict().items() if x.is_floating_point()}
    params, model = from_release(tensors, config), Mplug.build(config)
    golden = {
        "images": data["images"].astype(np.float32),
        "prompt": np.where(data["question_mask"] == 1, data["questions"], 0),
    }
    context = context_of(model, params, golden)
    logits = run(model, "score", params, data["answers"], rows(context, data["owner"]))
    assert far(logits, expected["logits"].detach().numpy(), data["answer_mask"] == 1) <= 4 * LOGITS  # not a chosen seed
    search = decode.Search((101,), (102,), 0, config.vocab_size, length=10, min_length=5, beams=5, kind="mplug")
    tokens, _ = decode.beam_search(model, {"params": params}, context, search)
    ids = expected["beam5_4_9/ids"]
    assert np.mean(np.asarray(tokens)[:, 0] == np.where(ids < 0, 0, ids)[:, 0]) > 0.9
