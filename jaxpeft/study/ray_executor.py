"""The runs of a study on a Ray cluster: `main.py --config=configs/studies/X.py --workdir=DIR --executor=ray`.

Every node sees DIR, the data and the checkout at the same paths (a shared file system, or an image with the checkout and a
mounted DIR): results, claims and features are files there, as with processes of one machine, which may help on the
same DIR at the same time. A task is one run. The cluster is the one that RAY_ADDRESS names, or that runs on this host, or one
that is started here. The driver holds nothing that is not on disk: killed, it is started again by the same command.
"""

import dataclasses
import os
import time
from pathlib import Path

import jax

import jaxpeft
from jaxpeft.runtime import host, malloc, registry, signals
from jaxpeft.study import execute, state
from jaxpeft.study.grid import Run

RUNS_A_PROCESS = 20
POLL, AGAIN = 2.0, 5.0  # seconds between looks, and before a run that could not be done is sent again


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one run takes of a node; Ray starts as many at once as fit."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: float = 0.0  # bytes; 0: not asked for
    custom: tuple[tuple[str, float], ...] = ()  # as TPU=4

    @classmethod
    def parse(cls, text: str) -> "Resources":
        """From 'CPU=4,GPU=1,memory_gb=16,TPU=4'; raises ValueError naming the part that is wrong."""
        found, custom = {"cpus": 1.0}, {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                amount = float(value)
                if not 0 <= amount < float("inf"):
                    raise ValueError
            except ValueError:
                raise ValueError(
                    f"resources: {part!r} is not NAME=NUMBER; say for example CPU=4,GPU=1,memory_gb=16 or CPU=8,TPU=4"
                ) from None
            match name:
                case "CPU":
                    found["cpus"] = amount
                case "GPU":
                    found["gpus"] = amount
                case "memory_gb":
                    found["memory"] = amount * 1e9
                case _:
                    custom[name] = amount
        return cls(**found, custom=tuple(sorted(custom.items())))

    def options(self) -> dict:
        """For `ray.remote`."""
        own = {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": dict(self.custom)}
        return own | ({"memory": self.memory} if self.memory else {})

    def fits(self, node: dict[str, float]) -> bool:
        """Whether a node with these resources in all can do a run."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory, **dict(self.custom)}
        return all(node.get(name, 0.0) >= amount for name, amount in asked.items())

    def __str__(self):
        memory = [f"memory_gb={self.memory / 1e9:g}"] if self.memory else []
        return ",".join([f"CPU={self.cpus:g}", f"GPU={self.gpus:g}", *memory, *(f"{k}={v:g}" for k, v in self.custom)])


def work(config, directory: Path, resources: Resources, log=print) -> None:
    """Send runs to the cluster until none is left. A run whose process the system kills, as for want of memory, has failed
    and is tried again; one whose node goes away, or that meets a full disk, is sent again and has not failed."""
    try:
        import ray
    except ImportError:
        raise ValueError("--executor=ray needs Ray: pip install 'jaxpeft[ray]'") from None

    if not ray.is_initialized():
        checkout = str(Path(jaxpeft.__file__).parents[1])
        paths = os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])])
        ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    log(f"ray: {len(nodes)} nodes, {sum(node.get('CPU', 0) for node in nodes):g} cores; a run takes {resources}")
    if not any(resources.fits(node) for node in nodes):
        log(f"ray: no node has {resources} now; waiting for one (--resources says what a run takes)")

    # on a device a process per run, so that nothing of a run stays behind there; else some, which import once
    calls = 1 if resources.gpus or resources.custom else RUNS_A_PROCESS
    task = ray.remote(max_retries=0, max_calls=calls, **resources.options())(_task)
    directory, found, sent, not_before = directory.resolve(), None, {}, {}
    try:
        while True:
            found = state.read(config, directory, found)
            flying, now = {run.id for run in sent.values()}, time.monotonic()
            for run in found.todo:
                if run.id not in flying and not_before.get(run.id, 0.0) <= now:
                    cores = max(1, int(resources.cpus))
                    _ = run.config  # goes with the run: a process of a later edit might make another one of the study
                    sent[task.remote(run, str(directory), os.getcwd(), cores, tuple(registry.given))] = run
            if not sent and not found.todo:
                return
            ready = ray.wait(list(sent), timeout=POLL)[0] if sent else time.sleep(POLL) or []
            for ref in ready:
                run = sent.pop(ref)
                if not _received(ray, ref, run, directory, log):
                    not_before[run.id] = time.monotonic() + AGAIN
    except KeyboardInterrupt:  # every run stops at its next step, saved, and the same command goes on from there
        for ref in sent:
            ray.cancel(ref)
        if sent:
            ray.wait(list(sent), num_returns=len(sent), timeout=60.0)
        raise


def _received(ray, ref, run, directory: Path, log) -> bool:
    """Take in what became of a task; False where its run may be sent again later. Only a killed process used up a try."""
    try:
        lines = ray.get(ref)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        said = f"its process was killed ({type(error).__name__}), as for want of memory"
        state.write_failure(directory, run.id, said, time.time())
        log(f"failed: {run.id}: {said}")
        return False
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(error, ray.exceptions.RayTaskError) and not signals.is_transient(cause):
            raise cause from error
        log(
            f"{run.id}: {signals.message(cause) if signals.is_transient(cause) else type(error).__name__}; it is sent again"
        )
        return False
    for line in lines or ():
        log(line)
    return lines is not None


def _task(run: Run, directory: str, cwd: str, n_cores: int, imports=()) -> list[str] | None:
    """In a process of the cluster: do a run -> what it said, or None where another process is doing it or it was stopped."""
    os.chdir(cwd)
    registry.load(imports)
    lines: list[str] = []
    os.environ["PJRT_NPROC"] = str(n_cores)  # XLA's threads: Ray counts cores, and keeps no process to its own
    with signals.handled():
        malloc.keep_freed_memory()
        host.keep_compiled_programs()
        try:
            done = execute.attempt(run, Path(directory), lines.append)
        except KeyboardInterrupt:  # cancelled, or its node is told to go: it is saved
            return None
        finally:
            jax.clear_caches()
    return lines if done else None
