"""Leases: locks on a run of a study or on a run's directory, held by one process among all that share a file system.

A lease is a file, created atomically and touched every BEAT seconds by a thread. It is free when its owner releases it, when
the owner was a process of this host that no longer exists, or when its mtime stays unchanged for STALE seconds, measured by
this process's monotonic clock: clocks of hosts may differ and may be set back. A running process of this host is never
considered dead, however slow it is.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxpeft.runtime import files

STALE, BEAT = 120.0, 10.0  # seconds
_watched: dict[Path, tuple[int, float]] = {}  # file -> (its mtime, when this process first saw that mtime)


class Lease:
    """The lease `directory / name`, held by at most one process among all hosts that share the directory."""

    def __init__(self, directory: Path, name: str):
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._done, self._thread = directory / name, threading.Event(), None
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}

    def take(self) -> bool:
        """Try to take the lease; return whether it is ours."""
        if not (self._create(self._path) or self._take_over()):
            return False
        _watched.pop(self._path, None)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return True

    def release(self) -> None:
        self._done.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def owner(self) -> dict | None:
        """The holder: host, pid, since; None if the lease is free."""
        try:
            return None if self._stale() else json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _create(self, path: Path) -> bool:
        return files.create_new(path, json.dumps(self._me | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}))

    def _take_over(self) -> bool:
        """Replace a stale lease. A second file makes checking and replacing it atomic among the processes that try."""
        gate = self._path.with_name(f".{self._path.name}.gate")
        if not self._create(gate):
            if _unchanged(gate) > STALE:  # the process that created it was killed before it removed it
                gate.unlink(missing_ok=True)
            return False
        try:
            if not self._stale():
                return False
            self._path.unlink(missing_ok=True)
            return self._create(self._path)
        finally:
            gate.unlink(missing_ok=True)

    def _stale(self) -> bool:
        try:
            owner = json.loads(self._path.read_text())
        except FileNotFoundError:
            return False
        if owner["host"] == self._me["host"]:
            return _started(owner["pid"]) != owner["started"]
        return _unchanged(self._path) > STALE

    def _beat(self):
        while not self._done.wait(BEAT):
            try:
                os.utime(self._path)
            except OSError:  # a full or unreachable disk: others may take over, but the result is still written
                pass


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold `directory` as the only process that writes there; raises ValueError, naming the owner, if another one does.

    A lease from another host is watched until its owner touches it, or until it has been stale for STALE seconds.
    """
    claim, began = Lease(directory, ".owner"), time.monotonic()
    first = None
    while not claim.take():
        owner = claim.owner() or {}
        mtime = _watched.get(directory / ".owner", (None, 0))[0]
        first = first or mtime
        lives = owner.get("host") == claim._me["host"] or mtime != first
        if owner and (lives or time.monotonic() - began > STALE + BEAT):
            raise ValueError(
                f"{directory} is in use by process {owner['pid']} on {owner['host']} since {owner.get('since')}; stop that "
                f"process first, or use another --workdir"
            )
        time.sleep(min(1.0, BEAT / 4))
    try:
        yield
    finally:
        claim.release()


def _unchanged(path: Path) -> float:
    """For how many seconds this process has seen the same mtime of `path`; 0 at the first call."""
    try:
        now = path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0.0
    before, since = _watched.get(path, (None, 0.0))
    if now != before:
        since = time.monotonic()
        _watched[path] = (now, since)
    return time.monotonic() - since


def _started(pid: int) -> str:
    """The start time of a process of this host, to distinguish it from a later one with the same id; '' if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[19]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return ""
    return "alive" if files.lives(pid) else ""  # no /proc: macOS
