"""The notebooks, made from their .py twins and run from top to bottom: `python colab/execute.py [NAME ...]`.

Needs `pip install -e '.[notebooks]'`. Each runs in an empty directory; outputs are kept, with pictures, and nothing of the
machine. JAXPEFT_TINY=1 makes them take seconds, for the tests, which do not keep the outputs.
"""

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient

HERE = Path(__file__).resolve().parent
TINY = {"JAXPEFT_TINY": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # few steps: compiling is most of the time
NAMES = ("quickstart", "your_pictures", "study", "new_method")


def execute(name: str, directory: str | Path, tiny: bool = False, timeout: int = 3600):
    """The executed notebook NAME, run in `directory`; raises nbclient's CellExecutionError where a cell fails."""
    notebook = jupytext.read(HERE / f"{name}.py")
    os.environ |= {"JAXPEFT_SOURCE": str(HERE.parent), "JUPYTER_PLATFORM_DIRS": "1"} | (TINY if tiny else {})
    client = nbclient.NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    )
    client.execute()
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{name}-{i}"  # nbformat draws them at random, and diffs should read
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # progress bars and warnings of other libraries
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata = {"jupytext": {"formats": "ipynb,py:percent"}, "kernelspec": notebook.metadata["kernelspec"]}
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as directory:
            jupytext.write(execute(name, directory), HERE / f"{name}.ipynb", fmt="ipynb")
        print(f"{name}: done", flush=True)
