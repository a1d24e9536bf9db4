"""Files that several processes write at once, also on other hosts, and in any locale."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxpeft.runtime import files
from jaxpeft.training import frozen_cache

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "write",
    [
        lambda path, text: files.write_text(path, text),
        lambda path, text: frozen_cache._kept(path, lambda: np.array(list(text)), 1 << 20, pytest.fail),
    ],
    ids=["text", "table"],
)
def test_two_hosts_write_one_file_under_one_process_id(tmp_path, monkeypatch, write):
    """The second one writes while the first one is about to put its file into place."""
    replace, began = os.replace, []

    def interrupted(a, b):
        began.append(a)
        if len(began) == 1:
            write(tmp_path / "x.npy", "second")
        replace(a, b)

    monkeypatch.setattr(os, "replace", interrupted)
    write(tmp_path / "x.npy", "first")
    assert len(set(began)) == 2 and [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    assert b"f" in (tmp_path / "x.npy").read_bytes()


def test_a_directory_that_another_host_is_writing_stays(tmp_path, monkeypatch):
    """Its process id means nothing here: no process of this host need have it, and this process may have it."""
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    with files.whole_directory(tmp_path / "out", ("a",)) as theirs:
        (theirs / "a").write_text("theirs")
        monkeypatch.undo()
        with files.whole_directory(tmp_path / "out", ("a",)) as mine:
            (mine / "a").write_text("mine")
        assert (theirs / "a").read_text() == "theirs" and (tmp_path / "out" / "a").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "theirs"


WORDS = r"""
import sys
from pathlib import Path
from configs.studies import tiny
from jaxpeft.runtime import files
from jaxpeft.study import cases, execute, grid

def run(config, workdir, **_):
    print("a warning about \u043a\u043e\u0442")
    raise ValueError("as expected")

directory, said = Path(sys.argv[1]), []
row = {"split": "test", "tuned": "\u043a\u043e\u0442"}
files.write_jsonl(directory / "predictions.jsonl", [row])
assert files.read_jsonl(directory / "predictions.jsonl") == cases._predictions(directory, {"test"})["test"] == [row]
execute.training_run.run = run
execute.execute(grid.runs(tiny.get_config(), {})[0], directory, said.append)
assert "as expected" in said[0], said
"""


@pytest.mark.slow
def test_texts_are_utf_8_in_any_locale(tmp_path):
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, "-c", WORDS, tmp_path], cwd=ROOT, env=env, check=True)
    assert "кот" in (tmp_path / "predictions.jsonl").read_text("utf-8")
