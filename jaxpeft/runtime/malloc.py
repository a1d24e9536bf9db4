"""Settings of malloc: keep freed memory for the next training step, return it to the system after every compilation.

They affect the whole process, so programs make them and the library does not.
"""

import ctypes
import functools
import sys

import jax

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # malloc.h
_COMPILED = "/jax/core/compile/backend_compile_duration"
LONG = 0.3  # seconds; shorter compilations leave little memory behind


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc's malloc keep large freed blocks for the next step instead of returning them to the system.

    XLA on CPU allocates its temporaries anew every step, and by default each is mapped and faulted in page by page: 48,000
    page faults per step for the tiny BLIP's gradient at batch 32, and 350 ms of CPU time instead of 260 ms (two busy cores,
    x86-64). What loading and compiling leave behind is returned after every compilation, so only what a step itself used is
    kept: BLIP-base trains in 1.62 GB (results/memory.json). Returns False without glibc.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is None:
        return False
    largest = 2**31 - 1
    kept = all([mallopt(k, v) for k, v in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, largest), (_TRIM_THRESHOLD, largest))])
    jax.monitoring.register_event_duration_secs_listener(_after_compiling)
    return kept


def release_freed_memory() -> bool:
    """Return freed memory to the system now; return whether there was any."""
    trim = getattr(_libc(), "malloc_trim", None)
    return bool(trim and trim(0))


def _after_compiling(event: str, seconds: float, **_: object) -> None:
    if event == _COMPILED and seconds > LONG:
        release_freed_memory()


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None
