"""Stopping: what Ctrl-C and SIGTERM do, and the exit codes that tell a scheduler whether to start the command again.

A training loop says that it looks (`with signals.polled()`), and then the first signal only sets `asked()`: the loop ends at
the next step with everything saved. Elsewhere (loading, compiling, evaluation) the signal raises `Stopped` as soon as
Python runs again, and the checkpoint being written is finished on the way out. A second Ctrl-C raises at once.

A program is `signals.program(main)`: after a signal it ends without the interpreter's own shutdown, in which jaxlib 0.10
crashes (a segmentation fault, status 139) when the signal came while XLA compiled for the CPU.
"""

import atexit
import contextlib
import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

RESTARTABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from here
INTERRUPTED = 130  # by Ctrl-C; the same command goes on too
FATAL = 1  # something must be changed first
_TRANSIENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # libraries tell these in errors of their own, by the system's words


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
        raise Stopped(f"stopped by {signal.Signals(number).name}", number)


def _lost(hook, unraisable) -> None:
    """Python drops what is raised while it frees objects, as it does in JAX's hook of the garbage collector: ask again."""
    if not isinstance(error := unraisable.exc_value, Stopped):
        hook(unraisable)
        return
    number = signal.SIGINT if error.code == INTERRUPTED else signal.SIGTERM
    again = threading.Timer(0.05, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


@contextlib.contextmanager
def handled():
    """Inside, SIGINT and SIGTERM are ours; nested uses and other threads than the main one change nothing."""
    global _asked
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _handle:
        yield
        return
    before = {number: signal.signal(number, _handle) for number in numbers}
    _asked, hook = None, sys.unraisablehook
    sys.unraisablehook = functools.partial(_lost, hook)
    try:
        yield
    finally:
        _asked, sys.unraisablehook = None, hook
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raise `Stopped` where a stop was asked for and nobody polls, should the handler's own exception have been lost."""
    if _asked is not None and not _polls:
        raise Stopped(f"stopped by {signal.Signals(_asked).name}", _asked)


def program(main: Callable[[], int | None]) -> NoReturn:
    """Be the program `main`: what it returns is the exit status; a stop, an error that is for the user, and one of the machine
    are one line and the status of `exit_code`."""
    try:
        with handled():
            status = main()
    except (ValueError, FloatingPointError, KeyboardInterrupt) as error:
        _end(error)
    except Exception as error:
        if not is_transient(error):
            raise
        _end(error)
    sys.exit(status)


def _end(error: BaseException) -> NoReturn:
    if text := message(error):
        print(text if isinstance(error, KeyboardInterrupt) else f"error: {text}", file=sys.stderr)
    if not isinstance(error, KeyboardInterrupt):
        sys.exit(exit_code(error))
    atexit._run_exitfuncs()  # of JAX for several hosts, Ray, logging, temporary files: all but the interpreter's own end
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(exit_code(error))


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


def _machine_error(error: BaseException | None) -> int | None:
    """The number of the system's error that `error` is or comes from, where that may be gone later."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _TRANSIENT:
            return error.errno
        if not isinstance(error, OSError):
            for number in _DISK:
                if os.strerror(number) in str(error):
                    return number
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def is_transient(error: BaseException) -> bool:
    """Whether an error is of the machine and may be gone later: a full or unreachable disk, too many open files."""
    return _machine_error(error) is not None


def reason(error: BaseException) -> str:
    """What the system says of an error of the machine, '' for any other: 'No space left on device'."""
    number = _machine_error(error)
    return "" if number is None else os.strerror(number)


def exit_code(error: BaseException) -> int:
    """What a process that ends with `error` should return."""
    if isinstance(error, Stopped):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return RESTARTABLE if is_transient(error) else FATAL


def message(error: BaseException) -> str:
    """One line for the user: what happened and what to do."""
    if isinstance(error, KeyboardInterrupt) or not is_transient(error):
        return str(error)
    if isinstance(error, OSError):
        what = f"{reason(error)} ({error.filename})" if error.filename else reason(error)
    else:
        what = f"{str(error)[:500]} ({reason(error)})"
    return f"{what}: free some space or repair the disk, then run the same command again"
