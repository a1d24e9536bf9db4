"""Before JAX looks for devices: which processes belong together, which devices there are, where compiled programs are kept."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import jax


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict:
    """Where a number was measured."""
    device = jax.devices()[0]
    return {
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "cores": os.cpu_count(),
        "os": platform.platform(),
    }


def versions() -> dict:
    """The packages that decide numbers."""
    names = ("jaxpeft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def join_others(
    when: str = "auto", coordinator: str | None = None, n: int | None = None, me: int | None = None
) -> bool:
    """Make this process one of those of a run on several hosts, before JAX looks for devices; whether it is.

    `when` is 'on', 'off' or 'auto': where `coordinator` is given (as an argument or in JAX_COORDINATOR_ADDRESS, then with
    JAX_NUM_PROCESSES and JAX_PROCESS_ID), in a SLURM step of several tasks, and on a TPU slice of several hosts. Clusters
    that JAX knows (SLURM, GKE, TPU, Open MPI) say the rest themselves. Raises ValueError where something is missing.
    """
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    n = int(env["JAX_NUM_PROCESSES"]) if n is None and "JAX_NUM_PROCESSES" in env else n
    me = int(env["JAX_PROCESS_ID"]) if me is None and "JAX_PROCESS_ID" in env else me
    if coordinator and (n is None) != (me is None):
        raise ValueError(
            f"--coordinator {coordinator} needs both --num_processes (now {n}) and --process_id (now {me})"
        )
    slurm = int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    tpu = len([one for one in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if one]) > 1
    if when == "off" or (when == "auto" and not (coordinator or slurm or tpu)):
        return False
    try:
        jax.distributed.initialize(coordinator, n, me)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"cannot join the other processes: {error}") from None
    return True


def plan_for(n_devices: int, topology: str | None) -> None:
    """Before JAX looks for devices: `n_devices` virtual ones of CPU, or none but CPU where a topology is planned for."""
    if n_devices or topology:
        jax.config.update("jax_platforms", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu else looks for the machine's metadata server
    if n_devices:
        jax.config.update("jax_num_cpu_devices", n_devices)


def keep_compiled_programs() -> Path | None:
    """Let XLA keep compiled programs on disk, so that a rerun and the next point of a study do not compile again.

    Under $XDG_CACHE_HOME/jaxpeft (~/.cache), one directory per kind of processor, because programs for CPU hold its
    instructions. JAX's own settings (JAX_COMPILATION_CACHE_DIR) go first; then None is returned.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return None
    try:
        kind = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        kind = platform.processor()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = home / "jaxpeft" / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:8]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: compile every time
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return directory
