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
# # Your pictures: from a folder to a tuned BLIP, and back to PyTorch
#
# Put pictures into a folder with a `captions.csv` (columns `image, caption`; or `image, question, answer` for questions), or
# `cat.txt` beside `cat.jpg`, and run the cells. Without a folder of yours the notebook draws one, so that everything can be
# seen first.

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
import csv, importlib.util, json, re, textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

import jaxpeft as jp
from configs import folder
from jaxpeft.runtime import malloc
from jaxpeft.data import scenes

malloc.keep_freed_memory()

# your folder, and your base: a BLIP of the Hugging Face hub such as "Salesforce/blip-image-captioning-base" (which is
# downloaded, 990 MB), a directory with one, or the shipped "tiny", which knows drawn scenes only
PICTURES, BASE = "", "tiny"

# %% [markdown]
# ## A folder
#
# Pictures of any size and format; the first row of the file names the columns.

# %%
if not PICTURES:
    PICTURES = Path("pictures")
    PICTURES.mkdir(exist_ok=True)
    drawn = scenes.load({"n_train": 24 if TINY else 300}, ["train"])["train"]
    with open(PICTURES / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i, row in enumerate(drawn.rows):
            name = f"{i:04}.jpg"
            Image.fromarray(drawn.images[i]).resize((120 + i % 60, 110)).save(PICTURES / name, quality=92)
            table.writerows([name, caption] for caption in row["captions"])
print(*(Path(PICTURES) / "captions.csv").read_text().splitlines()[:4], sep="\n")

# %% [markdown]
# ## Tune
#
# The same as `python main.py --config=configs/folder.py:root=PICTURES,annotations=captions.csv,base=BASE`. Pictures are divided
# into train, val and test by a hash of their name. Whatever is wrong with the data is listed before training starts. Training
# lasts as long as the loss on val falls, and the best step is kept: step 0 where the pictures taught nothing.

# %%
config = folder.get_config(f"root={PICTURES},annotations=captions.csv,base={BASE}" + (",steps=4" if TINY else ""))
config.data.data_dir = "runs/prepared"
config.eval.gallery = False
workdir = Path("runs/your_pictures")
result = jp.run(config, workdir)

# %% [markdown]
# ## Use
#
# From the command line: `jaxpeft generate --workdir RUN --folder PICTURES`, or `jaxpeft demo --workdir RUN`
# for a page in the browser.

# %%
curve = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
for key in ("loss", "validation_loss"):
    plt.plot(*zip(*((row["step"], row[key]) for row in curve if key in row)), label=key)
plt.axvline(result["validation"]["kept_step"], color="grey", linestyle=":", label="kept")
plt.xlabel("step"), plt.ylabel("nats per token"), plt.legend()

# %%
model, variables, methods, task = jp.load_run(workdir)
paths = sorted(Path(PICTURES).glob("*.jpg"))[:4]
before = jp.generate(model, {"params": variables["params"]}, paths, task=task)
after = jp.generate(model, variables, paths, task=task)
figure, axes = plt.subplots(1, 4, figsize=(14, 4.5))
for ax, path, old, new in zip(axes, paths, before, after):
    ax.imshow(Image.open(path))
    ax.set_title(textwrap.fill(f"before: {old}", 44) + "\n\n" + textwrap.fill(f"after: {new}", 44), fontsize=7)
    ax.axis("off")

# %% [markdown]
# ## Back to PyTorch
#
# A whole BLIP directory with the method folded into its weights, tokenizer, processor and a model card with it. transformers
# loads it without jaxpeft. The same as `jaxpeft export --workdir RUN --out merged`; `--format peft` gives an adapter.

# %%
from jaxpeft.apps import export

export.main(["--workdir", str(workdir), "--out", "merged"])
card = Path("merged/README.md").read_text()
print(card)

# %% [markdown]
# The code on the card runs as it stands: it writes the caption of `picture.jpg`.

# %%
Image.open(paths[0]).save("picture.jpg")
if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
else:
    print("pip install torch transformers, to see the same caption there")
print("jaxpeft:", *jp.generate(model, variables, "picture.jpg", beams=1, task=task))
