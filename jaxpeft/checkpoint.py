"""Checkpoints of the tuned half: a thin layer over orbax with what it lacks (a digest per leaf, a walk back).

A step holds the flat state (tuned leaves, optimizer, step number) and a manifest: what it was trained on and a digest
of every leaf. The base is named by its digest, not stored. Orbax restores a step with flipped bits silently and raises
on a truncated one; `restore` verifies, says what is wrong with a step, and goes back to the one before.
"""

import hashlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxpeft import tree
from jaxpeft.tree import Tree


def _digests(flat: dict) -> dict[str, str]:
    return {name: hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()[:16] for name, leaf in flat.items()}


class Checkpoints:
    """Steps under one directory, the newest `keep` of them. Saving is atomic and waits until the step is on disk."""

    def __init__(self, directory: str | Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def save(self, step: int, state: Tree, manifest: dict) -> None:
        """Store `state` as `step`. `manifest` is JSON: names and digests of base, data and config."""
        if step in self._manager.all_steps():
            return
        flat = {name: np.asarray(leaf) for name, leaf in tree.flatten(jax.device_get(state)).items()}
        args = ocp.args.Composite(
            # '/' would be read as a directory by the array store
            state=ocp.args.StandardSave({name.replace("/", "|"): leaf for name, leaf in flat.items()}),
            manifest=ocp.args.JsonSave(manifest | {"leaves": _digests(flat)}),
        )
        self._manager.save(step, args=args)

    def restore(self, like: Tree, manifest: dict, log=print) -> tuple[int, Tree] | None:
        """(step, state in the structure of `like`) of the newest step that verifies; None when there is none.

        Raises ValueError when a readable step was trained on another base, data or config than `manifest` says.
        """
        flat_like = tree.flatten(like)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                stored, flat = self._read(step)
                bad = [name for name, digest in _digests(flat).items() if stored["leaves"].get(name) != digest]
                if bad or set(flat) != set(stored["leaves"]):
                    raise ValueError(f"{len(bad)} leaves do not match their digest, first: {bad[:3]}")
            except Exception as error:  # orbax raises six types on damage; any of them means: not this step
                log(f"checkpoint {step} is damaged and is left out ({type(error).__name__}: {str(error)[:200]})")
                continue
            differs = {k: (stored.get(k), v) for k, v in manifest.items() if stored.get(k) != v}
            if differs:
                rows = "; ".join(f"{k}: stored {a}, now {b}" for k, (a, b) in differs.items())
                raise ValueError(f"checkpoint {step} belongs to another run ({rows}); use a new workdir")
            tree.check_same(flat_like, flat, f"checkpoint {step}")
            return step, tree.unflatten(like, flat)
        return None

    def _read(self, step: int) -> tuple[dict, dict]:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), manifest=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        flat = {name.replace("|", "/"): np.asarray(leaf) for name, leaf in restored["state"].items()}
        return restored["manifest"], flat

    def close(self) -> None:
        self._manager.close()
