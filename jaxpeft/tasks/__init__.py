"""The tasks, by the name that configs use. A new task is one file and one line here, or the line `TASKS["mine"] = Mine` in a
module of your own (see jaxpeft/runtime/registry.py)."""

import dataclasses
from typing import Any

from jaxpeft.metrics import METRICS
from jaxpeft.runtime.registry import Registry
from jaxpeft.tasks.base import Task, check_ids
from jaxpeft.tasks.captioning import Captioning
from jaxpeft.tasks.vqa import Vqa

TASKS = Registry("task", {"captioning": Captioning, "vqa": Vqa})

# the default options of version 0.1, which its runs do not store
IN_0_1 = {"captioning": {"max_tokens": 40, "max_words": 50, "length": 40, "variant": "coco"},
          "vqa": {"max_question": 35, "length": 10, "variant": "official2021"}}  # fmt: skip
__all__ = ["IN_0_1", "TASKS", "Captioning", "Task", "Vqa", "build", "check_ids"]


def build(name: str, **options: Any) -> Task:
    """Build the task `name` with its options. Raises ValueError for an unknown name or option."""
    cls = TASKS.find(name)
    known = {field.name for field in dataclasses.fields(cls)}
    if set(options) - known:
        raise ValueError(f"task {name}: unknown options {sorted(set(options) - known)}; allowed: {sorted(known)}")
    for metric in options.get("metrics", ()):
        METRICS.find(metric)
    return cls(**options | ({"metrics": tuple(options["metrics"])} if "metrics" in options else {}))
