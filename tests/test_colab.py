"""The notebooks: made from their .py twins, run from top to bottom, and kept with what they printed and drew."""

import os
import pathlib
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages; the kernel is another process
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    for key in ("JAXPEFT_SOURCE", "JUPYTER_PLATFORM_DIRS", *TINY):  # `execute` sets them
        monkeypatch.setitem(os.environ, key, "")
    if name == "new_method":
        monkeypatch.delenv("XLA_FLAGS", raising=False)  # it says how exact the method is in a user's programs
    notebook = execute(name, tmp_path, tiny=True, timeout=600)
    said = "".join(text_of(cell.outputs) for cell in notebook.cells if cell.cell_type == "code")
    expected = {
        "quickstart": "frozen base", "your_images": "tuned, no picture", "study": "10 done",
        "new_method": "fresh, largest difference: 0.0", "export": "there and back, largest difference",
    }  # fmt: skip
    assert expected[name] in said
    if name == "new_method":
        assert float(said.split("merged - beside: ")[1].split()[0]) < 1e-4
