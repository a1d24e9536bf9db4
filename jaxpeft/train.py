"""One run, top to bottom: data, model, methods, split, optimizer, restore, loop, evaluation, result.

There is one loop and no trainer class. `train_step` is pure; randomness is `fold_in(seed, step)`, so a resumed run
repeats what the interrupted one would have done, bit for bit on the same machine.
"""

import functools
import hashlib
import json
import signal
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft import data, datasets, evals, hub, methods, optim, results, sharding, sites, tasks, tree
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.methods import Selective
from jaxpeft.progress import Progress
from jaxpeft.tree import Tree


class TrainState(NamedTuple):
    """What training changes. No rng: step `s` uses fold_in(seed, s)."""

    step: jax.Array
    tuned: Tree
    opt: optax.OptState


class NonFinite(FloatingPointError):
    """The loss or a gradient is NaN or infinite; the message names the step and the leaf groups."""


def train_step(state: TrainState, frozen: Tree, features, batch: dict, *, model, task, tx, seed: int, accumulate: int):
    """One update of the tuned half -> (state, metrics). Gradients are of sums, divided once by the total count."""
    rng = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_fn(tuned, micro, rng):
        return task.loss(model, tree.join(tuned, frozen), micro, {"dropout": rng})

    def add(total, indexed):
        i, micro = indexed
        (loss, count), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.tuned, evals.with_features(micro, features), jax.random.fold_in(rng, i)
        )
        return jax.tree.map(jnp.add, total, (loss, jnp.float32(count), grads)), None

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.tuned))
    micros = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
    if accumulate == 1:
        (loss, count, grads), _ = add(zero, (0, jax.tree.map(lambda x: x[0], micros)))
    else:
        (loss, count, grads), _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), micros))
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt = tx.update(grads, state.opt, state.tuned)
    squares = _group_squares(grads)
    metrics = {"loss": loss / count, "grad_norm": jnp.sqrt(sum(squares.values())), "groups": squares}
    return TrainState(state.step + 1, optax.apply_updates(state.tuned, updates), opt), metrics


def _group_squares(grads: Tree) -> dict[str, jax.Array]:
    """Squared gradient norm per leaf group ('params/vision', 'peft/text_decoder', ...)."""
    squares: dict[str, jax.Array] = {}
    for name, leaf in tree.flatten(grads).items():
        group = "/".join(name.split("/")[:2])
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(leaf))
    return squares


def check_finite(step: int, metrics: dict) -> None:
    """Raise NonFinite when the loss or any group's gradient is not finite."""
    bad = [group for group, square in metrics["groups"].items() if not np.isfinite(square)]
    if bad or not np.isfinite(metrics["loss"]):
        raise NonFinite(
            f"step {step}: loss {float(metrics['loss'])}, gradients not finite in: {', '.join(bad) or 'no group'}. "
            f"Training stopped; the last checkpoint is kept. Try a lower optim.lr or optim.clip."
        )


class _Stop:
    """Ctrl-C and SIGTERM ask for a stop at the next step boundary; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked, self._before = False, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever owns it decides
                pass
        return self

    def _ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def setup_model(config, task, train: datasets.Split, log):
    """(model, params, methods, facts) of a config: the base, its vocabulary checked against the texts, the methods."""
    runtime = {"dtype": config.model.dtype, "remat": config.model.remat, "dropout": config.model.dropout}
    model, params, report = hub.read(
        config.base, question_encoder=task.question_encoder, image_size=config.model.image_size, **runtime
    )
    if model.tokenizer is None:
        raise ValueError(f"{config.base} has no vocab.txt or tokenizer.json; put the tokenizer's files beside the weights")
    if config.init == "scratch":
        model, params = hub.scratch(model.config, model.tokenizer, config.seed)
    elif config.init != "base":
        raise ValueError(f"init is {config.init!r}; choose 'base' (the checkpoint's weights) or 'scratch' (random)")
    texts = task.texts(train)
    field = {k: v for k, v in config.method.items() if k != "name"}
    chosen = methods.build(config.method.name, config.head, **field)
    unknown = [word for text in texts for word in model.tokenizer.unknown_words(text)]
    facts = {"base": str(config.base), "init": config.init, "report": report}
    facts |= {"unknown_words": len(unknown), "new_words": 0}
    if unknown and config.model.extend_vocabulary:
        model, params, new = hub.extend_vocabulary(model, params, sorted(set(unknown)), config.seed)
        facts["new_words"] = len(new)
        log(f"vocabulary: {len(new)} words are new to the base; their rows start random, so the word embedding is tuned")
        if not any(isinstance(one, methods.Full) for one in chosen):
            chosen = (*chosen, Selective(leaves=r"^params/text_.*/(embed/word|head/bias)$"))
    elif unknown:
        log(f"vocabulary: {len(unknown)} words of the training texts are unknown to the base and read as [UNK]")
    return model, params, chosen, facts


def config_digest(config) -> str:
    """What a checkpoint remembers of the config it was made with."""
    return _digest(json.loads(config.to_json_best_effort()))


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _prepare_workdir(config, workdir: Path) -> dict | None:
    """Create it and write config.json; the finished result if there is one; ValueError if another run lives there."""
    workdir.mkdir(parents=True, exist_ok=True)
    now, path = json.loads(config.to_json_best_effort()), workdir / "config.json"
    if path.exists():
        before = tree.flatten(json.loads(path.read_text()))
        rows = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in tree.flatten(now).items() if before.get(k) != v]
        rows += [f"{k}: {before[k]!r} -> gone" for k in before if k not in tree.flatten(now)]
        if rows:
            raise ValueError(f"{workdir} holds a run with another config; use a new --workdir. Changed: {'; '.join(rows)}")
    results.write_json(path, now)
    done = workdir / "result.json"
    return json.loads(done.read_text()) if done.exists() else None


def run(config, workdir: str | Path, log=print) -> dict:
    """Train and evaluate one point in `workdir`; returns what result.json holds.

    The same call goes on from the last checkpoint of an interrupted run and returns at once from a finished one. Raises
    ValueError for a bad config, data set or checkpoint before training, NonFinite on NaN, KeyboardInterrupt after a
    stop was asked for and the state was saved.
    """
    began = time.perf_counter()
    workdir = Path(workdir)
    task = tasks.build(config.task, **config.task_options)
    if (done := _prepare_workdir(config, workdir)) is not None:
        log(f"{workdir} is finished; this is its result\n\n{results.table(done)}")
        return done

    # data
    eval_splits = list(config.eval.splits)
    splits = datasets.load(config.data, ["train", *eval_splits])
    train = data.subset(
        splits["train"], seed=config.data.subset_seed, fraction=config.data.fraction, n_images=config.data.n_images
    )
    data_digest = _digest([train.rows, [splits[name].rows for name in eval_splits]])

    # model, methods, split
    model, params, chosen, facts = setup_model(config, task, train, log)
    base_digest = tree.digest(params)
    variables = sites.attach(model, params, chosen, jax.random.key(config.seed))
    mask = sites.trainable(chosen, variables)
    counts = sites.counts(variables, mask)
    results.write_json(workdir / "sites.json", sites.report(variables, mask))
    tuned, frozen = tree.split(variables, mask)
    log(
        f"{' + '.join(map(str, chosen))}\ntuned {counts['tuned']:,} of {counts['total']:,} base parameters; every leaf is "
        f"listed in {workdir / 'sites.json'}"
    )

    # examples, and the frozen image encoder's output once per picture where nothing that is tuned can change it
    size = model.config.image_size
    pictures = {name: data.Resized(split.images, size) for name, split in {**splits, "train": train}.items()}
    examples = _with_pictures(task.examples(train, model.tokenizer), pictures["train"])
    cached, why = _can_cache(config, mask, model, len(train.rows) + sum(len(splits[n].rows) for n in eval_splits))
    log(f"image features {'computed once per picture' if cached else 'computed every step'}: {why}")
    features = dict.fromkeys(pictures)
    if cached:
        started = time.perf_counter()
        features = {name: evals.image_features(model, variables, p) for name, p in pictures.items()}
        log(f"image features of {sum(map(len, pictures.values())):,} pictures in {time.perf_counter() - started:.1f} s")
        examples = data.Examples(examples.arrays, None, examples.rows)

    # loop
    manifest = {"config": config_digest(config), "base": base_digest, "data": data_digest}
    state, timing = fit(
        config,
        workdir,
        functools.partial(train_step, model=model, task=task, seed=config.seed, accumulate=config.accumulate),
        tuned,
        frozen,
        features["train"],
        lambda step: data.batches(examples, config.batch_size, seed=config.seed, start=step, augment=config.data.augment),
        manifest,
        log,
    )

    # evaluation, result
    started = time.perf_counter()
    after = tree.join(state.tuned, frozen)
    metrics, shown = {}, []
    for name in eval_splits:
        metrics[name], rows = _evaluate(config, model, task, {"base": {"params": params}, "tuned": after}, train, splits[name], pictures[name], features[name])
        shown += rows
    timing |= {"eval_s": time.perf_counter() - started, "total_s": time.perf_counter() - began}
    result = {
        "point": point_id(config),
        "task": config.task,
        "method": config.method.name,
        "size": config.size,
        "fraction": config.data.fraction,
        "n_train_images": len(train.rows),
        "seeds": {"seed": config.seed, "subset": config.data.subset_seed},
        "counts": counts,
        "main_metric": task.main_metric,
        "metrics": metrics,
        "timing": timing,
        "memory": results.memory(),
        "digests": {"base": base_digest, "data": data_digest},
        "model": facts,
        "data_report": {name: split.report for name, split in splits.items() if split.report},
        "machine": results.machine(),
        "versions": results.versions(),
        "status": "done",
    }
    results.write_jsonl(workdir / "predictions.jsonl", shown)
    _gallery(config, workdir, splits[eval_splits[0]], [row for row in shown if row["split"] == eval_splits[0]])
    results.write_json(workdir / "result.json", result)
    log(f"\n{results.table(result)}\nresults in {workdir}: result.json, predictions.jsonl, metrics.jsonl, gallery.png")
    return result


def point_id(config) -> str:
    """A readable, stable name of a point."""
    name = config.method.name + (f"{config.size}" if config.size else "")
    head = "" if config.head == "none" else f"+{config.head}"
    n = f"n{config.data.n_images}" if config.data.n_images else f"f{config.data.fraction:g}"
    return f"{config.task}-{name}{head}-{n}-{config.init}-s{config.seed}"


def _with_pictures(examples: data.Examples, pictures) -> data.Examples:
    return data.Examples(examples.arrays, pictures, examples.rows)


def _can_cache(config, mask, model, n_pictures: int) -> tuple[bool, str]:
    """Whether image features may be computed once, and the reason."""
    size = n_pictures * (1 + model.config.n_patches) * model.config.vision_width * jnp.dtype(model.config.dtype).itemsize
    tuned = [name for name, on in tree.flatten(mask).items() if on and "/vision" in name]
    if tuned:
        return False, f"{tuned[0]} is tuned"
    if config.data.augment != "none":
        return False, f"pictures are augmented ({config.data.augment})"
    if size > config.data.feature_bytes:
        return False, f"they would take {size / 1e9:.1f} GB; data.feature_bytes allows {config.data.feature_bytes / 1e9:.1f}"
    return True, f"no tuned leaf is in the image encoder ({size / 1e6:.0f} MB)"


def fit(config, workdir: Path, step_fn, tuned: Tree, frozen: Tree, features, batches, manifest: dict, log=print):
    """Train `tuned` from the newest good checkpoint to `config.steps` -> (state, timing).

    `step_fn(state, frozen, features, batch, tx=...)` is the pure step; `batches(step)` iterates from a step on. Metrics
    of step n are read while step n + 1 runs, so the device never waits for the log.
    """
    if config.batch_size % config.accumulate:
        raise ValueError(f"batch_size {config.batch_size} is not divisible by accumulate {config.accumulate}")
    mesh = sharding.mesh(config.batch_size // config.accumulate)
    tx = optim.optimizer(config.optim, tuned, config.steps)
    state = TrainState(jnp.int32(0), tuned, jax.jit(tx.init)(tuned))
    timing = {"steps": config.steps, "compile_s": 0.0, "step_s": 0.0, "train_s": 0.0}
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        if (restored := checkpoints.restore(state, manifest, log)) is not None:
            log(f"resumed from step {restored[0]}")
            state = restored[1]
        start = int(state.step)
        if start >= config.steps:
            return state, timing
        # donated below: a copy, so that the caller's tuned tree stays readable
        state = sharding.replicate(jax.tree.map(jnp.array, state), mesh)
        frozen, features = sharding.replicate((frozen, features), mesh)
        before = tree.digest(frozen) if config.check_frozen else None

        stream = batches(start)
        batch = sharding.shard_batch(next(stream), mesh)
        started = time.perf_counter()
        step_fn = jax.jit(functools.partial(step_fn, tx=tx), donate_argnums=0)
        step_fn = step_fn.lower(state, frozen, features, batch).compile()
        timing["compile_s"] = time.perf_counter() - started
        log(f"compiled the training step in {timing['compile_s']:.1f} s; batch {config.batch_size}, {config.steps} steps")

        started = time.perf_counter()
        state, durations = _loop(config, workdir, step_fn, state, frozen, features, batch, stream, mesh, checkpoints, manifest, log)
        timing |= {"step_s": statistics.median(durations), "train_s": time.perf_counter() - started}
        if before is not None and tree.digest(frozen) != before:
            raise AssertionError("a frozen leaf changed during training")
    finally:
        checkpoints.close()
    return state, timing


def _loop(config, workdir, step_fn, state, frozen, features, batch, stream, mesh, checkpoints, manifest, log):
    start = int(state.step)
    writer, bar = results.Metrics(workdir, start), Progress(config.steps, config.batch_size, start)
    durations, pending = [], None

    def settle(step, metrics):
        """Wait for a dispatched step, check it, log it."""
        metrics = jax.device_get(metrics)
        check_finite(step, metrics)
        if step % config.log_every == 0 or step == config.steps:
            writer.write(step, loss=float(metrics["loss"]), grad_norm=float(metrics["grad_norm"]))
        bar.update(step, loss=float(metrics["loss"]))

    try:
        with _Stop() as stop:
            last = time.perf_counter()
            for step in range(start + 1, config.steps + 1):
                state, metrics = step_fn(state, frozen, features, batch)
                if step < config.steps:
                    batch = sharding.shard_batch(next(stream), mesh)
                if pending is not None:
                    settle(*pending)
                pending = (step, metrics)
                durations.append(time.perf_counter() - last)
                last = time.perf_counter()
                if step % config.checkpoint_every == 0 or step == config.steps or stop.asked:
                    settle(*pending)
                    pending = None
                    checkpoints.save(step, state, manifest)
                    last = time.perf_counter()
                if stop.asked and step < config.steps:
                    log(f"\nstopped at step {step}, which is saved; the same command goes on from it")
                    raise KeyboardInterrupt
    finally:
        writer.close()
    return state, durations


def _evaluate(config, model, task, versions: dict[str, Tree], train, split, pictures, features):
    """Scores of the base and the tuned model, and of blind guesses, on one split; and a row per case."""
    cases = _with_pictures(task.cases(split, model.tokenizer), pictures)
    examples = _with_pictures(task.examples(split, model.tokenizer), pictures)
    scores = {"n": len(cases), "blind": task.blind(train, cases.rows)}
    rows = [{"split": split.name, **row} for row in cases.rows]
    for label, variables in versions.items():
        options = {"features": features, "batch_size": config.eval.batch_size}
        written = evals.predict(model, variables, task, cases, beams=config.eval.beams, **options)
        scores[label] = task.score(cases.rows, [one["text"] for one in written])
        scores[label]["nll"] = evals.nll(model, variables, task, examples, **options)
        for row, one in zip(rows, written, strict=True):
            row[label], row[f"{label}_score"] = one["text"], round(one["score"], 4)
    return scores, rows


def _gallery(config, workdir: Path, split, rows: list[dict]) -> None:
    """Twelve cases spread over the split: truth, before, after."""
    where = {row["image_id"]: i for i, row in enumerate(split.rows)}
    chosen = [rows[i] for i in np.linspace(0, len(rows) - 1, min(12, len(rows))).round().astype(int)]
    cases = []
    for row in chosen:
        lines = [("Q", row["question"])] if "question" in row else []
        truth = row["answers"][0] if "answers" in row else row["references"][0]
        lines += [("truth", truth), ("before", row["base"]), ("after", row["tuned"])]
        cases.append({"image": split.images[where[row["image_id"]]], "lines": lines})
    results.gallery(workdir / "gallery.png", cases)
