"""The step, the loop and what it leaves behind, on the smallest model and a handful of scenes."""

import dataclasses
import functools
import itertools
import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toy
from tiny import config_of, quiet

from jaxpeft import config, tasks, tree
from jaxpeft.adapt import sites
from jaxpeft.data import pipeline, scenes
from jaxpeft.methods import Head, LoRA
from jaxpeft.models import loading, stack
from jaxpeft.runtime import files, renamed, signals
from jaxpeft.training import evaluate, finished, frozen_cache, loop, optim, results, run, setup, sharding
from jaxpeft.training.checkpoint import Checkpoints

TASK = tasks.build("vqa")


def weighted(variables, batch, rngs):
    """Weighted least squares: rows of a batch count unequally, as texts of unequal length do. BLIP's step: test_sharding.py."""
    params = variables["params"]
    wrong_BY = batch["x"] @ params["kernel"] + params["fixed"][None] - batch["y"]
    return jnp.sum(batch["weight"][:, None] * wrong_BY**2), jnp.sum(batch["weight"])


def _state(tx):
    rng = np.random.default_rng(0)
    kernel, fixed = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 3), (3,)))
    tuned, frozen = {"params": {"kernel": kernel, "fixed": None}}, {"params": {"kernel": None, "fixed": fixed}}
    return loop.TrainState(jnp.int32(0), tuned, tx.init(tuned)), frozen


def _batch(n):
    rng = np.random.default_rng(1)
    weight = np.arange(1, n + 1, dtype=np.float32)
    return {"weight": weight} | {name: rng.normal(size=(n, k)).astype(np.float32) for name, k in (("x", 5), ("y", 3))}


def _step(tx, grad_accum=1):
    return jax.jit(functools.partial(loop.train_step, loss=weighted, tx=tx, grad_accum=grad_accum))


def test_a_step_follows_the_gradient_of_the_mean_over_the_counts():
    """Against the gradient written out by hand."""
    state, frozen = _state(optax.sgd(0.1))
    batch, kernel = _batch(4), np.float64(state.tuned["params"]["kernel"])
    after, metrics = _step(optax.sgd(0.1))(state, frozen, batch)
    wrong = batch["x"] @ kernel + np.float64(frozen["params"]["fixed"]) - batch["y"]
    share = batch["weight"][:, None] / batch["weight"].sum()
    gradient = 2 * batch["x"].T @ (share * wrong)
    np.testing.assert_allclose(metrics["loss"], (share * wrong**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((gradient**2).sum()), rtol=1e-5)
    np.testing.assert_allclose(after.tuned["params"]["kernel"], kernel - 0.1 * gradient, rtol=1e-5)


@pytest.mark.parametrize("grad_accum", [2, 4])
def test_microbatches_add_up_to_the_batch(grad_accum):
    state, frozen = _state(optax.sgd(0.1))
    whole, m1 = _step(optax.sgd(0.1))(state, frozen, _batch(8))
    parts, m2 = _step(optax.sgd(0.1), grad_accum)(state, frozen, _batch(8))
    np.testing.assert_allclose(m1["loss"], m2["loss"], rtol=1e-5)
    np.testing.assert_allclose(*(one.tuned["params"]["kernel"] for one in (whole, parts)), atol=1e-6)


def test_eight_devices_equal_one():
    state, frozen = _state(optax.sgd(0.1))
    one, m1 = _step(optax.sgd(0.1))(state, frozen, _batch(8))
    mesh = sharding.mesh()
    assert mesh.size == 8
    many = jax.device_put((state, frozen), sharding.replicated(mesh))
    eight, m8 = _step(optax.sgd(0.1))(*many, sharding.shard_batch(_batch(8), mesh))
    np.testing.assert_allclose(m1["loss"], m8["loss"], rtol=1e-5)
    np.testing.assert_allclose(*(one.tuned["params"]["kernel"] for one in (one, eight)), atol=1e-6)


def test_a_batch_that_devices_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size 6 / grad_accum 1 is not divisible by the 8 parts"):
        sharding.check_batch(6, 1, sharding.mesh())
    with pytest.raises(ValueError, match="batch_size 16 is not divisible by grad_accum 3"):
        sharding.check_batch(16, 3, sharding.mesh())
    with pytest.raises(ValueError, match=r"mesh \(data 3, fsdp 2, tensor 1\) does not fit 8 devices"):
        sharding.mesh({"data": 3, "fsdp": 2, "tensor": 1})


@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_clipping_sees_trainable_leaves_only(limit):
    """The update has the norm of the trainable gradient, which alone decides on clipping; the frozen one is far larger."""
    tx = optax.chain(optax.clip_by_global_norm(limit), optax.sgd(1.0))
    state, frozen = _state(tx)
    batch = _batch(4)
    batch |= {"x": 1e-3 * batch["x"], "y": 1e3 * batch["y"]}
    after, metrics = _step(tx)(state, frozen, batch)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, after.tuned, state.tuned))
    assert 0.5 < metrics["grad_norm"] < 10.0  # the frozen one would be clipped at both
    np.testing.assert_allclose(moved, min(limit, metrics["grad_norm"]), rtol=1e-4)


def test_a_cosine_after_a_warm_up():
    c = config.get_config().optim
    c.lr, c.warmup = 2.0, 0.1

    def rate(step):
        return optim.schedule(c, 100)._replace(step=jnp.int32(step)).rate(c.schedule)

    assert rate(0) == 0 and rate(10) == 2.0 and abs(rate(100)) < 1e-6 and abs(rate(55) - 1.0) < 1e-6


@pytest.mark.parametrize("key, value, message", [("schedule", "step", "choose one of"), ("warmup", 2.0, "fraction")])
def test_bad_optimizer_settings_are_named(key, value, message):
    c = config.get_config().optim
    c[key] = value
    with pytest.raises(ValueError, match=f"optim.{key}.*{message}"):
        optim.schedule(c, 10)


def test_nan_is_an_error_that_names_the_step_and_the_leaves():
    names = list(tree.flatten({"params": tiny.params()}))
    fine = {"loss": np.float32(1.0), "squares": np.ones(len(names), np.float32)}
    loop.check_finite(7, fine, names)
    vision = np.array([name.startswith("params/vision") for name in names])
    with pytest.raises(loop.NonFinite, match=rf"step 7: loss 1.0, .* in: params/vision \({vision.sum()} leaves\)"):
        loop.check_finite(7, fine | {"squares": np.where(vision, np.inf, 1.0)}, names)
    one = np.array([name == "params/vision/norm/bias" for name in names])
    with pytest.raises(loop.NonFinite, match="gradients not finite in: params/vision/norm/bias. Try a lower optim.lr"):
        loop.check_finite(7, fine | {"squares": np.where(one, np.nan, 1.0)}, names)
    with pytest.raises(loop.NonFinite, match="step 7: loss nan, gradients not finite in: no leaf"):
        loop.check_finite(7, fine | {"loss": np.float32(np.nan)}, names)


def test_after_a_nan_nothing_changes_any_more():
    """However many steps are dispatched behind it."""
    step = _step(tx := optax.adam(0.1))
    state, frozen = _state(tx)
    bad = _batch(4)
    bad["x"][2, 1] = np.nan
    good, _ = step(state, frozen, _batch(4))
    after, _ = step(good, frozen, bad)
    later, _ = step(after, frozen, _batch(4))
    assert good.ok and not later.ok
    assert tree.digest(later._replace(ok=True)) == tree.digest(good._replace(ok=True))


@pytest.mark.slow
def test_a_run_with_its_layers_apart_is_the_same(base, tmp_path, monkeypatch):
    apart, calls = stack.apart, []

    def counted(config, variables):
        found = apart(config, variables)
        calls.append(sum("/arrays/" in name for name in tree.flatten(found)))
        return found

    monkeypatch.setattr(stack, "apart", counted)
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    tests = {}
    for unroll in (0, 4):
        c = config_of(base, "captioning", **{"eval.gallery": False})
        c.model.unroll = unroll or None
        tests[unroll] = run.run(c, tmp_path / str(unroll), quiet)["metrics"]["test"]
        assert len(calls) > 3 and (min(calls) > 10 if unroll else max(calls) == 0)
        calls.clear()
    for label in ("base", "tuned"):
        np.testing.assert_allclose(tests[4][label]["nll"], tests[0][label]["nll"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_a_run_leaves_its_files(base, tmp_path, task):
    changes = {"eval.gallery": True, "eval.forgetting": task == "vqa"}
    c = config_of(base, task, head="transform", **changes)
    result = run.run(c, tmp_path, quiet)
    on_disk = json.loads((tmp_path / "result.json").read_text())
    assert on_disk == json.loads(json.dumps(result)) and on_disk["status"] == "done"
    assert on_disk["validation"] is None and on_disk["timing"]["steps"] == 6 and "kept_step" not in on_disk["timing"]
    n = {"vqa": 30, "captioning": 5}[task]
    assert on_disk["metrics"]["test"]["n"] == n
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == n and all({"base", "tuned", "image_id"} <= set(row) for row in rows)
    n_tokens = sum(row["tokens"] for row in rows)
    for label in ("base", "tuned"):  # of captions: the five references of an image together
        nll = sum(row[f"{label}_nats"] for row in rows) / n_tokens
        np.testing.assert_allclose(nll, on_disk["metrics"]["test"][label]["nll"], atol=1e-4)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "gallery.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "checkpoints" / "6").exists()
    if task == "vqa":  # of captions, which the base was not tuned for either
        forgot = on_disk["forgetting"]
        assert forgot["n"] == 5 and forgot["base"] > 0 and forgot["tuned"] != forgot["base"]
    listed = json.loads((tmp_path / "sites.json").read_text())
    assert sum(row["trained"] for row in listed) == on_disk["counts"]["tuned"]
    table = results.table(on_disk)
    assert "frozen base" in table and f"tuned {on_disk['counts']['tuned']:,} of" in table
    assert run.run(c, tmp_path, quiet) == on_disk  # finished: nothing is done again


@pytest.mark.slow
def test_a_run_that_stops_at_a_plateau_says_so(base, tmp_path):
    """End to end: what validation measures decides, and is in the result."""
    c = config_of(
        base,
        **{"optim.schedule": "plateau", "optim.cooldown": 0.5, "steps": 20, "data.n_val": 5, "eval.gallery": False},
    )
    c.stop.every, c.stop.patience, c.stop.min_gain = 1, 2, 0.5  # a gain that no step makes
    result = run.run(c, tmp_path, quiet)
    timing, said = result["timing"], result["validation"]
    assert (timing["steps"], timing["stopped"]) == (3, "plateau")  # 2 without progress, and half of it
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    curve = [row["validation_loss"] for row in logged if "validation_loss" in row]
    assert len(curve) == 4 and (said["first"], said["last"]) == (curve[0], curve[-1])
    assert said["kept"] == min(curve) == curve[timing["kept_step"]]
    assert said["curve"] == [[step, round(loss, 6)] for step, loss in enumerate(curve)]


def test_another_config_in_the_same_workdir_is_refused(base, tmp_path):
    assert not finished.check_workdir(config_of(base), tmp_path)
    files.write_json(tmp_path / "config.json", setup.as_json(config_of(base)))
    finished.check_workdir(config_of(base), tmp_path)
    with pytest.raises(ValueError, match=r"another config.*optim/lr: 0.003 -> 0.1"):
        finished.check_workdir(config_of(base, **{"optim.lr": 0.1}), tmp_path)
    saved = setup.as_json(config_of(base))
    saved["model"]["remat"] = "none"
    files.write_json(tmp_path / "config.json", saved)
    with pytest.raises(ValueError, match="another config.*model/remat: 'none' -> None"):
        finished.check_workdir(config_of(base), tmp_path)
    del saved["model"]["attention"]  # as in 0.2, where 'none' was the default
    files.write_json(tmp_path / "config.json", saved)
    finished.check_workdir(config_of(base), tmp_path)


def test_the_former_default_of_captions_shortest_length_is_no_other_config(base, tmp_path):
    saved = setup.as_json(config_of(base, "captioning"))
    saved["task_options"]["min_length"] = 5
    files.write_json(tmp_path / "config.json", saved)
    with pytest.raises(ValueError, match="another config.*task_options/min_length: 5 -> 0"):
        finished.check_workdir(config_of(base, "captioning"), tmp_path)
    files.write_json(tmp_path / "config.json", saved | {"size": 2})  # a key of that time
    finished.check_workdir(config_of(base, "captioning"), tmp_path)


def test_studies_of_own_data_that_asked_for_forgetting_are_no_other_runs():
    old = {"task": "vqa", "task_options": {}, "data": {"name": "folder"}, "eval": {"forgetting": True}}
    assert renamed.with_defaults(old) == old  # asked for by name
    assert not renamed.with_defaults(old | {"size": 8})["eval"]["forgetting"]
    assert renamed.with_defaults(old | {"size": 8, "data": {"name": "scenes"}})["eval"]["forgetting"]
    assert old["eval"]["forgetting"]


def test_a_mistake_leaves_nothing_that_blocks_the_corrected_rerun(base, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        run.run(config_of("nowhere"), tmp_path, quiet)
    assert not list(tmp_path.iterdir())  # its lock too is gone
    finished.check_workdir(config_of(base), tmp_path)


@pytest.mark.slow
def test_cached_features_equal_encoding_every_step(base, tmp_path):
    """In memory and from disk: a subset reads its rows from the whole split's table, and a second run finds the table there."""
    options = {"data.n_images": 7, "eval.gallery": False, "optim.lr": 0.5}
    plain = run.run(config_of(base, **options, **{"data.feature_bytes": 0}), tmp_path / "plain", quiet)
    cached = run.run(config_of(base, **options), tmp_path / "cached", quiet)
    shared = run.run(config_of(base, **options), tmp_path / "shared", quiet, tmp_path / "features")
    files = sorted((tmp_path / "features").iterdir())
    assert kinds(tmp_path / "features") == ["test-image_tokens-5", "train-image_tokens-12"]
    before = [path.stat().st_ino for path in files]
    again = run.run(config_of(base, **options), tmp_path / "again", quiet, tmp_path / "features")
    assert [path.stat().st_ino for path in files] == before
    assert again["metrics"] == shared["metrics"]
    for one in (cached, shared):
        for label in ("base", "tuned"):
            a, b = (run["metrics"]["test"][label]["nll"] for run in (one, plain))
            np.testing.assert_allclose(a, b, rtol=1e-5)


def kinds(directory):
    """The files of tables without what their content decides: split, stage and number of rows."""
    return sorted(path.name.rsplit("-", 1)[0] for path in directory.iterdir())


@pytest.mark.slow
def test_question_states_once_per_question_equal_encoding_every_step(base, tmp_path, monkeypatch):
    """Where only the decoder is tuned the question encoder is frozen too; in memory, a test below compares them."""
    options, cacheable = {"method": "head", "data.n_images": 7, "eval.gallery": False}, frozen_cache.cacheable
    shared = run.run(config_of(base, **options), tmp_path / "shared", quiet, tmp_path / "features")
    sizes = ["test-image_tokens-5", "test-question_states-30", "train-image_tokens-12", "train-question_states-42"]
    assert kinds(tmp_path / "features") == sizes
    asked_not_to = {"question_states": "asked not to"}
    monkeypatch.setattr(frozen_cache, "cacheable", lambda *args: cacheable(*args) | asked_not_to)
    said = []
    plain = run.run(config_of(base, **options), tmp_path / "plain", said.append)
    assert "image_tokens: computed once: it depends on no trainable leaf" in said
    assert "question_states: computed every step: asked not to" in said
    for label in ("base", "tuned"):
        a, b = (run["metrics"]["test"][label]["nll"] for run in (shared, plain))
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.fixture(scope="module")
def asked(base):
    """(model, variables, split, examples) of questions about three pictures."""
    model, params = loading.load(base, task="vqa")
    split = scenes.load({"n_test": 3}, ["test"])["test"]
    return model, {"params": params}, split, examples_of(model, split)


def examples_of(model, split):
    images = pipeline.Resized.of(split.images, model)
    return dataclasses.replace(TASK.examples(split, TASK.template(model)), images=images)


def cache_of(model, variables, directory=None, limit=1 << 30, log=quiet):
    """A cache of every stage."""
    found = frozen_cache.programs(model, variables)
    return frozen_cache.FrozenCache(model, variables, model.stages, found, {}, limit, directory, log)


def test_what_stages_read_is_left_out_of_batches(asked):
    """And a batch holds the rows that belong to its examples."""
    model, variables, split, examples = asked
    cache = cache_of(model, variables)
    tokens, states = cache.fill(split, examples, per=("image",)), cache.fill(split, examples)
    rows = np.array([16, 2])
    batch, small, smallest = (pipeline.gather(one, rows) for one in (examples, tokens, states))
    texts = {"prompt", "tokens", "targets", "weights"}
    assert [set(one) for one in (batch, small, smallest)] == [
        texts | {"image"}, texts | {"image_tokens"}, texts | {"question_states"},
    ]  # fmt: skip
    np.testing.assert_allclose(
        small["image_tokens"], model.apply(variables, batch, "image_tokens", method="stage"), atol=2e-6
    )
    expected = model.apply(variables, small, "question_states", method="stage")
    np.testing.assert_allclose(smallest["question_states"], expected, atol=2e-6)


@pytest.mark.slow
def test_question_states_are_taken_from_the_batch(asked):
    """A sharp check of what a test above compares: other states give another loss."""
    model, variables, split, examples = asked
    cached = cache_of(model, variables).fill(split, examples)
    plain, same = (evaluate.nll(model, variables, TASK, one) for one in (examples, cached))
    cached.arrays["question_states"] = cached.arrays["question_states"] + 1
    assert abs(same - plain) <= 1e-6 * plain < abs(evaluate.nll(model, variables, TASK, cached) - plain)


def test_the_same_questions_about_other_pictures_are_other_states(asked, tmp_path):
    model, variables, split, here = asked
    moved = dataclasses.replace(here, arrays=here.arrays | {"image_index": (here.arrays["image_index"] + 1) % 3})
    for examples in (here, moved):
        kept = cache_of(model, variables, tmp_path).fill(split, examples)
        tokens = cache_of(model, variables).fill(split, examples, per=("image",))
        expected = evaluate.stage_outputs(model, variables, tokens, "question_states")
        np.testing.assert_array_equal(kept.arrays["question_states"], expected)
    assert kinds(tmp_path) == ["test-image_tokens-3", *["test-question_states-18"] * 2]


def test_old_feature_files_make_room(asked, tmp_path):
    model, variables, *_ = asked
    for n in (3, 4):  # no room for both: the one unused for longest goes
        split = scenes.load({"n_test": n}, ["test"])["test"]
        limit = max((path.stat().st_size for path in tmp_path.iterdir()), default=1 << 30)
        cache_of(model, variables, tmp_path, limit).fill(split, examples_of(model, split), per=("image",))
        for path in tmp_path.iterdir():
            os.utime(path, (1, 1))
    assert kinds(tmp_path) == ["test-image_tokens-4"]


@pytest.mark.slow
def test_features_of_other_weights_or_pictures_have_other_names(base, asked, tmp_path):
    model, variables, split, examples = asked
    params, other = variables["params"], scenes.load({"n_test": 3, "seed": 1}, ["test"])["test"]
    n_made = itertools.count()

    def names(model, variables, split, examples):
        """The file of each stage."""
        directory = tmp_path / str(next(n_made))
        cache_of(model, variables, directory).fill(split, examples)
        return {path.name.split("-")[1]: path.name for path in directory.iterdir()}

    def moved(tower):
        return {"params": params | {tower: jax.tree.map(lambda x: x + 1, params[tower])}}

    asked_else = dataclasses.replace(examples, arrays=examples.arrays | {"prompt": examples.arrays["prompt"] + 1})
    plain = names(model, variables, split, examples)
    vision, text = (names(model, moved(tower), split, examples) for tower in ("vision", "text_encoder"))
    pictures = names(model, variables, other, examples)
    questions = names(model, variables, split, asked_else)
    assert len({one["image_tokens"] for one in (plain, vision, pictures)}) == 3
    assert len({one["question_states"] for one in (plain, vision, pictures, text, questions)}) == 5
    assert plain["image_tokens"] == text["image_tokens"] == questions["image_tokens"]
    # nor does it matter what else a model has, and what is tuned elsewhere
    captions = loading.load(base, task="captioning")[0]
    assert names(captions, variables, split, examples) == {"image_tokens": plain["image_tokens"]}
    tuned = sites.attach(model, params, Head(), jax.random.key(0))
    assert names(model, tuned, split, examples) == plain
    tuned = sites.attach(model, params, LoRA(rank=2), jax.random.key(0))
    there = names(model, tuned, split, examples)
    assert there["image_tokens"] == plain["image_tokens"] and there["question_states"] != plain["question_states"]


# ---------------------------------------------------------------- the loop, on the toy of tests/faults


def plateau(**changes):
    defaults = {"steps": 20, "optim.schedule": "plateau", "optim.cooldown": 0.5, "stop.every": 1, "stop.patience": 2}
    return toy.rarely(**defaults | changes)


def stopped(workdir, losses, accept=False, **changes):
    """(state, timing, digests of what was validated) of a run with these validation losses, each of which is asked for."""
    left, seen = iter(losses), []

    def validate(tuned):
        seen.append(tree.digest(tuned))
        return next(left)

    state, timing = toy.train(workdir, plateau(**changes), validate=validate, accept=accept)
    assert not list(left)
    return state, timing, seen


def test_a_stopped_loop_goes_on_bit_for_bit(tmp_path):
    """Six steps equal three, a stop, and three more: weights, optimizer, order of batches, dropout, lines of the log."""
    whole, _ = toy.train(tmp_path / "whole", toy.rarely(6))
    with pytest.raises(signals.Stopped):
        toy.train(tmp_path / "parts", toy.rarely(6), change=toy.raise_at(4))
    said = []
    parts, _ = toy.train(tmp_path / "parts", toy.rarely(6), said.append)
    assert "resumed from step 3" in said
    assert tree.digest(parts) == tree.digest(whole)
    assert len({(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")}) == 1


def test_training_stops_when_validation_does(tmp_path):
    """Falling for 3 steps, then not for 2: at step 5 the decay starts and takes half as long again."""
    losses = [4.0, 3.0, 2.0, 1.0, 1.5, 1.5, 0.9, 1.2]
    _, timing, _ = stopped(tmp_path, losses)
    assert (timing["steps"], timing["stopped"], timing["kept_step"]) == (7, "plateau", 6)
    np.testing.assert_allclose(timing["validation_loss"], 0.9, rtol=1e-6)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["validation_loss"]) for row in logged if "validation_loss" in row] == list(
        enumerate(losses)
    )
    said = results.validation(tmp_path, "val", timing, None)
    assert (said["first"], said["kept_step"], said["last_step"], said["last"]) == (4.0, 6, 7, 1.2)


def test_a_fixed_budget_does_all_steps_and_step_0_is_a_candidate(tmp_path):
    """Nothing that validation says ends it, the last half is the decay, and the state before training is kept if it is best."""
    state, timing, seen = stopped(tmp_path, [1.0, *[2.0] * 20], **{"stop.patience": 0})
    assert (timing["steps"], timing["stopped"], timing["kept_step"]) == (20, "budget", 0) and len(set(seen)) == 21
    assert tree.digest(state.tuned) == seen[0]
    assert (int(state.opt[-1].decay_from), int(state.opt[-1].n_steps)) == (10, 20)


@pytest.mark.parametrize(
    ("losses", "warmup", "steps", "why"),
    [
        # one validation without progress, progress, one without: no two in a row until steps 6 and 7
        ([4.0, 3.0, 3.0, 2.0, 2.0, *[1.0] * 7], 0.0, 11, "plateau"),  # 7, and half of it rounded
        ([1.1, 1.0, 0.999, 0.998, 0.997, 0.996], 0.0, 5, "plateau"),  # gains below the least: 3, and half of it rounded
        ([1.0 / n for n in range(1, 22)], 0.0, 20, "cap"),
        # patience waits for the end of the warm-up: a decay that began in it would raise the rate
        ([1.0] * 13, 0.4, 12, "plateau"),  # 8 of 20, and half of it
    ],
)
def test_when_training_stops_and_why(tmp_path, losses, warmup, steps, why):
    _, timing, _ = stopped(tmp_path, losses, **{"optim.warmup": warmup})
    assert (timing["steps"], timing["stopped"]) == (steps, why)


def rates(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}


def test_a_changed_schedule_counts_after_a_resume(tmp_path):
    """A lower rate, and more steps: the schedule is that of the new settings, at the step that was reached."""
    toy.train(tmp_path / "lower", toy.config(3))
    toy.train(tmp_path / "lower", toy.config(6, **{"optim.lr": 1e-4}), accept=True)
    assert rates(tmp_path / "lower") == pytest.approx(
        {**dict.fromkeys((1, 2, 3), 1e-2), **dict.fromkeys((4, 5, 6), 1e-4)}
    )
    toy.train(tmp_path / "more", toy.config(4, **{"optim.schedule": "cosine"}))
    toy.train(tmp_path / "more", toy.config(8, **{"optim.schedule": "cosine"}), accept=True)
    toy.train(tmp_path / "whole", toy.config(8, **{"optim.schedule": "cosine"}))
    later = {step: rates(tmp_path / "whole")[step] for step in (5, 6, 7, 8)}
    assert {step: rates(tmp_path / "more")[step] for step in later} == pytest.approx(later) and min(later.values()) > 0


def test_more_steps_after_a_plateau_train_no_more(tmp_path):
    _, timing, _ = stopped(tmp_path, [4.0, *[3.0] * 5])
    assert timing["stopped"] == "plateau"
    _, again, _ = stopped(tmp_path, [], accept=True, steps=40)
    assert again["steps"] == timing["steps"]


def test_the_best_parameters_are_returned(tmp_path):
    """Those of the step with the lowest validation loss, not the last ones."""
    state, timing, seen = stopped(tmp_path, [4.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    assert (timing["steps"], timing["kept_step"], len(set(seen))) == (6, 2, 7)
    assert tree.digest(state.tuned) == seen[2]


def test_a_plateau_resumes_bit_exact(tmp_path):
    """A stop in the validation that starts the decay."""
    losses = [4.0, 3.0, 2.0, 1.0, 1.5, 1.25, 0.9, 1.2]
    whole, *_ = stopped(tmp_path / "whole", losses)
    left = iter(losses)

    def validate(_):
        loss = next(left)
        if loss == 1.25:  # after step 5
            signal.raise_signal(signal.SIGTERM)
        return loss

    with pytest.raises(signals.Stopped):
        toy.train(tmp_path / "parts", plateau(), validate=validate)
    parts, timing = toy.train(tmp_path / "parts", plateau(), validate=lambda _: next(left))
    assert tree.digest(parts) == tree.digest(whole) and not list(left)
    assert timing["stopped"] == "plateau" and timing["steps"] == 7


def test_metrics_of_a_step_are_read_while_the_next_one_runs(tmp_path, monkeypatch):
    """The order of events: step n + 1 is dispatched, then the line of step n is written, then batch n + 2 is made."""
    events, write, most_soon = [], results.Metrics.write, sharding.most_soon

    def dispatched(*args):  # called once, after each step is dispatched
        events.append("step")
        return most_soon(*args)

    def written(self, step, **values):
        events.append(f"line {step}")
        write(self, step, **values)

    def made(step, batch):
        events.append(f"batch {step}")
        return batch

    monkeypatch.setattr(sharding, "most_soon", dispatched)
    monkeypatch.setattr(results.Metrics, "write", written)
    toy.train(tmp_path, toy.rarely(3), change=made)
    expected = "batch 1, step, batch 2, step, line 1, batch 3, step, line 2, line 3"
    assert ", ".join(events) == expected


# ---------------------------------------------------------------- what is compiled, and what is computed once


def test_runs_that_differ_in_rate_steps_or_seed_share_one_program():
    """The schedule and the seed are data: what is compiled does not hold them."""
    c, texts = config.get_config().optim, []
    for lr, n_steps, seed in ((1e-3, 10, 0), (3e-3, 20, 1)):
        c.lr = lr
        state, frozen = _state(
            tx := optim.optimizer(c, {"params": {"kernel": jnp.ones((5, 3)), "fixed": None}}, n_steps)
        )
        texts.append(_step(tx).lower(state._replace(seed=jnp.uint32(seed)), frozen, _batch(4)).as_text())
    assert texts[0] == texts[1]


ROOM = 1 << 20  # bytes


def why_every_step(base, stage, method, augment="none", n_images=10, n_questions=60, limit=ROOM, dropout=0.0):
    """Why a stage is computed every step; '' where once is enough."""
    c = config_of(base, method=method, **{"data.augment": augment, "model.dropout": dropout})
    model, params, chosen, _ = setup.setup_model(c, TASK, scenes.load(c.data, ["train"])["train"], quiet)
    variables = sites.attach(model, params, chosen, jax.random.key(0))
    found, n_rows = frozen_cache.programs(model, variables), {"image": n_images, "example": n_questions}
    return frozen_cache.cacheable(model, found, sites.trainable(variables), augment, n_rows, limit)[stage]


@pytest.mark.parametrize(
    "method, changes, reason",
    [
        ("full", {}, "params/vision/.* is trained"),
        ("lora", {"augment": "crop"}, r"images are augmented \(crop\)"),
        ("lora", {"n_images": ROOM // 100}, "its outputs would take .* GB, more than data.feature_bytes"),
        ("lora", {"limit": 10}, "its outputs would take"),
        ("lora", {"dropout": 0.1}, "$"),  # it acts in the text stacks
        ("lora", {}, "$"),
    ],
)
def test_features_are_cached_only_where_that_is_right(base, method, changes, reason):
    assert re.match(reason, why_every_step(base, "image_tokens", method, **changes))


@pytest.mark.parametrize(
    "method, changes, reason",
    [
        ("lora", {}, "peft/text_encoder.* is trained"),
        ("head", {"augment": "crop"}, r"images are augmented \(crop\)"),
        ("head", {"n_images": ROOM}, "it reads image_tokens, which is computed every step"),
        ("head", {"dropout": 0.1}, "it has dropout"),
        ("head", {"n_questions": ROOM}, "its outputs would take .* GB, more than data.feature_bytes"),
        ("head", {}, "$"),
    ],
)
def test_question_states_are_cached_only_where_that_is_right(base, method, changes, reason):
    assert re.match(reason, why_every_step(base, "question_states", method, **changes))


def test_unknown_words_extend_the_vocabulary_and_are_tuned(base, tmp_path):
    c = config_of(base)
    split = scenes.load(c.data, ["train"])["train"]
    split = dataclasses.replace(split, rows=list(split.rows))
    split.rows[0]["questions"][0]["question"] = "is there a zebra"
    model, params, chosen, facts = setup.setup_model(c, TASK, split, quiet)
    assert facts["new_words"] == ["zebra"] and model.tokenizer.vocabulary[-1] == "zebra"
    known = params["text_decoder"]["embed"]["word"]
    assert known.shape[0] + 1 == model.config.vocab_size == len(model.tokenizer) and model.config.new_words == 1
    variables = sites.attach(model, params, chosen, jax.random.key(0))
    mask = tree.flatten(sites.trainable(variables))
    tuned = {name for name, on in mask.items() if on and name.startswith("params/")}
    rows = {f"params/text_{tower}/embed/new_word" for tower in ("decoder", "encoder")}
    assert tuned == rows | {"params/text_decoder/head/new_bias"}  # and none of the words that the base knows
    c.model.extend_vocabulary = False
    assert facts["unknown_words"] == 0  # none is left after the extension
    said = []
    facts = setup.setup_model(c, TASK, split, said.append)[3]
    assert (facts["new_words"], facts["unknown_words"]) == ([], 1)
    assert "warning: 1 different words of the training texts (1 in all) are not in the base's vocabulary" in said[-1]


def test_what_devices_share_is_stored_in_parts_and_the_rest_as_one_array(tmp_path):
    mesh = sharding.mesh({"fsdp": 8, "data": 1})
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("fsdp",), ()))
    state = {"s": jax.device_put(jnp.arange(64.0).reshape(16, 4), split), "n": jax.device_put(jnp.int32(5), whole),
             "w": jax.device_put(jnp.arange(6.0).reshape(2, 3), whole)}  # fmt: skip
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state, {})
    checkpoints.wait()
    manifest = checkpoints._read_manifest(1)
    assert [name for name, _, _ in manifest["layout"]] == ["n", "w"] and len(manifest["leaves"]["s"]) == 8
    step, got = checkpoints.restore(state, {})
    assert step == 1
    for name, x in state.items():
        np.testing.assert_array_equal(got[name], x)
        assert got[name].dtype == x.dtype
    checkpoints.close()


def test_a_checkpoint_of_another_base_or_shape_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"a": jnp.ones(3)}, {"base": "x"})
    checkpoints.wait()
    with pytest.raises(ValueError, match="base: stored x, now y"):
        checkpoints.restore({"a": jnp.ones(3)}, {"base": "y"})
    with pytest.raises(ValueError, match=r"missing \(1\): b"):
        checkpoints.restore({"a": jnp.ones(3), "b": jnp.ones(1)}, {"base": "x"})
    checkpoints.close()


def test_subsets_are_nested_and_batches_are_a_function_of_seed_and_step():
    split = scenes.load({"n_train": 40}, ["train"])["train"]
    ids = [[row["image_id"] for row in pipeline.subset(split, seed=3, n_images=n)[0].rows] for n in (5, 20)]
    assert ids[1][:5] == ids[0] and len(set(ids[1])) == 20
    other = [row["image_id"] for row in pipeline.subset(split, seed=4, n_images=5)[0].rows]
    assert other != ids[0]
    examples = TASK.examples(split, tiny.template("vqa", tiny.SCENES))
    stream = pipeline.batches(examples, 7, seed=1)
    first = [next(stream) for _ in range(40)]  # 280 > 240 examples: into the second epoch
    again = next(pipeline.batches(examples, 7, seed=1, start=38))
    for name, array in first[38].items():
        np.testing.assert_array_equal(array, again[name])
    seen = np.concatenate([batch["prompt"] for batch in first])[:240]
    assert len(np.unique(seen, axis=0)) == len(np.unique(examples.arrays["prompt"], axis=0))  # an epoch is complete


@pytest.mark.parametrize(
    "key, value, message", [("fraction", 0.0, "fraction is 0.0"), ("n_images", 99, "has 3 images")]
)
def test_impossible_subsets_are_named(key, value, message):
    split = scenes.load({"n_train": 3}, ["train"])["train"]
    with pytest.raises(ValueError, match=message):
        pipeline.subset(split, seed=0, **{key: value})


@pytest.mark.parametrize(
    ("targets", "platform", "dtype", "remat"),
    [
        ("vision", "gpu", "bfloat16", "dots"),
        ("vision", "tpu", "bfloat16", "dots"),
        ("vision", "gpu", "float32", "none"),
        ("text.attention.qv", "gpu", "bfloat16", "none"),
        ("vision", "cpu", "bfloat16", "none"),
    ],
)
def test_what_a_config_leaves_open_depends_on_devices_and_on_what_is_trained(targets, platform, dtype, remat):
    c = config_of("tiny", "captioning", **{"method.targets": targets, "model.dtype": dtype})
    model = setup.abstract_model(c)
    chosen = sites.resolved(model, setup.methods_of(c))
    found = setup.for_devices(c, model, chosen, platform).config
    assert found.remat == remat
    assert found.attention == {"gpu": {"bfloat16": "cudnn"}.get(dtype, "plain"), "tpu": "plain", "cpu": None}[platform]
    c.model.remat, c.model.attention, c.model.unroll = "full", "plain", 3
    model = setup.abstract_model(c)
    found = setup.for_devices(c, model, chosen, platform).config
    assert (found.remat, found.attention, found.unroll) == ("full", "plain", 3)


def test_forgetting_is_of_scenes_and_refused_for_other_data(tmp_path):
    """Other data have no captions in the style of pre-training: the run failed after training, or measured something else."""
    c = config_of("tiny", "vqa", **{"eval.forgetting": True})
    setup.check_config(c)
    c.data.name = "coco_captions"
    with pytest.raises(ValueError, match="eval.forgetting is True, but data.name is 'coco_captions'.*to False"):
        run.run(c, tmp_path)
    assert not any(path.suffix for path in tmp_path.iterdir())


def test_precision_is_that_of_the_config():
    c = config_of("tiny", "captioning", **{"model.precision": "high"})
    with setup.precision(c):
        assert jax.config.jax_default_matmul_precision == "high"
    assert jax.config.jax_default_matmul_precision == "highest"  # conftest.py
    with setup.precision(config_of("tiny")):
        assert jax.config.jax_default_matmul_precision == "highest"
    c.model.precision = "highst"
    with pytest.raises(ValueError, match="model.precision is 'highst'.*highest"):
        setup.check_config(c)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [(key, least - 1, f"at least {least}") for key, least in setup.LEAST.items()]
    + [(key, value, "in [0, 1)") for key in setup.SHARES for value in (-0.1, 1)]
    + [("optim.lr", float("nan"), "at least 0")],
)
def test_a_number_out_of_its_range_is_named(key, value, allowed):
    c = config.get_config("captioning" if key.endswith("max_words") else "vqa")
    setup.check_config(c)
    value = type(functools.reduce(getattr, key.split("."), c))(value)
    c.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=re.escape(f"{key} is {value}; it must be {allowed}")):
        setup.check_config(c)


def test_the_ends_of_ranges_are_allowed():
    c = config.get_config("vqa")
    numbers = setup.LEAST | dict.fromkeys(setup.SHARES, 0.0)
    c.update_from_flattened_dict({key: x for key, x in numbers.items() if not key.endswith("max_words")})
    setup.check_config(c)


@pytest.mark.parametrize("field", [{"dropout": 1.5}, {"dropout": -0.5}, {"dtype": "flaot32"}, {"dtype": "int8"}])
def test_a_base_is_not_read_with_a_dropout_or_type_that_does_not_exist(field):
    ((name, value),) = field.items()
    with pytest.raises(
        ValueError, match=f"{name} is {value!r}; (it must be in .0, 1.|choose one of float32, bfloat16)"
    ):
        loading.load("tiny", **field)
