"""Stopping: what Ctrl-C and SIGTERM do, and the exit codes that tell a scheduler whether to start the command again.

A training loop says that it looks (`with stop.polled()`), and then the first signal only sets `asked()`: the loop ends at
the next step with everything saved. Elsewhere (loading, compiling, evaluation) the signal raises `Stopped` as soon as
Python runs again, and the checkpoint being written is finished on the way out. A second Ctrl-C raises at once.
"""

import contextlib
import errno
import os
import signal
import threading

RESTARTABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from here
INTERRUPTED = 130  # by Ctrl-C; the same command goes on too
FATAL = 1  # something must be changed first
_TRANSIENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; `code` is the exit code."""

    def __init__(self, message: str = "", number: int = signal.SIGTERM):
        super().__init__(message)
        self.code = INTERRUPTED if number == signal.SIGINT else RESTARTABLE


_asked: int | None = None
_polls = 0


def asked() -> int | None:
    """The signal that asked for a stop, or None."""
    return _asked


def _handle(number, frame):
    global _asked
    again, _asked = _asked is not None, number
    if not _polls or (again and number == signal.SIGINT):
        raise Stopped(signal.Signals(number).name, number)


@contextlib.contextmanager
def handled():
    """Inside, SIGINT and SIGTERM are ours; nested uses and other threads than the main one change nothing."""
    global _asked
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _handle:
        yield
        return
    before = {number: signal.signal(number, _handle) for number in numbers}
    _asked = None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def polled():
    """Inside, the caller looks at `asked()` between steps."""
    global _polls
    with handled():
        _polls += 1
        try:
            yield
        finally:
            _polls -= 1


def is_transient(error: BaseException) -> bool:
    """Whether an error is of the machine and may be gone later: a full or unreachable disk, too many open files."""
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def exit_code(error: BaseException) -> int:
    """What a process that ends with `error` should return."""
    if isinstance(error, Stopped):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return RESTARTABLE if is_transient(error) else FATAL


def message(error: BaseException) -> str:
    """One line for the user: what happened and what to do."""
    if is_transient(error):
        where = f" ({error.filename})" if error.filename else ""
        return f"{os.strerror(error.errno)}{where}: make room or mend it; the same command goes on from the last checkpoint"
    return str(error)
