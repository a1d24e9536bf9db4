"""Do the claims of a study say what is true? Simulated studies with known effects and the noise of committed seeds.

    python benchmarks/claims_simulation.py --out results/claims_simulation.json

The noise is that of results/scenes_full. The studies are made here, by code that shares nothing with jaxpeft/study/claims.py:
this file knows the truth, that one only rows of scores. Per effect (0, half a margin, one, two), 1,000 studies are judged:

- coverage: how often the 95 % interval contains the true effect;
- wrong: how often the verdict says something false of the true effect;
- the verdicts: 'positive' is the power, the others are the shares of the other verdicts.

A planted selection bias: three equally good learning rates a cell, of which seed 0 keeps the one with the best score on test.
"""

import argparse
import collections
import functools
import json
import multiprocessing
import platform
import time
from pathlib import Path

import numpy as np
import scipy

from jaxpeft.study import claims, intervals

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "results/scenes_full/results.jsonl"
METHODS = ("lora", "parallel_adapter", "serial_adapter", "prefix", "prompt")
IMAGES, SIZES = (64, 256, 1024, 4096, 16384), (2, 6, 18, 54, 162)
EFFECTS = (0.0, 0.5, 1.0, 2.0)  # in margins
MARGIN = 0.02  # two points: the scores here run from 0 (blind) to 1 (ceiling)
HUMP = (0.0, 0.5, 1.0, 0.5, 0.0)  # of five sizes


@functools.cache
def committed_noise(path: Path = COMMITTED) -> dict:
    """The spread over seeds in the committed study, as shares of blind to best: task -> images -> what `draw` needs.

    `common`: the standard deviation of what all cells of a seed share, `own`: the deviations of single cells, with the variance
    of a population, and `luck`: the correlation of a run's deviations on validation and on test images.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cells, chosen = collections.defaultdict(list), {}
    for row in rows:
        cells[row["level"], row["arm"], row["size"], row["n_images"]].append(row)
    for cell, runs in cells.items():
        metric = runs[0]["main_metric"]
        best = min((-r["metrics"]["val"]["tuned"][metric], r["lr"]) for r in runs if r["seed"] == 0)[1]
        kept = sorted((r for r in runs if r["lr"] == best), key=lambda r: r["seed"])
        chosen[cell] = [[r["metrics"][split]["tuned"][metric] for r in kept] for split in ("test", "val")]
    found = {}
    for task, level in (("captioning", "captions_human"), ("vqa", "vqa_unstated")):
        mine = {cell: np.array(both) for cell, both in chosen.items() if cell[0] == level}
        blind = max(
            score[r["main_metric"]]
            for r in rows
            if r["level"] == level
            for score in r["metrics"]["test"]["blind"].values()
        )
        span = max(test.mean() for test, _ in mine.values()) - blind
        pairs = np.array([both[:, 1] - both[:, 2] for both in mine.values()])  # the seeds that nothing was chosen on
        by_images = {}
        for n in IMAGES:
            rest = np.array([test - test.mean() for cell, (test, _) in mine.items() if cell[3] == n]) / span
            total = (rest**2).sum() / (2 * len(rest))
            shared = rest.mean(axis=0)
            common = max(0.0, ((shared**2).sum() / 2 - total / len(rest)) / (1 - 1 / len(rest)))
            own = (rest - shared).ravel()
            own *= np.sqrt((total - common) / (own**2).mean())
            by_images[n] = {"common": float(np.sqrt(common)), "own": own, "sd": float(np.sqrt(total))}
        found[task] = {"images": by_images, "luck": float(np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1])}
    return found


def draw(rng, noise, cells: list, n_seeds: int, tries: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Deviations on test and on validation images (cells, seeds, tries) for cells (variant, size, images)."""
    test, val = (np.zeros((len(cells), n_seeds, tries)) for _ in range(2))
    for n, about in noise["images"].items():
        rows = [i for i, cell in enumerate(cells) if cell[2] == n]
        shape = (len(rows), n_seeds, tries)
        common = rng.normal(0, about["common"], (1, n_seeds, 1))
        own, other = rng.choice(about["own"], shape), rng.choice(about["own"], shape)
        test[rows] = common + own
        val[rows] = common + noise["luck"] * own + np.sqrt(1 - noise["luck"] ** 2) * other
    return test, val


def setting(rng, noise, name, task, n_seeds, truth, full=None, choose=None) -> list[claims.Result]:
    """The rows of a setting with the true scores truth(method, i, j) at the i-th size and j-th number of images."""
    cells, true = [], []
    for method in METHODS:
        for i, size in enumerate(SIZES):
            for j, n in enumerate(IMAGES):
                if i == 2 or j == 4:
                    cells.append((method, size, n))
                    true.append(truth(method, i, j))
    if full is not None:
        cells.append(("full", 0, IMAGES[-1]))
        true.append(full)
    test, val = draw(rng, noise, cells, n_seeds, 3 if choose else 1)
    kept = np.zeros(test.shape[:2], int)
    if choose:  # seed 0 has tried three rates that are equally good; the other seeds run the chosen one
        kept[:, 0] = {"test": test, "validation": val}[choose][:, 0].argmax(axis=1)
    rows = []
    for c, (method, size, n) in enumerate(cells):
        head, stored = ("none", 10**6) if method == "full" else ("transform", 16_000 + 1_000 * size)
        variant = method if method == "full" else f"{method}_head"
        for seed in range(n_seeds):
            scores = (true[c] + float(one[c, seed, kept[c, seed]]) for one in (test, val))
            rows.append(claims.Result(name, task, variant, method, head, size, n, stored, seed, *scores))
    return rows


def study(rng, noise: dict, effect: float, n_seeds: int, choose=None) -> tuple[list, list, dict]:
    """(rows, scales, truths) of a study in which every claim has the true effect `effect` in margins, or 0.

    a: captions, inconsistent; data, size and composition with layers have the effect. b: captions, consistent; nothing has.
    c: questions, consistent; data have the effect, sizes a hump of it (in margins of C4: twice the seeds' deviation). d: other
    questions, inconsistent; full fine-tuning is behind by it, and all other cells are equal, so that the best one is luck.
    """
    e = effect * MARGIN
    captions, questions = noise["captioning"], noise["vqa"]
    hump = effect * claims.MARGINS["departure"] * questions["images"][IMAGES[-1]]["sd"]

    def a(method, i, j):
        return 0.5 + e * (j / 4 + i / 4) + e * (method not in ("prefix", "prompt"))

    rows = [
        *setting(rng, captions, "a", "captioning", n_seeds, a, choose=choose),
        *setting(rng, captions, "b", "captioning", n_seeds, lambda method, i, j: 0.7, choose=choose),
        *setting(rng, questions, "c", "vqa", n_seeds, lambda m, i, j: 0.5 + e * j / 4 + hump * HUMP[i], choose=choose),
        *setting(rng, questions, "d", "other", n_seeds, lambda m, i, j: 0.6, full=0.6 - e, choose=choose),
    ]
    kinds = {"a": ("captioning", False), "b": ("captioning", True), "c": ("vqa", True), "d": ("other", False)}
    scales = [claims.Scale(name, *kind, blind=0.0, ceiling=1.0, declared=True) for name, kind in kinds.items()]
    points = 100 * e
    truths = {
        ("C1", "a"): points, ("C2", "a"): points, ("C3", "c"): points, ("C4", "b"): 0.0,
        ("C4", "c"): picked(rows, "c", HUMP, hump), ("C5 prefix", "a"): points, ("C6", "d"): points,
        ("C7 data", ""): points, ("C7 size", ""): points,
    }  # fmt: skip
    return rows, scales, truths


def picked(rows: list, name: str, shape: tuple, hump: float) -> float:
    """The true effect of C4 in points: of the pairs of sizes that are furthest from monotonic on seed 0, mean over methods."""
    mine = [r for r in rows if r.setting == name and r.n_images == IMAGES[-1] and r.seed == 0]
    score, total = {(r.method, r.size): r.score for r in mine}, 0.0
    for method in METHODS:
        seen = [score[method, size] for size in SIZES]
        rise = max((seen[j] - seen[i], j, i) for i in range(5) for j in range(i + 1, 5))
        fall = max((seen[i] - seen[j], i, j) for i in range(5) for j in range(i + 1, 5))
        size, high, low = min(rise, fall)
        total += 100 * hump * (shape[high] - shape[low]) / len(METHODS) if size > 0 else 0.0
    return total


def false_of(word: str, truth: float, margin: float) -> bool:
    """Whether a verdict says something false of the true effect."""
    said = {
        "positive": truth > 0, "positive, below the margin": 0 < truth < margin, "flat": abs(truth) < margin,
        "negative": truth < 0, "undecided": True,
    }  # fmt: skip
    return not said[word]


def one_study(job) -> tuple[list, object]:
    """(claim, effect, low, high, verdict, wrong, covered) of each claim with a known truth, and the check on selection."""
    seed, effect, n_seeds, choose = job
    noise = committed_noise()
    rows, scales, truths = study(
        np.random.default_rng([seed, n_seeds, int(10 * effect)]), noise, effect, n_seeds, choose
    )
    out = []
    for line in claims.judge(rows, scales):
        name = "C5 prefix" if line.claim == "C5" and "prefix" in line.statement else line.claim
        key = (name, "" if name.startswith("C7") else line.where)
        if key in truths:
            truth, margin = truths[key], line.margin
            if name == "C4":  # the true margin; the line's is an estimate of it
                task = {"b": "captioning", "c": "vqa"}[line.where]
                margin = 100 * claims.MARGINS["departure"] * noise[task]["images"][IMAGES[-1]]["sd"]
            label = f"{name} {'flat' if key == ('C4', 'b') else ''}".strip()
            covered = line.low <= truth <= line.high
            out.append(
                (label, truth, line.high - line.low, line.verdict, false_of(line.verdict, truth, margin), covered)
            )
    selection = claims.selection(rows)
    return out, selection and selection.low > 0


def simulate(effect: float, n_seeds: int, studies: int, workers: int, choose=None) -> tuple[dict, float]:
    """(claim -> its frequencies, the share of studies in which selection was found)."""
    jobs = [(seed, effect, n_seeds, choose) for seed in range(studies)]
    if workers > 1:
        with multiprocessing.Pool(workers) as pool:
            found = pool.map(one_study, jobs, chunksize=10)
    else:
        found = [one_study(job) for job in jobs]
    by_claim = collections.defaultdict(list)
    for lines, _ in found:
        for line in lines:
            by_claim[line[0]].append(line)
    table = {}
    for claim, lines in by_claim.items():
        words = collections.Counter(line[3] for line in lines)
        table[claim] = {
            "truth": float(np.mean([line[1] for line in lines])), "half_width": float(np.mean([line[2] for line in lines])) / 2,
            "coverage": float(np.mean([line[5] for line in lines])), "wrong": float(np.mean([line[4] for line in lines])),
            "verdicts": {word: n / len(lines) for word, n in sorted(words.items())},
        }  # fmt: skip
    return table, float(np.mean([caught for _, caught in found]))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file that exists is continued")
    parser.add_argument("--studies", type=int, default=1000, help="per effect, with three seeds")
    parser.add_argument("--more-seeds", type=int, default=10, help="the power with as many seeds; 0: leave it out")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    done = json.loads(args.out.read_text()) if args.out and args.out.exists() else about(args.studies)
    parts = [(3, effect, args.studies, None) for effect in EFFECTS]
    parts += [(3, 0.0, args.studies, choose) for choose in ("test", "validation")]
    parts += [(args.more_seeds, effect, args.studies // 5, None) for effect in EFFECTS if args.more_seeds]
    for n_seeds, effect, studies, choose in parts:
        facts = {"seeds": n_seeds, "effect": effect, "studies": studies, "rates_chosen_on": choose}
        if any(part.items() >= facts.items() for part in done["parts"]):
            continue
        began = time.time()
        claims_, alarms = simulate(effect, n_seeds, studies, args.workers, choose)
        seconds = round(time.time() - began)
        done["parts"].append({**facts, "seconds": seconds, "selection_found": alarms, "claims": claims_})
        print("\n".join(text(done["parts"][-1])), flush=True)
        if args.out:
            args.out.write_text(json.dumps(done, indent=1) + "\n")
    print("\n".join(tables(done)))
    return 0


def tables(done: dict) -> list[str]:
    """The lines of two tables: coverage and verdicts with three seeds, and the power with more."""
    words = ("positive", "positive, below the margin", "flat", "negative", "undecided")
    three = [
        "| claim | effect, margins | truth, points | interval | coverage | wrong | + | + below | flat | - | undecided |"
    ]
    three.append("|" + "---|" * 11)
    more = ["| claim | seeds | interval | half a margin | one | two |", "|" + "---|" * 6]
    plain = [part for part in done["parts"] if not part["rates_chosen_on"]]
    for claim in sorted(plain[0]["claims"]):
        for part in plain:
            row = part["claims"][claim]
            if part["seeds"] == 3:
                shares = " | ".join(f"{100 * row['verdicts'].get(word, 0):.1f}" for word in words)
                three.append(
                    f"| {claim} | {part['effect']:g} | {row['truth']:.1f} | ±{row['half_width']:.1f} | "
                    f"{100 * row['coverage']:.1f} | {100 * row['wrong']:.1f} | {shares} |"
                )
        for seeds in dict.fromkeys(part["seeds"] for part in plain):
            mine = [part["claims"][claim] for part in plain if part["seeds"] == seeds]
            found = [sum(row["verdicts"].get(word, 0) for word in words[:2]) for row in mine[1:]]
            if claim != "C4 flat":
                power = " | ".join(f"{100 * share:.0f}" for share in found)
                more.append(f"| {claim} | {seeds} | ±{mine[0]['half_width']:.1f} | {power} |")
    return [*three, "", *more]


def about(studies: int) -> dict:
    """What the numbers depend on."""
    noise = {
        task: {
            "luck": one["luck"],
            "sd_points": {str(n): 100 * by["sd"] for n, by in one["images"].items()},
            "common_sd_points": {str(n): 100 * by["common"] for n, by in one["images"].items()},
        }
        for task, one in committed_noise().items()
    }
    versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    machine = {"machine": platform.machine(), "system": platform.system(), **versions}
    margins = dict(claims.MARGINS) | {"level": intervals.LEVEL}
    return {
        "command": "python benchmarks/claims_simulation.py",
        **machine,
        "margins": margins,
        "noise": noise,
        "parts": [],
    }


def text(part: dict) -> list[str]:
    """The lines of a part of the table."""
    planted = f", rates chosen on {part['rates_chosen_on']}" if part["rates_chosen_on"] else ""
    lines = [
        f"{part['seeds']} seeds, effect {part['effect']} margins{planted}, {part['studies']} studies, {part['seconds']} s: "
        f"selection found in {100 * part['selection_found']:.1f} %"
    ]
    for claim, row in sorted(part["claims"].items()):
        words = ", ".join(f"{word} {100 * share:.1f}" for word, share in row["verdicts"].items())
        lines.append(
            f"  {claim:9}: truth {row['truth']:5.1f} points, +-{row['half_width']:.1f}; "
            f"coverage {100 * row['coverage']:.1f} %, wrong {100 * row['wrong']:.1f} %; {words}"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
