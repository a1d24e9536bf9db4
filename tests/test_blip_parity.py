"""Our BLIP against transformers' (numbers of golden/make_blip.py): states, logits, losses, gradients, and that these
numbers can tell a wrong model from a right one."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
from test_vlm_parity import far

from jaxpeft import ops, tree
from jaxpeft.models import convert, loading
from jaxpeft.models.base import MODELS, Context
from jaxpeft.models.blip import Blip

GOLDEN = pathlib.Path(__file__).parent / "golden"
# the reference's own float32 error is 6e-6 at logits of standard deviation 1.9
LOGITS, LOSS, GRADIENT = 5e-5, 1e-5, 1e-4
TASKS = pytest.mark.parametrize("task", ["caption", "vqa"])


@functools.cache
def loaded(task):
    """(config, params, golden numbers)"""
    model, params = loading.load(GOLDEN / f"blip_{task}_tiny")
    return model.config, params, dict(np.load(GOLDEN / f"blip_{task}_tiny.npz"))


@functools.partial(jax.jit, static_argnames=("config", "method"))
def run(config, method, params, *args):
    """One stage of the model."""
    return Blip.build(config).apply({"params": params}, *args, method=method)


def score(config, params, tokens_RT, memory_BSD, mask_BS=None):
    """Logits of texts about a context."""
    context = Context(memory_BSD, mask_BS, np.zeros(len(memory_BSD), np.int32))
    return run(config, "score", params, tokens_RT, context)


def forward(params, golden, config):
    """(image tokens, question states or None, logits of the golden texts)"""
    image_BPD = run(config, "encode_image", params, golden["images"])
    if not config.question_encoder:
        return image_BPD, None, score(config, params, golden["tokens"], image_BPD)
    mask_BT, owner = golden["question_mask"] == 1, golden["owner"]
    states_BTD = run(config, "encode_question", params, image_BPD, golden["questions"], mask_BT)
    return image_BPD, states_BTD, score(config, params, golden["answers"], states_BTD[owner], mask_BT[owner])


@functools.cache
def outputs(task, **changes):
    config, params, golden = loaded(task)
    return [
        None if x is None else np.asarray(x) for x in forward(params, golden, dataclasses.replace(config, **changes))
    ]


def valid(task):
    golden = loaded(task)[2]
    return golden["token_mask" if task == "caption" else "answer_mask"] == 1


# ------------------------------------------------------------------------------------------- forward
@TASKS
def test_image_tokens(task):
    assert far(outputs(task)[0], loaded(task)[2]["image_tokens"]) <= LOGITS


def test_image_tokens_at_another_size():
    golden = loaded("caption")[2]
    model, params = loading.load(GOLDEN / "blip_caption_tiny", image_size=56)
    tokens_BPD = model.apply({"params": params}, golden["resized_images"], method="encode_image")
    assert far(tokens_BPD, golden["resized_image_tokens"]) <= LOGITS


def test_question_states():
    golden = loaded("vqa")[2]
    assert far(outputs("vqa")[1], golden["question_states"], golden["question_mask"] == 1) <= LOGITS


@TASKS
def test_logits(task):
    assert far(outputs(task)[2], loaded(task)[2]["logits"], valid(task)) <= LOGITS


def test_one_question_for_several_answers_needs_no_copies_of_its_states():
    config, params, golden = loaded("vqa")
    _, states_BTD, expected = outputs("vqa")
    rows = np.array([0, 1, 3, 4])  # two answers of question 0, two of question 2
    one, mask_BT = np.array([0, 2]), golden["question_mask"] == 1
    logits_BTV = score(config, params, golden["answers"][rows], states_BTD[one], mask_BT[one])
    assert far(logits_BTV, expected[rows], valid("vqa")[rows]) <= 1e-5


def test_masked_question_tokens_do_not_matter():
    config, params, golden = loaded("vqa")
    image_BPD, states_BTD, logits_BTV = outputs("vqa")
    questions, mask_BT, owner, answers = (golden[k] for k in ("questions", "question_mask", "owner", "answers"))
    mask_BT = mask_BT == 1
    junk = np.where(mask_BT[..., None], states_BTD, 50.0)
    np.testing.assert_array_equal(score(config, params, answers, junk[owner], mask_BT[owner]), logits_BTV)
    again = run(config, "encode_question", params, image_BPD, np.where(mask_BT, questions, 33), mask_BT)
    np.testing.assert_array_equal(np.asarray(again)[mask_BT], states_BTD[mask_BT])
    row, length = slice(1, 2), int(mask_BT[1].sum())
    assert length < questions.shape[1]
    alone = run(config, "encode_question", params, image_BPD[row], questions[row, :length], mask_BT[row, :length])
    assert far(alone, states_BTD[row, :length]) <= 1e-5


# ------------------------------------------------------------------------------------------- losses and gradients
def loss_of(logits_BTV, golden, smoothing):
    """(the loss of the recipe, sums per text). Captioning: mean over tokens; VQA: weighted sums over questions."""
    targets_BT = golden["labels"][:, 1:]
    nll_BT = ops.token_nll(logits_BTV[:, :-1], np.maximum(targets_BT, 0), smoothing)
    sums_B = (nll_BT * (targets_BT != -100)).sum(1)
    if "weights" not in golden:
        return sums_B.sum() / (targets_BT != -100).sum(), sums_B
    return (sums_B * golden["weights"]).sum() / len(golden["questions"]), sums_B


@TASKS
@pytest.mark.parametrize("suffix", ["", "_smooth"])
def test_losses(task, suffix):
    golden = loaded(task)[2]
    loss, sums_B = loss_of(outputs(task)[2], golden, float(golden["smoothing"]) if suffix else 0.0)
    assert far(loss, golden[f"loss{suffix}"]) <= LOSS
    assert far(sums_B, golden[f"loss_sums{suffix}"]) <= LOSS * valid(task).sum(1).max()


@TASKS
@pytest.mark.slow
def test_gradients(task):
    config, params, golden = loaded(task)
    smoothing = float(golden["smoothing"])
    gradient = jax.jit(jax.grad(lambda p: loss_of(forward(p, golden, config)[2], golden, smoothing)[0]))(params)
    ours = convert.written(tree.flatten(gradient), MODELS["blip"]().table(config))
    names = [name for name in golden if name.startswith("grad/")]
    assert len(names) >= 10
    for name in names:
        expected = golden[name]
        assert far(ours[name.removeprefix("grad/")], expected) <= GRADIENT * min(1.0, np.abs(expected).max()), name


# ------------------------------------------------------------------------------------------- negative controls
MISTAKES = {
    "vision_eps": {"vision_eps": 1e-5},
    "text_eps": {"text_eps": 1e-6},
    "text_heads": {"text_heads": 2},
    "vision_heads": {"vision_heads": {"caption": 2, "vqa": 1}},
}
N_WRONG = 3  # rows stored of wrong logits


@TASKS
@pytest.mark.parametrize("mistake", [*MISTAKES, "tanh_gelu"])
def test_the_tolerance_tells_wrong_models_apart(task, mistake):
    wrong = loaded(task)[2][f"wrong/{mistake}"]
    assert far(outputs(task)[2][:N_WRONG], wrong, valid(task)[:N_WRONG]) > 10 * LOGITS


@pytest.mark.parametrize(("task", "mistake"), list(zip(("caption", "vqa") * 2, MISTAKES, strict=True)))
def test_our_model_with_the_same_mistake_agrees_with_the_wrong_reference(task, mistake):
    changes = {key: value[task] if isinstance(value, dict) else value for key, value in MISTAKES[mistake].items()}
    wrong = loaded(task)[2][f"wrong/{mistake}"]
    assert far(outputs(task, **changes)[2][:N_WRONG], wrong, valid(task)[:N_WRONG]) <= LOGITS


def test_an_all_ones_question_mask_is_another_answer():
    config, params, golden = loaded("vqa")
    states_BTD = outputs("vqa")[1][golden["owner"]]
    everything = np.ones(states_BTD.shape[:2], bool)
    logits_BTV = np.asarray(score(config, params, golden["answers"], states_BTD, everything))
    wrong, where = golden["wrong/question_mask"], valid("vqa")[:N_WRONG]
    assert far(logits_BTV[:N_WRONG], wrong, where) <= LOGITS
    assert far(golden["logits"][:N_WRONG], wrong, where) > 10 * LOGITS
