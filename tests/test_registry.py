"""Methods, data sets, tasks, optimizers and metrics from a module outside the package, all the way to `generate`."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import jaxpeft as jp
from jaxpeft import cli, interchange, methods, metrics, tasks
from jaxpeft.data import DATASETS
from jaxpeft.methods import METHODS, LoRA
from jaxpeft.runtime import registry
from jaxpeft.training import optim, results

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from jaxpeft import config

def get_config(arg=""):
    c = config.get_config("shout", "shift")
    c.data.name, c.data.n = "squares", 9
    c.task_options = config.task_options("shout", metrics=("words", "exact_match"))
    c.optim.name, c.optim.lr, c.optim.schedule = "plain", 0.5, "cosine"
    c.steps, c.batch_size, c.log_every = 150, 9, 50
    c.base, c.eval.batch_size, c.model.unroll = "tiny", 9, 1
    return c
"""


def shell(*words, cwd):
    """(exit status, output) of a command in another process, which knows nothing of the module."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with the module, a config that uses all of it, its finished run and a picture."""
    home = tmp_path_factory.mktemp("outside")
    shutil.copyfile(pathlib.Path(__file__).with_name("outside.py"), home / "my_things.py")
    (home / "mine.py").write_text(CONFIG)
    Image.fromarray(np.full((20, 30, 3), (30, 30, 220), np.uint8)).save(home / "blue.png")
    command = [ROOT / "main.py", "--config=mine.py", "--workdir=run"]
    status, said = shell(*command, "--imports=my_things", cwd=home)
    assert status == 0, said
    return home, said


@pytest.mark.slow
def test_a_run_uses_all_of_it_and_says_where_it_came_from(home, monkeypatch):
    home, said = home
    result = json.loads((home / "run" / "result.json").read_text())
    test = result["metrics"]["test"]
    assert result["imports"] == ["my_things"] and result["method"] == "shift" and result["task"] == "shout"
    assert test["tuned"]["words"] > 2 and test["tuned"]["exact_match"] == 0.0  # every word twice is no reference
    assert test["tuned"]["nll"] < 0.7 * test["base"]["nll"]  # the offsets learned, by the optimizer from outside
    assert "words" in said and "exact_match" in said  # columns of the table
    module = hashlib.sha256((home / "my_things.py").read_bytes()).hexdigest()
    monkeypatch.setattr(registry, "digests", {"my_things": module})
    assert result["code"] == results.code()  # the package's and the module's
    assert result["counts"]["tuned"] == result["counts"]["stored"] == 3 * 128 + 129  # three layers; a word


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads configs so
def test_a_config_that_uses_the_module_without_importing_it_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--config=mine.py", "--workdir=run"])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "error: unknown task 'shout'" in said and "--imports=MODULE" in said


@pytest.mark.slow
def test_it_writes_and_is_exported_where_the_module_is_imported_again(home):
    home, _ = home
    generate = ["-m", "jaxpeft", "generate", "--workdir", "run", "--image", "blue.png", "--beams", "1"]
    status, said = shell(*generate, "--imports", "my_things.py", cwd=home)
    rows = [json.loads(line) for line in (home / "run" / "predictions.jsonl").read_text().splitlines()]
    (written,) = (row["tuned"] for row in rows if row["image_id"] == "test-2")  # the same picture
    assert status == 0 and said.startswith(f"blue.png: {written} (") and len(written.split()) > 2
    status, said = shell(*generate, cwd=home)
    assert status == 1 and said.count("\n") == 1
    assert re.match(r"error: run: unknown task 'shout'.* used code from my_things; .*--imports=my_things", said)
    status, said = shell(
        "-m", "jaxpeft", "export", "--workdir", "run", "--out", "out", "--imports", "my_things", cwd=home
    )
    assert status == 0 and (home / "out" / "model.safetensors").exists(), said


@pytest.mark.slow
def test_loading_imports_nothing_that_a_run_names(home, tmp_path, monkeypatch):
    """A run directory may be a stranger's: with a module in it and in the working directory, and names of all kinds."""
    run = tmp_path / "run"
    shutil.copytree(home[0] / "run", run)
    for place in (run, tmp_path):
        (place / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    monkeypatch.chdir(run)
    result = json.loads((run / "result.json").read_text())
    for names in (["evil"], ["evil", "os"], ["../evil"], ["evil.py"], [3], "evil", {"evil": 1}, None, ["e" * 10**6]):
        (run / "result.json").write_text(json.dumps(result | {"imports": names}))
        with pytest.raises(ValueError) as error:
            jp.load_run(run)
        assert len(str(error.value)) < 2000
    (run / "result.json").write_text(json.dumps(result | {"imports": ["evil"]}))
    with pytest.raises(ValueError, match="code from evil; if you have and trust this code, import it: --imports=evil"):
        jp.load_run(run)
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules
    with pytest.raises(ValueError, match="unknown task 'shout'"):
        jp.load_run(run, imports=["evil"])  # asked for: imported, and of no use
    assert (tmp_path / "ran").exists()
    del sys.modules["evil"]


@pytest.fixture
def outside():
    """The module, imported into this process, and taken out again."""
    kept = [(one, dict(one)) for one in (METHODS, DATASETS, tasks.TASKS, optim.OPTIMIZERS, metrics.METRICS)]
    import outside

    yield outside
    for one, entries in kept:
        dict.clear(one)
        dict.update(one, entries)
    del sys.modules["outside"]


def test_jaxpefts_own_names_stay_its_own(outside):
    for one, name in ((METHODS, "lora"), (DATASETS, "scenes"), (tasks.TASKS, "vqa"), (optim.OPTIMIZERS, "adamw")):
        with pytest.raises(ValueError, match=f"{name!r} is a built-in {one.kind}; choose another name"):
            one[name] = outside.plain
    METHODS["shift"] = outside.Shift  # a cell of a notebook that runs again
    with pytest.raises(TypeError, match="LoRA is a built-in method class; choose another name"):
        type("LoRA", (LoRA,), {"__module__": "mine"})


def test_a_method_from_outside_is_saved_by_its_name(outside):
    method = outside.Shift(gain=2.0)
    assert interchange.from_json(interchange.to_json(method)) == method
    with pytest.raises(registry.Unknown, match="unknown method 'Shifty' in a manifest"):
        interchange.from_json({"name": "Shifty"})
    assert methods.build("shift", gain=3.0) == (outside.Shift(gain=3.0),)


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (lambda: methods.build("lroa"), r"unknown method 'lroa' \(did you mean 'lora'\?\); choose one of bitfit, "),
        (lambda: tasks.build("caption"), r"unknown task 'caption' \(did you mean 'captioning'\?\)"),
        (lambda: DATASETS.find("sceens"), r"unknown data set 'sceens' \(did you mean 'scenes'\?\)"),
        (lambda: optim.OPTIMIZERS.find("adam"), r"unknown optimizer 'adam' \(did you mean 'adamw'\?\)"),
        (lambda: tasks.build("vqa", metrics=("exact",)), r"unknown metric 'exact'.*choose one of exact_match"),
        (lambda: registry.load(["no_such_module"]), "--imports=no_such_module: module not found"),
        (lambda: registry.load(["no/such.py"]), "--imports=no/such.py: file not found"),
    ],
)
def test_an_unknown_name_is_said_with_the_nearest(find, message):
    with pytest.raises(ValueError, match=message):
        find()


def test_what_a_module_itself_raises_comes_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.py").write_text("import no_such_library_of_yours")
    for name in ("half", "half.py"):
        with pytest.raises(ModuleNotFoundError, match="no_such_library_of_yours"):
            registry.load([name])
        assert "half" not in sys.modules and str(tmp_path) not in sys.path
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ValueError, match="another module named 'json' is already loaded; rename the file"):
        registry.load(["json.py"])
