"""Two processes of two devices each, as two hosts: they train as one process of two devices does, and survive as one does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("two_processes.py")
SETTINGS = {
    "task": "captioning",
    "data.augment": "crop_flip",
    "model.dropout": 0.1,
    "method.dropout": 0.1,
    "eval.base": False,
    "steps": 10,
    "mesh.fsdp": 4,  # weights over both hosts: each writes its parts of a checkpoint; digests are of parts
}


def start(workdir, base, n=2, **settings):
    """The processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (PROGRAM.parent, PROGRAM.parents[1])))}
    return [
        subprocess.Popen(
            [sys.executable, PROGRAM, workdir, base, str(port), str(me), str(n), json.dumps(SETTINGS | settings)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for me in range(n)
    ]  # fmt: skip


def finish(processes):
    """[(exit code, what was said), ...]"""
    said = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def left(workdir):
    """What a run left: metrics lines, scores, tuned leaves."""
    lines = (workdir / "metrics.jsonl").read_text()
    return lines, json.loads((workdir / "result.json").read_text()), load_file(workdir / "tuned" / "tuned.safetensors")


def check_close(workdir, other):
    """Losses and tuned leaves differ by rounding only."""
    (lines, _, tuned), (lines1, _, tuned1) = left(workdir), left(other)
    losses, losses1 = ([json.loads(line)["loss"] for line in text.splitlines()] for text in (lines, lines1))
    assert len(losses) == 10
    np.testing.assert_allclose(losses, losses1, rtol=2e-6)
    for name, x in tuned.items():
        np.testing.assert_allclose(x, tuned1[name], atol=1e-4, err_msg=name)  # Adam's first steps amplify rounding


OFTEN = {"checkpoint_seconds": 1e-9}


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("hosts") / "undisturbed"
    ended = finish(start(workdir, base))
    assert [code for code, _ in ended] == [0, 0], ended[0][1][-2000:] + ended[1][1][-2000:]
    return workdir


def test_two_hosts_train_as_one_with_the_same_devices(undisturbed, base, tmp_path):
    """Each host makes its own rows of every batch, augmented as one host would; scores count every case once."""
    ((code, said),) = finish(start(tmp_path / "one", base, 1, **{"mesh.fsdp": 1}))
    assert code == 0, said[-2000:]
    check_close(undisturbed, tmp_path / "one")
    (_, result, _), (_, result1, _) = left(undisturbed), left(tmp_path / "one")
    assert result["metrics"]["test"]["n"] == result1["metrics"]["test"]["n"] == 5
    np.testing.assert_allclose(
        result["metrics"]["test"]["tuned"]["nll"], result1["metrics"]["test"]["tuned"]["nll"], rtol=1e-5
    )
    assert result["digests"] == result1["digests"]


def test_hosts_that_are_killed_and_then_stopped_equal_the_undisturbed_run(undisturbed, base, tmp_path):
    """Bit for bit: lines, scores, weights. Process 1 dies before step 3 is logged; of those that go on, it alone gets a signal.

    Checkpoints are by the clock of the first host, which says after every step that it is time; all hosts know a step later.
    """
    processes = start(tmp_path, base, _kill_at=3, **OFTEN)
    assert processes[1].wait(timeout=240) == -signal.SIGKILL
    processes[0].kill()  # a scheduler does that; alone it would end by itself after 100 s without a heartbeat
    finish(processes)
    assert not (tmp_path / "result.json").exists()
    ended = finish(start(tmp_path, base, _term_at=5, **OFTEN))
    assert [code for code, _ in ended] == [75, 75], ended
    assert int(re.search(r"resumed from step (\d+)\n", ended[0][1])[1]) in (1, 2)  # 2 was being saved
    assert "MB of weights per device" in ended[0][1]
    assert "stopped at step 8, which is saved" in ended[0][1]  # the others know when a step begun after it is done
    ended = finish(start(tmp_path, base, **OFTEN))
    assert [code for code, _ in ended] == [0, 0], ended[0][1][-2000:]
    assert "resumed from step 8\n" in ended[0][1]
    (lines, result, tuned), (lines1, result1, tuned1) = left(undisturbed), left(tmp_path)
    assert lines == lines1 and result["metrics"] == result1["metrics"]
    for name, x in tuned.items():
        np.testing.assert_array_equal(x, tuned1[name], err_msg=name)
