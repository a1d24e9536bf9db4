"""The documented command on 300 photographs, with default settings and with controls that could refute the result.

    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb stamps
    python benchmarks/own_photos.py --stamps stamps/usr/share/tuxpaint/stamps --out results/own_photos.json

Every photograph has three captions, made from its name and its folder. All runs use the tiny base and
`configs/folder.py:root=...,annotations=...`, with nothing else set except the seed:

    captions    the original captions
    shuffled    captions shuffled among the images, so that nothing can be learned from an image: step 0 must be kept
    grey        the original captions with grey images: a model of the texts alone, trained the same way (its best step is
                kept, although its images cannot matter)

The claim is refuted if `captions` is not above the best blind caption and above `grey` on test, or if `shuffled` keeps a step
other than 0. Writes a row per run, and the curve of the first run as an image beside the file.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.figure
from PIL import Image
from reference import ROOT

import jaxpeft as jp
from jaxpeft.runtime import files, host, malloc
from jaxpeft.training import evaluate

KINDS = {
    "animals/amphibians": "amphibian", "animals/birds": "bird", "animals/fish": "fish", "animals/insects": "insect",
    "animals/mammals": "mammal", "animals/marsupials": "marsupial", "animals/shellfish": "shellfish", "clothes/hats": "hat",
    "food/fruit": "fruit", "food/nuts": "nut", "food/vegetables": "vegetable", "hobbies/music": "instrument",
    "household/dishes": "dish", "household/tools": "tool", "military/vehicles": "tank", "plants/flowers": "flower",
    "plants/mushrooms": "mushroom", "plants/trees": "tree", "seasonal/christmas": "christmas ornament",
    "seasonal/easter": "easter thing", "seasonal/halloween": "halloween thing", "space/planets": "planet",
    "symbols/money": "coin", "town/houses": "house", "town/monuments": "monument", "town/roadsigns": "road sign",
    "vehicles/auto": "car", "vehicles/construction": "machine", "vehicles/flight": "aircraft",
    "vehicles/locomotive": "locomotive", "vehicles/ship": "ship",
}  # fmt: skip
N = 300


def photographs(stamps: Path) -> list[tuple[Path, str, str]]:
    """(image, its name, its kind) of N randomly chosen stamps that are photographs."""
    found = []
    for path in sorted(stamps.rglob("*.png")):
        parts, said = path.relative_to(stamps).parts, path.with_suffix(".txt")
        kind = KINDS.get("/".join(parts[:2]))
        if kind and "cartoon" not in parts and said.exists():
            name = said.read_text("utf-8", errors="replace").splitlines()[0].strip().rstrip(".!")
            if name:
                found.append((path, name[0].lower() + name[1:], kind))
    random.Random(0).shuffle(found)
    if len(found) < N:
        raise ValueError(f"{stamps} has {len(found)} photographs with a text; {N} are needed")
    return found[:N]


def write(stamps: Path, root: Path, n_shuffles: int) -> None:
    """Write root/photos and root/grey, each with captions.csv; in photos also shuffled-K.csv."""
    chosen = photographs(stamps)
    texts = []
    for i, (path, name, kind) in enumerate(chosen):
        image = Image.open(path).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image.thumbnail((400, 400))
        for directory, one in (("photos", image), ("grey", Image.new("RGB", image.size, "grey"))):
            (root / directory).mkdir(parents=True, exist_ok=True)
            one.save(root / directory / f"{i:03}.jpg", quality=92)
        a = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        texts.append([f"{name}, {a}", f"a photograph of {a}", f"{a} on a white background: {name}"])
    table(root / "photos" / "captions.csv", texts)
    table(root / "grey" / "captions.csv", texts)
    for k in range(n_shuffles):
        table(root / "photos" / f"shuffled-{k}.csv", random.Random(k).sample(texts, len(texts)))


def table(path: Path, texts: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption_1", "caption_2", "caption_3"])
        rows.writerows([f"{i:03}.jpg", *three] for i, three in enumerate(texts))


def run(root: Path, annotations: str, workdir: Path, copies: Path, seed: int, keep: bool) -> dict:
    """The result of the documented command, with its wall time; `keep`: keep the best step even if images do not matter."""
    from configs import folder

    c = folder.get_config(f"root={root},annotations={annotations},seed={seed}")
    c.data.data_dir = str(copies)
    c.stop.images_must_matter = not keep
    began = time.perf_counter()
    result = jp.run(c, workdir)
    return result | {"wall_s": time.perf_counter() - began}


def row(name: str, seed: int, result: dict) -> dict:
    """The row of a run."""
    test, validation = result["metrics"]["test"], result["validation"]
    best = max(test["blind"], key=lambda label: test["blind"][label]["cider_d"])
    scores = {label: round(test[label]["cider_d"], 4) for label in ("base", "text_only", "tuned")}
    return {
        "run": name, "seed": seed, "cider_d": scores | {"blind": round(test["blind"][best]["cider_d"], 4)},
        "intervals": {key: [round(x, 4) for x in value] for key, value in test["intervals"].items()},
        "validation": validation, "steps": result["timing"]["steps"], "wall_s": round(result["wall_s"], 1),
    }  # fmt: skip


def curve(workdir: Path, kept: int, out: Path) -> None:
    """Draw the losses of a run over its steps."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    axes = (figure := matplotlib.figure.Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    for key, label in (("loss", "training"), ("validation_loss", "validation")):
        axes.plot(*zip(*((one["step"], one[key]) for one in rows if key in one), strict=True), label=label)
    axes.axvline(kept, color="grey", linestyle=":", label=f"kept: step {kept}")
    axes.set(xlabel="step", ylabel="nats per token", ylim=(0, None))
    axes.legend()
    figure.savefig(out, dpi=110)


def above_grey(captions: Path, grey: Path) -> list[float]:
    """[mean, low, high] of the difference between the runs on photographs and on grey images, over the same test captions."""
    rows = [json.loads(line) for line in (captions / "predictions.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (grey / "predictions.jsonl").read_text().splitlines()]
    values = {one["image_id"]: one["tuned_cider_d"] for one in others}
    rows = [one | {"grey_cider_d": values[one["image_id"]]} for one in rows]
    return [round(x, 4) for x in evaluate.intervals(rows, "cider_d", "tuned", ["grey"])["tuned - grey"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT)]  # for configs/
    malloc.keep_freed_memory()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        write(args.stamps, home, args.seeds)
        for seed in range(args.seeds):
            for name, root, annotations in (
                ("captions", "photos", "captions.csv"),
                ("shuffled", "photos", f"shuffled-{seed}.csv"),
                ("grey", "grey", "captions.csv"),
            ):
                workdir = home / f"{name}-{seed}"
                result = run(home / root, annotations, workdir, home / "copies", seed, keep=name == "grey")
                rows.append(row(name, seed, result))
                if name == "grey":
                    rows[-1]["captions - grey"] = above_grey(home / f"captions-{seed}", workdir)
        curve(home / "captions-0", rows[0]["validation"]["kept_step"], args.out.with_suffix(".png"))
    found = {"machine": host.machine(), "versions": host.versions(), "rows": rows}
    files.write_json(args.out, found)
    for one in rows:
        print(one["run"], one["seed"], one["cider_d"], "kept", one["validation"]["kept_step"], one["wall_s"], "s")


if __name__ == "__main__":
    main()
