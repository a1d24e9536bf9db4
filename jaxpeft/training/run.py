"""One point of the grid, top to bottom: data, model, methods, split, training, evaluation, result.

    python main.py --config=configs/point.py:task=vqa,method=lora,size=8 --workdir=DIR

`run` reads like the order of events; everything that can be wrong with config, data or checkpoint is an error before
training starts and before anything is written that a corrected rerun would trip over.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxpeft import data, methods, metrics, tasks, tree
from jaxpeft.adapt import sites  # fmt: skip
from jaxpeft.data import base, pipeline
from jaxpeft.interchange import load_tuned, save_tuned
from jaxpeft.methods import METHODS
from jaxpeft.models import loading
from jaxpeft.runtime import files, locks, registry, renamed
from jaxpeft.training import evaluate, optim, results, sharding
from jaxpeft.training import frozen_cache as feature_tables
from jaxpeft.training.loop import Job, fit, train_step
from jaxpeft.tree import Tree

MOST_RESULT = 1 << 30  # bytes of a result.json
DTYPES = ("float32", "bfloat16")
LEAST_STEPS = 100  # where epochs decide: a few pictures are seen often, and the best step is kept
VALIDATIONS = 40  # where stop.every is 0
ENOUGH = 20  # validation pictures for a test of whether pictures matter; of fewer the mean alone decides
FEW = 100  # pictures of a test split, below which its scores are said to be uncertain


def run(
    config,
    workdir: str | Path,
    log=print,
    features_in: str | Path | None = None,
    command: str = "",
    accept_changes: bool = False,
) -> dict:
    """Train and evaluate one point in `workdir`; returns what result.json holds. `command`: what was typed, kept there.

    `features_in`: a directory where several runs keep the image features of whole splits (frozen_cache.py). All
    processes of a run on several hosts make the same call, on a `workdir` that all of them see.

    The same call goes on from the last checkpoint of an interrupted run and returns at once from a finished one. Raises
    ValueError for a bad config, data set or checkpoint, or a `workdir` in use, before training; NonFinite on NaN;
    KeyboardInterrupt after a stop was asked for and the state was saved. A run whose config, data or base is no longer
    the one it began with is a ValueError that names the difference, unless `accept_changes`.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if not sharding.is_first():
        return _run(config, workdir, lambda *_: None, features_in, command, accept_changes)
    with locks.held(workdir):
        return _run(config, workdir, log, features_in, command, accept_changes)


def _run(config, workdir: Path, log, features_in, command: str, accept_changes: bool) -> dict:
    began = time.perf_counter()
    check_config(config)
    changed = check_workdir(config, workdir, accept_changes, log)
    if not changed and (workdir / "result.json").exists():
        done = json.loads((workdir / "result.json").read_text())
        log(f"{workdir} is finished; this is its result\n\n{results.table(done)}")
        return done
    mesh = sharding.mesh(config.get("mesh"))
    sharding.check_batch(config.batch_size, config.grad_accum, mesh)

    # data
    task = tasks.build(config.task, **config.task_options)
    until_plateau = config.optim.schedule == "plateau"
    splits = data.load(config.data, needed_splits(config))
    c = config.data
    train, chosen_images = pipeline.subset(
        splits["train"], seed=c.subset_seed, fraction=c.fraction, n_images=c.n_images
    )
    held_out = {name: split for name, split in splits.items() if name != "train"}
    log("pictures: " + ", ".join(f"{name} {len(split.rows):,}" for name, split in {"train": train, **held_out}.items()))
    for remark in train.report.get("remarks", []):
        log(f"warning: {remark}")

    # model, methods, split
    model, params, chosen, facts = setup_model(config, task, train, log)
    variables = sites.attach(model, params, chosen, jax.random.key(config.seed))
    mask = sites.trainable(variables)
    counts = sites.counts(variables, mask)
    task, texts = with_limits(task, model, chosen, {"train": train, **held_out}, log)
    candidates = task.candidates(train, model.tokenizer)
    cases = {name: task.eval_examples(held_out[name], model.tokenizer) for name in config.eval.splits}
    yardsticks = {name: yardstick(task, train, name, some, model.tokenizer, log) for name, some in cases.items()}
    log(" + ".join(map(str, chosen)))
    log(sites.describe(variables, mask, leaves=False))
    digests = {"base": tree.digest(params)}
    originals, variables = variables, narrowed(variables, mask, config.model.get("frozen_dtype", "float32"))
    variables = _placed(variables, model, mesh, log)
    if config.model.get("frozen_dtype", "float32") != "float32":  # what the tuned tree is checked against when loaded
        originals = jax.tree.map(tree.fetch, originals)
    base = {"params": variables["params"]}
    tuned, frozen = tree.split(variables, mask)
    del params

    # examples; image features once per picture where nothing that is tuned can change them
    examples = task.examples(train, model.tokenizer)
    looked_at = held_out | {"train": train}
    if features_in:  # features of the whole split, so that every subset shares them and the step's program
        looked_at["train"] = splits["train"]
        examples.arrays["image_index"] = chosen_images[examples.arrays["image_index"]].astype(np.int32)
    images = {name: pipeline.Resized.of(split.images, model) for name, split in looked_at.items()}
    examples = dataclasses.replace(examples, images=images["train"])
    cached, why = can_cache(config, mask, model, sum(map(len, images.values())))
    log(f"image features {'computed once per picture' if cached else 'computed every step'}: {why}")
    features = dict.fromkeys(images)
    if cached:
        features = {
            name: feature_tables.table(model, variables, split, images[name], features_in, c.feature_bytes, log)
            for name, split in looked_at.items()
        }
        examples = dataclasses.replace(examples, images=None)

    asked = False
    if task.question_encoder:
        asked, why = can_cache_questions(config, mask, model, examples, cached)
        log(f"question states {'computed once per question' if asked else 'computed every step'}: {why}")

    def prepare(name, examples):
        """The examples of a split with question states beside the questions, where those are computed once."""
        if not asked:
            return examples
        split, limit = looked_at[name], c.feature_bytes
        return feature_tables.with_questions(model, variables, split, examples, features[name], features_in, limit, log)

    examples = prepare("train", examples)
    plan = scheduled(config, len(examples))

    # training
    first = sharding.is_first()
    if first:
        if changed and (workdir / "result.json").exists():  # not before all that is given was found to be good
            os.replace(workdir / "result.json", workdir / "result_before.json")
            log(f"the result of the run before is kept as {workdir / 'result_before.json'}")
        files.write_json(workdir / "config.json", as_json(config))
        files.write_json(workdir / "sites.json", sites.report(variables, mask))
    # a source may be a directory that is named by a digest and was moved
    digests["data"] = {
        name: digest([Path(split.source).name, split.rows]) for name, split in {"train": train, **held_out}.items()
    }
    step = functools.partial(train_step, model=model, task=task, grad_accum=config.grad_accum)
    order = {"seed": config.seed, "augment": config.data.augment}
    manifest = {"config": digest(as_json(config)), **digests}

    table = None if features["train"] is None else tree.fetch(features["train"])

    def batches(start):
        rows = sharding.rows(config.batch_size, mesh)
        stream = pipeline.batches(examples, config.batch_size, start=start, rows=rows, **order)
        return (evaluate.with_features(batch, table) for batch in stream)

    validate = None
    if until_plateau:
        sample = validation_sample(config, task, model, held_out, images)
        validate = validation(config, model, task, sample, features, frozen, prepare)
        log(
            f"at most {plan.steps:,} steps (batch {plan.batch_size}, {len(examples):,} training examples); validated on "
            f"{len(sample):,} examples of {plan.stop.split} every {plan.stop.every} steps, and the best step is kept"
        )
    job = Job(
        step=step,
        trainable=tuned,
        frozen=frozen,
        batches=batches,
        manifest=manifest,
        validate=validate,
        rules=model.sharding,
    )
    state, timing = fit(plan, workdir, job, log, accept_changes)

    # evaluation
    started = time.perf_counter()
    best, validated = state.tuned, None
    if until_plateau:
        worth, split = None, config.stop.split
        if config.stop.get("images_must_matter", False):
            options = {"features": features[split], "batch_size": config.eval.batch_size}
            worth = evaluate.worth_of_images(model, tree.join(best, frozen), task, sample, **options)
        validated = results.validation(workdir, split, timing, worth)
        if why := why_step_0(config, validated):
            best, timing["kept_step"] = tuned, 0
            validated |= {"kept_step": 0, "kept": validated["first"]}
            log(f"step 0, the state before training, is kept: {why}")
        elif worth is not None and worth["least"] <= 0:
            log(
                f"warning: {worth['n']} validation pictures are too few to show that the model uses them; look at its texts, "
                f"or set more aside for validation"
            )
    versions = {"tuned": tree.join(best, frozen)}
    if config.eval.base:
        versions = {"base": base} | versions
    scores, rows = {}, []
    for name in config.eval.splits:
        split = held_out[name]
        scores[name], more = evaluate_split(
            config, model, task, versions, split, cases[name], images[name], features[name], prepare, candidates
        )
        blind, guess = yardsticks[name]
        scores[name] |= blind
        if guess is not None:
            for row, text, value in zip(more, guess, task.per_example(cases[name].rows, guess), strict=True):
                row["blind"], row[f"blind_{task.main_metric}"] = text, round(float(value), 6)
            others = [one for one in ("blind", "text_only", "base") if one in more[0]]
            scores[name]["intervals"] = evaluate.intervals(more, task.main_metric, "tuned", others)
        rows += more
        upload = task.upload(more, [row["tuned"] for row in more])
        if upload is not None and first:
            files.write_text(workdir / f"upload_{name}.json", json.dumps(upload) + "\n")
    forgot = (
        forgetting(config, model, base, versions["tuned"], features.get("test")) if config.eval.forgetting else None
    )
    timing |= {"eval_s": time.perf_counter() - started, "total_s": time.perf_counter() - began}

    # result
    result = {
        "point": config.name or point_id(config),
        "task": config.task,
        "method": config.method.name,
        "size": config.size,
        "fraction": config.data.fraction,
        "n_train_images": len(train.rows),
        "lr": config.optim.lr,
        "head": config.head,
        "seeds": {"seed": config.seed, "subset": config.data.subset_seed},
        "counts": counts,
        "main_metric": task.main_metric,
        "metrics": scores,
        "validation": validated,
        "forgetting": forgot,
        "timing": timing,
        "memory": results.memory(),
        "digests": digests,
        "model": facts,
        "task_options": dataclasses.asdict(task),
        "texts": texts,
        "data_report": train.report,
        "machine": results.machine(),
        "versions": results.versions(),
        "imports": imports_of(config, chosen, task),
        "status": "done",
    } | ({"command": command} if command else {})
    whole = tree.join(jax.tree.map(tree.fetch, best), tree.split(originals, mask)[1])
    if not first:
        return result
    files.write_jsonl(workdir / "predictions.jsonl", rows)
    save_tuned(model, whole, workdir / "tuned")
    with_gallery = ", gallery.png" if rows and config.eval.gallery else ""
    if with_gallery:
        _gallery(workdir, held_out[config.eval.splits[0]], rows)
    files.write_json(workdir / "result.json", result)
    log(
        f"\n{results.table(result)}\nresults in {workdir}: result.json, predictions.jsonl, metrics.jsonl{with_gallery}; "
        f"what was tuned: tuned/ (jp.load_run, jaxpeft generate)"
    )
    return result


def needed_splits(config) -> list[str]:
    """The splits that a run reads, 'train' first."""
    validated = [config.stop.split] if config.optim.schedule == "plateau" else []
    return list(dict.fromkeys(["train", *config.eval.splits, *validated]))


def check_config(config) -> None:
    """Raise ValueError for a setting that training or evaluation would refuse, before anything is read."""
    renamed.check_config(config)
    optim.schedule(config.optim, 1000)
    optim.OPTIMIZERS.find(config.optim.get("name", "adamw"))
    pipeline.check_augment(config.data.augment)
    for name in ("dtype", "frozen_dtype"):
        if config.model.get(name, "float32") not in DTYPES:
            raise ValueError(
                f"model.{name} is {config.model[name]!r}{registry.did_you_mean(config.model[name], DTYPES)}; choose one of "
                f"{', '.join(DTYPES)}"
            )


def imports_of(config, chosen, task: tasks.Task) -> list[str]:
    """The modules outside jaxpeft that a run's method, task, data set, optimizer and metrics come from."""
    entries = [METHODS[config.method.name], *map(type, chosen), type(task), data.DATASETS[config.data.name]]
    entries.append(optim.OPTIMIZERS[config.optim.get("name", "adamw")])
    return registry.modules_of(entries + [metrics.METRICS[name] for name in task.metrics])


def load_run(workdir: str | Path, imports: Iterable[str] = ()):
    """(model, variables, methods, task) of a finished run, for `generate`, `merge` and the exports.

    `imports`: modules with the run's own method or task, which are imported first (see runtime/registry.py); nothing that
    stands in a run directory is ever imported or executed. Raises ValueError where `workdir` holds no finished run, the base
    is no longer the one that was tuned, or a method or task is unknown, with the modules that the run says it came from.
    """
    registry.load(imports)
    workdir = Path(workdir)
    if not (workdir / "result.json").exists():
        raise ValueError(f"{workdir} holds no finished run: result.json is missing; run main.py on it to the end")
    if not (workdir / "tuned").exists():
        raise ValueError(
            f"{workdir} has no tuned/: an older version, which did not keep it, finished this run; run again"
        )
    with files.reading(workdir, "holds no run of ours"):
        config = ml_collections.ConfigDict(renamed.translated(files.read_json(workdir / "config.json")))
        result = files.read_json(workdir / "result.json", MOST_RESULT)
        try:
            return _load_run(workdir, config, result)
        except registry.Unknown as error:
            names = [name for name in result.get("imports", []) if re.fullmatch(r"[\w.]{1,200}", name)][:5]
            said = f"was made with code from {', '.join(names)}" if names else "does not say which module defines it"
            raise ValueError(
                f"{workdir}: {error}. The run {said}; if you have that code and trust it, import it: "
                f"--imports={','.join(names) or 'MODULE'}, in Python jp.load_run(..., imports=[...])"
            ) from error


def _load_run(workdir, config, result):
    task = tasks.build(
        config.task, **result.get("task_options", tasks.IN_0_1.get(config.task, {}) | dict(config.task_options))
    )
    config.base = pinned_base(config, result)
    model, params, _ = _base(config, task)
    model, params, _ = loading.extend_vocabulary(model, params, result["model"]["new_words"], config.seed)
    if not result["model"].get("new_rows"):  # tuned by version 0.1, which kept the whole word embedding
        model, params = loading.joined(model, params)
    variables, chosen = load_tuned(model, params, files.kept_in(workdir / "tuned"))
    return model, variables, chosen, task


def as_json(config) -> dict:
    """A config as plain JSON values."""
    return json.loads(config.to_json_best_effort())


def digest(value) -> str:
    """What a checkpoint remembers of a JSON value it must not be mixed up with."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def check_workdir(config, workdir: Path, accept: bool = False, log=print) -> bool:
    """Whether a run with another config lives in `workdir`. Raises ValueError, with the differences, or, with `accept`, says
    them."""
    if not (workdir / "config.json").exists():
        return False
    before, now = (tree.flatten(c) for c in (json.loads((workdir / "config.json").read_text()), as_json(config)))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if keys:
        rows = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys)
        if not accept:
            raise ValueError(
                f"{workdir} holds a run with another config; use a new --workdir, or --accept_changes to go on from its last "
                f"step. Changed: {rows}"
            )
        log(f"{workdir} holds a run with another config, accepted as asked. Changed: {rows}")
    return bool(keys)


def point_id(config) -> str:
    """A readable, stable name of a point."""
    name = config.method.name + (f"{config.size}" if config.size else "")
    head = "" if config.head == "none" else f"+{config.head}"
    n = f"n{config.data.n_images}" if config.data.n_images else f"f{config.data.fraction:g}"
    return f"{config.task}-{name}{head}-{n}-{config.init}-s{config.seed}"


def setup_model(config, task: tasks.Task, train: base.Split, log):
    """(model, params, methods, facts) of a config: the base, its vocabulary checked against the texts, the methods."""
    model, params, report = _base(config, task)
    for group, source in report.get("initialised", {}).items():
        if source != "checkpoint":
            log(f"{group} starts from {source}")
    chosen = methods_of(config)

    _, chosen, unknown, new = with_new_words(config, task, model, chosen, train)
    model, params, _ = loading.extend_vocabulary(model, params, new, config.seed)
    if new:
        log(f"vocabulary: {len(new):,} words are new to the base; their rows start random and are tuned")
    if unknown:
        shown = ", ".join(map(repr, list(unknown)[:5]))
        log(
            f"warning: {len(unknown):,} different words of the training texts ({unknown.total():,} in all) are unknown to "
            f"the base and read as [UNK]: {shown}"
        )
    facts = {"base": str(config.base), "init": config.init, "report": report}
    # new_rows: whether the rows of new words are leaves of their own, as they were not in version 0.1
    return model, params, chosen, facts | {"unknown_words": len(unknown), "new_words": new, "new_rows": True}


def with_new_words(config, task: tasks.Task, model, chosen, train: base.Split):
    """(model, methods, words that stay unknown, words that are added) for the training texts; no parameters are needed.

    Words are added where the vocabulary has no pieces to spell them from: the tiny base's. The methods then train their rows.
    """
    found = (word for text in task.texts(train) for word in model.tokenizer.unknown_words(text))
    unknown = collections.Counter(dict(sorted(collections.Counter(found).items())))
    if not config.model.extend_vocabulary or model.tokenizer.has_pieces:
        return model, chosen, unknown, []
    model, new = loading.wider(model, list(unknown))
    if new and not any(isinstance(one, methods.Full) for one in chosen):
        chosen = (*chosen, methods.NewWords())
    return model, chosen, collections.Counter(), new


def with_limits(task: tasks.Task, model, chosen, splits: dict[str, base.Split], log) -> tuple[tasks.Task, dict]:
    """(the task with limits that fit the data and the base, {split: {limit: what it cuts}}); cuts are said."""
    shifts = [sum(one.shift(site) for one in chosen if one.selects(site)) for site in sites.sites(model)]
    lengths = {name: task.lengths(split, model.tokenizer) for name, split in splits.items()}
    task = task.limited(lengths.values(), model.config.max_positions - max(shifts, default=0), model.tokenizer)
    texts = {name: task.cuts(one) for name, one in lengths.items()}
    log("texts: " + ", ".join(f"{name} {one['limit']}" for name, one in texts["train"].items() if one["limit"]))
    for name, cuts in texts.items():
        for limit, one in cuts.items():
            if one["cut"] and not (name == "train" and limit in task.only_written):
                log(
                    f"warning: {name}: {one['cut']:,} of {one['of']:,} {task.limited_texts[limit]} are longer than "
                    f"task_options.{limit}={one['limit']} and are cut; the longest has {one['longest']:,}"
                )
    long, usual = max(
        (
            (int(n.max()), int(np.percentile(n, 99)))
            for name, n in lengths["train"].items()
            if name in task.limits and n.size
        ),
        default=(0, 0),
    )
    if long > max(2 * usual, 32):
        log(
            f"warning: the longest training text has {long} tokens and 99 of 100 have at most {usual}; every batch is as long "
            f"as the longest: a limit in task_options makes steps faster"
        )
    return task, texts


def yardstick(
    task: tasks.Task, train, name: str, cases: base.Examples, tokenizer, log
) -> tuple[dict, list[str] | None]:
    """({'blind', 'perfect_writer'}, the best blind guess per case) of a split, said before training: what needs no picture
    scores, and what this vocabulary lets one score at most. ({'blind': {}}, None) where there are no answers to score with.
    Raises ValueError for ids that repeat."""
    if not len(cases):
        raise ValueError(
            f"split {name!r} has nothing to score: no {' and no '.join(sorted(set(task.limited_texts.values())))}"
        )
    tasks.check_ids(cases, task.id_key, name)
    if not scored(cases):
        return {"blind": {}}, None
    guesses, writer = task.guesses(train, cases.rows), task.perfect_writer(cases.rows, tokenizer)
    blind, metric = {label: task.scores(cases.rows, texts) for label, texts in guesses.items()}, task.main_metric
    best = max(blind, key=lambda label: blind[label][metric])
    log(
        f"{name}, {metric}: {results.LABELS.get(best, best)} {blind[best][metric]:.3f}; perfect writer {writer[metric]:.3f} "
        f"({writer['out_of_reach']:,} of {writer['truths']:,} right texts are out of reach)"
    )
    if writer[metric] < 0.95 * writer["unhindered"]:
        shown = "".join(f"; {text!r} becomes {written!r}" for text, written in writer["examples"])
        log(
            f"warning: {name}: the right texts as this base can write them score {writer[metric]:.3f} {metric}, as they are "
            f"{writer['unhindered']:.3f}: its vocabulary or task_options.length loses part of them{shown}"
        )
    n = len({row["image_id"] for row in cases.rows})
    if n < FEW:
        log(
            f"warning: {name} has {n} pictures, too few to tell small differences: look at the intervals in the table"
            + (f" (about +-{98 / math.sqrt(n):.0f} points)" if metric == "accuracy" else "")
        )
    return {"blind": blind, "perfect_writer": writer}, guesses[best]


def scheduled(config, n_examples: int) -> ml_collections.ConfigDict:
    """The config with numbers where they follow from the data: `steps` from `epochs`, `stop.every` from the steps."""
    c = config.copy_and_resolve_references()
    if not c.steps:
        if not c.get("epochs", 0) > 0:
            raise ValueError(f"steps is 0 and epochs is {c.get('epochs', 0)}; one of the two must be above 0")
        c.steps = max(LEAST_STEPS, math.ceil(c.epochs * n_examples / c.batch_size))
    c.stop.every = c.stop.every or max(1, round(c.steps / VALIDATIONS))
    return c


def scored(cases: base.Examples) -> bool:
    """Whether every case has a right answer: a test set for a server has none."""
    return all(row.get("answers", True) for row in cases.rows)


def abstract_model(config):
    """The model of a config, from the base's configuration alone: no weights are read, no words added."""
    task = tasks.build(config.task, **config.task_options)
    model = loading.abstract(config.base, question_encoder=task.question_encoder, **_options(config))
    if model.tokenizer is None:
        raise ValueError(f"{config.base} has no vocab.txt or tokenizer.json; put them beside the weights")
    return model


def _options(config) -> dict:
    c = config.model
    return {"image_size": c.image_size, "dtype": c.dtype, "remat": c.remat, "dropout": c.dropout}


def pinned_base(config, result: dict) -> str:
    """The base of a finished run: of a repository of the hub the very commit that was tuned, as 'owner/name@commit'."""
    revision = result.get("model", {}).get("report", {}).get("revision")
    return f"{config['base'].partition('@')[0]}@{revision}" if revision else str(config["base"])


def _base(config, task: tasks.Task):
    """(model, params, report) that training starts from, before words are added."""
    model, params, report = loading.read(config.base, question_encoder=task.question_encoder, **_options(config))
    if model.tokenizer is None:
        raise ValueError(f"{config.base} has no vocab.txt or tokenizer.json; put them beside the weights")
    if config.init == "scratch":
        model, params = loading.scratch(model.config, model.tokenizer, config.seed)
    elif config.init != "base":
        raise ValueError(f"init is {config.init!r}; choose 'base' (the checkpoint's weights) or 'scratch' (random)")
    return model, params, report


def methods_of(config) -> tuple[methods.Method, ...]:
    """The methods that a config names."""
    fields = {key: value for key, value in config.method.items() if key != "name"}
    return methods.build(config.method.name, config.head, **fields)


def narrowed(variables: Tree, mask, dtype: str) -> Tree:
    """Frozen matrices in `dtype`. In bfloat16 with model.dtype bfloat16 that is what every product casts them to, so nothing
    changes. Word embeddings stay as they are: they are added to others in float32 before anything is rounded."""
    if dtype == "float32":
        return variables
    if dtype != "bfloat16":
        raise ValueError(f"model.frozen_dtype is {dtype!r}; choose float32 or bfloat16")

    def one(name, x, tuned):
        return x if tuned or not re.search("^params/.*kernel$", name) else x.astype(dtype)

    return jax.tree.map(one, tree.names(variables), variables, mask)


def _placed(variables: Tree, model, mesh, log) -> Tree:
    """The variables on the mesh as the model's rules say, with a line about what that means where there are devices."""
    placed = sharding.shardings(variables, model.sharding, mesh)
    if mesh.size > 1:
        n_bytes, n_all = sharding.bytes_per_device(variables, placed), sum(x.nbytes for x in jax.tree.leaves(variables))
        shape = " x ".join(f"{name} {n}" for name, n in mesh.shape.items())
        log(f"mesh {shape}: {n_bytes / 1e6:.1f} MB of weights per device, {n_all / 1e6:.1f} MB in all")
        if whole := sharding.whole(variables, placed):
            log(f"every device holds whole: {', '.join(whole[:8])}")
    return sharding.put(variables, placed)


def can_cache(config, mask, model, n_images: int) -> tuple[bool, str]:
    """Whether image features may be computed once, and the reason."""
    c = model.config
    size = n_images * (1 + c.n_patches) * c.vision_width * jnp.dtype(c.dtype).itemsize
    tuned = [name for name, on in tree.flatten(mask).items() if on and "/vision" in name]
    if tuned:
        return False, f"{tuned[0]} is tuned"
    if config.data.augment != "none":
        return False, f"pictures are augmented ({config.data.augment})"
    if size > config.data.feature_bytes:
        return False, f"they would take {size / 1e9:.1f} GB, more than data.feature_bytes"
    return True, f"no tuned leaf is in the image encoder ({size / 1e6:.0f} MB)"


def can_cache_questions(config, mask, model, examples, images_cached: bool) -> tuple[bool, str]:
    """Whether question states may be computed once, and the reason."""
    n, length = examples.arrays["question"].shape
    size = n * length * model.config.text_width * jnp.dtype(model.config.dtype).itemsize
    tuned = [name for name, on in tree.flatten(mask).items() if on and "/text_encoder" in name]
    if tuned:
        return False, f"{tuned[0]} is tuned"
    if not images_cached:
        return False, "image features are computed every step"
    if size > config.data.feature_bytes:
        return False, f"they would take {size / 1e9:.1f} GB, more than data.feature_bytes"
    return True, f"no tuned leaf is in the question encoder ({size / 1e6:.0f} MB)"


def evaluate_split(
    config, model, task, versions: dict[str, Tree], split, cases, images, features, prepare, candidates=None
):
    """Scores of each version of the model on one split, and a row per case.

    A split whose cases have no answers, as a test set for a server, is predicted and not scored.
    """
    blank = dataclasses.replace(cases, arrays=cases.arrays | {"image_index": np.zeros(len(cases), np.int32)})
    cases = prepare(split.name, dataclasses.replace(cases, images=images))
    known = scored(cases)
    scores = {"n": len(cases), "scored": known}
    options = {"features": features, "batch_size": config.eval.batch_size}
    if known:
        examples = prepare(split.name, dataclasses.replace(task.examples(split, model.tokenizer), images=images))
    rows = [{"split": split.name, **row} for row in cases.rows]
    looks = [(label, variables, cases, options) for label, variables in versions.items()]
    if config.eval.get("text_only", False) and known:
        grey = {"features": _grey(model, versions["tuned"]), "batch_size": config.eval.batch_size}
        looks.insert(-1, ("text_only", versions["tuned"], blank, grey))
    for label, variables, shown, options in looks:
        written = evaluate.predict(
            model, variables, task, shown, beams=config.eval.beams, candidates=candidates, **options
        )
        if not known:
            for row, one in zip(rows, written, strict=True):
                row[label], row[f"{label}_score"] = one["text"], round(one["score"], 4)
            continue
        scores[label] = task.scores(cases.rows, [one["text"] for one in written])
        if label != "text_only" and not (
            config.optim.schedule == "plateau" and split.name == config.stop.split
        ):  # measured in training
            scores[label]["nll"] = evaluate.nll(model, variables, task, examples, **options)
        each = task.per_example(cases.rows, [one["text"] for one in written])
        for row, one, value in zip(rows, written, each, strict=True):
            row[label], row[f"{label}_score"] = one["text"], round(one["score"], 4)
            row[f"{label}_{task.main_metric}"] = round(float(value), 6)
    return scores, rows


def _grey(model, variables) -> jax.Array:
    """Image tokens of one picture of the mean colour, on every device that `variables` are on."""
    size = model.config.image_size
    image_1YXC = np.broadcast_to(np.float32(model.config.image_mean) * 255, (1, size, size, 3)).astype(np.uint8)
    tokens_1PD = evaluate.image_features(model, variables, image_1YXC, batch_size=1)
    on = sharding.mesh_of(variables)
    return jnp.asarray(tokens_1PD) if on is None else sharding.replicate(tokens_1PD, on)


def validation_sample(config, task, model, held_out, images) -> base.Examples:
    """At most config.stop.examples examples of config.stop.split, spread over it."""
    examples = task.examples(held_out[config.stop.split], model.tokenizer)
    some = np.unique(np.linspace(0, len(examples) - 1, min(config.stop.examples, len(examples))).astype(int))
    arrays = {name: array[some] for name, array in examples.arrays.items()}
    return dataclasses.replace(examples, arrays=arrays, images=images[config.stop.split])


def validation(config, model, task, sample, features, frozen, prepare):
    """tuned -> nats per token of the references of `sample`."""
    examples = prepare(config.stop.split, sample)
    options = {"features": features[config.stop.split], "batch_size": config.eval.batch_size}
    return lambda tuned: evaluate.nll(model, tree.join(tuned, frozen), task, examples, **options)


def why_step_0(config, validated: dict) -> str:
    """Why what was tuned is of no use, and the base as it was is kept; '' where it is of use or that cannot be told."""
    worth, step = validated["images"], validated["best_step"]
    if step == 0:
        return "the validation loss never fell below it; try a lower optim.lr, or leave these texts to the base"
    # of few pictures the bound is below zero for useful models too
    if worth is None or (worth["least"] if worth["n"] >= ENOUGH else worth["gain"]) > 0:
        return ""
    return (
        f"at the best step, {step}, it cannot be shown on {worth['n']} validation pictures that texts are more likely with "
        f"their own picture than with another ({worth['gain']:+.3f} nats a text, 95 % lower bound {worth['least']:+.3f}), so "
        f"the model seems to have learned the texts, not what the pictures show. Do texts and pictures belong together? "
        f"--config.stop.images_must_matter=False --accept_changes keeps step {step} all the same"
    )


def forgetting(config, model, base: Tree, tuned: Tree, features) -> dict:
    """{'base', 'tuned', 'n'}: nats per token of captions of test pictures in the style of pre-training.

    What tuning took away of what the base knew is 'tuned' less 'base', as in HF's comparison of methods. A model that
    answers questions captions with its decoder alone. `features` of the test pictures, where the encoder is frozen.
    """
    settings = dict(config.data.items()) | {"captions": "web", "types": ()}
    split = data.load(ml_collections.ConfigDict(settings), ["test"])["test"]
    split = dataclasses.replace(split, rows=[row | {"captions": row["captions"][:1]} for row in split.rows])
    task = tasks.build("captioning", max_tokens=40)
    model = type(model)(dataclasses.replace(model.config, question_encoder=False), model.tokenizer)
    examples = task.examples(split, model.tokenizer)
    examples = dataclasses.replace(examples, images=pipeline.Resized.of(split.images, model))
    options = {"features": features, "batch_size": config.eval.batch_size}
    scores = {
        label: evaluate.nll(model, variables, task, examples, **options)
        for label, variables in (("base", base), ("tuned", tuned))
    }
    return scores | {"n": len(split.rows)}


def _gallery(workdir: Path, split: base.Split, rows: list[dict]) -> None:
    """Twelve cases spread over the split: truth, before, after."""
    rows = [row for row in rows if row["split"] == split.name]
    where = {row["image_id"]: i for i, row in enumerate(split.rows)}
    cases = []
    for k in np.linspace(0, len(rows) - 1, min(12, len(rows))).round().astype(int):
        row = rows[k]
        lines = [("Q", row["question"])] if "question" in row else []
        truth = row.get("answers") or row.get("references")
        lines += [("truth", truth[0])] if truth else []
        lines += [(said, row[label]) for said, label in (("before", "base"), ("after", "tuned")) if label in row]
        cases.append({"image": split.images[where[row["image_id"]]], "lines": lines})
    results.gallery(workdir / "gallery.png", cases)
