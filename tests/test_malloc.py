"""Freed memory stays with the process between steps and is given back when a program was compiled."""

import subprocess
import sys

import jax
import pytest
from jax import monitoring

from jaxpeft.runtime import malloc

PROGRAM = """
import ctypes
from pathlib import Path
import jax
from jaxpeft.runtime import malloc

def resident():  # MB
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS")) / 1024

assert malloc.keep_freed_memory() and malloc.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def use(size=400 << 20):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

jax.devices()
before = resident()
use()
kept = resident() - before
malloc.LONG = 0.0
jax.jit(lambda x: x * 3)(1.0)
print(kept, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
@pytest.mark.slow
def test_memory_is_kept_until_something_is_compiled():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, after = map(float, run.stdout.split())
    assert kept > 390 and after < 60  # MB, of 400


def test_jax_still_tells_when_it_compiled(monkeypatch):
    """The name of the event is JAX's own, and nothing would fail if it changed."""
    released = []
    monkeypatch.setattr(malloc, "LONG", 0.0)
    monkeypatch.setattr(malloc, "release_freed_memory", lambda: released.append(1))
    monitoring.register_event_duration_secs_listener(malloc._after_compiling)
    try:
        jax.jit(lambda x: x * 5 + 2)(1.0)
    finally:
        monitoring.unregister_event_duration_listener(malloc._after_compiling)
    assert released
