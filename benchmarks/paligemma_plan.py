"""Plan a LoRA step of both PaliGemma recipes without data, checkpoint or accelerator.

    python benchmarks/paligemma_plan.py --out results/paligemma_plan.json --topology v5e:2x4               (libtpu)
    python benchmarks/paligemma_plan.py --out results/paligemma_plan.json --topology v5e:2x4 --batch 64 --images

The recipes are configs/paligemma_coco.py and configs/paligemma_vqa_v2.py with method=lora,size=16: PaliGemma-3B at 224 pixels
in bfloat16, layers recomputed in the backward pass. Texts are as long as the recipes allow: captions of 32 tokens; questions of
32 tokens with 10 answers, of at most 10 tokens each. --preflight plans the same for real data.
"""

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jaxpeft import config, tree
from jaxpeft.runtime import host
from jaxpeft.training import preflight, setup, sharding

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RECIPES = {"captions_coco": "paligemma_coco", "vqa_v2": "paligemma_vqa_v2"}
LONG = "a photo of some people who stand near the water with their bikes and look at one old boat in that small bay at noon"


def base(path: Path) -> Path:
    """The settings of PaliGemma-3B and a toy tokenizer; no weights."""
    path.mkdir()
    text = {
        "model_type": "gemma", "vocab_size": 257216, "hidden_size": 2048, "intermediate_size": 16384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
    }  # fmt: skip
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224,
    }  # fmt: skip
    said = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "image_token_index": 423}
    (path / "config.json").write_text(json.dumps(said))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tests" / "golden" / "vlm_inputs" / "paligemma" / name, path)
    return path


def data(path: Path) -> Path:
    """Images with texts that are longer than the recipes read."""
    path.mkdir()
    captions, questions = [], []
    for i in range(40):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path / f"{i}.png")
        answers = [f"a red dog {k}" for k in range(10)]
        captions.append({"image": f"{i}.png", "caption": LONG})
        questions.append({"image": f"{i}.png", "question": LONG, "answer": answers})
    for name, rows in (("captions_coco", captions), ("vqa_v2", questions)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def planned(name: str, root: Path, model_at: Path, args) -> dict:
    """What a step of one recipe takes."""
    recipe = importlib.import_module(f"configs.{RECIPES[name]}")
    c = recipe.get_config(f"base={model_at},method={args.method},size=16,batch_size={args.batch}")
    options = c.task_options
    c.data = config.get_config(c.task).data  # not COCO's
    c = config.folder(c, str(root))
    c.task_options, c.data.augment = options, "none"
    c.data.feature_bytes = 0 if args.images else c.data.feature_bytes
    c.data.annotations = f"{name}.jsonl"
    model = setup.abstract_model(c)
    step, shapes, _ = preflight.step_in_shapes(c, model)
    state, frozen, batch = shapes
    mesh = sharding.mesh(c.get("mesh"), preflight.devices_of(args.topology))
    placed = sharding.shardings(frozen, model.sharding, mesh)
    row = {
        "recipe": RECIPES[name],
        "batch": args.batch,
        "images_every_step": args.images,
        "mesh": dict(mesh.shape),
        "tuned": tree.count(state.tuned),
        "shapes": {key: list(x.shape) for key, x in batch.items()},
        "frozen_bytes": sharding.bytes_per_device(frozen, placed),
    }
    if args.flops:
        row["flops"] = preflight.flops_of(step, shapes, model)
    began = time.perf_counter()
    try:
        plan = preflight.compiled(step, shapes, model.sharding, mesh)
        row |= {"peak_bytes": plan.peak, "temporary_bytes": plan.temporary}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row["peak_bytes"] = None  # does not fit
    row["compile_s"] = round(time.perf_counter() - began, 1)
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--topology", default="", help="such as v5e:2x4; the devices of this machine otherwise")
    parser.add_argument(
        "--batch", type=int, default=8, help="examples in a step, over all devices (default %(default)s)"
    )
    parser.add_argument("--method", default="lora")
    parser.add_argument(
        "--images", action="store_true", help="image tokens do not fit on the host: computed every step"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--flops", action="store_true", help="count FLOPs too, on unrolled layers: minutes more")
    args = parser.parse_args()
    host.plan_for(0, args.topology)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    found = {"topology": args.topology, "machine": host.machine(), "versions": host.versions(), "rows": rows}
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        root, model_at = data(here / "data"), base(here / "base")
        for name in args.recipes:
            found["rows"].append(planned(name, root, model_at, args))
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
