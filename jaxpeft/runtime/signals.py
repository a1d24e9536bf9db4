"""Handling of Ctrl-C and SIGTERM, and exit codes that tell a scheduler whether to start the command again.

In a training loop that polls (`with signals.polled()`) the first signal only sets `asked()`: the loop ends at the next step
with everything saved. Elsewhere (loading, compiling, evaluation) the signal raises `Stopped` as soon as Python code runs, and
a checkpoint that is being written is completed first. A second Ctrl-C raises immediately.

A program calls `signals.program(main)`: after a signal it exits without the interpreter's own shutdown, in which jaxlib 0.10
crashes (segmentation fault, status 139) if the signal came while XLA was compiling for the CPU.
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

RESTARTABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes from here
INTERRUPTED = 130  # by Ctrl-C; the same command resumes too
FATAL = 1  # something must be fixed first
_TRANSIENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # also recognized by their text, as libraries raise their own errors


class Stopped(KeyboardInterrupt):
    """A signal requested a stop; `code` is the exit code."""

    def __init__(self, message: str = "", number: int = signal.SIGTERM):
        super().__init__(message)
        self.code = INTERRUPTED if number == signal.SIGINT else RESTARTABLE


_asked: int | None = None
_polls = 0


def asked() -> int | None:
    """The signal that requested a stop, or None."""
    return _asked


def _handle(number, frame):
    global _asked
    again, _asked = _asked is not None, number
    if not _polls or (again and number == signal.SIGINT):
        raise Stopped(f"stopped by {signal.Signals(number).name}", number)


def _lost(hook, unraisable) -> None:
    """Send the signal again: Python drops exceptions raised while it frees objects, as in JAX's garbage collector hook."""
    if not isinstance(error := unraisable.exc_value, Stopped):
        hook(unraisable)
        return
    number = signal.SIGINT if error.code == INTERRUPTED else signal.SIGTERM
    again = threading.Timer(0.05, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


@contextlib.contextmanager
def handled():
    """Handle SIGINT and SIGTERM in the block; nested uses, and uses outside the main thread, change nothing."""
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
    """Raise `Stopped` if a stop was requested and nothing polls, in case the handler's own exception was lost."""
    if _asked is not None and not _polls:
        raise Stopped(f"stopped by {signal.Signals(_asked).name}", _asked)


def program(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with the status that it returns. A stop, a user error and a machine error print one line and exit
    with the status of `exit_code`."""
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
    atexit._run_exitfuncs()  # of multi-host JAX, Ray, logging, temporary files: all but the interpreter's own shutdown
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(exit_code(error))


@contextlib.contextmanager
def polled():
    """In the block the caller checks `asked()` between steps."""
    global _polls
    with handled():
        _polls += 1
        try:
            yield
        finally:
            _polls -= 1


def _machine_error(error: BaseException | None) -> int | None:
    """The errno of the system error that `error` is or was caused by, if that may be temporary; else None."""
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
    """Whether an error comes from the machine and may be temporary: a full or unreachable disk, too many open files."""
    return _machine_error(error) is not None


def reason(error: BaseException) -> str:
    """The system's description of a machine error, such as 'No space left on device'; '' for any other error."""
    number = _machine_error(error)
    return "" if number is None else os.strerror(number)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with `error`."""
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
