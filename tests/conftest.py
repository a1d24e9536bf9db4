"""A strict session: warnings are errors (pyproject), ranks never broadcast by accident, eight virtual devices."""

import os
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before any array exists
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Programs compiled by one worker serve the other and the next session: a second run takes a third of the time.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
