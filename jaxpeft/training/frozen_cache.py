"""Outputs of frozen stages: computed once per image or example, shared by runs through memory-mapped files.

The dependencies of a stage are derived from its program, not declared: the leaves that its output depends on, and whether it
draws random numbers. A stage is cached if none of these leaves is trainable, nothing in it is random (dropout), images are not
augmented, and the stages it reads are cached too. A file is named by a digest of everything that its content depends on: the
compiled program, the values of these leaves, images and prompts. It is written completely or not at all, so readers need no
lock; two runs that start together may both compute it, and either of the equal files is kept.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.interpreters import partial_eval

from jaxpeft import tree
from jaxpeft.data.base import Examples, Split
from jaxpeft.models.base import Stage, VisionLanguageModel
from jaxpeft.runtime import files
from jaxpeft.training import evaluate, sharding
from jaxpeft.training.optim import Config
from jaxpeft.tree import Mask, Tree


@dataclasses.dataclass(frozen=True)
class Program:
    """What the output of a stage depends on, directly or through stages it reads. `row`: its shape without the batch axis."""

    leaves: frozenset[str]
    random: bool
    augmented: bool  # whether it depends on the images, which may be augmented
    row: jax.ShapeDtypeStruct
    digest: str


def programs(model: VisionLanguageModel, variables: Tree, examples: Examples | None = None) -> dict[str, Program]:
    """Stage name -> its program, from shapes alone: those of `examples` (of prompts, for example) where they are given."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    batch = dict(jax.eval_shape(model.example))
    given = examples.arrays if examples is not None else {}
    batch |= {
        name: jax.ShapeDtypeStruct((1, *given[name].shape[1:]), given[name].dtype) for name in batch if name in given
    }
    names, key, found = list(tree.flatten(shapes)), jax.eval_shape(lambda: jax.random.key(0)), {}
    for stage in model.stages:

        def run(variables: Tree, inputs: dict[str, jax.Array], key: jax.Array, name: str = stage.name) -> jax.Array:
            return model.apply(variables, inputs, name, method="stage", rngs={"dropout": key})

        arguments = shapes, {name: batch[name] for name in stage.reads}, key
        traced = jax.jit(run).trace(*arguments)
        jaxpr = traced.jaxpr.jaxpr
        _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        before = [found[name] for name in stage.reads if name in found]
        output = jax.eval_shape(run, *arguments)
        parts = [traced.lower().as_text(), *(one.digest for one in before)]
        found[stage.name] = Program(
            leaves=frozenset(name for name, on in zip(names, used, strict=False) if on).union(
                *(p.leaves for p in before)
            ),
            random=used[-1] or any(one.random for one in before),
            augmented="image" in stage.reads or any(one.augmented for one in before),
            row=jax.ShapeDtypeStruct(output.shape[1:], output.dtype),
            digest=hashlib.sha256("".join(parts).encode()).hexdigest(),
        )
        batch[stage.name] = output
    return found


@dataclasses.dataclass(frozen=True)
class FrozenCache:
    """The stages of a run that are computed once, and where their outputs are stored."""

    model: VisionLanguageModel
    variables: Tree
    stages: tuple[Stage, ...]
    programs: dict[str, Program]
    why: dict[str, str]  # stage name -> why it is computed every step; '' where it is computed once
    limit: int  # the most bytes in the directory: the least recently used files are deleted first
    directory: Path | None = None  # where runs share tables; None: in memory
    log: Callable[[str], object] = print
    tables: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)  # of (split, stage), per image

    def fill(self, split: Split, examples: Examples, per: tuple[str, ...] = ("image", "example")) -> Examples:
        """Add the outputs of cached stages to the examples, and remove what only these stages read."""
        outputs = {"image": self._per_image, "example": self._per_example}
        stages = [stage for stage in self.stages if stage.per in per]
        return self._filled(examples, stages, lambda stage, examples: outputs[stage.per](stage, split, examples))

    def shapes(self, examples: Examples) -> Examples:
        """As `fill` for examples of a single image, but with zeros that take no memory in place of the outputs."""

        def zeros(stage: Stage, examples: Examples) -> np.ndarray:
            row = self.programs[stage.name].row
            return np.broadcast_to(np.zeros((), row.dtype), (1 if stage.per == "image" else len(examples), *row.shape))

        return self._filled(examples, self.stages, zeros)

    def _filled(
        self, examples: Examples, stages: Sequence[Stage], output: Callable[[Stage, Examples], np.ndarray]
    ) -> Examples:
        for stage in stages:
            field = "tables" if stage.per == "image" else "arrays"
            rows = getattr(examples, field) | {stage.name: output(stage, examples)}
            examples = dataclasses.replace(examples, **{field: rows})
        return _without(examples, self._unread({stage.name for stage in stages}))

    def _unread(self, cached: set[str]) -> set[str]:
        """Batch keys that only cached stages read."""
        readers = {}
        for stage in self.model.stages:
            for name in stage.reads:
                readers.setdefault(name, []).append(stage.name)
        large = {"image", *(stage.name for stage in self.model.stages)}
        return {name for name, some in readers.items() if name in large and cached.issuperset(some)}

    def _per_image(self, stage: Stage, split: Split, examples: Examples) -> np.ndarray:
        key = (split.name, stage.name)
        if key not in self.tables:
            assert examples.images is not None  # only `fill` takes them away
            n = len(examples.images)
            every = Examples({"image_index": np.arange(n, dtype=np.int32)}, examples.images, [], examples.tables)
            ids = [row["image_id"] for row in split.rows]
            self.tables[key] = self._kept(stage, split, every, [split.source, ids])
        return self.tables[key]

    def _per_example(self, stage: Stage, split: Split, examples: Examples) -> np.ndarray:
        reads = [examples.arrays[name] for name in stage.reads if name in examples.arrays]
        ids = [split.rows[i]["image_id"] for i in examples.arrays["image_index"]]
        content = [hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest() for x in reads]
        return self._kept(stage, split, examples, [split.source, ids, *content])

    def _kept(self, stage: Stage, split: Split, examples: Examples, content: list) -> np.ndarray:
        def compute() -> np.ndarray:
            return evaluate.stage_outputs(self.model, self.variables, examples, stage.name)

        if not self.directory or not split.source:  # '': the origin of the images is unknown
            return compute()
        program = self.programs[stage.name]
        flat = tree.flatten(self.variables)
        leaves = tree.digest({name: flat[name] for name in sorted(program.leaves)})
        digest = hashlib.sha256(json.dumps([program.digest, leaves, *content]).encode()).hexdigest()[:16]
        path = self.directory / f"{split.name}-{stage.name}-{len(examples)}-{digest}.npy"
        # a .npy file does not name bfloat16: it is read as two bytes without a type
        return _kept(path, compute, self.limit, self.log).view(program.row.dtype)


def _without(examples: Examples, names: set[str]) -> Examples:
    return dataclasses.replace(
        examples,
        images=None if "image" in names else examples.images,
        arrays={name: x for name, x in examples.arrays.items() if name not in names},
        tables={name: x for name, x in examples.tables.items() if name not in names},
    )


def planned(
    config: Config, model: VisionLanguageModel, variables: Tree, mask: Mask, examples: Examples, n_images: int
) -> FrozenCache:
    """The cache of a run, in memory. `examples` are the training examples, `n_images` counts the images of all splits."""
    found, limit = programs(model, variables, examples), config.data.feature_bytes
    n_rows = {"image": n_images, "example": len(examples)}
    why = cacheable(model, found, mask, config.data.augment, n_rows, limit)
    return FrozenCache(model, variables, tuple(one for one in model.stages if not why[one.name]), found, why, limit)


def cacheable(
    model: VisionLanguageModel, found: dict[str, Program], mask: Mask, augment: str, n_rows: dict[str, int], limit: int
) -> dict[str, str]:
    """Stage name -> why it must be computed every step; '' for a stage that can be computed once.

    `n_rows`: the number of rows of a stage per 'image' and per 'example'; `limit`: the most bytes of a table.
    """
    trained, why = [name for name, on in tree.flatten(mask).items() if on], {}
    for stage in model.stages:
        program = found[stage.name]
        size = n_rows[stage.per] * program.row.size * program.row.dtype.itemsize
        changing = [name for name in trained if name in program.leaves]
        waiting = [name for name in stage.reads if why.get(name)]
        if changing:
            why[stage.name] = f"{changing[0]} is trained"
        elif program.random:
            why[stage.name] = "it has dropout"
        elif program.augmented and augment != "none":
            why[stage.name] = f"images are augmented ({augment})"
        elif waiting:
            why[stage.name] = f"it reads {waiting[0]}, which is computed every step"
        elif size > limit:
            why[stage.name] = f"its outputs would take {size / 1e9:.1f} GB, more than data.feature_bytes"
        else:
            why[stage.name] = ""
    return why


def _kept(path: Path, compute: Callable[[], np.ndarray], limit: int, log: Callable[[str], object]) -> np.ndarray:
    """The result of `compute`, memory-mapped from `path`, where it is computed and written unless it is there."""
    stored = None
    if path.exists():
        try:
            stored = np.load(path, mmap_mode="r")
            with contextlib.suppress(OSError):  # a read-only directory
                os.utime(path)
        except (ValueError, OSError) as error:  # truncated, but not by this module
            log(f"{path} cannot be read ({error}); computed again")
    missing = sharding.any_of(stored is None)  # on any host
    if stored is not None and not missing:
        return stored
    computed = compute()  # by all hosts together
    try:
        if sharding.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, computed)
            computed = np.load(path, mmap_mode="r")  # frees the memory
            _trim(path.parent, limit, keep=path)
    except OSError as error:  # a full disk: the result can be used all the same
        log(f"{path} cannot be written ({error.strerror}); it will be computed again next time")
    return computed


def _trim(directory: Path, limit: int, keep: Path) -> None:
    """Delete the least recently used tables until the rest fit into `limit`, and partial files older than an hour."""
    for path in directory.glob(".*.npy.*"):
        if time.time() - path.stat().st_mtime > 3600:
            path.unlink(missing_ok=True)
    tables = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in directory.glob("[!.]*.npy"))
    total = sum(size for _, size, _ in tables)
    for _, size, path in tables:
        if total <= limit:
            return
        if path != keep:
            path.unlink(missing_ok=True)  # a process that has it mapped keeps reading it
            total -= size
