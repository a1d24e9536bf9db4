"""The worker processes of a study on this machine: each on its own cores, and replaced if the system kills it."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from jaxpeft.runtime import signals
from jaxpeft.study import state

# A worker does this before it imports anything: it takes an equal share of the cores (XLA sizes its thread pool by them), and
# asks for a SIGTERM when the launcher ends, because a killed launcher cannot stop its workers.
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
    """Start workers and wait. An interrupt or the end of this process stops them with their state saved.

    If the system kills a worker (for example, out of memory), its run is recorded as failed and another worker replaces it.
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
                        directory, run, f"the worker was killed by {name} (likely out of memory)", time.time()
                    )
                    log(f"failed: {run}: the worker was killed by {name}; another worker replaces it")
                children[i] = start(i)
    except KeyboardInterrupt:
        for child in children.values():
            child.terminate()
        for child in children.values():
            child.wait()
        raise
    if bad := [code for code in codes if code not in (0, signals.RESTARTABLE, signals.INTERRUPTED)]:
        raise RuntimeError(f"{len(bad)} of {workers} workers failed (exit codes {bad}); run the same command to resume")
    for code in (signals.INTERRUPTED, signals.RESTARTABLE):
        if code in codes:
            raise signals.Stopped("", signal.SIGINT if code == signals.INTERRUPTED else signal.SIGTERM)


def _held_by(directory: Path, pid: int) -> list[str]:
    """The runs that a process of this host held when it ended."""
    found = []
    for path in (directory / "claims").glob("[!.]*"):
        try:
            owner = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            continue
        if (owner["host"], owner["pid"]) == (socket.gethostname(), pid):
            found.append(path.name)
    return found
