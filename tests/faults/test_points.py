"""Faults of whole runs and studies: a run of `main.py` from data to result, and work shared by several processes."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import config_of, quiet

from configs.studies import tiny as tiny_study
from jaxpeft.runtime import files, locks, signals
from jaxpeft.study import execute, grid, processes, state
from jaxpeft.training import evaluate, finished, frozen_cache, loop, run, setup

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def program(code, *args):
    """A Python process with this project on its path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def test_two_launchers(base, tmp_path, fault):
    """Two launchers on one workdir."""
    holder = program(
        """
        import sys, time
        from pathlib import Path
        from jaxpeft.runtime import locks
        with locks.held(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(600)
        """,
        tmp_path,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on .* since 20.*another --workdir"):
            run.run(config_of(base), tmp_path, quiet)
        assert not (tmp_path / "config.json").exists()
    finally:
        holder.kill()
        holder.communicate()
    with fault.timed(locks.held, tmp_path):  # its owner is dead
        pass
    assert not list(tmp_path.iterdir())
    fault.tried("the second is refused, naming host, process and time of the first; a dead owner's lock is taken")


def test_a_lock_of_another_host(tmp_path, fault, monkeypatch):
    """A lock of a host that died, and of one that lives."""
    monkeypatch.setattr(locks, "STALE", 1.0)
    monkeypatch.setattr(locks, "BEAT", 0.2)
    path = tmp_path / ".owner"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "1", "since": "2026-01-01"}))
    began = time.perf_counter()
    with locks.held(tmp_path):
        assert 1.0 < time.perf_counter() - began < 10
    lives = program(
        """
        import json, os, sys, time
        path = sys.argv[1]
        open(path, "w").write(json.dumps({"host": "elsewhere", "pid": 7, "started": "1", "since": "2026-01-01"}))
        print("there", flush=True)
        while True:
            os.utime(path)
            time.sleep(0.1)
        """,
        path,
    )
    try:
        assert lives.stdout.readline() == "there\n"
        with pytest.raises(ValueError, match="in use by process 7 on elsewhere since 2026-01-01"), locks.held(tmp_path):
            pass
    finally:
        lives.kill()
        lives.communicate()
    fault.tried("taken over when nobody refreshes it, refused when somebody does")


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("point")
    run.run(config_of(base), workdir, quiet)
    return left(workdir)


def left(workdir):
    return (workdir / "metrics.jsonl").read_text(), (workdir / "predictions.jsonl").read_text()


def finish(base, workdir, undisturbed, fault):
    """Run the same command again: no step is done again, and what it leaves is that of an undisturbed run."""
    said = []
    fault.timed(run.run, config_of(base), workdir, said.append)
    assert "resumed from step 6" in said and not any("compiled" in line for line in said)
    assert left(workdir) == undisturbed


@pytest.mark.parametrize("moment", ["loading", "evaluation", "writing results"])
def test_sigterm_of_a_run(base, tmp_path, fault, monkeypatch, undisturbed, moment):
    """SIGTERM of a run."""
    module, name = {
        "loading": (setup, "setup_model"),
        "evaluation": (evaluate, "predict"),
        "writing results": (run, "save_tuned"),
    }[moment]
    real = getattr(module, name)

    def signalled(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, signalled)
    with pytest.raises(signals.Stopped) as caught, signals.handled():
        run.run(config_of(base), tmp_path, quiet)
    assert signals.exit_code(caught.value) == 75 and not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    if moment == "loading":  # nothing was trained
        fault.timed(run.run, config_of(base), tmp_path, quiet)
        assert left(tmp_path) == undisturbed
    else:
        finish(base, tmp_path, undisturbed, fault)
    fault.tried("exit code 75; no step is done again")


KILLED_AT = """
import os, signal, sys
sys.path[:0] = [sys.argv[3]]
import conftest  # devices and options of the tests' own process: other programs round otherwise
from tiny import config_of, quiet
from jaxpeft.runtime import files
from jaxpeft.training import run
name, real = sys.argv[4], files.write_text

def write_text(path, text):
    if path.name == name:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, text)

tensors = files.write_tensors

def write_tensors(path, *rest):
    if path.name == name:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    tensors(path, *rest)

files.write_text, files.write_tensors = write_text, write_tensors
run.run(config_of(sys.argv[1]), sys.argv[2], lambda *_: None)
"""


@pytest.mark.parametrize("name", ["tuned.safetensors", "manifest.json"])
def test_sigkill_while_the_result_is_written(base, tmp_path, fault, undisturbed, name):
    """SIGKILL while the trained parameters are written."""
    workdir = tmp_path / "run"
    child = program(KILLED_AT, base, workdir, ROOT / "tests", name)
    assert child.wait(timeout=300) == -signal.SIGKILL
    child.stdout.close()
    names = {path.name for path in workdir.iterdir()}
    assert "tuned" not in names and any(one.startswith(".tuned.jaxpeft-new-") for one in names)
    finish(base, workdir, undisturbed, fault)
    assert {path.name for path in (workdir / "tuned").iterdir()} == {"tuned.safetensors", "manifest.json"}
    assert not [path for path in workdir.iterdir() if path.name.startswith(".tuned")]
    finished.load_run(workdir)
    fault.tried("written again completely; no step is done again, no partial files are left")


def test_what_an_older_version_left_half_written(base, tmp_path, fault):
    """A half-written tuned/ of version 0.1."""
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / ".tuned.safetensors").write_bytes(b"half")
    fault.timed(run.run, config_of(base), tmp_path, quiet)
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {"tuned.safetensors", "manifest.json"}
    finished.load_run(tmp_path)  # every leaf is compared with its digest
    fault.tried("replaced")


def test_a_full_disk_while_the_result_is_written(base, tmp_path, fault, monkeypatch, undisturbed):
    """The disk is full while the trained parameters are written."""
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError) as caught:
        run.run(config_of(base), tmp_path, quiet)
    assert signals.exit_code(caught.value) == 75 and "No space left on device (" in signals.message(caught.value)
    assert not (tmp_path / "tuned").exists() and not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    finish(base, tmp_path, undisturbed, fault)
    fault.tried("one line, exit code 75; the same command finishes the run")


def test_a_directory_is_there_whole_or_not_at_all(tmp_path, fault):
    """Errors and kills at any time while a directory is written."""
    out = tmp_path / "out"

    def write(text, fail=False):
        with files.whole_directory(out, ("a", "b")) as new:
            (new / "a").write_text(text)
            if fail:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            (new / "b").write_text(text)

    def holds(text):
        return {path.name: path.read_text() for path in out.iterdir()} == dict.fromkeys("ab", text)

    with pytest.raises(OSError, match="No space"):
        write("first", fail=True)
    assert not list(tmp_path.iterdir())
    write("first")
    with pytest.raises(OSError, match="No space"):
        write("second", fail=True)
    assert holds("first")
    with files.whole_directory(tmp_path / "out", ("a", "b")) as new:
        left = new.name  # as a process of this host names it
        for name in "ab":
            (new / name).write_text("first")

    def of(kind, pid):
        return tmp_path / left.replace("new", kind).replace(f"-{os.getpid()}-", f"-{pid}-")

    os.rename(out, of("old", 9999999))  # killed between the two renames
    of("new", 9999999).mkdir()
    with pytest.raises(OSError, match="No space"):
        write("third", fail=True)
    assert holds("first")
    (tmp_path / ".out.mine").mkdir()  # somebody else's
    write("fourth")
    assert holds("fourth") and sorted(path.name for path in tmp_path.iterdir()) == [".out.mine", "out"]
    alive = of("new", os.getppid())
    alive.mkdir()  # of a process that lives: it is writing now
    write("fifth")
    assert alive.exists() and holds("fifth")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\)"):
        write("sixth")
    fault.tried("the old directory or the new one, complete; leftovers are removed, other files are not touched")


def test_a_mounted_directory_is_written_into(tmp_path, fault):
    """An export to a mount point, which cannot be renamed."""
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        for text in ("first", "second"):
            with files.whole_directory(out, ("a",)) as new:
                (new / "a").write_text(text)
            assert [path.name for path in out.iterdir()] == ["a"] and (out / "a").read_text() == text
    finally:
        subprocess.run(["umount", "-l", out], check=True)
    fault.tried("each file replaces the old one")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (OSError(errno.ENOSPC, "x", "a.bin"), 75, "No space left on device (a.bin): free some space"),
        (
            ValueError("RESOURCE_EXHAUSTED: No space left on device [28]"),
            75,
            "No space left on device [28] (No space left",
        ),
        (ValueError("rank is 0"), 1, "rank is 0"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_of_the_machine_are_told_from_others(error, code, said):
    assert signals.exit_code(error) == code and said in signals.message(error)


def test_an_error_that_took_the_place_of_one_of_the_machine_is_the_users():
    """`raise ... from None` hides the error that came before."""
    try:
        try:
            raise OSError(errno.EMFILE, "too many")
        except OSError:
            raise ValueError("bad config") from None
    except ValueError as error:
        assert signals.exit_code(error) == 1 and signals.message(error) == "bad config"


def test_changed_data(base, tmp_path, fault, monkeypatch):
    """The data changed between a run and its resumption."""
    fit, load = loop.fit, setup.data.load

    def stops(*args, **kwargs):
        fit(*args, **kwargs)
        raise signals.Stopped("", signal.SIGTERM)

    def other(*args):
        splits = load(*args)
        first, *rest = splits["train"].rows
        first["captions"][0] += " indeed"
        return splits | {"train": dataclasses.replace(splits["train"], rows=[first, *rest])}

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", stops)
        with pytest.raises(signals.Stopped):
            run.run(config_of(base), tmp_path, quiet)
    monkeypatch.setattr(setup.data, "load", other)
    with pytest.raises(ValueError, match="checkpoint 6 belongs to another run .data/train: stored .*, now "):
        fault.timed(run.run, config_of(base), tmp_path, quiet)
    fault.tried("refused: 'data/train: stored ..., now ...'; the test split, unchanged, is not named")


def test_full_disk_of_the_feature_cache(tmp_path, fault, monkeypatch):
    """The disk is full while image features are kept."""
    said, computed = [], np.ones((3, 2), np.float32)

    def save(file, array):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(frozen_cache.np, "save", save)
    found = fault.timed(frozen_cache._kept, tmp_path / "f" / "x.npy", lambda: computed, 1 << 20, said.append)
    np.testing.assert_array_equal(found, computed)
    assert not list((tmp_path / "f").iterdir()) and "No space left on device" in said[0]
    monkeypatch.undo()
    frozen_cache._kept(tmp_path / "f" / "x.npy", lambda: computed, 1 << 20, said.append)
    np.testing.assert_array_equal(np.load(tmp_path / "f" / "x.npy"), computed)
    fault.tried("what was computed is used; no partial file is left")


def test_a_damaged_feature_cache(tmp_path, fault):
    """A truncated file in the feature cache."""
    said, computed = [], np.arange(4096, dtype=np.float32)
    path = tmp_path / "x.npy"
    frozen_cache._kept(path, lambda: computed, 1 << 20, said.append)
    path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(
        fault.timed(frozen_cache._kept, path, lambda: computed, 1 << 20, said.append), computed
    )
    assert "cannot be read" in said[0]
    fault.tried("reported, and computed again")


# ---------------------------------------------------------------- studies


@pytest.fixture
def small(monkeypatch):
    config = tiny_study.get_config()
    monkeypatch.setattr(execute, "keep_images", lambda *_: None)
    monkeypatch.setattr(grid, "check", lambda *_: None)
    return config


def test_out_of_memory_in_a_point(small, tmp_path, fault, monkeypatch):
    """Out of memory in a run of a study."""
    runs = state.read(small, tmp_path).todo
    bad = runs[1].id

    def run(config, workdir, log=print, features_in=None):
        if config.name == bad:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes")
        raise signals.Stopped("", signal.SIGTERM) if config.name == runs[2].id else ValueError("not this one")

    monkeypatch.setattr(execute.training_run, "run", run)
    assert not execute.execute(runs[1], tmp_path, quiet)
    (line,) = (tmp_path / "failures" / f"{bad}.jsonl").read_text().splitlines()
    assert "RESOURCE_EXHAUSTED" in json.loads(line)["error"]
    assert not execute.execute(runs[0], tmp_path, quiet)  # the other runs continue
    with pytest.raises(signals.Stopped):
        execute.execute(runs[2], tmp_path, quiet)
    assert not (tmp_path / "failures" / f"{runs[2].id}.jsonl").exists()  # a stop is not a failure
    fault.tried("recorded with its reason and tried again twice; the other runs go on")


def test_full_disk_in_a_point(small, tmp_path, fault, monkeypatch):
    """The disk is full in a run of a study."""
    runs = state.read(small, tmp_path).todo

    def run(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "result.json")

    monkeypatch.setattr(execute.training_run, "run", run)
    with pytest.raises(OSError) as caught:
        execute.execute(runs[0], tmp_path, quiet)
    assert signals.exit_code(caught.value) == 75 and "result.json" in signals.message(caught.value)
    assert not (tmp_path / "failures").exists()
    fault.tried("the worker ends with exit code 75; no try of the run is used up")


WORKER = """
import os, signal, sys, time
from pathlib import Path
from jaxpeft.runtime import locks
directory, me = Path(sys.argv[1]), sys.argv[-1]
claim = locks.Lease(directory / "claims", "a-run")
if (directory / "failures" / "a-run.jsonl").exists():
    (directory / "done").touch()
    sys.exit(0)
assert claim.take()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_worker(tmp_path, fault, monkeypatch):
    """A worker of a study is killed (kill -9, out of memory)."""
    script, said = tmp_path / "worker.py", []
    script.write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fault.timed(processes.run_workers, [str(script), str(tmp_path)], 1, tmp_path, said.append)
    assert (tmp_path / "done").exists() and "killed by SIGKILL" in said[0] and "a-run" in said[0]
    (line,) = (tmp_path / "failures" / "a-run.jsonl").read_text().splitlines()
    assert "(likely out of memory)" in json.loads(line)["error"]
    fault.tried("its run is recorded as failed once, and another worker takes its place", 0)


def test_sigterm_at_a_claim(tmp_path, fault):
    """SIGTERM while a run of a study is being claimed."""
    for delay in (0.0, 0.02, 0.05):
        claimer = program(
            """
            import sys
            from pathlib import Path
            from jaxpeft.runtime import locks, signals
            try:
                with signals.handled():
                    print("begins", flush=True)
                    while True:
                        claim = locks.Lease(Path(sys.argv[1]), "run")
                        if claim.take():
                            claim.release()
            except KeyboardInterrupt as error:
                sys.exit(signals.exit_code(error))
            """,
            tmp_path,
        )
        assert claimer.stdout.readline() == "begins\n"
        time.sleep(delay)
        claimer.send_signal(signal.SIGTERM)
        assert claimer.wait(timeout=60) == 75
        claimer.communicate()
        claim = locks.Lease(tmp_path, "run")
        for _ in range(2):  # the first try may only remove the gate of the ended process
            if fault.timed(claim.take):
                break
        claim.release()
        fault.tried("exit code 75; the claim is free at once")
