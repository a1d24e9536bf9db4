"""The progress line of training: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TextIO

import jax


class Progress:
    """Progress of training: call `update(step, ...)` after every step. Prints every `every` seconds, and the last step."""

    def __init__(
        self, n_steps: int, batch_size: int, start: int = 0, every: float | None = None, out: TextIO | None = None
    ) -> None:
        self._out = out or sys.stdout
        self._live = self._out.isatty()
        self._silent = jax.process_index() > 0  # of several processes only the first one prints
        self._every = (0.2 if self._live else 10.0) if every is None else every
        self.n_steps, self._batch_size, self._start = n_steps, batch_size, start
        self._began = self._last = time.perf_counter()

    def update(self, step: int, **values: float) -> None:
        """Show the number of steps done and the `values` with their names."""
        now = time.perf_counter()
        if self._silent or (now - self._last < self._every and step < self.n_steps):
            return
        self._last = now
        rate = (step - self._start) / max(now - self._began, 1e-9)
        left = (self.n_steps - step) / max(rate, 1e-9)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        text = f"step {step}/{self.n_steps}  {shown}  {rate * self._batch_size:.0f} examples/s  ETA {_clock(left)}"
        if self._live:
            filled = round(24 * step / self.n_steps)
            end = "\n" if step == self.n_steps else ""
            print(f"\r[{'#' * filled}{'.' * (24 - filled)}] {text}\x1b[K", end=end, file=self._out, flush=True)
        else:
            print(text, file=self._out, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
