"""PaliGemma and SmolVLM behind the model protocol: packed, cached and batched, they equal a loop over single sequences;
methods, caching of image tokens, tasks and devices. Numbers of transformers: test_vlm_parity.py."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_vlm
from methods_table import perturbed
from safetensors.numpy import load_file
from test_vlm_parity import written
from tiny_vlm import KINDS, LENGTHS, SPLIT

import jaxpeft as jp
from jaxpeft import methods, tree
from jaxpeft.adapt import sites
from jaxpeft.data import pipeline
from jaxpeft.models import decode, decoder, loading
from jaxpeft.tasks import build
from jaxpeft.training import evaluate, frozen_cache, run, setup, sharding

every_kind = pytest.mark.parametrize("kind", KINDS)
METHODS = {
    "nothing": (),
    "lora": jp.LoRA(rank=2),
    "prompt": jp.Prompt(length=3, init_weights="normal", std=0.5),
    "prefix": jp.Prefix(length=2),
    "adapter": jp.SerialAdapter(bottleneck=3),
    "gates": jp.UniPELT(length=2, bottleneck=3, rank=2),
    "several": (
        jp.LoRA(targets="", rank=2),
        jp.Prompt(length=3, init_weights="normal", std=0.5, positions="shift"),
        jp.Prefix(length=2, positions="shift"),
        jp.Prefix(length=1),
        jp.ParallelAdapter(targets="", bottleneck=3),
        jp.SSF(targets=""),
    ),
}
SOME = [("paligemma", "several"), ("smolvlm", "several"), ("paligemma", "nothing")]


@functools.cache
def variables(kind, name):
    """The tree of a method with every adapter parameter moved from its start."""
    if not METHODS[name]:
        return {"params": tiny_vlm.params(kind)}
    return perturbed(jp.attach(tiny_vlm.model(kind), tiny_vlm.params(kind), METHODS[name], jax.random.key(1)), 0.3)


@functools.cache
def alone(kind, name):
    """(image, prompt with padding, text) -> logits of every token of the text, one sequence at a time."""
    model, pad = tiny_vlm.model(kind), tiny_vlm.tokenizer(kind).pad_id
    whole = jax.jit(lambda *x: model.apply(variables(kind, name), *x, method="whole"), static_argnums=3)

    def run(image, prompt, text):
        longest = np.full(8, pad, np.int32)  # what follows in a text does not matter: one program
        longest[: len(text)] = text
        prompt = prompt[prompt != pad]
        at = prompt.tolist().index(model.config.image_id) if kind == "smolvlm" else 0
        return np.asarray(whole(image, prompt, longest, at))[: len(text)]

    return run


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in KINDS for name in ("nothing", "gates", "several")),
        ("paligemma", "prompt"),
        ("smolvlm", "adapter"),
    ],
)
@pytest.mark.slow
def test_packed_texts_equal_single_sequences(kind, name):
    b = tiny_vlm.batch(kind)
    logits = jax.jit(tiny_vlm.model(kind).apply)(variables(kind, name), b)
    assert logits.shape == (len(LENGTHS), 2, 4, tiny_vlm.model(kind).config.vocab_size)
    for i, a in np.ndindex(b["tokens"].shape[:2]):
        expected = alone(kind, name)(b["image"][i], b["prompt"][i], [*b["tokens"][i, a, 1:], 7])
        np.testing.assert_allclose(logits[i, a], expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-6)


@every_kind
def test_packed_texts_equal_single_sequences_behind_a_learned_prefix(kind):
    test_packed_texts_equal_single_sequences(kind, "prefix")


def log_probs_of(kind, name, image, prompt):
    n_words = len(tiny_vlm.tokenizer(kind))

    def log_probs(text):
        logits = alone(kind, name)(image, prompt, [*text, 7])
        return np.asarray(jax.nn.log_softmax(logits[-1]))[:n_words]

    return log_probs


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


@pytest.mark.parametrize(
    ("kind", "name", "beams"), [*((*one, 3) for one in SOME), ("smolvlm", "gates", 3), ("paligemma", "several", 1)]
)
@pytest.mark.slow
def test_searches_equal_a_loop_without_cache(kind, name, beams):
    model, b = tiny_vlm.model(kind), tiny_vlm.batch(kind)
    template = model.processor.template("vqa")
    context = evaluate.contexts(model, variables(kind, name), b)
    search = decode.Search.of(template, 5, beams=beams)
    if beams == 1:
        tokens, score = decode.greedy(model, variables(kind, name), context, search)
        tokens, score = tokens[:, None], score[:, None]
    else:
        tokens, score = decode.beam_search(model, variables(kind, name), context, search)
    for i in range(len(LENGTHS)):
        log_probs = log_probs_of(kind, name, b["image"][i], b["prompt"][i])
        for k, (text, value) in enumerate(loop_search(log_probs, beams, 5, template.stop[0])[:beams]):
            assert np.asarray(tokens[i, k]).tolist()[: len(text)] == text
            np.testing.assert_allclose(score[i, k], value, atol=2e-5)


@pytest.mark.parametrize(("kind", "name"), SOME)
@pytest.mark.slow
def test_ranking_equals_the_likelihood_of_each_answer(kind, name):
    model, b, rng = tiny_vlm.model(kind), tiny_vlm.batch(kind), np.random.default_rng(5)
    template = model.processor.template("vqa")
    answers = [[*rng.integers(300, 398, n).tolist(), template.stop[0]] for n in (1, 2, 3, 2, 1)]
    padded = np.array([[template.pad, *text, *[template.pad] * (4 - len(text))] for text in answers], np.int32)
    context = evaluate.contexts(model, variables(kind, name), b)
    order, score = decode.rank(model, variables(kind, name), context, padded, pad=template.pad, k=5, chunk=2)
    for i in range(len(LENGTHS)):
        sums = []
        for text in answers:
            logits = alone(kind, name)(b["image"][i], b["prompt"][i], text)
            sums.append(float(np.asarray(jax.nn.log_softmax(logits))[np.arange(len(text)), text].sum()))
        assert np.asarray(order[i]).tolist() == np.argsort(sums)[::-1].tolist()
        np.testing.assert_allclose(score[i], sorted(sums)[::-1], atol=5e-5)


# ------------------------------------------------------------------------------------------- methods
TOWER = {"vpt": "vision"}  # methods of the image tower
NO_DEFAULT = {"selective", "scoped"}  # nothing to choose by default
FIELDS = {"oft": {"block": 2}, "compacter": {"n": 2, "bottleneck": 4}, "prompt": {"length": 3}, "prefix": {"length": 2},
          "pissa": {"rank": 2}, "vera": {"rank": 2}}  # fmt: skip


@every_kind
@pytest.mark.parametrize("name", [name for name in methods.METHODS if name not in NO_DEFAULT])
def test_defaults_act_in_the_decoder_only(kind, name):
    model = tiny_vlm.model(kind)
    method = methods.build(name, **FIELDS.get(name, {}))
    if name == "bitfit":
        with pytest.raises(
            ValueError, match=r"no base leaf below '\^decoder'; .* use layer_norms, or targets='vision'"
        ):
            jax.eval_shape(lambda p: jp.attach(model, p, method, jax.random.key(0)), tiny_vlm.params(kind))
        return
    tuned = jax.eval_shape(lambda p: jp.attach(model, p, method, jax.random.key(0)), tiny_vlm.params(kind))
    trained = {leaf for leaf, on in tree.flatten(jp.trainable(tuned)).items() if on}
    towers = {leaf.split("/")[1] for leaf in trained} - {sites.SHARED}
    expected = {"vision", "projector", "decoder"} if name == "full" else {TOWER.get(name, "decoder")}
    assert towers == expected
    said, rest = setup._towers(tuned, jp.trainable(tuned)).split("; not adapted: ")
    assert set(said.removeprefix("adapted: ").split(", ")) == expected
    assert set(rest.split(", ")) == ({"vision", "projector", "decoder"} - expected or {"nothing"})


@every_kind
def test_the_groups_name_what_they_say(kind):
    model = tiny_vlm.model(kind)
    linears = {site.path: site.shape for site in sites.sites(model) if site.kind == "linear"}
    found = {}
    for group in ("text.attention.qv", "text.attention.kv_mlp.down", "projector", "head"):
        (method,) = sites.resolved(model, jp.LoRA(targets=group))
        found[group] = {site.path for site in sites.sites(model) if method.selects(site)}
    at = "decoder/blocks/"
    assert found == {
        "text.attention.qv": {f"{at}attention/query", f"{at}attention/value"},
        "text.attention.kv_mlp.down": {f"{at}attention/key", f"{at}attention/value", f"{at}mlp/down"},
        "projector": {"projector"},
        "head": {"decoder/head"},
    }
    assert linears[f"{at}attention/query"] == (14, 24) and linears[f"{at}attention/out"] == (24, 14)
    assert linears[f"{at}attention/value"] == (14, 12)  # two key heads of size 6


@pytest.mark.slow
@every_kind
def test_lora_on_tower_and_projector(kind):
    """Its gradients are not zero, the rest is frozen, and merging is exact."""
    model, b = tiny_vlm.model(kind), tiny_vlm.batch(kind)
    groups = (jp.LoRA(targets=r"^vision.*(query|up|patch)$", rank=2), jp.LoRA(targets="projector", rank=2))
    tuned = perturbed(jp.attach(model, tiny_vlm.params(kind), groups, jax.random.key(0)), 0.3)
    mask = jp.trainable(tuned)

    def loss(trainable, frozen):
        return jnp.square(model.apply(tree.join(trainable, frozen), b)).mean()

    gradients = jax.jit(jax.grad(loss))(*tree.split(tuned, mask))
    flat = {name: float(jnp.abs(x).max()) for name, x in tree.flatten(gradients).items()}
    assert {name.split("/")[1] for name in flat} == {"vision", "projector"} and min(flat.values()) > 1e-6
    merged = {"params": jp.merge(model, tuned)}
    run = jax.jit(model.apply)
    np.testing.assert_allclose(run(merged, b), run(tuned, b), rtol=2e-4, atol=2e-4)
    assert np.abs(run(merged, b) - run({"params": tiny_vlm.params(kind)}, b)).max() > 0.01


@every_kind
def test_prompts_begin_as_words_on_the_scale_of_the_decoder(kind):
    model, words = tiny_vlm.model(kind), tiny_vlm.params(kind)["decoder"]["embed"]["word"]
    text = "a cat"
    method = jp.Prompt(length=3, init_weights="text", text=text)
    tuned = jp.attach(model, tiny_vlm.params(kind), method, jax.random.key(0))
    ids = np.resize(tiny_vlm.tokenizer(kind).pieces(text), 3)
    scale = 14**0.5 if kind == "paligemma" else 1
    rows = tree.flatten(tuned)["peft/decoder/@embed/0/prompt/rows"]
    np.testing.assert_allclose(rows, words[ids] * scale, rtol=1e-6)
    in_model = model.apply(tuned, ids[None], method=lambda m, x: m.decoder.words(x))
    np.testing.assert_allclose(rows, in_model[0], rtol=1e-6)


@pytest.mark.slow
@every_kind
def test_a_prompt_that_shifts_positions_computes_the_same(kind):
    """Rotary positions are relative: rows at -3, -2, -1 before 0 equal rows at 0, 1, 2 before 3. Keys of a prefix stay at 0."""
    model, b = tiny_vlm.model(kind), tiny_vlm.batch(kind)
    logits, found = {}, {"prompt": jp.Prompt} | ({"prefix": jp.Prefix} if kind == "smolvlm" else {})
    for positions in ("keep", "shift"):
        for name, method in found.items():
            fields = {"init_weights": "normal"} if name == "prompt" else {}
            method = method(length=3, std=0.5, positions=positions, **fields)
            tuned = jp.attach(model, tiny_vlm.params(kind), method, jax.random.key(0))
            logits[name, positions] = np.asarray(jax.jit(model.apply)(tuned, b))
    scale = np.abs(logits["prompt", "keep"]).max()
    np.testing.assert_allclose(logits["prompt", "keep"], logits["prompt", "shift"], atol=5e-6 * scale)
    if "prefix" in found:
        assert np.abs(logits["prefix", "keep"] - logits["prefix", "shift"]).max() > 1e-4 * scale


# ------------------------------------------------------------------------------------------- image tokens are computed once
@every_kind
def test_what_is_cached_follows_from_the_program(kind):
    model = tiny_vlm.model(kind)
    n_tokens = model.config.n_image_tokens
    for method, why in (
        (jp.LoRA(rank=2), ""),
        (jp.LoRA(targets="projector", rank=2), "peft/projector/@linear/0/lora/a is trained"),
        (
            jp.LoRA(targets=r"^vision/.*query$", rank=2),
            "peft/vision/blocks/attention/query/@linear/0/lora/a is trained",
        ),
    ):
        tuned = jp.attach(model, tiny_vlm.params(kind), method, jax.random.key(0))
        found = frozen_cache.programs(model, tuned)
        assert found["image_tokens"].row.shape == (n_tokens, 14)
        mask, n_rows = sites.trainable(tuned), {"image": 10, "example": 10}
        assert frozen_cache.cacheable(model, found, mask, "none", n_rows, 10**6) == {"image_tokens": why}
    assert {name.split("/")[1] for name in found["image_tokens"].leaves} == {"vision", "projector"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task"), [("paligemma", "captioning"), ("smolvlm", "vqa")]
)  # the others in runs, below
def test_tables_stand_in_for_images_and_give_the_same_numbers(kind, task):
    model, tuned, task = tiny_vlm.model(kind), variables(kind, "lora"), build(task, max_new_tokens=5, min_length=0)
    template = task.template(model)
    examples, cases = task.examples(SPLIT, template), task.eval_examples(SPLIT, template)
    found = frozen_cache.programs(model, tuned, examples)
    cache = frozen_cache.FrozenCache(model, tuned, model.stages, found, {}, 10**9)
    filled = cache.fill(SPLIT, examples)
    assert filled.images is None and filled.tables["image_tokens"].shape == (3, model.config.n_image_tokens, 14)
    with_images = evaluate.nlls(model, tuned, task, examples, batch_size=4)
    np.testing.assert_allclose(evaluate.nlls(model, tuned, task, filled, batch_size=4), with_images, rtol=1e-5)
    texts = [evaluate.predict(model, tuned, task, one, beams=3) for one in (cases, cache.fill(SPLIT, cases))]
    assert [one["text"] for one in texts[0]] == [one["text"] for one in texts[1]]


@every_kind
def test_image_tokens_in_bfloat16_are_kept_as_they_are_in_a_mapped_file(tmp_path, kind):
    """After the projector, in the dtype of the products; batches take their rows of the file."""
    model, tuned, task = tiny_vlm.model(kind).replaced(dtype="bfloat16"), variables(kind, "lora"), build("captioning")
    split = dataclasses.replace(SPLIT, source="three pictures")
    examples, found = task.examples(split, task.template(model)), frozen_cache.programs(model, tuned)
    for _ in ("computed", "read"):
        cache = frozen_cache.FrozenCache(model, tuned, model.stages, found, {}, 10**9, tmp_path)
        filled = cache.fill(split, examples)
        (table,) = filled.tables.values()
        assert isinstance(table, np.memmap) and table.shape == (3, model.config.n_image_tokens, 14)
        rows = pipeline.gather(filled, np.array([1, 0]))["image_tokens"]
        assert rows.dtype == jnp.bfloat16 and not isinstance(rows.base, np.memmap)
        index = examples.arrays["image_index"][np.array([1, 0])]
        images = np.stack([split.images[i] for i in index])
        stage = jax.jit(lambda tuned, images: model.apply(tuned, {"image": images}, "image_tokens", method="stage"))
        expected = stage(tuned, images)
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (rows, expected)), rtol=0.05, atol=0.05)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@every_kind
def test_frozen_matrices_and_words_in_bfloat16_change_nothing_where_products_are_in_bfloat16(kind):
    """Bit for bit: loss and gradients; a word table that is trained keeps its dtype."""
    model, b, found = tiny_vlm.model(kind).replaced(dtype="bfloat16"), tiny_vlm.batch(kind), []
    tuned = variables(kind, "lora")
    mask = jp.trainable(tuned)
    for dtype in ("float32", "bfloat16"):
        moving, frozen = tree.split(sites.narrowed(model, tuned, dtype, mask), mask)
        found.append(jax.jit(jax.value_and_grad(lambda x, y: model.apply(tree.join(x, y), b).std()))(moving, frozen))
    narrow = {name for name, x in tree.flatten(frozen).items() if x.dtype == jnp.bfloat16}
    assert "params/decoder/embed/word" in narrow
    assert {name.split("/")[-1] for name in narrow} == {"kernel", "word"}
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(x, y)
    words = jp.attach(model, tuned["params"], jp.Selective(leaves="embed/word"), jax.random.key(0))
    words = sites.narrowed(model, words, "bfloat16", jp.trainable(words))["params"]["decoder"]
    assert words["embed"]["word"].dtype == jnp.float32 != words["blocks"]["mlp"]["up"]["kernel"].dtype


@pytest.mark.parametrize(
    "method",
    [jp.DoRA(rank=2), jp.PiSSA(rank=2), jp.Prompt(length=3), methods.Head(matrix="untied")],
    ids=lambda x: x.name,
)
def test_methods_start_from_a_narrow_base_as_from_the_same_values_in_float32(method):
    narrow = jax.tree.map(lambda x: np.asarray(x).astype("bfloat16"), tiny_vlm.params("paligemma"))
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), narrow)
    found = [jp.attach(tiny_vlm.model("paligemma"), base, method, jax.random.key(0))["peft"] for base in (narrow, wide)]
    assert jax.tree.leaves(found[0])
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_base_in_bfloat16_is_never_wider_and_its_run_is_the_same(tmp_path):
    """Bit for bit: the trained parameters, the base's digest and what is loaded again."""
    base, tuned = directory("paligemma", tmp_path / "base"), {}
    for dtype in ("float32", "bfloat16"):
        config = tiny.config_of(base, "captioning", **{"model.dtype": "bfloat16", "model.frozen_dtype": dtype})
        ready = setup.prepare(config, lambda _: None)
        params, placed = (tree.flatten(one["params"]) for one in (ready.originals, ready.variables))
        assert all(np.shares_memory(np.asarray(placed[name]), x) for name, x in params.items())  # CPU: one copy
        wide = {name for name, x in params.items() if x.dtype == np.float32}
        assert wide == (
            {n for n in params if not n.endswith(("kernel", "word"))} if dtype == "bfloat16" else set(params)
        )
        result = run.run(config, tmp_path / dtype, lambda _: None)
        tuned[dtype] = load_file(tmp_path / dtype / "tuned" / "tuned.safetensors") | {"": result["digests"]["base"]}
        _, variables, *_ = jp.load_run(tmp_path / dtype)
        assert variables["params"]["decoder"]["embed"]["word"].dtype == dtype
    for name, x in tuned["float32"].items():
        np.testing.assert_array_equal(x, tuned["bfloat16"][name], err_msg=name)


# ------------------------------------------------------------------------------------------- tasks
@every_kind
def test_a_caption_has_a_prompt_and_every_token_of_it_is_scored(kind):
    model, task = tiny_vlm.model(kind), build("captioning", max_new_tokens=5, min_length=0)
    template = task.template(model)
    examples, cases = task.examples(SPLIT, template), task.eval_examples(SPLIT, template)
    frame = template.prompt("")[0]
    for one in (examples, cases):
        np.testing.assert_array_equal(one.arrays["prompt"], np.tile(frame, (len(one), 1)))
    tokens, targets, weights = (examples.arrays[name][0, 0] for name in ("tokens", "targets", "weights"))
    text = template.target("a cat is here")[0]
    assert targets[: len(text)].tolist() == text and tokens[1 : len(text)].tolist() == text[:-1]
    assert weights.tolist() == [1.0] * len(text) + [0.0] * (len(weights) - len(text))
    assert template.text(text) == "a cat is here"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), [("paligemma", "vqa"), ("smolvlm", "captioning"), ("smolvlm", "vqa")])
def test_likelihoods_of_a_task_equal_those_of_single_sequences(kind, task):
    model, task = tiny_vlm.model(kind), build(task, max_new_tokens=5, min_length=0)
    template = task.template(model)
    examples = task.examples(SPLIT, template)
    found = evaluate.nlls(model, variables(kind, "lora"), task, examples, batch_size=4)
    for row in range(len(examples)):
        one, total = {key: x[row] for key, x in examples.arrays.items()}, 0.0
        for text, weights in zip(one["targets"], one["weights"], strict=True):
            text = text[weights > 0]
            if len(text):
                logits = alone(kind, "lora")(SPLIT.images[one["image_index"]], one["prompt"], text)
                total -= np.asarray(jax.nn.log_softmax(logits))[np.arange(len(text)), text].sum()
        np.testing.assert_allclose(found[row, 0], total, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "prompts"), [("paligemma", None), ("smolvlm", "what is the dog?")])
def test_generate_writes_captions_and_answers(kind, prompts):
    model, params = tiny_vlm.model(kind), tiny_vlm.params(kind)
    images = [np.random.default_rng(i).integers(0, 256, (20, 16, 3), np.uint8) for i in range(2)]
    texts = jp.generate(model, {"params": params}, images, prompts, beams=2)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


# ------------------------------------------------------------------------------------------- programs and devices
@pytest.mark.slow
@every_kind
def test_how_layers_run_does_not_matter(kind):
    model, b = tiny_vlm.model(kind), tiny_vlm.batch(kind)
    expected = jax.jit(model.apply)(variables(kind, "several"), b)
    scale = np.abs(expected).max()
    jax.eval_shape(
        model.replaced(remat="full").apply, variables(kind, "several"), b
    )  # only gradients run it: test_model.py
    for other, near in ((model.unrolled(), 1e-5), (model.replaced(dtype="bfloat16"), 0.1)):
        found = jax.jit(other.apply)(variables(kind, "several"), b)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=near * scale)


def test_dropout_acts_in_training_only():
    model, b = tiny_vlm.model("paligemma"), tiny_vlm.batch("paligemma")
    wet = model.replaced(dropout=0.5)
    run = jax.jit(lambda v, rngs: wet.apply(v, b, rngs=rngs))
    plain, trained = (run(variables("paligemma", "nothing"), rngs) for rngs in ({}, {"dropout": jax.random.key(0)}))
    assert np.abs(plain - trained).max() > 0.01
    found = frozen_cache.programs(wet, variables("paligemma", "nothing"))
    assert not found["image_tokens"].random  # the tower has none


@pytest.mark.slow
@every_kind
def test_eight_devices_equal_one(kind):
    model, tuned, b = tiny_vlm.model(kind), variables(kind, "several"), tiny_vlm.batch(kind)
    b = {name: np.concatenate([x, x[:1]]) for name, x in b.items()}
    found = []
    for shape in ({"data": 1, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        on = sharding.mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
        placed = sharding.put(tuned, sharding.shardings(tuned, model.sharding, on))

        def loss(params, rest, b):
            return jnp.square(model.apply({"params": rest, "peft": params}, b)).mean()

        with sharding.using(placed):
            value = jax.jit(jax.value_and_grad(loss))(placed["peft"], placed["params"], sharding.shard_batch(b, on, 4))
        found.append((float(value[0]), tree.flatten(jax.tree.map(np.asarray, value[1]))))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    for name, x in found[0][1].items():
        if name.startswith("vision") and "/key/" in name and name.endswith("ssf/t"):
            # what is added to all keys changes no weight, so this gradient is rounding
            assert max(np.abs(x).max(), np.abs(found[1][1][name]).max()) < 1e-6
        else:
            np.testing.assert_allclose(x, found[1][1][name], atol=2e-5 * max(1e-3, np.abs(x).max()), err_msg=name)


@every_kind
def test_a_rule_places_every_leaf_and_no_key_head_is_split(kind):
    on = sharding.mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    found = sharding.shardings({"params": tiny_vlm.params(kind)}, tiny_vlm.model(kind).sharding, on)
    specs = {name.removeprefix("params/"): tuple(x.spec) for name, x in tree.flatten(found).items()}
    assert specs["decoder/blocks/attention/query/kernel"] == (None, "fsdp", "tensor")
    assert specs["decoder/blocks/attention/key/kernel"] == (None, "fsdp", None)
    assert specs["vision/blocks/attention/key/kernel"] == (None, "fsdp", "tensor")
    assert specs["decoder/blocks/mlp/down/kernel"] == (None, "tensor", "fsdp")


# ------------------------------------------------------------------------------------------- files with their tokenizers
IMAGE_KEY = {"paligemma": "image_token_index", "smolvlm": "image_token_id"}


def directory(kind, path):
    """A golden checkpoint with the toy tokenizer and image processor: its vocabulary is that of the toy."""
    words = tiny_vlm.tokenizer(kind)

    def taller(tensors):
        rng = np.random.default_rng(0)
        for name, x in tensors.items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                more = rng.normal(0, 0.3, (len(words) - len(x), x.shape[1]))
                tensors[name] = np.concatenate([x, more.astype(x.dtype)])
        return tensors

    settings = {"text_config__vocab_size": len(words), "vision_config__image_size": 12}
    settings[IMAGE_KEY[kind]] = words.id_of("<image>")
    written(kind, path, taller, **settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_vlm.FOLDER / kind / name, path)
    return path


@every_kind
def test_a_directory_has_model_tokenizer_and_templates(tmp_path, kind):
    path = directory(kind, tmp_path / "base")
    model, params = loading.load(path)
    assert model.tokenizer == tiny_vlm.tokenizer(kind) and model.config.pad_id == model.tokenizer.pad_id
    assert loading.abstract(path) == model
    one = model.processor
    assert (one.image_size, one.resample, one.longest_edge) == {"paligemma": (12, 3, 0), "smolvlm": (12, 1, 2048)}[kind]
    loading.save(tmp_path / "ours", model, params, aliases={}, dtype="float32")
    loading.save(tmp_path / "ours", model, params, aliases={}, dtype="float32")  # over itself
    again, values = loading.load(tmp_path / "ours")
    assert again == model and again.tokenizer == model.tokenizer
    for name, x in tree.flatten(values).items():
        np.testing.assert_array_equal(x, tree.flatten(params)[name], err_msg=name)
    for task in ("vqa", "captioning"):
        assert loading.load(path, task=task)[0].processor.template(task).start == ()
    with pytest.raises(ValueError, match="task is 'retrieval'; .* supports 'captioning' and 'vqa'"):
        loading.load(path, task="retrieval")


@every_kind
def test_an_image_token_that_contradicts_the_tokenizer(tmp_path, kind):
    path, right = directory(kind, tmp_path / "base"), tiny_vlm.tokenizer(kind).id_of("<image>")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace(f'"{IMAGE_KEY[kind]}": {right}', f'"{IMAGE_KEY[kind]}": 5'))
    with pytest.raises(ValueError, match=f"{IMAGE_KEY[kind]} is 5 in the configuration, but <image> is {right}"):
        loading.load(path)


def test_files_that_contradict_each_other(tmp_path):
    path = directory("smolvlm", tmp_path / "base")
    shutil.copy(tiny_vlm.FOLDER / "smolvlm" / "preprocessor_config.json", path)  # of another image size
    with pytest.raises(ValueError, match="the image processor has image size"):
        loading.load(path)


@every_kind
def test_a_model_without_its_tokenizer_says_what_is_missing(kind):
    model = type(tiny_vlm.model(kind)).build(tiny_vlm.model(kind).config)
    with pytest.raises(ValueError, match="no tokenizer; put vocab.txt or tokenizer.json beside its weights"):
        model.processor.template("vqa")


def test_positions_are_rotated_by_halves():
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) with the angle position * theta^(-2i/H)."""
    x = np.random.default_rng(0).normal(size=(1, 1, 3, 4)).astype(np.float32)
    position = np.array([[0, 1, 5]])
    found = np.asarray(decoder.rotated(jnp.asarray(x), jnp.asarray(position), 100.0))
    np.testing.assert_allclose(found[0, 0, 0], x[0, 0, 0])
    for t, p in enumerate([0, 1, 5]):
        for i, angle in enumerate([p * 1.0, p * 0.1]):
            turned = (x[0, 0, t, i] + 1j * x[0, 0, t, i + 2]) * np.exp(1j * angle)
            np.testing.assert_allclose(found[0, 0, t, [i, i + 2]], [turned.real, turned.imag], rtol=1e-5, atol=1e-6)


def test_a_config_is_checked():
    config = tiny_vlm.model("smolvlm").config
    for change, message in (
        ({"kv_heads": 3}, "text_heads 4 is not divisible by kv_heads 3"),
        ({"head_size": 5}, "head_size is 5; rotary positions need an even number"),
        ({"shuffle": 3}, "4 patches in a row are not divisible by shuffle 3"),
        ({"vision_heads": 5}, "vision_width 12 is not divisible by vision_heads 5"),
        ({"vision_eps": 10**31}, "vision_eps is 10+; it must be at least 0 and below 1e30"),
        ({"vision_eps": float("nan")}, "vision_eps is nan; it must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **change)
    eps = dataclasses.replace(config, vision_eps=2**31).vision_eps  # as in a damaged file; JAX takes no such integer
    assert type(eps) is float and eps == 2**31


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task", "method"), [("smolvlm", "captioning", "lora"), ("paligemma", "vqa", "prefix")]
)
def test_a_run_trains_scores_and_is_loaded_again(tmp_path, kind, task, method):
    config = tiny.config_of(directory(kind, tmp_path / "base"), task, method)
    result = run.run(config, tmp_path / "run")
    tuned = result["metrics"]["test"]["tuned"]
    assert np.isfinite(tuned["nll"]) and tuned["nll"] < result["metrics"]["test"]["base"]["nll"]
    model, variables, *_ = jp.load_run(tmp_path / "run")
    image = np.random.default_rng(0).integers(0, 256, (20, 16, 3), np.uint8)
    (text,) = jp.generate(model, variables, image, "what is it?" if task == "vqa" else None)
    assert isinstance(text, str)
