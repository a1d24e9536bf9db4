"""A stop while XLA compiles for seconds, in every program that compiles: the exit code must be the documented one.

The compilations are real (the tiny BLIP's step and beam search, 3 to 4 s each on two cores) and do not use a cache. Each test
checks in the compiler's log that the signal came between the start and the end of the compilation.
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxpeft.runtime import signals

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
POINT = (
    "main.py",
    "--config=configs/point.py:steps=2",
    "--config.data.n_train=64",
    "--config.data.n_test=32",
    "--config.eval.beams=3",
)
STUDY = ("main.py", "--config=configs/studies/tiny.py:steps=10,seeds=1,small=true", "--workers=2")
# program -> (its arguments, what it compiles when it is stopped)
PROGRAMS = {
    "training": (POINT, "train_step"),
    "generate": (("-m", "jaxpeft", "generate", "--base", "tiny", "--image"), "beam_search"),
    "a study's launcher": (STUDY, "train_step"),
    "a study's workers": (STUDY, "train_step"),
}  # fmt: skip


class Watched:
    """A process whose stderr is read as it is written, to know when a compilation begins and ends."""

    def __init__(self, arguments):
        env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_LOG_COMPILES": "1", "PYTHONUNBUFFERED": "1"}
        env |= {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines, self._seen = [], threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            with self._seen:
                self.lines.append(line)
                self._seen.notify()
        with self._seen:
            self.lines.append("")
            self._seen.notify()

    def wait_for(self, text, seconds=300):
        with self._seen:
            assert self._seen.wait_for(lambda: self.has(text) or self.lines[-1:] == [""], seconds), self.lines[-5:]
            assert self.has(text), "".join(self.lines)[-2000:]

    def has(self, text) -> bool:
        return any(text in line for line in self.lines)

    def children(self) -> list[int]:
        return list(map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()))

    def end(self):
        """(exit code, stderr without the compiler's log)"""
        code = self.process.wait(timeout=120)
        self.process.stderr.close()
        said = [line for line in self.lines if line.strip() and not re.search(r"Compiling|Finished|WARNING|^W\d", line)]
        return code, "".join(said)


@pytest.mark.parametrize("name", PROGRAMS)
def test_sigterm_while_xla_compiles(tmp_path, fault, name):
    """SIGTERM while a program of seconds is compiled."""
    arguments, function = PROGRAMS[name]
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    last = str(picture) if name == "generate" else f"--workdir={tmp_path / 'run'}"
    rng, inside = random.Random(), False
    for longest in (2.0, 1.0, 0.2, 0.0):  # a fast machine may finish before: then try earlier
        watched = Watched((*arguments, last))
        try:
            watched.wait_for(f"Compiling jit({function})")
            time.sleep(rng.uniform(0, longest))
            inside = not watched.has(f"Finished XLA compilation of jit({function})")
            for pid in watched.children() if name == "a study's workers" else [watched.process.pid]:
                os.kill(pid, signal.SIGTERM)
            began = time.perf_counter()
            code, said = watched.end()
            took = time.perf_counter() - began
        finally:
            watched.process.kill()
        assert code == signals.RESTARTABLE, (code, said)
        assert "Traceback" not in said and "Fatal" not in said, said
        assert not (tmp_path / "run" / "failures").exists()  # a stop does not count as a failure of the run
        if inside:
            break
    assert inside, f"{function} was compiled before the signal came"
    fault.tried(f"status {signals.RESTARTABLE}, one line: 'stopped by SIGTERM'", seconds=took)


def test_a_stop_that_comes_while_an_object_is_freed(fault):
    """SIGTERM in a destructor, whose exceptions Python drops."""

    class Freed:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(signals.Stopped, match="stopped by SIGTERM") as caught, signals.handled():
        Freed()
        for _ in range(200):
            time.sleep(0.01)
    assert signals.exit_code(caught.value) == signals.RESTARTABLE
    fault.tried("delivered again a moment later")
