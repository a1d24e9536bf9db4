"""Rights held by one process among all that see a directory: on a run of a study, and on a run's own directory.

A file made whole or not at all, touched every BEAT seconds by a thread. It is free again when its owner lets go, when the
owner's process is gone from this host, or when its time did not change during STALE seconds of watching. The watching is
on this process's monotonic clock: clocks of hosts may differ, and may be set back. A process that lives on this host is
never taken for dead, however slow.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

STALE, BEAT = 120.0, 10.0  # seconds
_watched: dict[Path, tuple[int, float]] = {}  # file -> (its time, since when this process has seen that time)


class Lease:
    """The right to `directory / name`, held by at most one process of any host that sees the directory."""

    def __init__(self, directory: Path, name: str):
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._done, self._thread = directory / name, threading.Event(), None
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}

    def take(self) -> bool:
        """Whether the claim is now ours."""
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
        """Who holds it: host, pid, since; or None where nobody does."""
        try:
            return None if self._stale() else json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _create(self, path: Path) -> bool:
        """Written aside and linked: nobody sees half a claim."""
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            aside.write_text(json.dumps(self._me | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}))
            os.link(aside, path)
            return True
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)

    def _take_over(self) -> bool:
        """Replace a stale claim. A second file makes looking and replacing one act among those who try."""
        gate = self._path.with_name(f".{self._path.name}.gate")
        if not self._create(gate):
            if _unchanged(gate) > STALE:  # whoever made it was killed between two lines
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
            except OSError:  # a full or unreachable disk: others may take over, the result is still written
                pass


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold `directory` as the only process that writes there; raises ValueError, naming the owner, where another does.

    An owner on another host is watched until it is seen to live or STALE seconds have shown that it does not.
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
                f"one first, or use another --workdir"
            )
        time.sleep(min(1.0, BEAT / 4))
    try:
        yield
    finally:
        claim.release()


def _unchanged(path: Path) -> float:
    """For how many seconds this process has seen the time of `path` unchanged; 0 at the first look."""
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
    """When a process of this host began, so that a reused number is not taken for it; '' where it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[19]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return ""
    try:  # no /proc: macOS
        os.kill(pid, 0)
        return "alive"
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "alive"
