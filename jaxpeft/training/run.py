"""One run from top to bottom: setup, inputs, training, scores, files.

    python main.py --config=configs/point.py:task=vqa,method=lora,size=8 --workdir=DIR

Errors in config, data or checkpoint are raised before training starts, and before anything is written that a corrected run in
the same directory would conflict with.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from pathlib import Path

import jax

from jaxpeft import methods, tree
from jaxpeft.adapt import sites
from jaxpeft.data import pipeline
from jaxpeft.data.base import Split
from jaxpeft.interchange import save_tuned
from jaxpeft.models import stack
from jaxpeft.runtime import files, host, locks
from jaxpeft.training import boards, finished, inputs, results, sharding
from jaxpeft.training import score as scoring
from jaxpeft.training import setup as setups
from jaxpeft.training.inputs import Inputs
from jaxpeft.training.loop import Job, fit
from jaxpeft.training.setup import Config, Log, Setup
from jaxpeft.tree import Tree


def run(
    config: Config,
    workdir: str | Path,
    log: Log = print,
    features_in: str | Path | None = None,
    command: str = "",
    accept_changes: bool = False,
) -> dict:
    """Train and evaluate one run in `workdir`; returns the content of result.json. `command`: the command line, stored there.

    `features_in`: a directory where several runs share outputs of frozen stages (frozen_cache.py). All processes of a run on
    several hosts make the same call, with a `workdir` on a shared file system.

    The same call resumes an interrupted run from its last checkpoint, and returns the result of a finished run at once. Raises
    ValueError for an invalid config, data set or checkpoint, or a `workdir` in use, before training; NonFinite for a loss or
    gradient that is not finite; KeyboardInterrupt after a stop was requested and the state was saved. A changed config, data
    set or base is a ValueError that names the differences, unless `accept_changes`.
    """
    workdir, first = Path(workdir), sharding.is_first()
    workdir.mkdir(parents=True, exist_ok=True)
    log = log if first else lambda *_: None
    with contextlib.ExitStack() as entered:
        if first:
            entered.enter_context(locks.held(workdir))
        began = time.perf_counter()
        setups.check_config(config)
        entered.enter_context(setups.precision(config))
        changed = finished.check_workdir(config, workdir, accept_changes, log)
        if not changed and (workdir / "result.json").exists():
            result = json.loads((workdir / "result.json").read_text())
            log(f"the run in {workdir} is already finished; its result:\n\n{results.table(result)}")
            return result
        setup = setups.prepare(config, log)
        yardsticks = scoring.yardsticks(config, setup, log)
        read = inputs.prepare(config, setup, Path(features_in) if features_in else None, log)
        plan = setups.scheduled(config, len(read.examples("train")))
        _begin(config, setup, workdir, changed, log)
        state, timing = fit(plan, workdir, _job(plan, setup, read, log), log, accept_changes)
        started = time.perf_counter()
        best, validated = scoring.kept_step(config, setup, read, (state.tuned, timing), workdir, log)
        scored = scoring.score(config, setup, read, best, yardsticks)
        timing |= {"eval_s": time.perf_counter() - started, "total_s": time.perf_counter() - began}
        result = _result(config, setup, scored) | {"validation": validated, "timing": timing, "status": "done"}
        result |= {"command": command} if command else {}
        whole = tree.join(jax.tree.map(tree.fetch, best), tree.split(setup.originals, setup.mask)[1])
        if first:
            _save(config, setup, workdir, whole, (result, scored.rows), log)
    return result


def _begin(config: Config, setup: Setup, workdir: Path, changed: bool, log: Log) -> None:
    """Write the first files, after all inputs have been checked."""
    if not sharding.is_first():
        return
    if changed and (workdir / "result.json").exists():
        os.replace(workdir / "result.json", workdir / "result_before.json")
        log(f"the previous result is kept as {workdir / 'result_before.json'}")
    files.write_json(workdir / "config.json", setups.as_json(config))
    files.write_json(workdir / "sites.json", sites.report(setup.variables, setup.mask))


def _job(plan: Config, setup: Setup, read: Inputs, log: Log) -> Job:
    """The job of the loop; `plan` is the config with its number of steps."""
    examples, rows = read.examples("train"), sharding.rows(plan.batch_size, setup.mesh)
    options = {"seed": plan.seed, "augment": plan.data.augment, "rows": rows}
    if plan.optim.schedule == "plateau":
        log(
            f"at most {plan.steps:,} steps (batch {plan.batch_size}, {len(examples):,} training examples); validated on "
            f"{plan.stop.split} every {plan.stop.every} steps, and the best step is kept"
        )
    return Job(
        loss=functools.partial(setup.task.loss, setup.model),
        trainable=setup.trainable,
        frozen=stack.apart(setup.model.config, setup.frozen),
        batches=lambda start: pipeline.batches(examples, plan.batch_size, start=start, **options),
        validate=scoring.validation(plan, setup, read),
        rules=setup.model.sharding,
        manifest={"config": setups.digest(setups.as_json(plan)), **_digests(setup)},
    )


def _digests(setup: Setup) -> dict:
    return {"base": setup.facts["base_digest"], "data": {name: _of_data(one) for name, one in setup.splits.items()}}


def _of_data(split: Split) -> str:
    """`setups.digest([source, rows])`, row by row: as one text, millions of rows would take gigabytes."""
    # a source may be a directory that is named by a digest; it may be moved
    found = hashlib.sha256(json.dumps([Path(split.source).name, []])[:-2].encode())
    for i, row in enumerate(split.rows):
        found.update((", " * (i > 0) + json.dumps(row, sort_keys=True)).encode())
    found.update(b"]]")
    return found.hexdigest()[:16]


def _result(config: Config, setup: Setup, scored: scoring.Scored) -> dict:
    train = setup.splits["train"]
    return {
        "point": config.name or point_id(config),
        "task": config.task,
        "method": config.method.name,
        "size": methods.size_of(config.method),
        "fraction": config.data.fraction,
        "n_train_images": len(train.rows),
        "lr": config.optim.lr,
        "head": config.head,
        "seeds": {"seed": config.seed, "subset": config.data.subset_seed},
        "counts": setup.facts["counts"],
        "main_metric": setup.task.main_metric,
        "metrics": scored.metrics,
        "forgetting": scored.forgetting,
        "memory": results.memory(),
        "digests": _digests(setup),
        "model": setup.facts["model"],
        "task_options": dataclasses.asdict(setup.task),
        "texts": setup.facts["texts"],
        "data_report": train.report,
        "code": results.code(),
        "machine": host.machine(),
        "versions": host.versions(),
        "imports": setups.imports_of(config, setup.methods, setup.task),
    }


def _save(config: Config, setup: Setup, workdir: Path, whole: Tree, found: tuple[dict, list[dict]], log: Log) -> None:
    """Write the last files. result.json comes last: a run that has it is finished."""
    result, rows = found
    for name in config.eval.splits:
        mine = [row for row in rows if row["split"] == name]
        upload = setup.task.upload(mine, [row["tuned"] for row in mine])
        if upload is not None:
            files.write_text(workdir / f"upload_{name}.json", json.dumps(upload) + "\n")
    files.write_jsonl(workdir / "predictions.jsonl", rows)
    save_tuned(setup.model, whole, workdir / "tuned")
    with_gallery = ", gallery.png" if rows and config.eval.gallery else ""
    if with_gallery:
        scoring.gallery(workdir, setup.splits[config.eval.splits[0]], rows)
    boards.finished(workdir, result, log)
    files.write_json(workdir / "result.json", result)
    log(
        f"\n{results.table(result)}\nresults in {workdir}: result.json, predictions.jsonl, metrics.jsonl{with_gallery}; "
        f"trained parameters: tuned/ (jp.load_run, jaxpeft generate)"
    )


def point_id(config: Config) -> str:
    """A readable, stable name of a run."""
    name = f"{config.method.name}{methods.size_of(config.method) or ''}"
    head = "" if config.head == "none" else f"+{config.head}"
    n = f"n{config.data.n_images}" if config.data.n_images else f"f{config.data.fraction:g}"
    return f"{config.task}-{name}{head}-{n}-{config.init}-s{config.seed}"
