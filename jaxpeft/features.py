"""Image features that several runs share: computed once, kept on disk, memory-mapped.

Right only where no tuned leaf is in the image encoder and pictures are not augmented (`point.can_cache`). A file is named
by what it depends on: the encoder's weights and configuration, and the pictures. It is written whole or not at all, so
readers need no lock; two runs that start together may both compute it, and one of the equal files stays.
"""

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxpeft import evals, tree
from jaxpeft.datasets import Split


def name_of(model, variables, split: Split) -> str:
    """The file name of a split's features: split, number of pictures, digest."""
    config = dataclasses.asdict(model.config)
    parts = [
        tree.digest(variables["params"]["vision"]),
        {key: config[key] for key in config if key.startswith(("image_", "patch_", "vision_")) or key == "dtype"},
        split.source,
        [row["image_id"] for row in split.rows],
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return f"{split.name}-{len(split.rows)}-{digest}.npy"


def table(model, variables, split: Split, pictures, directory: str | Path | None, limit: int, log=print):
    """Image tokens (n, 1 + P, D) of a split's pictures; from `directory`, and into it, where one is given.

    `limit`: most bytes there; the files that were not used for longest are deleted first. A split whose `source` is empty
    says nothing of where its pictures are from, so its features are computed and not kept.
    """
    if not directory or not split.source:
        return evals.image_features(model, variables, pictures)
    path = Path(directory) / name_of(model, variables, split)
    if path.exists():
        try:
            stored = np.load(path, mmap_mode="r")
            os.utime(path)
            return jnp.asarray(stored)
        except (ValueError, OSError) as error:  # truncated by something else than this module
            log(f"{path} cannot be read ({error}); computed again")
    path.parent.mkdir(parents=True, exist_ok=True)
    computed = evals.image_features(model, variables, pictures)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.save(file, np.asarray(computed))
    os.replace(temporary, path)
    _trim(path.parent, limit, keep=path)
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
