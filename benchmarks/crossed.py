"""The gates and the estimands of configs/studies/crossed.py, from the results of the study.

    python benchmarks/crossed.py --workdir=runs/crossed [--out=FILE.json]
    python benchmarks/crossed.py --ceiling        CIDEr-D of the best of twelve captions by the rules, without any model

Gates, to pass before the other parts of the study are run; in points: 0 is the best guess without the image, 100 the ceiling

    consistent settings     the frozen base scores 60 to 90, and training all of the text towers adds at least 5
    inconsistent settings   training all of the text towers scores at least 20

Estimands: how much more data and size matter where pre-training was another task, by method and for all methods together, with
t-intervals over bases; in nats per token and in points.

Budget: what the last three quarters of the steps gain in nats per token on validation, mean and largest by setting and variant.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from jaxpeft import tasks
from jaxpeft.data import scenes
from jaxpeft.runtime import files, host
from jaxpeft.study import claims, report
from jaxpeft.study.report import answers

HIGHEST, LOWEST, GAIN, LEAST = 90.0, 60.0, 5.0, 20.0


def gates(study) -> list[dict]:
    """A row per gate: what was measured, the bounds and whether it lies between them."""
    found = []
    for scale in study.scales:
        rows = [row for row in study.rows if row["setting"] == scale.setting and row["variant"] == "full_text"]
        most = max((row["n_images"] for row in rows), default=0)
        mine = [row for row in rows if row["chosen"] and row["n_images"] == most]
        if not mine:
            continue
        tuned = statistics.fmean(scale.points(row["test"]) for row in mine)
        base = statistics.fmean(scale.points(row["base"]) for row in mine)
        if scale.consistent:
            found.append(_gate(scale.setting, "frozen base", base, LOWEST, HIGHEST))
            found.append(_gate(scale.setting, f"full_text less base, {most:,} images", tuned - base, GAIN))
        else:
            found.append(_gate(scale.setting, f"full_text, {most:,} images", tuned, LEAST))
    return found


def _gate(setting: str, what: str, value: float, low: float, high: float = float("inf")) -> dict:
    return {"setting": setting, "what": what, "value": value, "low": low, "high": high, "pass": low <= value <= high}


def estimands(study) -> list[dict]:
    """A row per measure, axis and variant."""
    measures = {"nats per token": claims.in_nats(study.results, study.scales), "points": (study.results, study.scales)}
    return [
        {"measure": measure, "axis": axis, "variant": variant, "value": one.value, "low": one.low, "high": one.high}
        for measure, pair in measures.items() for (axis, variant), one in claims.interactions(*pair).items()
    ]  # fmt: skip


def ceiling(n: int = 1024) -> float:
    """CIDEr-D of the caption, of twelve by the rules, that is most like the other eleven, against the five references."""
    task, split = tasks.build("captioning"), scenes.load({"n_test": n, "captions": "clean"}, ["test"])["test"]
    own = [scenes.clean_captions("test", i, 17)[5:] for i in range(n)]
    rows = [{"image_id": row["image_id"], "references": row["captions"]} for row in split.rows]
    alike = []
    for k in range(12):
        others = [row | {"references": texts[:k] + texts[k + 1 :]} for row, texts in zip(rows, own, strict=True)]
        alike.append(task.per_example(others, [texts[k] for texts in own]))
    best = [texts[k] for texts, k in zip(own, np.argmax(alike, axis=0), strict=True)]
    return task.score(rows, best)["cider_d"]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/crossed"))
    parser.add_argument("--ceiling", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.ceiling:
        print(f"consensus of twelve: CIDEr-D {ceiling():.3f}")
        return 0
    study = report.read(args.workdir)
    passed, found = gates(study), estimands(study)
    for one in passed:
        bounds = f"{one['low']:g} to {one['high']:g}" if np.isfinite(one["high"]) else f"at least {one['low']:g}"
        print(f"{'pass' if one['pass'] else 'FAIL'}  {one['setting']}: {one['what']} {one['value']:.1f}; {bounds}")
    for one in found:
        print(
            f"D_{one['axis']} {one['variant']}, {one['measure']}: {one['value']:.3g} ({one['low']:.3g} to {one['high']:.3g})"
        )
    gained = answers.budget(study)
    for one in gained:
        print(f"budget {one['setting']} {one['variant']}: mean {one['mean']:.4f}, largest {one['largest']:.4f} nats")
    if args.out:
        facts = {"command": f"python benchmarks/crossed.py --workdir={args.workdir}", "machine": host.machine()}
        gated = [one | {"high": one["high"] if np.isfinite(one["high"]) else None} for one in passed]
        files.write_json(args.out, facts | {"gates": gated, "estimands": found, "budget": gained})
    return 0 if all(one["pass"] for one in passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
