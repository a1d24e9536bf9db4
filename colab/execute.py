"""The notebooks, made from their .py twins and run from top to bottom: `python colab/execute.py [NAME ...]`.

Needs `pip install -e '.[notebooks]'`; export reads its files in PyTorch where torch, transformers and peft are installed. Each
runs in an empty directory; outputs are kept, with images, and nothing of the machine. JAXPEFT_TINY=1 makes them take seconds,
for the tests, which do not keep the outputs.
"""

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).resolve().parent
TINY = {"JAXPEFT_TINY": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # few steps: compiling is most of the time
NAMES = ("quickstart", "your_images", "study", "new_method", "export")
REPOSITORY = ""  # "owner/name" on GitHub, once the project has a public address there; notebooks then get a badge


def badge(name: str, repository: str) -> str:
    """Markdown of an "Open in Colab" badge for the notebook NAME."""
    site = "https://colab.research.google.com"
    return f"[![Open in Colab]({site}/assets/colab-badge.svg)]({site}/github/{repository}/blob/main/colab/{name}.ipynb)"


def read(name: str, repository: str = REPOSITORY) -> nbformat.NotebookNode:
    """The notebook NAME from its twin, not yet run; with a badge at its top where `repository` is known."""
    notebook = jupytext.read(HERE / f"{name}.py")
    if repository:
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(badge(name, repository)))
    return notebook


def execute(name: str, directory: str | Path, tiny: bool = False, timeout: int = 3600) -> nbformat.NotebookNode:
    """The executed notebook NAME, run in `directory`; raises nbclient's CellExecutionError where a cell fails."""
    notebook = read(name)
    os.environ |= {"JAXPEFT_SOURCE": str(HERE.parent), "JUPYTER_PLATFORM_DIRS": "1"} | (TINY if tiny else {})
    client = nbclient.NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    )
    client.execute()
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{name}-{i}"  # nbformat draws them at random, and diffs should read
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # without progress bars and warnings of other libraries
            cell.outputs = _joined(out for out in cell.outputs if out.get("name") != "stderr")
    notebook.metadata = {"jupytext": {"formats": "ipynb,py:percent"}, "kernelspec": notebook.metadata["kernelspec"]}
    return notebook


def _joined(outputs) -> list:
    """Outputs, with what was printed in several pieces as one text."""
    joined = []
    for out in outputs:
        if joined and out.output_type == joined[-1].output_type == "stream":
            joined[-1].text += out.text
        else:
            joined.append(out)
    return joined


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as directory:
            jupytext.write(execute(name, directory), HERE / f"{name}.ipynb", fmt="ipynb")
        print(f"{name}: done", flush=True)
