"""Greedy and beam search: against transformers' tokens, against the uncached forward, and their own properties."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from jaxpeft.models import decode, loading

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def golden(name):
    model, params, _ = loading.read(GOLDEN / f"blip_{name}_tiny")
    numbers = dict(np.load(GOLDEN / f"blip_{name}_tiny.npz"))
    variables = {"params": params}
    image_BPD = model.apply(variables, numbers["images"], method="encode_image")
    if name == "caption":
        prompt_BT = np.tile(numbers["prompt"], (len(image_BPD), 1))
        return model, variables, image_BPD, None, prompt_BT.astype(np.int32), numbers
    mask_BT = numbers["question_mask"].astype(bool)
    states_BTD = model.apply(variables, image_BPD, numbers["questions"], mask_BT, method="encode_question")
    prompt_BT = np.full((len(image_BPD), 1), model.config.bos_id, np.int32)
    return model, variables, states_BTD, mask_BT, prompt_BT, numbers


both = pytest.mark.parametrize("name", ["caption", "vqa"])


@both
def test_greedy_tokens_equal_transformers(name):
    model, variables, context, mask, prompt, numbers = golden(name)
    tokens, score = decode.greedy(model, variables, context, mask, prompt, length=12)
    np.testing.assert_array_equal(tokens, numbers["greedy_tokens"])
    assert len({tuple(row) for row in np.asarray(tokens)}) >= 4  # the pictures decide, not the weights
    assert np.all(score < 0)


@both
@pytest.mark.parametrize("case", ["beam", "beam2"])
def test_beam_tokens_and_scores_equal_transformers(name, case):
    """beam: length penalty 1; beam2: length penalty 0 and a minimum length."""
    model, variables, context, mask, prompt, numbers = golden(name)
    options = {} if case == "beam" else {"length_penalty": 0.0, "min_length": int(numbers["beam2_min_length"])}
    tokens, score = decode.beam_search(model, variables, context, mask, prompt, beams=3, length=12, **options)
    np.testing.assert_array_equal(tokens[:, 0], numbers[f"{case}_tokens"])
    np.testing.assert_allclose(score[:, 0], numbers[f"{case}_scores"], atol=5e-5)
    assert np.all(np.diff(score, axis=1) <= 0)


@both
def test_cached_steps_equal_the_uncached_forward(name):
    model, variables, context, mask, prompt, numbers = golden(name)
    tokens = numbers["greedy_tokens"].astype(np.int32)
    full_BTV = model.apply(variables, tokens, context, mask, method="decode")
    n = prompt.shape[1]
    logits_BV, cache = model.apply(variables, tokens[:, :n], context, mask, 12, method="decode_start")
    for t in range(n, 12):
        np.testing.assert_allclose(logits_BV, full_BTV[:, t - 1], atol=5e-5)
        logits_BV, cache = model.apply(variables, tokens[:, t], cache, mask, method="decode_step")
    np.testing.assert_allclose(logits_BV, full_BTV[:, -1], atol=5e-5)


@both
def test_rows_do_not_see_each_other(name):
    """A row decoded alone writes what it writes in a batch."""
    model, variables, context, mask, prompt, numbers = golden(name)
    one = slice(2, 3)
    tokens, _ = decode.beam_search(
        model, variables, context[one], None if mask is None else mask[one], prompt[one], beams=3, length=12
    )
    np.testing.assert_array_equal(tokens[0, 0], numbers["beam_tokens"][2])


def test_many_beams_find_the_best_of_all_sequences():
    """With V beams and two generated tokens beam search is exhaustive: compare with enumeration."""
    model, variables = tiny.model(), {"params": tiny.params()}
    n_vocab, sep = model.config.vocab_size, model.config.sep_id
    batch = tiny.batch(2)
    image_BPD = model.apply(variables, batch["image"], method="encode_image")
    context, mask = model.apply(variables, image_BPD, batch["question"], method="context")
    prompt = np.full((2, 1), model.config.bos_id, np.int32)
    tokens, score = decode.beam_search(
        model, variables, context, mask, prompt, beams=n_vocab, length=3, length_penalty=0.0
    )
    pairs = np.array([[model.config.bos_id, v] for v in range(n_vocab)], np.int32)
    for row in range(2):
        logits = model.apply(variables, pairs, context[row : row + 1], mask[row : row + 1], method="decode")
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        total = log_probs[0, 0][:, None] + log_probs[:, 1]  # (first, second)
        total[sep] = -np.inf
        best_of_two = total.max()
        np.testing.assert_allclose(score[row, 0], max(best_of_two, log_probs[0, 0, sep]), atol=1e-5)


def test_minimum_length_and_padding():
    model, variables, context, mask, prompt, _ = golden("vqa")
    tokens, _ = decode.greedy(model, variables, context, mask, prompt, length=10, min_length=6)
    tokens = np.asarray(tokens)
    assert not np.any(tokens[:, :6] == model.config.sep_id)
    for row in tokens:
        ends = np.flatnonzero(row == model.config.sep_id)
        if len(ends):
            assert np.all(row[ends[0] + 1 :] == model.config.pad_id)


def test_lengths_that_cannot_work_are_named():
    model, variables, context, mask, prompt, _ = golden("vqa")
    with pytest.raises(ValueError, match="prompt of 1 tokens leaves nothing to write within length 1"):
        decode.greedy(model, variables, context, mask, prompt, length=1)
    with pytest.raises(ValueError, match="length 100 is more than the model's"):
        decode.greedy(model, variables, context, mask, prompt, length=100)
