"""A strict session: warnings are errors (pyproject), ranks never broadcast by accident, eight virtual devices."""

import gc
import os
from importlib import metadata
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also where there are GPUs; test_accelerator.py says how to test on them
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of numpy and LAPACK: workers of pytest-xdist share the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # test_downloads.py has a hub of its own
# Tests mostly compile, and programs that they start do so too: without optimization in half of the time, and a gradient of
# the tiny model with XLA's older emitters, which jaxlib 0.11 no longer has, in a third of that
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
# Compiled programs are kept from one session to the next, for the workers of pytest-xdist and for programs that tests start
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax
import pytest
import tiny

jax.config.update("jax_num_cpu_devices", 8)  # before any array exists
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped():
    """A compiled program holds memory maps (11,000 after 80 tests; Linux allows 65,530). A process that kept them all was
    aborted while compiling, after some 560 tests. Modules share programs, so they are kept as long as there is room."""
    yield
    if Path("/proc/self/maps").read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint directory of ours: random weights, the words of scenes."""
    return tiny.saved(tmp_path_factory.mktemp("base") / "tiny", tiny.of_scenes())[0]


@pytest.fixture
def fake(monkeypatch):
    """The runs of a study, which finish at once."""
    import fake_runs  # not above: programs that tests start import this file too

    runs = fake_runs.Runs()
    monkeypatch.setattr("jaxpeft.training.run.run", runs.run)
    monkeypatch.setattr("jaxpeft.study.execute.keep_images", fake_runs.quiet)
    return runs
