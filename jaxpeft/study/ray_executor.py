"""The runs of a study on a Ray cluster: `main.py --config=configs/studies/X.py --workdir=DIR --executor=ray`.

DIR, the data and the checkout must have the same paths on every node (a shared file system, or an image with the checkout and
a mounted DIR): results, claims and features are files there, as with processes on one machine, which may work in the same DIR
at the same time. A Ray task is one run. The cluster is the one given by RAY_ADDRESS, or the one running on this host, or a new
one. All state of the driver is on disk: if it is killed, run the same command again.
"""

import os
import time
from pathlib import Path

import jax

import jaxpeft
from jaxpeft.runtime import host, malloc, registry, signals
from jaxpeft.study import execute, state
from jaxpeft.study.grid import Run

RUNS_A_PROCESS = 20
POLL, AGAIN = 2.0, 5.0  # seconds between polls, and before a run that could not be executed is submitted again


# of Ray's resources, and of the options that ask for them
NAMES = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


def resources_of(text: str) -> dict[str, float]:
    """What a run needs of 'CPU=4,GPU=1,memory_gb=16,TPU=4', by Ray's names. Raises ValueError naming the invalid part."""
    found = {"CPU": 1.0}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            amount = float(value)
        except ValueError:
            amount = -1.0
        if not 0 <= amount < float("inf"):
            raise ValueError(
                f"resources: {part!r} must be NAME=NUMBER, for example CPU=4,GPU=1,memory_gb=16 or CPU=8,TPU=4"
            )
        found |= {"memory": amount * 1e9} if name == "memory_gb" else {name: amount}
    return found


def work(config, directory: Path, resources: dict[str, float], log=print) -> None:
    """Submit runs to the cluster until all are done. A run whose process is killed (likely out of memory) has failed and is
    tried again; a run whose node is lost, or that finds a full disk, is submitted again and does not count as failed."""
    try:
        import ray
    except ImportError:
        raise ValueError("--executor=ray needs Ray: pip install 'jaxpeft[ray]'") from None

    if not ray.is_initialized():
        checkout = str(Path(jaxpeft.__file__).parents[1])
        paths = os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])])
        ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    log(f"ray: {len(nodes)} nodes, {sum(node.get('CPU', 0) for node in nodes):g} cores; each run needs {resources}")
    if not any(all(node.get(name, 0.0) >= n for name, n in resources.items()) for node in nodes):
        log(f"ray: no node has {resources} now; waiting for one (--resources sets what a run needs)")

    # on an accelerator a process per run, so that its memory is freed; else several runs, to import only once
    custom = {name: n for name, n in resources.items() if name not in NAMES}
    calls = 1 if resources.get("GPU") or custom else RUNS_A_PROCESS
    options = {NAMES[name]: n for name, n in resources.items() if name in NAMES}
    task = ray.remote(max_retries=0, max_calls=calls, resources=custom, **options)(_task)
    directory, found, sent, not_before = directory.resolve(), None, {}, {}
    try:
        while True:
            found = state.read(config, directory, found)
            flying, now = {run.id for run in sent.values()}, time.monotonic()
            for run in found.todo:
                if run.id not in flying and not_before.get(run.id, 0.0) <= now:
                    cores = max(1, int(resources["CPU"]))
                    _ = run.config  # cached and sent with the run: a worker might import edited code and build another
                    sent[task.remote(run, str(directory), os.getcwd(), cores, tuple(registry.given))] = run
            if not sent and not found.todo:
                return
            ready = ray.wait(list(sent), timeout=POLL)[0] if sent else time.sleep(POLL) or []
            for ref in ready:
                run = sent.pop(ref)
                if not _received(ray, ref, run, directory, log):
                    not_before[run.id] = time.monotonic() + AGAIN
    except KeyboardInterrupt:  # every run saves its state and stops at its next step; the same command resumes it
        for ref in sent:
            ray.cancel(ref)
        if sent:
            ray.wait(list(sent), num_returns=len(sent), timeout=60.0)
        raise


def _received(ray, ref, run, directory: Path, log) -> bool:
    """Handle the outcome of a task; returns False where its run may be submitted again. Only a killed process uses up a try."""
    try:
        lines = ray.get(ref)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        said = f"its process was killed (likely out of memory; {type(error).__name__})"
        state.write_failure(directory, run.id, said, time.time())
        log(f"failed: {run.id}: {said}")
        return False
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(error, ray.exceptions.RayTaskError) and not signals.is_transient(cause):
            raise cause from error
        log(
            f"{run.id}: {signals.message(cause) if signals.is_transient(cause) else type(error).__name__}; submitted again"
        )
        return False
    for line in lines or ():
        log(line)
    return lines is not None


def _task(run: Run, directory: str, cwd: str, n_cores: int, imports=()) -> list[str] | None:
    """In a Ray worker: execute a run -> its log lines, or None where it was stopped or another process executes it."""
    os.chdir(cwd)
    registry.load(imports)
    lines: list[str] = []
    os.environ["PJRT_NPROC"] = str(n_cores)  # XLA's threads: Ray only counts cores, it does not pin processes to them
    with signals.handled():
        malloc.keep_freed_memory()
        host.keep_compiled_programs()
        try:
            done = execute.attempt(run, Path(directory), lines.append)
        except KeyboardInterrupt:  # cancelled, or its node is being removed: the run is saved
            return None
        finally:
            jax.clear_caches()
    return lines if done else None
