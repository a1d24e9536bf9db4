"""Checkpoints of the trainable parameters: a thin layer over Orbax that adds digests, fallback to older steps, and
tolerance of failed writes.

A step holds the flat state (trainable leaves, optimizer, and the step number, which is also the position in the data) and a
manifest: what it was trained on, a digest of every part of every leaf, and a digest of itself. The base is identified by its
digest, not stored. Steps are written in the background. Orbax restores a step with flipped bits silently and raises on a
truncated one; `restore` verifies each step, logs what is wrong with it, moves it aside and falls back to the one before.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxpeft import tree
from jaxpeft.runtime import signals
from jaxpeft.training import sharding
from jaxpeft.tree import Tree

WHOLE = "whole"  # the array of all leaves that are not split over devices (`tree.pack`)


def _sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A part of an array as '0:4,2:8'."""
    return ",".join("{}:{}".format(*one.indices(n)[:2]) for one, n in zip(index, shape, strict=True))


def _part(array: np.ndarray, key: str) -> np.ndarray:
    return array[tuple(slice(*map(int, one.split(":"))) for one in key.split(",") if one)]


def _digests(flat: dict[str, jax.Array]) -> dict[str, dict[str, str]]:
    """Leaf -> part -> digest, on all hosts. A part is what one device holds; it is read by a host that has it."""
    keys, mine = [], []
    for name, leaf in flat.items():
        owners = {}  # part -> the first device that holds it
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


class OtherRun(ValueError):
    """A checkpoint was trained with another base, data or config."""


def check_manifest(what: str, stored: dict, now: dict, accept: bool, log: Callable[[str], object]) -> None:
    """Raise OtherRun naming what differs between the `stored` manifest and the one `now`; with `accept` only log it."""
    before, after = (tree.flatten({key: one.get(key) for key in now}) for one in (stored, now))
    if differs := sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)):
        rows = "; ".join(f"{key}: stored {before.get(key)}, now {after.get(key)}" for key in differs)
        if not accept:
            raise OtherRun(f"{what} belongs to another run ({rows}); use a new workdir")
        log(f"{what} belongs to another run, accepted because accept_changes is set ({rows})")


def _of_manifest(manifest: dict) -> str:
    text = json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _not_orbax(record: logging.LogRecord) -> bool:
    """Whether a log record is not Orbax's: it logs a failed save four times with tracebacks, here it is one line."""
    return os.path.join("orbax", "checkpoint") not in record.pathname or record.levelno < logging.WARNING


class Checkpoints:
    """The newest `keep` steps in one directory. Damaged steps are logged; of consecutive failed writes the first one is."""

    def __init__(self, directory: str | Path, keep: int = 2, log: Callable[[str], object] = print) -> None:
        self._directory, self._keep, self._log = Path(directory).absolute(), keep, log
        self._saving: int | None = None  # the step that is being written
        self._failing = False
        logging.getLogger("absl").addFilter(_not_orbax)
        self._open()

    def _open(self) -> None:
        # When Orbax 0.12.8 creates directories in the background and the disk is full, its threads, and with them the
        # process, wait for five minutes.
        background = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True, async_options=background)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: Tree, manifest: dict) -> bool:
        """Begin to write `state` as `step`; returns whether writing began. `manifest` is JSON: what the run depends on.

        The values are copied before this returns. A failed write (a full disk) is logged and earlier steps are kept; the next
        call tries again.
        """
        self.wait()
        flat = {name.replace("/", "|"): leaf for name, leaf in tree.flatten(state).items()}  # '/' would be a directory
        # replicated leaves are packed into one array: Orbax writes it three times as fast as sixty
        whole = {name: leaf for name, leaf in flat.items() if leaf.is_fully_replicated}
        manifest = manifest | {"leaves": _digests(flat), "layout": tree.layout(whole)}
        manifest |= {"digest": _of_manifest(manifest)}
        flat = {name: leaf for name, leaf in flat.items() if name not in whole}
        if whole:
            flat[WHOLE] = np.asarray(sharding.packed(list(whole.values())))
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(flat), manifest=ocp.args.JsonSave(manifest))
        self._saving = step
        try:
            if step in self._manager.all_steps():  # it was not restored, so it is damaged or of another run
                self._aside(step)
            self._manager.save(step, args=args)
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)
            return False
        return True

    def wait(self) -> bool:
        """Wait until the step that is being written is on disk; returns whether it is."""
        if self._saving is None:
            return True
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # of the background thread, of any type
            self._failed(error)
            return False
        self._saving, self._failing = None, False
        return True

    def _failed(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        try:
            self._manager.close()
        except Exception:  # noqa: S110  the same error again
            pass
        self._open()  # the old manager counts the failed step as written
        good = self._manager.latest_step()
        rest = "no step is stored yet" if good is None else f"step {good} is kept"
        said = signals.reason(error) or f"{type(error).__name__}: {str(error)[:200]}"
        if not self._failing:
            self._log(f"checkpoint {step} could not be written ({said}); {rest}")
        self._failing = True

    def restore(self, like: Tree, manifest: dict, accept: bool = False) -> tuple[int, Tree] | None:
        """(step, state as NumPy arrays in the structure of `like`) of the newest undamaged step; None if there is none.

        A damaged step is moved aside to 'damaged-STEP'. Raises OtherRun where a step was trained with another base, data or
        config than in `manifest`; with `accept` this is only logged.
        """
        flat_like = {name.replace("/", "|"): leaf for name, leaf in tree.flatten(like).items()}
        for step in sorted(self._manager.all_steps(), reverse=True):
            stored, flat, error = {}, {}, None
            try:
                stored = self._read_manifest(step)
                flat = self._read(step, stored)
            except Exception as damage:  # Orbax raises six types of error on damage
                error = damage
            if sharding.any_of(error is not None):
                self._aside(step)
                before = max((one for one in self._manager.all_steps() if one < step), default=None)
                goes_on = "training starts from the beginning" if before is None else f"trying checkpoint {before}"
                said = f"{type(error).__name__}: {str(error)[:200]}" if error else "another host cannot read it"
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
            raise ValueError(f"{len(bad)} leaves do not match their digests, such as {bad[:3]}")
        return flat

    def _aside(self, step: int) -> None:
        """Move a step aside: it may still be useful, but must not take the place of a new one."""
        path = next(one for one in self._directory.iterdir() if one.name.isdecimal() and int(one.name) == step)
        if sharding.is_first():
            n = sum(one.name.startswith(f"damaged-{step}") for one in self._directory.iterdir())
            os.replace(path, self._directory / f"damaged-{step}{f'.{n}' if n else ''}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"aside {step}")
        self._manager.reload()

    def close(self) -> None:
        """Wait for the step that is being written, and close the manager."""
        self.wait()
        self._manager.close()
