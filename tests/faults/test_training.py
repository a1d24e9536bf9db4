"""Faults during training: each leaves the newest good step, and the same command ends with the same result as without."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from jaxpeft.runtime import locks, signals
from jaxpeft.training import loop, sharding
from jaxpeft.training.checkpoint import Checkpoints

# the array store's event loop warns when it is garbage-collected after a failed read
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(weights, lines of metrics.jsonl) of 12 undisturbed steps."""
    workdir = tmp_path_factory.mktemp("whole")
    return toy.fit(workdir), (workdir / "metrics.jsonl").read_text()


def same_end(workdir, whole, fault, c=None, **options):
    """Run the same command to its end, and compare everything with the undisturbed run -> (the step it resumed from, log)."""
    said = []
    after = fault.timed(toy.fit, workdir, c, said.append, **options)
    np.testing.assert_array_equal(after, whole[0])
    assert (workdir / "metrics.jsonl").read_text() == whole[1]
    resumed = [int(found[1]) for line in said if (found := re.match(r"resumed from step (\d+)", line))]
    return resumed[0] if resumed else 0, said


def damage(kind, step_dir):
    files = sorted((p for p in (step_dir / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim, raw = files[-1], bytearray(files[-1].read_bytes())
    if kind == "one flipped bit":
        raw[len(raw) // 2] ^= 1
        victim.write_bytes(raw)
    elif kind == "zeroed page":
        middle = len(raw) // 2
        raw[middle : middle + 4096] = bytes(len(raw[middle : middle + 4096]))
        victim.write_bytes(raw)
    elif kind == "truncated":
        victim.write_bytes(raw[: len(raw) // 2])
    elif kind == "garbage":
        victim.write_bytes(os.urandom(len(raw)))
    elif kind == "missing":
        victim.unlink()
    elif kind == "manifest changed":
        path = step_dir / "manifest" / "metadata"
        path.write_text(path.read_text().replace('"data": "a"', '"data": "b"').replace('"data":"a"', '"data":"b"'))
    else:
        for path in sorted(step_dir.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        if kind == "no state":
            (step_dir / "manifest").mkdir()


KINDS = ("one flipped bit", "zeroed page", "truncated", "garbage", "missing", "manifest changed", "empty directory")


@pytest.mark.parametrize("kind", KINDS)
def test_damage(tmp_path, whole, fault, kind):
    """A damaged checkpoint."""
    toy.fit(tmp_path)
    damage(kind, tmp_path / "checkpoints" / "12")
    step, said = same_end(tmp_path, whole, fault)
    assert step == 11
    (line,) = [line for line in said if "damaged" in line]
    assert "checkpoint 12 is damaged" in line and "trying checkpoint 11" in line
    assert (tmp_path / "checkpoints" / "damaged-12").exists()
    step, said = same_end(tmp_path, whole, fault)
    assert step == 12 and not any("damaged" in line for line in said)  # written again in its place
    fault.tried("'checkpoint 12 is damaged ... trying checkpoint 11'; moved aside; resumed from step 11", 1)


def test_all_damaged(tmp_path, whole, fault):
    """Every checkpoint damaged."""
    toy.fit(tmp_path)
    for step in (11, 12):
        damage("truncated", tmp_path / "checkpoints" / str(step))
    step, said = same_end(tmp_path, whole, fault)
    assert step == 0 and sum("is damaged" in line for line in said) == 2
    assert any("training starts from the beginning" in line for line in said)
    fault.tried("both named; training starts from the beginning", 12)


def killed_at_random(workdir, steps, seconds, tries):
    """Kill the toy `tries` times -> after each kill (steps logged, the step it resumed from, seconds until then)."""
    rng, logged, found = np.random.default_rng(0), 0, []
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    for n in range(tries + 1):
        program = [sys.executable, HERE / "toy.py", workdir, str(steps), str(seconds)]
        process, began = subprocess.Popen(program, env=env, stdout=subprocess.PIPE, text=True), time.perf_counter()
        went_on = 0
        for line in process.stdout:
            if resumed := re.match(r"resumed from step (\d+)", line):
                went_on = int(resumed[1])
            if line.startswith("compiled") or line.startswith("ends"):
                break
        if n:
            found.append((logged, went_on, time.perf_counter() - began))
        until = logged + rng.integers(5, 40)
        while process.poll() is None and (steps_logged(workdir) < until or not any_saved(workdir)):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        logged = steps_logged(workdir)
    return found


def steps_logged(workdir):
    lines = workdir / "metrics.jsonl"
    return len(lines.read_text().splitlines()) if lines.exists() else 0


def any_saved(workdir):
    return any(path.name.isdecimal() for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("seconds", [0, 0.02])
def test_kill(tmp_path, fault, seconds):
    """kill -9 at random moments; seconds between checkpoints."""
    workdir, expected = tmp_path / "killed", toy.fit(tmp_path / "whole", toy.rarely(200))
    kills = killed_at_random(workdir, 200, seconds, 2)
    assert any(went_on > 0 for _, went_on, _ in kills)
    most = max(logged - went_on for logged, went_on, _ in kills)
    if seconds == 0:  # at most the step that ran and the one being saved are lost
        assert most <= 2
    np.testing.assert_array_equal(toy.fit(workdir, toy.config(200, seconds)), expected)
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 201))  # none twice, none missing
    for _, _, seconds in kills:
        fault.tried("goes on from the last step on disk", max(most, 0), seconds)


def test_kill_at_every_step(tmp_path, fault, monkeypatch):
    """The process is gone after any of its steps (a copy of its directory goes on), with validations."""
    c = toy.config(**{"optim.schedule": "plateau", "stop.every": 3, "stop.patience": 100})
    init, opened = Checkpoints.__init__, []

    def noted(self, *args):
        init(self, *args)
        opened.append(self)

    def copy(name):
        opened[0].wait()  # until the save is on disk: a kill cannot leave what a copy of a partial save would have
        shutil.copytree(tmp_path / "run", tmp_path / name)

    def validate(tuned):
        return float(np.square(np.asarray(tuned["params"]["w"])).mean())

    def copied(step, batch):
        if step > 2:
            copy(f"copy {step}")
        return batch

    validations = iter((0, 3, 6, 9, 12))

    def copied_in_it(tuned):
        copy(f"validation {next(validations)}")
        return validate(tuned)

    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "__init__", noted)
        after = toy.fit(tmp_path / "run", c, change=copied, validate=copied_in_it)
    whole = after, (tmp_path / "run" / "metrics.jsonl").read_text()
    for step in range(3, 13):  # when batch `step` is made, step - 1 has started
        resumed, _ = same_end(tmp_path / f"copy {step}", whole, fault, c, validate=validate)
        assert resumed == step - 2
        fault.tried("goes on from the step before the one that ran", 1)
    for step in (0, 3, 6, 9, 12):  # during the validation after step `step`, which is part of that step
        resumed, _ = same_end(tmp_path / f"validation {step}", whole, fault, c, validate=validate)
        assert resumed == max(0, step - 1)
        fault.tried("goes on from the step before the one that ran", 1)


@pytest.mark.parametrize(
    "seconds, per_save, steps",
    [
        (0, 0.0, range(1, 31)),
        (4, 0.0, [4, 8, 12, 16, 20, 24, 28, 30]),
        (4, 0.125, [4, 11, 18, 25, 30]),
        (60, 0.125, [30]),
    ],
    ids=["every step", "4 s", "4 s, but a save blocks for 0.125 s", "60 s"],
)
def test_the_clock(tmp_path, monkeypatch, seconds, per_save, steps):
    """With steps of a second, saves come after `seconds` or 50 times the duration of the last save, and after the last step."""
    now, saved, save = [0.0], [], Checkpoints.save

    def timed(self, step, *args):
        now[0] += per_save
        saved.append(step)
        return save(self, step, *args)

    def second(step, batch):
        now[0] += 1.0 if step > 1 else 0.0  # the second batch is made while the first step runs
        return batch

    monkeypatch.setattr(Checkpoints, "save", timed)
    monkeypatch.setattr(loop, "clock", lambda: now[0])
    toy.fit(tmp_path, toy.config(30, seconds), change=second)
    assert saved == list(steps)


@pytest.mark.parametrize("moment", ["warm-up", "tracing", "step", "save", "first validation", "validation"])
def test_sigterm(tmp_path, whole, fault, monkeypatch, moment):
    """SIGTERM."""
    c, options, steps_done = toy.rarely(), {}, 0
    if moment == "warm-up":
        options["change"] = toy.raise_at(1)
    elif moment == "step":
        options["change"], steps_done = toy.raise_at(6), 5
    elif moment == "tracing":

        def loss(*args):
            signal.raise_signal(signal.SIGTERM)  # real compilations are in test_stops.py

        options["loss"] = loss
    elif moment == "save":
        save = Checkpoints.save

        def saved(self, step, *args):
            signal.raise_signal(signal.SIGTERM)
            return save(self, step, *args)

        monkeypatch.setattr(Checkpoints, "save", saved)
        c, steps_done = toy.config(), 2  # the first save is completed, and the next step notices the signal
    else:
        c = toy.rarely(**{"optim.schedule": "plateau", "stop.every": 3, "stop.patience": 100})
        losses = iter(range(100, 0, -1))
        whole = (toy.fit(tmp_path / "w", c, validate=lambda tuned: float(next(losses))), "")
        whole = (whole[0], (tmp_path / "w" / "metrics.jsonl").read_text())
        losses = iter(range(100, 0, -1))

        def validate(tuned):
            if (loss := next(losses)) == at:
                signal.raise_signal(signal.SIGTERM)
            return float(loss)

        at, steps_done = {"first validation": (100, 1), "validation": (99, 3)}[moment]
        options["validate"] = validate
    with pytest.raises(signals.Stopped) as caught:
        toy.fit(tmp_path / "a", c, **options)
    assert signals.exit_code(caught.value) == signals.RESTARTABLE
    monkeypatch.undo()
    rest = {"validate": lambda tuned: float(next(losses))} if "validate" in options else {}
    step, _ = same_end(tmp_path / "a", whole, fault, c, **rest)
    assert step == steps_done
    fault.tried(f"stops with exit code {signals.RESTARTABLE}, goes on from step {step}")


def test_fewer_devices(tmp_path, whole, fault, monkeypatch):
    """The machine that resumes has other devices (eight, then four, then one)."""
    mesh = sharding.mesh
    for devices, stops_at in ((8, 5), (4, 9), (1, None)):
        monkeypatch.setattr(sharding, "mesh", lambda shape, n=devices: mesh(shape, jax.devices()[:n]))
        c, said = toy.rarely(), []
        change = toy.raise_at(stops_at + 1) if stops_at else toy.unchanged
        with contextlib.suppress(signals.Stopped):
            after = fault.timed(toy.fit, tmp_path, c, said.append, change=change)
        if devices < 8:
            assert f"resumed from step {5 if devices == 4 else 9}" in said, said
    np.testing.assert_allclose(after, whole[0], rtol=0, atol=1e-5)  # sums over devices round differently
    losses = [[json.loads(line)["loss"] for line in text.splitlines()]
              for text in (whole[1], (tmp_path / "metrics.jsonl").read_text())]  # fmt: skip
    np.testing.assert_allclose(*losses, rtol=1e-6)
    fault.tried("goes on from the saved step, on the devices at hand")


def test_sigint_twice(tmp_path, whole, fault):
    """Ctrl-C twice."""
    with pytest.raises(signals.Stopped) as caught:
        toy.fit(tmp_path, change=toy.raise_at(7, signal.SIGINT, times=2))
    assert signals.exit_code(caught.value) == signals.INTERRUPTED
    step, _ = same_end(tmp_path, whole, fault)
    assert step == 5  # it stops at once, without waiting for the step that runs
    fault.tried("ends at once with exit code 130, goes on from the step before the one that ran", 1)


def test_poisoned_batch(tmp_path, whole, fault):
    """A batch with NaN at step 7."""

    def poison(step, batch):
        if step == 7:
            batch["x"][3, 2] = np.nan
        return batch

    said = []
    for tries in range(2):
        with pytest.raises(loop.NonFinite, match="step 7: loss nan, gradients not finite in: params/w") as caught:
            toy.fit(tmp_path, toy.rarely(), said.append, change=poison)
        assert any("step 6 is saved" in line for line in said) or tries
    assert signals.exit_code(caught.value) == signals.FATAL
    step, _ = same_end(tmp_path, whole, fault)
    assert step == 6
    fault.tried("names step 7 and the leaf, exit code 1; step 6 is stored and nothing after it was applied")


def ends_with(error, workdir, whole, fault):
    """An error when batch 7 is made: the step before is stored, and the same command goes on from there."""

    def change(step, batch):
        if step == 7:
            raise error
        return batch

    with pytest.raises(type(error), match=str(error)):
        toy.fit(workdir, toy.rarely(), change=change)
    step, _ = same_end(workdir, whole, fault)
    assert step == 6


def test_corrupt_data_mid_epoch(tmp_path, whole, fault):
    """An image that cannot be read at step 7."""
    ends_with(ValueError("cats/7.png: cannot be read as an image"), tmp_path, whole, fault)
    fault.tried("names the file; the step before is stored")


def test_out_of_memory_of_a_step(tmp_path, whole, fault):
    """The device runs out of memory in a step."""
    ends_with(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"), tmp_path, whole, fault)
    fault.tried("the step before is stored")


@pytest.mark.parametrize("key", ["data", "config", "base", "seed"])
def test_changed_inputs(tmp_path, fault, key):
    """Another data set, config, base or seed on resuming."""
    manifest = dict.fromkeys(("data", "config", "base", "seed"), "a")
    toy.fit(tmp_path, toy.config(8), manifest=manifest)
    with pytest.raises(ValueError, match=f"checkpoint 8 belongs to another run.*{key}: stored a, now b") as caught:
        toy.fit(tmp_path, manifest=manifest | {key: "b"})
    assert signals.exit_code(caught.value) == signals.FATAL
    said = []
    fault.timed(toy.fit, tmp_path, None, said.append, manifest=manifest | {key: "b"}, accept=True)
    assert any("accept_changes is set" in line for line in said) and "resumed from step 8" in said
    fault.tried("refused with the difference; goes on with --accept_changes")


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a file system of 4 MB."""
    where = tmp_path / "small"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", where], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    (where / "run").mkdir()
    yield where / "run"
    subprocess.run(["umount", "-l", where], check=True)


def fill(ballast):
    """Write a file until its disk is full."""
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left on device"):
        while True:
            file.write(bytes(4096))


def test_full_disk(small_disk, whole, fault, caplog):
    """The disk is full during saves and log lines, and has room again later."""
    said, ballast = [], small_disk.parent / "ballast"

    def change(step, batch):
        if step == 6:
            time.sleep(0.5)  # step 4 is being written
            fill(ballast)
        if step == 11:
            ballast.unlink()
        return batch

    after = toy.fit(small_disk, log=said.append, change=change)
    np.testing.assert_array_equal(after, whole[0])
    (line,) = [line for line in said if "could not be written" in line]
    assert line == "checkpoint 5 could not be written (No space left on device); step 4 is kept"
    loud = [one for one in caplog.records if "orbax" in one.pathname and one.levelname in ("WARNING", "ERROR")]
    assert not loud  # Orbax would print its traceback four times
    step, _ = same_end(small_disk, whole, fault)
    assert step == 12
    fault.tried("training goes on, 'checkpoint 5 could not be written ... step 4 is kept'; step 12 written later")


def test_disk_stays_full(small_disk, whole, fault):
    """The disk is full and stays full."""
    said, ballast = [], small_disk.parent / "ballast"

    def change(step, batch):
        if step == 6:
            time.sleep(0.5)
            fill(ballast)
        return batch

    toy.fit(small_disk, log=said.append, change=change)
    assert any("the last step is not stored" in line for line in said)
    ballast.unlink()
    step, _ = same_end(small_disk, whole, fault)
    assert step == 4
    fault.tried(
        "training ends, its last step is not stored; checkpoint 4 is kept whole, and what follows is repeated", 8
    )


def test_read_only_disk(small_disk, whole, fault):
    """The disk becomes read-only during training."""
    said = []

    def protect(step, batch):
        if step == 6:
            time.sleep(0.5)  # step 4 is being written
            subprocess.run(["mount", "-o", "remount,ro", small_disk.parent], check=True)
        if step == 10:
            subprocess.run(["mount", "-o", "remount,rw", small_disk.parent], check=True)
        return batch

    after = toy.fit(small_disk, log=said.append, change=protect)
    np.testing.assert_array_equal(after, whole[0])
    assert any("checkpoint 5 could not be written" in line for line in said), said
    assert sum("metrics.jsonl cannot be written (Read-only file system)" in line for line in said) == 1
    step, _ = same_end(small_disk, whole, fault)
    assert step == 12
    fault.tried("training goes on; its log lines and step 12 are written as soon as the disk allows")


def test_failed_commit(tmp_path, whole, fault, monkeypatch):
    """A background save that fails."""
    import orbax.checkpoint as ocp

    said, real, calls = [], ocp.CheckpointManager.wait_until_finished, []

    def fails_once(self):
        real(self)
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the store did not answer")

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", fails_once)
    np.testing.assert_array_equal(toy.fit(tmp_path, log=said.append), whole[0])
    monkeypatch.undo()
    assert any("could not be written (RuntimeError: the store did not answer)" in line for line in said)
    step, _ = same_end(tmp_path, whole, fault)
    assert step == 12
    fault.tried("reported, and later saves still happen")


def test_clock_set_back(tmp_path, fault, monkeypatch):
    """The clock of a host is set back, or differs between hosts, while a run is claimed."""
    monkeypatch.setattr(locks, "STALE", 0.5)
    mine = locks.Lease(tmp_path, "run")
    assert mine.take()
    path = tmp_path / "run"
    elsewhere = json.loads(path.read_text()) | {"host": "elsewhere"}
    path.write_text(json.dumps(elsewhere))
    other = locks.Lease(tmp_path, "run")
    for shift in (0, -86400, -86400 + 1, 86400, 3):  # its owner refreshes it, by any clock
        os.utime(path, (time.time() + shift,) * 2)
        assert not other.take()
        time.sleep(0.3)
    fault.tried("a claim whose time changes, forward or back, is left alone")
    assert not other.take()
    time.sleep(0.6)
    assert fault.timed(other.take)  # not refreshed while it was watched
    other.release()
    mine._done.set()
    fault.tried("a claim whose time changes, forward or back, is left alone; one that nobody refreshes is taken over")
