"""The model protocol, on a model that is not BLIP: packed, cached and batched, it equals a loop over single sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import prefix_lm
import pytest
import tiny

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.adapt import sites
from jaxpeft.data.base import Examples, Split
from jaxpeft.methods import Gated
from jaxpeft.models import decode
from jaxpeft.tasks import build
from jaxpeft.training import evaluate, frozen_cache, loop, optim, sharding

MODEL, WORDS = prefix_lm.model(), tiny.TOKENIZER
METHODS = {
    "nothing": (),
    "lora": jp.LoRA(rank=2),
    "prompt": jp.Prompt(targets="^decoder$", length=3, init_weights="normal", std=0.5),
    "prefix": jp.Prefix(length=2),
    "gates": jp.UniPELT(targets="^decoder", length=2, bottleneck=3, rank=2),
}
# what a method adds in front of the context, in front of keys, or decides by the queries; the rest acts alike on every token
some_methods = pytest.mark.parametrize("name", ["nothing", "prompt", "gates"])
LENGTHS = (1, 4, 2, 5)  # of the questions in one batch


@functools.cache
def variables(name):
    """The tree of a method with every own leaf moved from its start."""
    if not METHODS[name]:
        return {"params": prefix_lm.params()}
    found, keys = jp.attach(MODEL, prefix_lm.params(), METHODS[name], jax.random.key(1)), iter(range(1000))
    move = lambda x: x + 0.3 * jax.random.normal(jax.random.key(next(keys)), x.shape)  # noqa: E731
    return found | {"peft": jax.tree.map(move, found["peft"])}


def batch(n_texts=3, seed=0):
    """Images, questions of different lengths with padding on either side, and texts with a placeholder in front."""
    rng = np.random.default_rng(seed)
    words = lambda *shape: rng.integers(7, len(WORDS), shape).astype(np.int32)  # noqa: E731
    prompt = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for i, (row, n) in enumerate(zip(prompt, LENGTHS, strict=True)):
        row[slice(-n, None) if i % 2 else slice(n)] = words(n)
    tokens = np.concatenate([np.zeros((len(LENGTHS), n_texts, 1), np.int32), words(len(LENGTHS), n_texts, 4)], axis=2)
    return {
        "image": rng.integers(0, 256, (len(LENGTHS), 16, 16, 3)).astype(np.uint8),
        "prompt": prompt,
        "tokens": tokens,
    }


@functools.cache
def alone(name):
    """(image, prompt with padding, text) -> logits of every token of the text, one sequence at a time."""
    whole = jax.jit(lambda *x: MODEL.apply(variables(name), *x, method="whole"))
    return lambda image, prompt, text: np.asarray(whole(image, prompt[prompt != 0], np.asarray(text, np.int32)))


@pytest.mark.slow
@some_methods
def test_packed_texts_equal_single_sequences(name):
    b = batch()
    logits = jax.jit(MODEL.apply)(variables(name), b)
    for i, a in np.ndindex(b["tokens"].shape[:2]):
        expected = alone(name)(b["image"][i], b["prompt"][i], [*b["tokens"][i, a, 1:], 7])
        np.testing.assert_allclose(logits[i, a], expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-6)


def _search(**options):
    template = MODEL.processor.template("vqa")
    return decode.Search.of(template, 5, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "beams"), [("lora", 3), ("prompt", 1), ("prompt", 3), ("prefix", 3), ("gates", 3)])
def test_searches_equal_a_loop_without_cache(name, beams):
    b = batch()
    context = evaluate.contexts(MODEL, variables(name), b)
    search = _search(beams=beams)
    if beams == 1:
        tokens, score = decode.greedy(MODEL, variables(name), context, search)
        tokens, score = tokens[:, None], score[:, None]
    else:
        tokens, score = decode.beam_search(MODEL, variables(name), context, search)
    for i in range(len(LENGTHS)):

        def log_probs(text, i=i):
            logits = alone(name)(b["image"][i], b["prompt"][i], [*text, 7])
            return np.asarray(jax.nn.log_softmax(logits[-1][: len(WORDS)]))

        found = loop_search(log_probs, beams, 5, WORDS.sep_id)
        for k, (text, value) in enumerate(found[:beams]):
            assert [t for t in np.asarray(tokens[i, k]).tolist() if t != WORDS.pad_id] == text
            np.testing.assert_allclose(score[i, k], value, atol=1e-5)


def loop_search(log_probs, beams, length, end):
    """transformers' beam search (early_stopping=False) over lists; of one beam it is greedy search, whose score is a sum."""
    running, finished = [([], 0.0)], []
    for t in range(length):
        tried = [([*text, w], s + p) for text, s in running for w, p in enumerate(log_probs(text))]
        tried = sorted(tried, key=lambda one: -one[1])[: 2 * beams]
        ends = [text[-1] == end or t + 1 == length for text, _ in tried]
        for (text, s), over in list(zip(tried, ends, strict=True))[:beams]:
            if over:
                finished.append((text, s if beams == 1 else s / (t + 1)))
        finished = sorted(finished, key=lambda one: -one[1])[:beams]
        running = [one for one, over in zip(tried, ends, strict=True) if not over][:beams]
        if not running or (beams == 1 and finished):
            break
        if len(finished) == beams and running[0][1] / (t + 1) <= finished[-1][1]:
            break
    return finished


@pytest.mark.slow
@some_methods
def test_ranking_equals_the_likelihood_of_each_answer(name):
    b, rng = batch(), np.random.default_rng(5)
    answers = [[*rng.integers(7, len(WORDS), n).tolist(), WORDS.sep_id] for n in (1, 2, 3, 2, 1)]
    padded = np.array([[0, *text, *[0] * (4 - len(text))] for text in answers], np.int32)
    context = evaluate.contexts(MODEL, variables(name), b)
    order, score = decode.rank(MODEL, variables(name), context, padded, pad=WORDS.pad_id, k=5, chunk=2)
    for i in range(len(LENGTHS)):
        sums = []
        for text in answers:
            logits = alone(name)(b["image"][i], b["prompt"][i], text)
            sums.append(float(np.asarray(jax.nn.log_softmax(logits))[np.arange(len(text)), text].sum()))
        assert np.asarray(order[i]).tolist() == np.argsort(sums)[::-1].tolist()
        np.testing.assert_allclose(score[i], sorted(sums)[::-1], atol=2e-5)


SPLIT = Split(
    "val",
    [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in range(3)],
    [
        {"image_id": str(i), "captions": [f"w{i} w3", "w5"], "questions": [
            {"question_id": f"{i}{k}", "question": " ".join(f"w{j}" for j in range(k + 1)), "type": "",
             "answers": ["w1", f"w{i} w2", "w7 w8 w9"]} for k in range(2 + i)
        ]} for i in range(3)
    ],
)  # fmt: skip


def _examples(name, task):
    template = task.template(MODEL)
    return task.examples(SPLIT, template), task.eval_examples(SPLIT, template)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_tasks_score_and_write_with_the_first_token_from_the_prompt(task):
    task = build(task, max_new_tokens=5, min_length=0)
    examples, cases = _examples("lora", task)
    assert examples.arrays["weights"][..., 0].max() > 0 and not examples.arrays["tokens"][..., 0].any()
    if "prompt" not in examples.arrays:  # a caption has no question: the prompt is the frame alone
        frame = np.array([task.template(MODEL).prompt("")[0]], np.int32)
        for one in (examples, cases):
            one.arrays["prompt"] = np.repeat(frame, len(one), axis=0)
    found = evaluate.nlls(MODEL, variables("lora"), task, examples, batch_size=4)
    for row in range(len(examples)):
        one = {key: x[row] for key, x in examples.arrays.items()}
        total = 0.0
        for text, weights in zip(one["targets"], one["weights"], strict=True):
            text = text[weights > 0]
            if len(text):
                logits = alone("lora")(SPLIT.images[one["image_index"]], one["prompt"], text)
                total -= np.asarray(jax.nn.log_softmax(logits))[np.arange(len(text)), text].sum()
        np.testing.assert_allclose(found[row, 0], total, rtol=1e-5)
    written = evaluate.predict(MODEL, variables("lora"), task, cases, batch_size=4, beams=3)
    assert len(written) == len(cases) and all(one["score"] < 0 for one in written)


def test_what_is_cached_follows_from_the_program():
    cases = {
        "nothing": (jp.LoRA(rank=2), {}, "none", ""),
        "vision": (jp.LoRA(targets="^vision$", rank=2), {}, "none", "peft/vision/@linear/0/lora/a is trained"),
        "base leaf": (jp.BitFit(targets="^vision"), {}, "none", "params/vision/bias is trained"),
        "augmented": (jp.LoRA(rank=2), {}, "crop", "images are augmented (crop)"),
        "dropout elsewhere": (jp.LoRA(rank=2), {"dropout": 0.1}, "none", ""),
    }
    for name, (method, config, augment, why) in cases.items():
        model = prefix_lm.model(**config)
        tuned = jp.attach(model, prefix_lm.params(), method, jax.random.key(0))
        found = frozen_cache.programs(model, tuned)
        assert found["image_tokens"].row.shape == (4, 16)
        reasons = frozen_cache.cacheable(
            model, found, sites.trainable(tuned), augment, {"image": 10, "example": 10}, 10**6
        )
        assert reasons == {"image_tokens": why}, name
    assert {one.partition("/")[0] for one in found["image_tokens"].leaves} == {"params"}
    assert found["image_tokens"].leaves == {"params/vision/kernel", "params/vision/bias"}


def test_a_stage_that_reads_a_trained_leaf_or_drops_out_is_not_cached():
    """BLIP's question states: the image tower decides them too, and the text encoder has dropout."""
    n_rows = {"image": 1, "example": 1}
    for model, method, why in (
        (tiny.model(), jp.LoRA(targets="^text_decoder", rank=2), {"image_tokens": "", "question_states": ""}),
        (tiny.model(dropout=0.1), jp.LoRA(targets="^text_decoder", rank=2),
         {"image_tokens": "", "question_states": "it has dropout"}),
        (tiny.model(), jp.LoRA(targets="^vision.*query$", rank=2),
         dict.fromkeys(("image_tokens", "question_states"), "peft/vision/blocks/attention/query/@linear/0/lora/a is trained")),
        (tiny.model(), jp.LoRA(targets="^text_encoder.*query$", rank=2), {"image_tokens": ""}),
    ):  # fmt: skip
        tuned = jp.attach(model, tiny.params(), method, jax.random.key(0))
        found = frozen_cache.programs(model, tuned)
        reasons = frozen_cache.cacheable(model, found, sites.trainable(tuned), "none", n_rows, 10**9)
        assert {name: reasons[name] for name in why} == why
    assert reasons["question_states"].endswith("is trained")


@pytest.mark.slow
def test_tables_stand_in_for_images_and_give_the_same_numbers():
    task = build("vqa", max_new_tokens=5)
    examples, cases = _examples("lora", task)
    n_rows = {"image": 3, "example": len(examples)}
    tuned = variables("lora")
    found = frozen_cache.programs(MODEL, tuned)
    cache = frozen_cache.FrozenCache(MODEL, tuned, MODEL.stages, found, {}, 10**9)
    filled = cache.fill(SPLIT, examples)
    assert filled.images is None and filled.tables["image_tokens"].shape == (3, 4, 16) and n_rows["image"] == 3
    with_images = evaluate.nlls(MODEL, tuned, task, examples, batch_size=4)
    np.testing.assert_allclose(evaluate.nlls(MODEL, tuned, task, filled, batch_size=4), with_images, rtol=1e-6)
    texts = [evaluate.predict(MODEL, tuned, task, one, beams=3) for one in (cases, cache.fill(SPLIT, cases))]
    assert [one["text"] for one in texts[0]] == [one["text"] for one in texts[1]]


@pytest.mark.slow
def test_eight_devices_equal_one():
    task, method = build("vqa", max_new_tokens=5), jp.LoRA(rank=2)
    tuned = jp.attach(MODEL, prefix_lm.params(), method, jax.random.key(0))
    mask, b = sites.trainable(tuned), batch(seed=3)
    b = {name: np.concatenate([x, x[::-1]]) for name, x in b.items()}
    b |= {"targets": np.roll(b["tokens"], -1, axis=2), "weights": np.ones(b["tokens"].shape, np.float32)}
    from jaxpeft import config as defaults

    tx = optim.optimizer(defaults.get_config().optim, tree.split(tuned, mask)[0], 10)
    step = functools.partial(loop.train_step, loss=functools.partial(task.loss, MODEL), tx=tx, grad_accum=1)
    results = []
    for shape in ({"data": 1, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        on = sharding.mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
        placed = sharding.put(tuned, sharding.shardings(tuned, MODEL.sharding, on))
        trainable, frozen = tree.split(placed, mask)
        state = loop.TrainState(jnp.int32(0), trainable, tx.init(trainable))
        with sharding.using(placed):
            state, metrics = jax.jit(step)(state, frozen, sharding.shard_batch(b, on, 8))
        results.append((float(metrics["loss"]), tree.flatten(jax.tree.map(np.asarray, state.tuned))))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    for name, leaf in results[0][1].items():
        np.testing.assert_allclose(leaf, results[1][1][name], atol=1e-6, err_msg=name)


def test_a_base_loaded_twice_is_compiled_once():
    """The processor is no part of the jit key."""
    (one, params), (two, _) = jp.load("tiny", task="captioning"), jp.load("tiny", task="captioning")
    assert one == two and hash(one) == hash(two) and one.processor is not two.processor
    examples = Examples({"image_index": np.zeros(1, np.int32)}, [np.zeros((64, 64, 3), np.uint8)], [])
    variables, before = {"params": params}, evaluate.contexts._cache_size()
    for model in (one, two):
        evaluate.contexts(model, variables, {"image": np.stack(examples.images)})
    assert evaluate.contexts._cache_size() == before + 1


@pytest.mark.slow
def test_gates_are_of_the_method_that_they_go_around():
    assert any(isinstance(one, Gated) for one in sites.methods_of(variables("gates")))
