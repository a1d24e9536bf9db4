"""Judge the claims of results/scenes_full again, beside an earlier recomputation of the same numbers by another script.

    python benchmarks/rejudge.py --workdir=runs/rejudged
    python benchmarks/rejudge.py --workdir=runs/rejudged --page=results/scenes_full/index.html

Prints two tables: effects in the units of the recomputation, with both results, and the verdicts in points. Makes the report of
the study, with these verdicts, in WORKDIR/report, from results/scenes_full/results.jsonl and the config alone. The data in
results/scenes_full stay as they are; --page copies the page.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs.studies import scenes_full
from jaxpeft.runtime import files
from jaxpeft.study import claims, intervals, report
from jaxpeft.training import setup

KEPT = Path(__file__).parents[1] / "results/scenes_full"
OLD = {"settings": "levels", "variants": "arms", "learning_rates": "rates"}  # the names of version 0.1
MIDDLE = {"captions_human": 33, "vqa_unstated": 16}  # prefix at the middle size
NEW, KNOWN, QUESTIONS = "captions_human", "captions_web", "vqa_unstated"
COMMAND = "python main.py --config=configs/studies/scenes_full.py --workdir=runs/study"
NOTE = (
    "This page was made again, by a later version of the report, from the 640 rows of results.jsonl, which are of version "
    "0.1: python benchmarks/rejudge.py. The verdicts in claims.json beside it are the old ones, and several are withdrawn. "
    "What no page can say from these runs, because the protocol was at fault: learning rates were searched over a factor of 9, "
    "the frozen base was no candidate, and runs ended before they had learned. So captions_web cannot test a claim, and sizes "
    "and methods cannot be ranked. Validation curves and the scores of single test cases were not kept. See "
    "docs/results/which_method.md."
)


def study(workdir: Path):
    """The committed study, read as the report reads one."""
    workdir.mkdir(parents=True, exist_ok=True)
    link = workdir / "results.jsonl"
    if not link.exists():
        link.symlink_to(os.path.relpath(KEPT / "results.jsonl", workdir.resolve()))
    config = {OLD.get(key, key): value for key, value in setup.as_json(scenes_full.get_config()).items()} | {
        "note": NOTE
    }
    files.write_json(workdir / "study.json", {"config": config, "command": COMMAND})
    return report.read(workdir)


def same_estimand(results: list, scales: list) -> list[tuple]:
    """(what, the recomputation's numbers as printed there, values per seed, digits, level): the effects that both have."""
    of = {name: [one for one in results if one.setting == name] for name in (NEW, KNOWN, QUESTIONS)}

    def trend(name, axis="data", over="doubling"):
        return claims.trend(of[name], axis, over).values

    def share(name, axis="data"):  # of the mean score of all cells, in per cent
        return (
            100
            * trend(name, axis)
            / np.mean([claims.scores(by, [cell]) for by in [claims.cells(of[name])] for cell in by])
        )

    def span(name):
        one = next(scale for scale in scales if scale.setting == name)
        return (one.ceiling - one.blind) / 100

    def pair(variant, less, more):
        by = claims.cells(of[QUESTIONS])
        first, second = claims.scores(by, [(variant, less, 16384), (variant, more, 16384)])
        return second - first

    captions = {axis: (share(NEW, axis) + share(KNOWN, axis)) / 2 for axis in ("data", "size")}
    found = [
        ("C1 questions, accuracy a doubling", ".0274 (.0235 to .0313)", trend(QUESTIONS), 4, 0.95),
        ("C2 questions, accuracy a doubling", ".0034 (-.0004 to .0072)", trend(QUESTIONS, "size"), 4, 0.95),
        ("C3 captions in a new style, CIDEr-D, 90 %", "1.60 (1.50 to 1.70)", trend(NEW, over="axis"), 2, 0.9),
        ("C3 captions in the known style, CIDEr-D, 90 %", ".25 (.14 to .37)", trend(KNOWN, over="axis"), 2, 0.9),
        ("C4 parallel adapter, 97 to 291", "-.037 (-.072 to -.002)", pair("parallel_adapter_head", 97, 291), 3, 0.95),
        ("C4 prefix, 49 to 146", "-.014 (-.024 to -.004)", pair("prefix_head", 49, 146), 3, 0.95),
    ]
    for name, texts, both, digits in (
        (NEW, (".01", "-.04", "-.02", ".10 (.03 to .17)", ".05"), ".05 (-.01 to .11)", 2),
        (QUESTIONS, ("-.01", "-.06 (-.10 to -.02)", ".00", ".02", ".03"), ".016 (.005 to .028)", 3),
    ):
        for n, said in zip((64, 256, 1024, 4096, 16384), texts, strict=True):
            some = [r for r in of[name] if r.n_images == n and r.head != "none"]
            if n == 16384:
                near = next(r.stored for r in some if (r.variant, r.size) == ("prefix_head", MIDDLE[name]))
                some = [r for r in some if max(r.stored, near) / min(r.stored, near) < claims.EQUAL]
            values = claims.layers_less(some, "prefix").values
            found.append(
                (f"C5 {name}, layers less prefix, {n:,} images", said, values, 2, 0.95 if "to" in said else None)
            )
        found.append((f"C5 {name}, all cells", both, claims.layers_less(of[name], "prefix").values, digits, 0.95))
    for name, n, said, digits in (
        (NEW, 256, ".375 (.26 to .49)", (3, 2)), (NEW, 16384, "-.77 (-1.03 to -.51)", 2),
        (QUESTIONS, 256, ".055 (-.037 to .147)", 3), (QUESTIONS, 16384, "-.009 (-.056 to .038)", 3),
    ):  # fmt: skip
        found.append((f"C6 {name}, {n:,} images", said, claims.best_less_full(of[name], n).values, digits, 0.95))
    return found + [
        ("C7 data, questions less captions, % of mean", "1.71 (1.02 to 2.41)", share(QUESTIONS) - captions["data"], 2, 0.95),
        ("C7 size, the same", ".06 (-.94 to 1.06)", share(QUESTIONS, "size") - captions["size"], 2, 0.95),
        ("C7 data, questions less new style", ".21 (-.05 to .46)", share(QUESTIONS) - share(NEW), 2, 0.95),
        ("C7 data, new less known style", "3.0 (2.1 to 4.0)", share(NEW) - share(KNOWN), 1, 0.95),
        (
            "C7 data, questions less new style, % of blind to best", "4.9 (4.0 to 5.8)",
            trend(QUESTIONS) / span(QUESTIONS) - trend(NEW) / span(NEW), 1, 0.95,
        ),
    ]  # fmt: skip


def number(x: float, digits: int) -> str:
    """A number without the zero before its point, and without the sign of a zero."""
    text = f"{x:.{digits}f}"
    text = text.removeprefix("-") if float(text) == 0 else text
    return text.replace("0.", ".", 1) if abs(x) < 1 else text


def shown(values: np.ndarray, digits: int | tuple[int, int], level: float | None) -> str:
    """The mean over seeds and its interval of a level; the interval may have digits of its own."""
    of_value, of_ends = digits if isinstance(digits, tuple) else (digits, digits)
    found = intervals.t_interval(values, level or intervals.LEVEL)
    value, low, high = number(found.value, of_value), number(found.low, of_ends), number(found.high, of_ends)
    return f"{value} ({low} to {high})" if level else value


def verdict_rows(found) -> list[str]:
    """A line of a table per verdict; * where the effect differs from 0 also when all lines are looked at together."""
    rows = []
    for one in claims.judge(found.results, found.scales, found.config["margins"]):
        effect = "-" if one.low is None else f"{one.effect:.1f} ({one.low:.1f} to {one.high:.1f})"
        cells = [f"{one.claim}: {one.statement}", one.where, effect, f"{one.margin:.1f}"]
        cells += [one.verdict + (" *" if one.survives else ""), ", ".join(one.methods) or "-"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/rejudged"))
    parser.add_argument("--page", type=Path, help="where to copy the page of the report")
    args = parser.parse_args(argv)
    workdir = args.workdir
    found = study(workdir)
    print("| effect | recomputed | now | equal |\n|---|---|---|---|")
    for what, said, values, digits, level in same_estimand(found.results, found.scales):
        now = shown(values, digits, level)
        print(f"| {what} | {said} | {now} | {'yes' if now == said else 'no'} |")
    print("\n| claim | setting | effect, points | margin | verdict | methods |\n|---|---|---|---|---|---|")
    print("\n".join(verdict_rows(found)))
    selection = claims.selection(found.results)
    print(f"\nseed 0 less the others on test: {selection.value:+.2f} ({selection.low:.2f} to {selection.high:.2f}) sd")
    print(report.write(workdir))
    if args.page:
        shutil.copy(workdir / "report/index.html", args.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
