"""The notebooks: made from their .py twins, run from top to bottom, and kept with what they printed and drew."""

import os
import pathlib
import subprocess
import sys

import jupytext
import pytest

COLAB = pathlib.Path(__file__).parent.parent / "colab"
sys.path.insert(0, str(COLAB))
from execute import NAMES, TINY, execute, read  # noqa: E402


def text_of(outputs):
    plain = [out.get("text", "") for out in outputs]
    return "".join(plain + [str(out["data"].get("text/plain", "")) for out in outputs if "data" in out])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_twin_and_was_run(name):
    twin, kept = read(name), jupytext.read(COLAB / f"{name}.ipynb")
    assert [(c.cell_type, c.source) for c in kept.cells] == [(c.cell_type, c.source) for c in twin.cells]
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell.outputs]
    assert not any(out.output_type == "error" for out in outputs)
    assert any("image/png" in out.get("data", ()) for out in outputs)
    for path in (str(COLAB.parent), "/tmp/", "/home/", "/root/"):
        assert path not in text_of(outputs)


def test_every_notebook_installs_the_same_way():
    cells = [next(c.source for c in read(name).cells if c.cell_type == "code") for name in NAMES]
    assert "pip" in cells[0] and len(set(cells)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_badge_opens_the_notebook_once_there_is_an_address(name):
    assert not read(name, "").cells[0].source.startswith("[![")
    with_badge = read(name, "somebody/jaxpeft").cells
    assert with_badge[0].source.endswith(f"github/somebody/jaxpeft/blob/main/colab/{name}.ipynb)")
    assert [c.source for c in with_badge[1:]] == [c.source for c in read(name, "").cells]


RUN = """
import contextlib, os, pathlib, runpy, sys
import matplotlib.pyplot as plt
import tiny  # layers are not unrolled

for name in sys.argv[2:]:
    os.makedirs(name)
    with contextlib.chdir(name), open("said.txt", "w") as said, contextlib.redirect_stdout(said):
        runpy.run_path(f"{sys.argv[1]}/{name}.py", run_name="__main__")
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
    plt.close("all")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages; the kernel is another process
def test_the_notebooks_run_from_top_to_bottom(tmp_path, monkeypatch):
    """One through Jupyter; the twins of the others, without it, in one process."""
    for key in ("JAXPEFT_SOURCE", "JUPYTER_PLATFORM_DIRS", *TINY):  # `execute` sets them
        monkeypatch.setitem(os.environ, key, "")
    first, *others = NAMES
    notebook = execute(first, tmp_path, tiny=True, timeout=600)
    said = {first: "".join(text_of(cell.outputs) for cell in notebook.cells if cell.cell_type == "code")}
    command = [sys.executable, "-c", RUN, COLAB, *others]
    env = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    said |= {name: (tmp_path / name / "said.txt").read_text() for name in others}
    expected = {
        "quickstart": "frozen base", "your_images": "tuned, no picture", "study": "4 done",
        "new_method": "fresh, largest difference: ", "export": "there and back, largest difference",
    }  # fmt: skip
    assert {name: expected[name] in said[name] for name in NAMES} == dict.fromkeys(NAMES, True)
    assert difference(said["new_method"], "fresh, largest difference") < 1e-5
    assert difference(said["new_method"], "merged - beside") < 1e-4


def difference(said, name):
    return float(said.split(f"{name}: ")[1].split()[0])


def test_a_fresh_method_changes_nothing_in_the_kept_notebook():
    """Exactly, as its text says; programs of the tests are compiled in a way that may round otherwise."""
    kept = jupytext.read(COLAB / "new_method.ipynb")
    printed = "".join(text_of(cell.outputs) for cell in kept.cells if cell.cell_type == "code")
    assert difference(printed, "fresh, largest difference") == 0.0
