"""Greedy and beam search: against transformers' tokens, against the uncached forward, and their own properties."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft import methods, tree
from jaxpeft.adapt import sites
from jaxpeft.models import decode, loading
from jaxpeft.models.base import Context

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def golden(name):
    """(model, variables, context, ids that a text starts with, numbers)"""
    model, params, _ = loading.read(GOLDEN / f"blip_{name}_tiny")
    numbers = dict(np.load(GOLDEN / f"blip_{name}_tiny.npz"))
    variables = {"params": params}
    apply = jax.jit(model.apply, static_argnames="method")
    image_BPD = apply(variables, numbers["images"], method="encode_image")
    next_B = jnp.zeros(len(image_BPD), jnp.int32)
    if name == "caption":
        start = tuple(int(i) for i in numbers["prompt"])
        return model, variables, Context(image_BPD, None, next_B), start, numbers
    mask_BT = numbers["question_mask"].astype(bool)
    states_BTD = apply(variables, image_BPD, numbers["questions"], mask_BT, method="encode_question")
    return model, variables, Context(states_BTD, jnp.asarray(mask_BT), next_B), (model.config.bos_id,), numbers


def search(model, start, length=12, **options):
    """`length` counts the start."""
    c = model.config
    ids = {"start": start, "stop": (c.sep_id,), "pad": c.pad_id, "n_words": c.vocab_size}
    return decode.Search(**ids, length=length, **options)


def rows_of(context, rows):
    return jax.tree.map(lambda x: x[rows], context)


both = pytest.mark.parametrize("name", ["caption", "vqa"])


@both
def test_greedy_tokens_equal_transformers(name):
    model, variables, context, start, numbers = golden(name)
    tokens, score = decode.greedy(model, variables, context, search(model, start))
    np.testing.assert_array_equal(tokens, numbers["greedy_tokens"])
    assert len({tuple(row) for row in np.asarray(tokens)}) >= 4  # the pictures decide, not the weights
    assert np.all(score < 0)


@both
@pytest.mark.parametrize("case", ["beam", "beam2"])
def test_beam_tokens_and_scores_equal_transformers(name, case):
    """beam: length penalty 1; beam2: length penalty 0 and a minimum length."""
    model, variables, context, start, numbers = golden(name)
    options = {} if case == "beam" else {"length_penalty": 0.0, "min_length": int(numbers["beam2_min_length"])}
    tokens, score = decode.beam_search(model, variables, context, search(model, start, beams=3, **options))
    np.testing.assert_array_equal(tokens[:, 0], numbers[f"{case}_tokens"])
    np.testing.assert_allclose(score[:, 0], numbers[f"{case}_scores"], atol=5e-5)
    assert np.all(np.diff(score, axis=1) <= 0)


@both
def test_rows_do_not_see_each_other(name):
    """A row decoded alone writes what it writes in a batch."""
    model, variables, context, start, numbers = golden(name)
    one = rows_of(context, slice(2, 3))
    tokens, _ = decode.beam_search(model, variables, one, search(model, start, beams=3))
    np.testing.assert_array_equal(tokens[0, 0], numbers["beam_tokens"][2])


@pytest.mark.slow
def test_many_beams_find_the_best_of_all_sequences():
    """With V beams and two generated tokens beam search is exhaustive: compare with enumeration."""
    model, variables = tiny.model(), {"params": tiny.params()}
    n_vocab, sep = model.config.vocab_size, model.config.sep_id
    batch = tiny.batch(2)
    apply = jax.jit(model.apply, static_argnames="method")
    context = apply(variables, {name: batch[name] for name in ("image", "prompt")}, method="context")
    options = search(model, (model.config.bos_id,), length=3, beams=n_vocab, length_penalty=0.0)
    tokens, score = decode.beam_search(model, variables, context, options)
    pairs = np.array([[model.config.bos_id, v] for v in range(n_vocab)], np.int32)
    for row in range(2):
        logits = apply(variables, pairs, rows_of(context, slice(row, row + 1)), method="score")
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        total = log_probs[0, 0][:, None] + log_probs[:, 1]  # (first, second)
        total[sep] = -np.inf
        best_of_two = total.max()
        np.testing.assert_allclose(score[row, 0], max(best_of_two, log_probs[0, 0, sep]), atol=1e-5)


def test_minimum_length_and_padding():
    model, variables, context, start, _ = golden("vqa")
    tokens, _ = decode.greedy(model, variables, context, search(model, start, 10, min_length=6))
    tokens = np.asarray(tokens)
    assert not np.any(tokens[:, :6] == model.config.sep_id)
    for row in tokens:
        ends = np.flatnonzero(row == model.config.sep_id)
        if len(ends):
            assert np.all(row[ends[0] + 1 :] == model.config.pad_id)


def test_lengths_that_cannot_work_are_named():
    model, variables, context, start, _ = golden("vqa")
    with pytest.raises(ValueError, match="prompt of 1 tokens leaves no tokens to generate within length 1"):
        decode.greedy(model, variables, context, search(model, start, 1))
    with pytest.raises(ValueError, match="length 100 exceeds the model's"):
        decode.greedy(model, variables, context, search(model, start, 100))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.slow
def test_no_step_after_the_last_token(beams, monkeypatch):
    """n tokens take n - 1 steps: the first comes from the start."""
    model, variables, context, start, _ = golden("caption")
    steps, step = [], type(model).step

    def counted(self, token_R, cache, context):
        jax.debug.callback(lambda: steps.append(1))
        return step(self, token_R, cache, context)

    monkeypatch.setattr(type(model), "step", counted)
    settings = search(model, start, len(start) + 3, beams=beams, min_length=len(start) + 3)  # none ends early
    jax.clear_caches()
    write = decode.greedy if beams == 1 else decode.beam_search
    jax.block_until_ready(write(model, variables, context, settings))
    jax.effects_barrier()
    jax.clear_caches()
    assert len(steps) == 2


def test_matrices_are_cast_before_the_first_token():
    """In bfloat16 no step casts a matrix again; with float32 leaves of matrices each did."""
    model, variables, context, start, _ = golden("caption")
    half = model.replaced(dtype="bfloat16")
    program = decode.greedy.lower(half, variables, context, search(model, start)).as_text()
    loop = program[program.index("stablehlo.while") :]
    shapes = {
        x.shape for name, x in tree.flatten(variables).items() if name.endswith("text_decoder/blocks/mlp/up/kernel")
    }
    ((_, width, hidden),) = shapes
    assert f"x{width}x{hidden}xbf16>" in loop
    assert f"x{width}x{hidden}xf32>" not in loop


def test_what_dora_takes_norms_of_stays_float32():
    model, params = tiny.model(), tiny.params()
    variables = sites.attach(model, params, methods.build("dora", targets="mlp/up$"), jax.random.key(0))
    dtypes = {name: str(x.dtype) for name, x in tree.flatten(sites.narrowed(model, variables, "bfloat16")).items()}
    kernels = {name: dtype for name, dtype in dtypes.items() if name.endswith("kernel")}
    assert {dtype for name, dtype in kernels.items() if name.endswith("mlp/up/kernel")} == {"float32"}
    assert {dtype for name, dtype in kernels.items() if not name.endswith("mlp/up/kernel")} == {"bfloat16"}
    assert dtypes["params/text_decoder/embed/word"] == "float32"
