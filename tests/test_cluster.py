"""Runs of a study on a Ray cluster: one is started here, with two cores; processes are killed, the driver is stopped."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from fake_runs import finished

from configs.studies import tiny
from jaxpeft.study import execute, grid, ray_executor, state
from jaxpeft.study.ray_executor import resources_of

HERE = Path(__file__).parent
ray = pytest.importorskip("ray", reason="needs Ray: pip install -e .[ray]")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings


@pytest.fixture(scope="module")
def two_cores():
    """A cluster on this machine with two cores, whatever it has."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    own = {"PYTHONPATH": paths}
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": own},
        object_store_memory=100 << 20,
    )  # fmt: skip
    yield
    ray.shutdown()


def slow_point(config, workdir, log=print, features_in=None):
    """What `fake_runs.finished` leaves, half a second later; who did it, on how many threads. One run always fails."""
    if config.name == BAD:
        raise FloatingPointError("loss is nan")
    (Path(workdir) / "started").touch()
    time.sleep(0.5)
    jnp.ones(2).sum().block_until_ready()  # XLA starts its threads
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    with (Path(workdir) / "by.jsonl").open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "threads": names.count("tf_XLAEigen")}) + "\n")
    return finished(config, workdir)


def faked(*args):
    """`cluster._task` in a process of the cluster, with points that take half a second."""
    execute.training_run.run = slow_point
    return REAL(*args)


REAL = ray_executor._task
BAD = "captions_human-lora_head8-n64-s0-lr0.009"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ray_executor, "_task", faked)
    monkeypatch.setattr(ray_executor, "AGAIN", 0.5)
    monkeypatch.setattr(execute, "keep_images", lambda *_: None)
    monkeypatch.setattr(grid, "check", lambda *_: None)
    config = tiny.get_config("steps=3")
    config.settings.captions_human.lr_scale = 1.0
    del config.settings["vqa_stated"], config.variants["prefix_head"], config.variants["head"]
    config.variants.lora_head.sizes = (8,)
    return config  # two cells, six runs


def run(config, directory, log=lambda *_: None, **options):
    def elsewhere(*args, **kwargs):
        ray_executor.work(*args, resources=resources_of(""), **kwargs)

    return execute.run(config, directory, log=log, elsewhere=elsewhere, **options)


def holders(directory) -> dict[int, str]:
    """pid -> run, of the claims held now by runs that have begun."""
    found = {}
    for path in (directory / "claims").glob("[!.]*"):
        try:
            if (directory / "points" / path.name / "started").exists():
                found[json.loads(path.read_text())["pid"]] = path.name
        except (FileNotFoundError, ValueError):
            continue
    return found


def test_every_run_is_done_killed_ones_again_and_one_is_given_up(two_cores, small, tmp_path):
    killed, said = {}, []

    def killer():
        end = time.monotonic() + 120
        while len(killed) < 2 and time.monotonic() < end:
            time.sleep(0.05)
            for pid, name in holders(tmp_path).items():
                if name not in killed.values() and len(killed) < 2:
                    killed[pid] = name
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=killer)
    thread.start()
    rows = run(small, tmp_path, said.append)
    thread.join()
    assert len(killed) == 2
    assert {row["id"] for row in rows if row["status"] == "failed"} == {BAD}
    assert sum(row["status"] == "done" for row in rows) == grid.n_runs(small) - 1
    assert len((tmp_path / "failures" / f"{BAD}.jsonl").read_text().splitlines()) == state.TRIES
    for name in killed.values():
        (line,) = (tmp_path / "failures" / f"{name}.jsonl").read_text().splitlines()
        assert "its process was killed" in json.loads(line)["error"]
    assert not list((tmp_path / "claims").glob("[!.]*"))
    by = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "points").glob("*/by.jsonl")
    ]
    assert {len(lines) for lines in by} == {1}  # none twice
    if sys.platform == "linux":
        assert {lines[0]["threads"] for lines in by} == {
            1
        }  # of the one core that a run takes, on a machine that has more


def test_a_stopped_driver_leaves_what_is_done_and_goes_on(two_cores, small, tmp_path):
    def stop_soon(text):
        if "cider_d" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path, stop_soon)
    done = set((tmp_path / "points").glob("*/result.json"))
    assert 0 < len(done) < grid.n_runs(small)
    before = {path: path.stat().st_mtime_ns for path in done}
    rows = run(small, tmp_path)
    assert sum(row["status"] == "done" for row in rows) == grid.n_runs(small) - 1
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert [path.stem for path in (tmp_path / "failures").iterdir()] == [BAD]  # a stop is not a failure


def test_runs_asked_for_again_are_done_again_once(two_cores, small, tmp_path):
    """The processes of the cluster are told nothing: the request is in the directory."""

    def written():
        return {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "points").glob("*/result.json")}

    run(small, tmp_path)
    before = written()
    assert len(before) == grid.n_runs(small) - 1
    run(small, tmp_path, rerun="*-n256-*")
    after = written()
    assert {name for name in before if before[name] != after[name]} == {name for name in before if "-n256-" in name}
    run(small, tmp_path, rerun="*-n256-*")
    assert after == written()


def test_without_ray_it_says_what_to_install(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxpeft\[ray\]'"):
        run(small, tmp_path)


def test_resources():
    found = resources_of("CPU=4,GPU=1,memory_gb=16,TPU=4")
    assert found == {"CPU": 4.0, "GPU": 1.0, "memory": 16e9, "TPU": 4.0} and resources_of("") == {"CPU": 1.0}
    for bad in ("CPU", "CPU=x", "GPU=-1", "CPU=nan", "CPU=inf"):
        with pytest.raises(ValueError, match="NAME=NUMBER"):
            resources_of(bad)
