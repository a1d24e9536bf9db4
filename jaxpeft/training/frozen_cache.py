"""Outputs of frozen stages that several runs share: computed once, kept on disk, memory-mapped.

Image tokens of every picture, and question states of every question. Right only where no tuned leaf is in the stage or
before it and pictures are not augmented (`point.can_cache`, `point.can_cache_questions`). A file is named by what it
depends on: the weights and configuration of the stages, the pictures, the questions. It is written whole or not at all, so
readers need no lock; two runs that start together may both compute it, and one of the equal files stays.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.data.base import Examples, Split
from jaxpeft.training import evaluate, sharding


def name_of(model, variables, split: Split, question_NT: np.ndarray | None = None) -> str:
    """The file name of a split's image tokens, or of the states of `question_NT`: split, number of rows, digest."""
    config = dataclasses.asdict(model.config)
    stages = ("vision",) if question_NT is None else ("vision", "text_encoder")
    prefixes = ("image_", "patch_", "vision_", *(() if question_NT is None else ("text_",)))
    parts = [
        *(tree.digest(variables["params"][stage]) for stage in stages),
        {key: config[key] for key in config if key.startswith(prefixes) or key == "dtype"},
        split.source,
        [row["image_id"] for row in split.rows],
    ]
    if question_NT is not None:
        parts.append(hashlib.sha256(question_NT.tobytes()).hexdigest())
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    n, kind = (len(split.rows), "") if question_NT is None else (len(question_NT), "questions-")
    return f"{split.name}-{kind}{n}-{digest}.npy"


def table(model, variables, split: Split, images, directory: str | Path | None, limit: int, log=print) -> jax.Array:
    """Image tokens (n, 1 + P, D) of a split's pictures; from `directory`, and into it, where one is given. On every device
    that `variables` are on.

    `limit`: most bytes there; the files that were not used for longest are deleted first. A split whose `source` is empty
    says nothing of where its pictures are from, so its features are computed and not kept.
    """

    def compute():
        return evaluate.image_features(model, variables, images)

    if directory and split.source:
        found = _kept(Path(directory) / name_of(model, variables, split), compute, limit, log)
    else:
        found = compute()
    on = sharding.mesh_of(variables)
    return jnp.asarray(found) if on is None else sharding.replicate(found, on)


def with_questions(
    model, variables, split: Split, examples: Examples, features, directory: str | Path | None, limit: int, log=print
) -> Examples:
    """`examples` of a split with 'question_states' (n, T, D), which the decoder looks at, beside their questions."""

    def compute():
        return evaluate.question_states(model, variables, examples, features)

    if not directory or not split.source:
        states = compute()
    else:  # the picture of a question is known by its row in `features`
        asked = np.column_stack([examples.arrays["question"], examples.arrays["image_index"]])
        states = _kept(Path(directory) / name_of(model, variables, split, asked), compute, limit, log)
    return dataclasses.replace(examples, arrays=examples.arrays | {"question_states": states})


def _kept(path: Path, compute, limit: int, log) -> np.ndarray:
    """What `compute` returns, memory-mapped from `path`, which is written first where it is not there."""
    stored = None
    if path.exists():
        try:
            stored = np.load(path, mmap_mode="r")
            with contextlib.suppress(OSError):  # a read-only directory
                os.utime(path)
        except (ValueError, OSError) as error:  # truncated by something else than this module
            log(f"{path} cannot be read ({error}); computed again")
    if not sharding.any_of(stored is None):
        return stored
    computed = compute()  # all hosts together
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if sharding.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.save(file, computed)
            os.replace(temporary, path)
            _trim(path.parent, limit, keep=path)
    except OSError as error:  # a full disk: what is computed can be used all the same
        temporary.unlink(missing_ok=True)
        log(f"{path} cannot be written ({error.strerror}); computed again the next time")
    return computed


def _trim(directory: Path, limit: int, keep: Path) -> None:
    """Delete the longest unused tables until the rest fit in `limit`, and what killed writers left an hour ago."""
    for path in directory.glob(".*.npy.*"):
        if time.time() - path.stat().st_mtime > 3600:
            path.unlink(missing_ok=True)
    files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in directory.glob("[!.]*.npy"))
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= limit:
            return
        if path != keep:
            path.unlink(missing_ok=True)  # a process that has it mapped keeps reading it
            total -= size
