"""Metrics, scores and images of a run for TensorBoard and for Weights & Biases, where their packages are installed.

TensorBoard's files are written if `tensorboardX` can be imported. A run is sent to W&B if `wandb` can be imported and its
variable WANDB_PROJECT names a project: an installed package alone sends nothing anywhere. A board that fails is left out with
a line in the log; training continues.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxpeft.runtime import files

Log = Callable[[str], object]


class TensorBoard:
    """Event files in the folder tensorboard/ of a run. What an interrupted run wrote after step `start` is hidden."""

    def __init__(self, workdir: Path, start: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1 if start else 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels_YXC: np.ndarray) -> None:
        self._writer.add_image(name, pixels_YXC, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project WANDB_PROJECT. Its id is kept in the file wandb_id, so that a resumed run continues its curves."""

    def __init__(self, workdir: Path, start: int) -> None:
        import wandb

        place, config = workdir / "wandb_id", workdir / "config.json"
        if not place.exists():
            files.write_text(place, uuid.uuid4().hex)
        about = files.read_json(config) if config.exists() else {}
        self._image = wandb.Image
        self._run = wandb.init(name=workdir.name, dir=str(workdir), id=place.read_text(), resume="allow", config=about)
        self._run.define_metric("*", step_metric="step")  # W&B's own steps may not go back, those of a resumed run do

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, pixels_YXC: np.ndarray) -> None:
        self._run.log({"step": step, name: self._image(pixels_YXC)})

    def close(self) -> None:
        self._run.finish()


Board = TensorBoard | WandB


class Boards:
    """The boards of a run, as one."""

    def __init__(self, workdir: Path, start: int, log: Log = print) -> None:
        self._boards: list[Board] = []
        self._log = log
        if jax.process_index() == 0:
            self._try(lambda: self._boards.append(TensorBoard(workdir, start)), "TensorBoard")
            if os.environ.get("WANDB_PROJECT"):
                self._try(lambda: self._boards.append(WandB(workdir, start)), "W&B")

    def _try(self, do: Callable[[], object], name: str) -> bool:
        try:
            do()
        except ImportError:
            return False
        except Exception as error:  # of any type: no board may end a run
            self._log(
                f"{name} gets nothing from this run any more ({type(error).__name__}: {error}); training continues"
            )
            return False
        return True

    def _each(self, do: Callable[[Board], object]) -> None:
        self._boards = [
            board for board in self._boards if self._try(lambda board=board: do(board), type(board).__name__)
        ]

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the numbers among `values`."""
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._each(lambda board: board.scalars(step, numbers))

    def image(self, step: int, name: str, path: Path) -> None:
        """Show an image file, if it exists."""
        if self._boards and path.exists():
            pixels_YXC = np.asarray(Image.open(path).convert("RGB"))
            self._each(lambda board: board.image(step, name, pixels_YXC))

    def close(self) -> None:
        self._each(lambda board: board.close())


def finished(workdir: Path, result: Mapping[str, Any], log: Log = print) -> None:
    """Show the scores of a finished run, as 'test/cider_d' and 'test_base/cider_d', and its gallery of images."""
    step = result["timing"]["steps"]
    with contextlib.closing(Boards(workdir, step, log)) as boards:
        for split, scores in result["metrics"].items():
            for label, name in (("tuned", split), ("base", f"{split}_base")):
                found = scores.get(label, {})
                boards.scalars(step, {f"{name}/{metric}": value for metric, value in found.items() if metric != "n"})
        boards.image(step, "gallery", workdir / "gallery.png")
