"""Setup of the process before JAX initializes: multi-host runs, virtual devices, the cache of compiled programs."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import jax


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict:
    """The hardware and operating system, to record beside a measurement."""
    device = jax.devices()[0]
    return {
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "cores": os.cpu_count(),
        "os": platform.platform(),
    }


def versions() -> dict:
    """Versions of Python and of the packages that affect results."""
    names = ("jaxpeft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def join_others(
    when: str = "auto", coordinator: str | None = None, n: int | None = None, me: int | None = None
) -> bool:
    """Join the processes of a multi-host run before JAX initializes; return whether this is one.

    `when` is 'on', 'off' or 'auto': join if `coordinator` is given (as an argument, or in JAX_COORDINATOR_ADDRESS with
    JAX_NUM_PROCESSES and JAX_PROCESS_ID), in a SLURM step of several tasks, and on a TPU slice of several hosts. JAX detects
    the other values on SLURM, GKE, TPU and Open MPI. Raises ValueError if a value is missing.
    """
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    n = int(env["JAX_NUM_PROCESSES"]) if n is None and "JAX_NUM_PROCESSES" in env else n
    me = int(env["JAX_PROCESS_ID"]) if me is None and "JAX_PROCESS_ID" in env else me
    if coordinator and (n is None) != (me is None):
        raise ValueError(
            f"--coordinator {coordinator} needs both --num_processes (got {n}) and --process_id (got {me})"
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
    """Before JAX initializes: create `n_devices` virtual CPU devices, or use the CPU alone to plan for a topology."""
    if n_devices or topology:
        jax.config.update("jax_platforms", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu queries the cloud's metadata server
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two plans at once, or one beside a run
    if topology and not topology.startswith("v"):  # a GPU, whose compiler does not need one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        add_xla_flags("--xla_gpu_enable_triton_gemm=false")  # without a device to try them on, none is found for rank 8
    if n_devices:
        jax.config.update("jax_num_cpu_devices", n_devices)


# Without them two runs on GPUs differ in the last bits: scatters and the backward pass of fused attention add in the order in
# which threads arrive, and kernels are chosen by timing them, in every process anew
DETERMINISTIC = (
    "--xla_gpu_exclude_nondeterministic_ops=true",
    "--xla_gpu_autotune_level=0",
    "--xla_gpu_enable_triton_gemm=false",  # without autotuning, XLA finds no tiles for products of rank 8
)


def check_deterministic() -> None:
    """Raise ValueError if this process computes on GPUs and was not started with the options of `DETERMINISTIC`."""
    missing = [one for one in DETERMINISTIC if one not in os.environ.get("XLA_FLAGS", "").split()]
    if missing and jax.default_backend() == "gpu":
        raise ValueError(
            f"deterministic is set, but XLA_FLAGS lacks {' '.join(missing)}; set it before Python starts (the command line of "
            f"a single run does so itself)"
        )


def add_xla_flags(*flags: str) -> None:
    """Set options of XLA, before JAX initializes; what XLA_FLAGS already says about them stays."""
    old = os.environ.get("XLA_FLAGS", "").split()
    named = {one.partition("=")[0] for one in old}
    os.environ["XLA_FLAGS"] = " ".join(old + [one for one in flags if one.partition("=")[0] not in named])


def keep_compiled_programs() -> Path | None:
    """Let XLA keep compiled programs on disk, so that reruns and later runs of a study do not compile again.

    Returns their directory, below $XDG_CACHE_HOME/jaxpeft (~/.cache/jaxpeft): one per type of CPU, because programs hold its
    instructions. Returns None if JAX's own setting (JAX_COMPILATION_CACHE_DIR) takes precedence.
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
