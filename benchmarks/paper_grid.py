"""Plan the paper's grid (configs/studies/paper.py) without its data, its checkpoint or an accelerator.

    python benchmarks/paper_grid.py --out results/paper_grid.json                       FLOPs and hours: minutes
    python benchmarks/paper_grid.py --out results/paper_grid.json --topology v5e:2x4    and memory by the TPU compiler (libtpu)

The training step of every variant at its middle size is traced from shapes: mPLUG base at 384 pixels, batch 64, captions of 25
tokens, questions of 25 tokens with 10 answers of 10 tokens. Hours are those of training alone, at most:

    hours = runs * steps * FLOPs of a step / (share * peak of the device) / 3600

with the cap on steps, and an assumed share of the peak. The share is not measured; --share changes it.
"""

import argparse
import json
import string
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jaxpeft import tree
from jaxpeft.runtime import host
from jaxpeft.runtime.text import aligned
from jaxpeft.study import grid
from jaxpeft.training import preflight, setup, sharding

sys.path.insert(0, str(Path(__file__).parents[1]))
CHIPS = {"one H100": (989e12, 1), "v5e-8": (197e12, 8)}
WORDS = "a photo of some people who stand near the water with their bikes and look at one old boat in that small bay at noon"


def base(path: Path) -> Path:
    """mPLUG base's settings and a vocabulary that spells every word; no weights."""
    path.mkdir()
    (path / "config.yaml").write_text("clip_name: ViT-B-16\nimage_res: 384\n")
    (path / "config_bert.json").write_text(json.dumps({"hidden_size": 768}))
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    letters = [*string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]
    (path / "vocab.txt").write_text("\n".join(dict.fromkeys([*special, *letters, *WORDS.split()])))
    return path


def data(path: Path) -> Path:
    """Images with the longest texts that the grid reads."""
    path.mkdir()
    answers = [f"{a} boat" for a in WORDS.split()[:10]]
    captions, questions = [], []
    for i in range(40):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path / f"{i}.png")
        captions.append({"image": f"{i}.png", "caption": WORDS})
        questions.append({"image": f"{i}.png", "question": WORDS, "answer": answers})
    for name, rows in (("captions.jsonl", captions), ("questions.jsonl", questions)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--topology", default="", help="such as v5e:2x4: plan memory by its compiler")
    parser.add_argument(
        "--plan", nargs="*", default=["lora", "full"], help="variants whose memory is planned (minutes each)"
    )
    parser.add_argument("--share", type=float, default=0.17, help="assumed share of the peak (default %(default)s)")
    parser.add_argument("--towers", default="all")
    parser.add_argument("--only", default="", help="variants whose name begins with this")
    args = parser.parse_args()
    from configs.studies import paper

    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        said = (
            f"root={data(here / 'data')},base={base(here / 'base')},captions=captions.jsonl,questions=questions.jsonl"
        )
        study = paper.get_config(f"{said},towers={args.towers}")
        rows = [row for cell, n in cells(study) if (row := planned(study, cell, n, args))]
    total = {name: sum(row["hours"][name] for row in rows) for name in CHIPS}
    found = {"rows": rows, "hours": total, "runs": sum(row["runs"] for row in rows), "share": args.share}
    found |= {"topology": args.topology, "towers": args.towers, "machine": host.machine(), "versions": host.versions()}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(aligned(table(rows), left=2)))
    print(f"{found['runs']:,} runs; " + ", ".join(f"{name}: {n:,.0f} hours" for name, n in total.items()))


def cells(study):
    """(the cell of each setting and variant with its middle size and all images, number of runs of that setting and variant)"""
    every = grid.cells(study)
    for setting in study.settings:
        for variant in study.variants:
            mine = [cell for cell in every if (cell.setting, cell.variant) == (setting, variant)]
            sizes = sorted({cell.size for cell in mine})
            middle = next(cell for cell in mine if cell.size == sizes[len(sizes) // 2])
            yield middle, len(mine) * (len(study.learning_rates) + study.seeds - 1)


def planned(study, cell, n_runs: int, args) -> dict | None:
    """What one run of a cell takes."""
    if not cell.variant.startswith(args.only):
        return None
    c = grid.Run(cell, 0, grid.learning_rates(study, cell)[0], study).config
    c.data.n_images = 32
    model = setup.abstract_model(c)
    step, shapes, _ = preflight.step_in_shapes(c, model)
    state, frozen, batch = shapes
    flops = preflight.flops_of(step, shapes, model)
    row = {
        "setting": cell.setting, "variant": cell.variant, "size": cell.size, "runs": n_runs, "steps": c.steps,
        "tuned": tree.count(state.tuned), "flops": flops, "batch": {name: list(x.shape) for name, x in batch.items()},
        "hours": {
            name: n_runs * c.steps * flops / (args.share * peak * n) / 3600 for name, (peak, n) in CHIPS.items()
        },
    }  # fmt: skip
    if args.topology and cell.variant in args.plan:
        mesh = sharding.mesh(c.get("mesh"), preflight.devices_of(args.topology))
        began = time.perf_counter()
        try:
            row["peak_bytes"] = preflight.compiled(step, shapes, model.sharding, mesh).peak
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row["peak_bytes"] = None  # does not fit
        row["compile_s"] = round(time.perf_counter() - began, 1)
    print(cell, f"{flops:.3g} FLOPs", row.get("peak_bytes", ""), row.get("compile_s", ""), flush=True)
    return row


def table(rows: list[dict]) -> list[tuple[str, ...]]:
    head = ("setting", "variant", "size", "trained", "runs", "TFLOP a step", "GB a device", *CHIPS)
    found = [head]
    for row in rows:
        memory = row.get("peak_bytes", "")
        memory = "does not fit" if memory is None else f"{memory / 1e9:.2f}" if memory else "not planned"
        hours = (f"{row['hours'][name]:,.0f} h" for name in CHIPS)
        numbers = (str(row["size"]), f"{row['tuned']:,}", str(row["runs"]), f"{row['flops'] / 1e12:.2f}", memory)
        found.append((row["setting"], row["variant"], *numbers, *hours))
    return found


if __name__ == "__main__":
    main()
