"""The wheel: built, installed in an environment of its own, it trains from an empty directory without a clone."""

import importlib
import json
import os
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import jaxpeft as jp

ROOT = Path(__file__).parents[1]


def shell(*command, cwd, **env):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**clean_environment(), **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def sources():
    """The files that a wheel is made of."""
    below = (path for folder in ("jaxpeft", "configs") for path in (ROOT / folder).rglob("*"))
    files = [path for path in below if path.is_file() and "__pycache__" not in path.parts]
    return [*files, *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]


def clean_environment():
    """Without what makes this checkout importable."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as setuptools writes beside its sources."""
    out = tmp_path_factory.mktemp("wheel")
    for path in sources():
        target = out / "source" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    shell(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", out, ".",
        cwd=out / "source",
    )  # fmt: skip
    (found,) = out.glob("jaxpeft-*.whl")
    return found


@pytest.fixture(scope="module")
def home(wheel, tmp_path_factory):
    """(an empty directory, the directory of an environment's programs): the wheel, and this environment's libraries."""
    place = tmp_path_factory.mktemp("env")
    venv.create(place, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)}))
    # plain paths: the .pth files of these directories, an editable install of this checkout for one, are not followed
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    shell(
        sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "-q", "--no-deps", "--no-index", wheel,
        cwd=place,
    )  # fmt: skip
    empty = tmp_path_factory.mktemp("empty")
    return empty, place / "bin"


@pytest.mark.slow
def test_the_wheel_holds_what_a_run_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(path.relative_to(ROOT).as_posix()) for path in sources() if path.parent != ROOT}
    missing = {name for name in ours if f"jaxpeft/{name.removeprefix('jaxpeft/')}" not in names}
    assert not missing
    assert {"jaxpeft/py.typed", "jaxpeft/configs/quickstart.py", "jaxpeft/assets/tiny/model.safetensors"} <= names
    assert not any(name.split("/")[0] in ("configs", "tests", "benchmarks") for name in names)


@pytest.mark.slow
def test_the_quickstart_trains_from_an_empty_directory(home):
    empty, programs = home
    where = shell(programs / "python", "-c", "import jaxpeft; print(jaxpeft.__file__)", cwd=empty).strip()
    assert str(programs.parent) in where
    small = ["--config.steps=2", "--config.data.n_train=64", "--config.data.n_test=16", "--config.model.unroll=1"]
    said = shell(programs / "jaxpeft", "run", "--config=quickstart", "--workdir=run", *small, cwd=empty)
    result = json.loads((empty / "run" / "result.json").read_text())
    assert result["status"] == "done" and result["timing"]["steps"] == 2
    assert result["command"].startswith("jaxpeft run --config=quickstart")
    for part in (
        "accuracy",
        "blind: question only",
        "frozen base",
        "tuned",
        "compiled the training step",
        "gallery.png",
    ):
        assert part in said
    image = empty / "run" / "gallery.png"
    written = shell(
        programs / "jaxpeft", "generate", "--workdir", "run", "--image", image, "--question", "what color is the cube",
        cwd=empty,
    )  # fmt: skip
    assert written.startswith(str(image))
    assert "jaxpeft" in shell(programs / "jaxpeft", "--version", cwd=empty)
    plan = shell(programs / "jaxpeft", "preflight", "--config=configs/quickstart.py", *small[1:], cwd=empty)
    assert "FLOPs per step" in plan
    listed = {path.name for path in empty.iterdir()}
    assert listed == {"run"}


def test_the_commands_module_is_not_the_function():
    importlib.import_module("jaxpeft.apps.generate")
    assert callable(jp.generate) and jp.generate.__module__ == "jaxpeft.apps.generate"
