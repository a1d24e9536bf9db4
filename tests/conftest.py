"""A strict session: warnings are errors (pyproject), ranks never broadcast by accident, eight virtual devices."""

import gc
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import pytest

from jaxpeft.models import blip

jax.config.update("jax_num_cpu_devices", 8)  # before any array exists
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # tests mostly compile: 17 of them took 50 s, not 97 s
blip.UNROLLED = 0  # scanned as models of base size are: half the program to compile; test_model.py unrolls


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped():
    """A compiled program holds memory maps (11,000 after 80 tests; Linux allows 65,530). A process that kept them all was
    aborted while compiling, after some 560 tests."""
    yield
    jax.clear_caches()
    gc.collect()
