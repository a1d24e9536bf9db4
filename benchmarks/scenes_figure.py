"""Draw score against training images for the two tasks of scenes_full that are new to the base, from its results.jsonl.

    python benchmarks/scenes_figure.py --out results/scenes_full/new_tasks.png

Mean and range of three seeds; the middle size of each method, with the classifier trained as well.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parents[1] / "results/scenes_full/results.jsonl"
PANELS = (  # setting, the score of the best blind baseline, that of the frozen base
    ("captions_human", "captions in a new style", "CIDEr-D", 0.49, 0.563),
    ("vqa_unstated", "questions", "accuracy", 0.45, 0.0),
)
METHODS = {  # variant: (label, colour, marker, size on captions, size on questions)
    "lora_head": ("LoRA", "#009E73", "D", 16, 8),
    "parallel_adapter_head": ("parallel adapter", "#56B4E9", "v", 64, 32),
    "serial_adapter_head": ("serial adapter", "#0072B2", "^", 21, 10),
    "prefix_head": ("prefix", "#CC79A7", "s", 33, 16),
    "prompt_head": ("prompt", "#E69F00", "o", 8, 8),
    "head": ("classifier only", "#888888", "x", 0, 0),
    "full": ("full fine-tuning", "#000000", "*", 0, 0),
}


def scores() -> dict:
    """(setting, variant, size) -> {images: test scores of the seeds}, with each cell's chosen learning rate."""
    found, validated = defaultdict(lambda: defaultdict(dict)), defaultdict(dict)
    for row in map(json.loads, RESULTS.read_text().splitlines()):
        cell = (row["level"], row["arm"], row["size"])
        score = row["metrics"]["test"]["tuned"][row["main_metric"]]
        found[cell][row["n_images"]][row["lr"], row["seed"]] = score
        if row["seed"] == 0:
            validated[cell, row["n_images"]][row["lr"]] = row["metrics"]["val"]["tuned"][row["main_metric"]]
    return {
        cell: {
            n: [score for (lr, _), score in runs.items() if lr == max(validated[cell, n], key=validated[cell, n].get)]
            for n, runs in sorted(by_images.items())
        }
        for cell, by_images in found.items()
    }


def draw(out: str) -> None:
    found = scores()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for i, (axis, (level, title, unit, guess, base)) in enumerate(zip(axes, PANELS, strict=True)):
        for arm, (label, colour, marker, *sizes) in METHODS.items():
            cells = found[level, arm, sizes[i]]
            means = [sum(runs) / len(runs) for runs in cells.values()]
            below = [mean - min(runs) for mean, runs in zip(means, cells.values(), strict=True)]
            above = [max(runs) - mean for mean, runs in zip(means, cells.values(), strict=True)]
            line = "none" if arm == "full" else "--" if arm == "head" else "-"  # full has only two points, far apart
            axis.errorbar(
                list(cells), means, (below, above), label=label, color=colour, marker=marker, linestyle=line, capsize=3
            )
        axis.axhline(guess, color="#D55E00", linestyle=":", label="best guess without the image")
        axis.axhline(base, color="#444444", linestyle="-.", linewidth=1, label="frozen base")
        axis.set_xscale("log", base=2)
        axis.set_xticks([64, 256, 1024, 4096, 16384], ["64", "256", "1,024", "4,096", "16,384"])
        axis.set(title=title, xlabel="training images", ylabel=unit)
        axis.set_ylim(bottom=-0.02 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(out, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    draw(parser.parse_args().out)
