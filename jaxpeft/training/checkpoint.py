"""Checkpoints of the tuned half: a thin layer over orbax with what it lacks (digests, a walk back, failed writes).

A step holds the flat state (tuned leaves, optimizer, step number, which is also the position in the data) and a manifest:
what it was trained on, a digest of every part of every leaf, and a digest of itself. The base is named by its digest, not
stored. Writing goes on beside training. Orbax restores a step with flipped bits silently and raises on a truncated one;
`restore` verifies, says what is wrong with a step, puts it aside and goes back to the one before.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxpeft import tree
from jaxpeft.runtime import signals
from jaxpeft.training import sharding
from jaxpeft.tree import Tree

WHOLE = "whole"  # the array that holds every leaf which is not split over devices (`tree.pack`)


def _sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A part of an array as '0:4,2:8'."""
    return ",".join("{}:{}".format(*one.indices(n)[:2]) for one, n in zip(index, shape, strict=True))


def _part(array: np.ndarray, key: str) -> np.ndarray:
    return array[tuple(slice(*map(int, one.split(":"))) for one in key.split(",") if one)]


def _digests(flat: dict[str, jax.Array]) -> dict[str, dict[str, str]]:
    """Leaf -> part -> digest. A part is what one device holds; each is read by a host that has it, and all hosts know all."""
    keys, mine = [], []
    for name, leaf in flat.items():
        owners = {}  # of equal parts, the first device's
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            owners.setdefault(_key(index, leaf.shape), device)
        here = {shard.device: shard.data for shard in leaf.addressable_shards}
        for key, device in owners.items():
            keys.append((name, key))
            mine.append(_sha(np.asarray(here[device])) if device in here else "0" * 16)
    if jax.process_count() > 1:
        as_bytes = np.array([list(bytes.fromhex(digest)) for digest in mine], np.uint8)
        mine = [bytes(row).hex() for row in multihost_utils.process_allgather(as_bytes).max(axis=0)]
    digests: dict[str, dict[str, str]] = {name: {} for name in flat}
    for (name, key), digest in zip(keys, mine, strict=True):
        digests[name][key] = digest
    return digests


def check_manifest(what: str, stored: dict, now: dict, accept: bool, log: Callable[[str], object]) -> None:
    """Raise ValueError naming what differs between the manifest that was `stored` and the one `now`; `accept`: only say it."""
    differs = {k: (stored.get(k), v) for k, v in now.items() if stored.get(k) != v}
    if differs:
        rows = "; ".join(f"{k}: stored {a}, now {b}" for k, (a, b) in _leaves_that_differ(differs))
        if not accept:
            raise ValueError(f"{what} belongs to another run ({rows}); use a new workdir")
        log(f"{what} was made by another run, accepted as asked ({rows})")


def _leaves_that_differ(differs: dict[str, tuple[Any, Any]]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(key, (before, now)), with 'data/train' for an entry of a dictionary."""
    for key, (a, b) in differs.items():
        if isinstance(a, dict) and isinstance(b, dict):
            keys = sorted(one for one in a.keys() | b.keys() if a.get(one) != b.get(one))
            yield from ((f"{key}/{one}", (a.get(one), b.get(one))) for one in keys)
        else:
            yield key, (a, b)


def _of_manifest(manifest: dict) -> str:
    text = json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a save that fails four times, with tracebacks; here it is one line."""
    return os.path.join("orbax", "checkpoint") not in record.pathname or record.levelno < logging.WARNING


class Checkpoints:
    """Steps under one directory, the newest `keep` of them. `log` hears of damaged steps, and once of steps that cannot be
    written until one can be again."""

    def __init__(self, directory: str | Path, keep: int = 2, log: Callable[[str], object] = print) -> None:
        self._directory, self._keep, self._log = Path(directory).absolute(), keep, log
        self._saving: int | None = None  # the step that is being written
        self._failing = False
        logging.getLogger("absl").addFilter(_not_orbax)
        self._open()

    def _open(self) -> None:
        # directories made in the background, on a full disk, leave threads that wait for them, and the process with them,
        # for five minutes (orbax 0.12.8)
        background = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, async_options=background)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: Tree, manifest: dict) -> bool:
        """Begin to store `state` as `step`; whether it was begun. `manifest` is JSON: what the run depends on.

        The values are copied before this returns. A write that fails (a full disk) is said, and the steps before are
        kept; the next call tries again.
        """
        self.wait()
        flat = {name.replace("/", "|"): leaf for name, leaf in tree.flatten(state).items()}  # '/' would be a directory
        # leaves that no devices share become one array: orbax writes it three times as fast as sixty
        whole = {name: leaf for name, leaf in flat.items() if leaf.is_fully_replicated}
        manifest = manifest | {"leaves": _digests(flat), "layout": tree.layout(whole)}
        manifest |= {"digest": _of_manifest(manifest)}
        flat = {name: leaf for name, leaf in flat.items() if name not in whole}
        if whole:
            flat[WHOLE] = np.asarray(sharding.packed(list(whole.values())))
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(flat), manifest=ocp.args.JsonSave(manifest))
        self._saving = step
        try:
            if step in self._manager.all_steps():  # no restore offered it, so it is another run's or damaged
                self._aside(step)
            self._manager.save(step, args=args)
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)
            return False
        return True

    def wait(self) -> bool:
        """Wait until what was begun is on disk; whether it is."""
        if self._saving is None:
            return True
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # of the background thread: whatever made it fail
            self._failed(error)
            return False
        self._saving, self._failing = None, False
        return True

    def _failed(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        try:
            self._manager.close()
        except Exception:  # noqa: S110  the same failure again
            pass
        self._open()  # the old one counts the failed step as written
        good = self._manager.latest_step()
        rest = "no step is stored yet" if good is None else f"step {good} is kept"
        said = signals.reason(error) or f"{type(error).__name__}: {str(error)[:200]}"
        if not self._failing:
            self._log(f"checkpoint {step} could not be written ({said}); {rest}")
        self._failing = True

    def restore(self, like: Tree, manifest: dict, accept: bool = False) -> tuple[int, Tree] | None:
        """(step, state as numpy arrays in the structure of `like`) of the newest good step; None when there is none.

        A damaged step is put aside as 'damaged-STEP'. Raises ValueError when a step was trained on another base, data or
        config than `manifest` says; with `accept` that is only said.
        """
        flat_like = {name.replace("/", "|"): leaf for name, leaf in tree.flatten(like).items()}
        for step in sorted(self._manager.all_steps(), reverse=True):
            stored, flat, error = {}, {}, None
            try:
                stored = self._read_manifest(step)
                flat = self._read(step, stored)
            except Exception as damage:  # orbax raises six types on damage; any of them means: not this step
                error = damage
            if sharding.any_of(error is not None):
                self._aside(step)
                before = max((one for one in self._manager.all_steps() if one < step), default=None)
                goes_on = "training starts from the beginning" if before is None else f"trying checkpoint {before}"
                said = f"{type(error).__name__}: {str(error)[:200]}" if error else "another host could not read it"
                self._log(f"checkpoint {step} is damaged ({said}); {goes_on}")
                continue
            check_manifest(f"checkpoint {step}", stored, manifest, accept, self._log)
            tree.check_same(flat_like, flat, f"checkpoint {step}")
            return step, tree.unflatten(like, {name.replace("|", "/"): leaf for name, leaf in flat.items()})
        return None

    def _read_manifest(self, step: int) -> dict:
        args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
        stored = self._manager.restore(step, args=args)["manifest"]
        if stored.get("digest") != _of_manifest(stored):
            raise ValueError("the manifest does not match its digest")
        return stored

    def _read(self, step: int, manifest: dict) -> dict[str, np.ndarray]:
        layout = manifest.get("layout", [])
        arrays = {*manifest["leaves"]} - {name for name, _, _ in layout} | ({WHOLE} if layout else set())
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in arrays}
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(item=dict.fromkeys(as_numpy, 0), restore_args=as_numpy))
        flat = {name: np.asarray(leaf) for name, leaf in self._manager.restore(step, args=args)["state"].items()}
        if layout:
            flat |= tree.unpack(flat.pop(WHOLE), layout)
        bad = [
            name
            for name, parts in manifest["leaves"].items()
            if any(_sha(_part(flat[name], key)) != digest for key, digest in parts.items())
        ]
        if bad:
            raise ValueError(f"{len(bad)} leaves do not match their digest, first: {bad[:3]}")
        return flat

    def _aside(self, step: int) -> None:
        """Move a step out of the way: a damaged one may still be of use, and must not stand in a new one's place."""
        path = next(one for one in self._directory.iterdir() if one.name.isdecimal() and int(one.name) == step)
        if sharding.is_first():
            n = sum(one.name.startswith(f"damaged-{step}") for one in self._directory.iterdir())
            os.replace(path, self._directory / f"damaged-{step}{f'.{n}' if n else ''}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"aside {step}")
        self._manager.reload()

    def close(self) -> None:
        """Wait for what is being written, and let go."""
        self.wait()
        self._manager.close()
