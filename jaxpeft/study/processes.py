"""The worker processes of a study on this machine: each on its own cores, replaced when the system kills one."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from jaxpeft.runtime import signals
from jaxpeft.study import state

# In a worker before anything is imported: an equal share of the cores (XLA takes its threads from that), and a stop when
# the launcher is killed, which cannot tell it.
_PIN = """
import ctypes, os, signal, sys
i, n = int(sys.argv[1]), int(sys.argv[2])
if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[i * len(cores) // n : (i + 1) * len(cores) // n] or [cores[i % len(cores)]])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


def run_workers(command: list[str], workers: int, directory: Path, log=print) -> None:
    """Start workers and wait; an interrupt here, or the end of this process, stops them with their state saved.

    A worker that the system kills (out of memory, for one) has failed in the run that it held: that is written down, and
    another worker takes its place.
    """

    def start(i):
        return subprocess.Popen([sys.executable, "-c", _PIN, str(i), str(workers), *command, f"--worker={i}"])

    children, codes = {i: start(i) for i in range(workers)}, []
    try:
        while children:
            time.sleep(0.2)
            for i, child in list(children.items()):
                if child.poll() is None:
                    continue
                held = _held_by(directory, child.pid) if child.returncode < 0 else []
                if not held:
                    codes.append(child.returncode)
                    del children[i]
                    continue
                for run in held:
                    name = signal.Signals(-child.returncode).name
                    state.write_failure(
                        directory, run, f"the worker was killed by {name}, as for want of memory", time.time()
                    )
                    log(f"failed: {run}: the worker was killed by {name}; another one takes its place")
                children[i] = start(i)
    except KeyboardInterrupt:
        for child in children.values():
            child.terminate()
        for child in children.values():
            child.wait()
        raise
    if bad := [code for code in codes if code not in (0, signals.RESTARTABLE, signals.INTERRUPTED)]:
        raise RuntimeError(f"{len(bad)} of {workers} workers ended with {bad}; the same command goes on from here")
    for code in (signals.INTERRUPTED, signals.RESTARTABLE):
        if code in codes:
            raise signals.Stopped("", signal.SIGINT if code == signals.INTERRUPTED else signal.SIGTERM)


def _held_by(directory: Path, pid: int) -> list[str]:
    """The runs that a process of this host had claimed when it ended."""
    found = []
    for path in (directory / "claims").glob("[!.]*"):
        try:
            owner = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            continue
        if (owner["host"], owner["pid"]) == (socket.gethostname(), pid):
            found.append(path.name)
    return found
