"""A strict session: warnings are errors (pyproject), ranks never broadcast by accident, eight virtual devices."""

import gc
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # before any array exists
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # the suite is mostly compiling: half the time


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped():
    """Each compiled program keeps memory maps; some thousand tests in one process come to Linux's 65,530 and abort."""
    yield
    jax.clear_caches()
    gc.collect()
