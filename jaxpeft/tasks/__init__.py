"""The tasks, by the name that configs use. A new task is one file and one line here."""

import dataclasses

from jaxpeft.tasks.base import Task
from jaxpeft.tasks.captioning import Captioning
from jaxpeft.tasks.vqa import Vqa

TASKS: dict[str, type[Task]] = {"captioning": Captioning, "vqa": Vqa}


def build(name: str, **options) -> Task:
    """The task `name` with its options; raises ValueError for an unknown name or option."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    known = {field.name for field in dataclasses.fields(TASKS[name])}
    if set(options) - known:
        raise ValueError(f"task {name}: unknown options {sorted(set(options) - known)}; it has {sorted(known)}")
    return TASKS[name](**options)
