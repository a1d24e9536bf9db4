# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A study: which method, at which size, with how many pictures?
#
# A study is a grid of runs and a report that judges the claims of the paper (arXiv 2403.08433) with intervals. Here a very
# small one: LoRA and the head alone, two sizes, two amounts of pictures. It shows how; it is no evidence of anything.

# %%
# On Colab: put a clone or an unpacked archive of the repository beside this notebook, as `jaxpeft` (Files pane), and run
# this cell. It works on CPU, GPU and TPU runtimes. If jax was imported before, restart the runtime after it.
import importlib.metadata, os, shutil, subprocess, sys

HERE = ".." if os.path.exists("../pyproject.toml") else "jaxpeft"
SOURCE = os.path.abspath(os.environ.get("JAXPEFT_SOURCE", HERE))
try:
    importlib.metadata.version("jaxpeft")
except importlib.metadata.PackageNotFoundError:
    tpu = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if tpu else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", SOURCE + extra], check=True)
sys.path.insert(0, SOURCE)  # for configs/

TINY = bool(os.environ.get("JAXPEFT_TINY"))  # the tests: seconds instead of minutes, and nothing is learned

# %%
from pathlib import Path

from IPython.display import Image, display

from configs.studies import tiny
from jaxpeft.runtime import host, malloc
from jaxpeft.study import cost, execute, report

malloc.keep_freed_memory()
_ = host.keep_compiled_programs()

# %% [markdown]
# ## The grid
#
# `settings` are tasks from near to pre-training to far from it; `variants` are methods with sizes. Every cell gets the same
# number of learning rates; the best on validation pictures is trained with other seeds (here there is one).

# %%
config = tiny.get_config(f"steps={4 if TINY else 80},seeds=1,small={TINY}")
directory = Path("runs/study")
print(cost.dry_run(config, directory))

# %% [markdown]
# ## Run
#
# In a terminal: `python main.py --config=configs/studies/tiny.py --workdir=DIR`, with a process per core, on as many machines
# as see the directory. Stop it and run it again: finished runs stay.

# %%
rows = execute.run(config, directory, workers=1)
print(len(rows), "runs;", sum(row["status"] == "done" for row in rows), "done")

# %% [markdown]
# ## Read
#
# A page that stands alone (`DIR/report/index.html`). Runs that hit the cap before validation stopped improving are marked, and
# no claim is judged on them.

# %%
page = report.write(directory)
print(page)
for name in ("score_data", "consistency"):
    display(Image(filename=str(directory / "report" / f"{name}.png"), width=900))

# %%
for row in sorted(rows, key=lambda row: row["id"]):
    if row["status"] == "done":
        test = row["metrics"]["test"]["tuned"]
        print(f"{row['id']:<42} {row['main_metric']} {test[row['main_metric']]:.3f}  ({row['timing']['stopped']})")

# %% [markdown]
# The real ones: `configs/studies/scenes.py` (minutes, one seed), `scenes_full.py` (hours on two cores), `paper.py` (BLIP-base,
# COCO and VQAv2, where they are on disk).
