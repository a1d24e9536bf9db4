"""Run directories: whether a run may be resumed in one, and loading finished runs as models."""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

import ml_collections

from jaxpeft import tasks, tree
from jaxpeft.interchange import load_tuned
from jaxpeft.methods import Method
from jaxpeft.models import loading
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime import files, registry, renamed
from jaxpeft.training.setup import Config, Log, as_json, pinned_base, read_base
from jaxpeft.tree import Tree

MOST_RESULT = 1 << 30  # bytes of a result.json
Finished = tuple[VisionLanguageModel, Tree, tuple[Method, ...], tasks.Task]


def read(workdir: str | Path) -> tuple[dict, dict]:
    """(config with the current keys, result) of a finished run. Raises ValueError where there is none."""
    workdir = Path(workdir)
    for name in ("result.json", "config.json"):
        if not (workdir / name).exists():
            raise ValueError(f"{workdir} holds no finished run: {name} not found; finish the run with main.py")
    with files.reading(workdir, "holds no jaxpeft run"):
        config = renamed.translated(files.read_json(workdir / "config.json"))
        return config, files.read_json(workdir / "result.json", MOST_RESULT)


def load_run(workdir: str | Path, imports: Iterable[str] = ()) -> Finished:
    """Load (model, variables, methods, task) of a finished run, for `generate`, `merge` and the exports.

    `imports`: modules with the run's own method or task, which are imported first (see runtime/registry.py). Nothing in a run
    directory is ever imported or executed. Raises ValueError where `workdir` holds no finished run, where the base changed
    since, or where a method or task is unknown; the message then names the modules that the run imported.
    """
    registry.load(imports)
    workdir = Path(workdir)
    config, result = read(workdir)
    if not (workdir / "tuned").exists():
        raise ValueError(
            f"{workdir} has no tuned/: the run was made by an older version, which did not save it; run it again"
        )
    with files.reading(workdir, "holds no jaxpeft run"):
        try:
            return _load_run(workdir, ml_collections.ConfigDict(config), result)
        except registry.Unknown as error:
            names = [name for name in result.get("imports", []) if re.fullmatch(r"[\w.]{1,200}", name)][:5]
            said = f"used code from {', '.join(names)}" if names else "does not name the module that defines it"
            raise ValueError(
                f"{workdir}: {error}. The run {said}; if you have and trust this code, import it: "
                f"--imports={','.join(names) or 'MODULE'}, in Python jp.load_run(..., imports=[...])"
            ) from error


def _load_run(workdir: Path, config: Config, result: dict) -> Finished:
    options = result.get("task_options", tasks.IN_0_1.get(config.task, {}) | dict(config.task_options))
    length = options.pop("length", None)  # in version 0.1, the tokens of a text including its start
    task = tasks.build(config.task, **options)
    config.base = pinned_base(config, result)
    model, params, _ = read_base(config, task)
    model, params, _ = loading.extend_vocabulary(model, params, result["model"]["new_words"], config.seed)
    if not result["model"].get("new_rows"):  # tuned by version 0.1, which kept the whole word embedding
        model, params = loading.joined(model, params)
    if length:
        task = dataclasses.replace(task, max_new_tokens=max(1, length - len(task.template(model).start)))
    variables, chosen = load_tuned(model, params, workdir / "tuned")
    return model, variables, chosen, task


def check_workdir(config: Config, workdir: Path, accept: bool = False, log: Log = print) -> bool:
    """Whether `workdir` holds a run with another config. Raises ValueError with the differences; with `accept` logs them."""
    if not (workdir / "config.json").exists():
        return False
    saved = renamed.with_defaults(json.loads((workdir / "config.json").read_text()))
    before, now = tree.flatten(saved), tree.flatten(as_json(config))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if keys:
        rows = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys)
        if not accept:
            raise ValueError(
                f"{workdir} holds a run with another config; use a new --workdir, or --accept_changes to resume from its last "
                f"step. Changed: {rows}"
            )
        log(f"{workdir} holds a run with another config, accepted because accept_changes is set. Changed: {rows}")
    return bool(keys)
