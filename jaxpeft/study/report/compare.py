"""Compare two studies, A and B, in one page: the cells that both have, the claims, and what differs between their configs.

    jaxpeft compare runs/study_a runs/study_b --out comparison.html

Reads the files that a report reads. Runs of a cell are paired by seed: the same seed draws the same subset of the same data.
"""

import argparse
import html
import statistics
from pathlib import Path

import numpy as np

from jaxpeft import tree
from jaxpeft.runtime import files
from jaxpeft.study import claims
from jaxpeft.study.intervals import Estimate
from jaxpeft.study.report import answers, markup
from jaxpeft.study.report.markup import Html, table
from jaxpeft.study.report.rows import Study, read

Cells = dict[tuple, dict[int, claims.Result]]  # (setting, variant, size, number of images) -> seed -> run
BETTER, WORSE, TIED, UNKNOWN = "B is better", "A is better", "tied", "one seed"


def write(first: Path, second: Path, out: Path) -> str:
    """Write the page -> a line with its path and the numbers of cells. Raises ValueError where the studies share no cell."""
    both = (read(first, mixed_code=True), read(second, mixed_code=True))
    in_a, in_b = (_cells(study) for study in both)
    common = [cell for cell in in_a if cell in in_b and in_a[cell].keys() & in_b[cell].keys()]
    if not common:
        raise ValueError(
            f"{first} and {second} have no finished cell of the same setting, variant, size and number of images"
        )
    less = {cell: answers.difference(in_b[cell], in_a[cell]) for cell in common}
    words = [_word(one) for one in less.values()]
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, _page(both, (in_a, in_b), less))
    counts = "; ".join(f"{words.count(word)} {word}" for word in (BETTER, WORSE, TIED, UNKNOWN) if word in words)
    return f"comparison: {out} ({len(common)} cells in both: {counts})"


def _cells(study: Study) -> Cells:
    found: Cells = {}
    for one in sorted(study.results, key=lambda one: (one.setting, one.cell, one.seed)):
        found.setdefault((one.setting, *one.cell), {})[one.seed] = one
    return found


def _word(less: Estimate | float) -> str:
    if isinstance(less, float):
        return UNKNOWN
    return BETTER if less.low > 0 else WORSE if less.high < 0 else TIED


def over_cells(cells: list[tuple], in_a: Cells, in_b: Cells) -> Estimate | float | None:
    """The mean over cells of B's test score less A's; its interval is over the seeds that all of these cells have."""
    seeds = sorted(set.intersection(*(in_a[cell].keys() & in_b[cell].keys() for cell in cells)))
    less = [[in_b[cell][seed].score - in_a[cell][seed].score for seed in seeds] for cell in cells]
    return answers.mean(np.mean(less, axis=0)) if seeds else None


def _page(both: tuple[Study, Study], cells: tuple[Cells, Cells], less: dict[tuple, Estimate | float]) -> str:
    (a, b), (in_a, in_b) = both, cells
    note = "" if _codes(a) == _codes(b) else "The two studies were made by different code."
    return markup.page(
        "compare.html",
        name=html.escape(f"{a.config['name']} (A) and {b.config['name']} (B)"),
        note=markup.paragraph(note, "note"),
        sentences="".join(f"<li>{markup.escape(one)}</li>" for one in _sentences(both, cells, less)),
        methods=_method_table(a, cells, list(less)),
        cells=_cell_table(a, cells, less),
        claims=_claims(both),
        config=_config(a.config, b.config),
        only=_only(in_a, in_b),
        places=table(
            ("", "A", "B"),
            [
                ["directory", a.directory, b.directory],
                ["command", a.command, b.command],
                ["code", ", ".join(_codes(a)), ", ".join(_codes(b))],
            ],
        ),
    )


def _codes(study: Study) -> list[str]:
    return sorted({row["code"] or "version 0.1" for row in study.rows if row["status"] == "done"})


def _sentences(both: tuple[Study, Study], cells: tuple[Cells, Cells], less: dict[tuple, Estimate | float]) -> list[str]:
    """Three sentences: where the means of settings differ, how many cells do, and what was compared."""
    settings = list(dict.fromkeys(cell[0] for cell in less))
    means = []
    for setting in settings:
        found = over_cells([cell for cell in less if cell[0] == setting], *cells)
        means.append(f"{markup.estimate(found, '+') or 'no seed in common'} {both[0].metric(setting)} on {setting}")
    words = [_word(one) for one in less.values()]
    said = ", ".join(f"{words.count(word)}: {word}" for word in (BETTER, WORSE, TIED, UNKNOWN) if word in words)
    chance = f"; if the studies were equal, about {len(less) / 20:.1f} cells would differ by chance"
    runs = [sum(row["status"] == "done" for row in study.runs) for study in both]
    return [
        f"B less A, test scores, mean over cells: {'; '.join(means)}.",
        f"Of the {len(less)} cells that both have, by 95 % intervals over seeds: {said}{chance}.",
        f"A has {runs[0]:,} runs in {len(cells[0])} cells, B has {runs[1]:,} in {len(cells[1])}.",
    ]


def _method_table(study: Study, cells: tuple[Cells, Cells], common: list[tuple]) -> Html:
    """B less A of each setting and variant."""
    groups: dict[tuple, list[tuple]] = {}
    for cell in common:
        groups.setdefault(cell[:2], []).append(cell)
    found, rows = {group: over_cells(some, *cells) for group, some in groups.items()}, []
    for (setting, variant), one in found.items():
        # metrics differ in scale
        ends = markup.limits([other for group, other in found.items() if group[0] == setting])
        drawn, word = (None, None) if one is None else (markup.interval(one, ends), _word(one))
        rows.append([setting, variant, len(groups[setting, variant]), study.metric(setting), drawn, word])
    return table(("setting", "variant", "cells", "metric", "B less A", "by interval"), rows)


def _cell_table(study: Study, cells: tuple[Cells, Cells], less: dict[tuple, Estimate | float]) -> Html:
    ends = {
        setting: markup.limits([one for cell, one in less.items() if cell[0] == setting])
        for setting in study.config["settings"]
    }
    rows = []
    for (setting, variant, size, n), one in less.items():
        means = [statistics.fmean(run.score for run in some[setting, variant, size, n].values()) for some in cells]
        rows.append([setting, variant, size, n, *means, markup.interval(one, ends[setting]), _word(one)])
    header = ("setting", "variant", "size", "images", "test score A", "test score B", "B less A", "by interval")
    return table(header, rows)


def _claims(both: tuple[Study, Study]) -> str:
    """The verdicts of both studies side by side; '' unless both judge claims."""
    judged = []
    for study in both:
        found = claims.judge(study.results, study.scales, study.config["margins"])
        judged.append({(one.claim, one.statement, one.where): one for one in found})
    if not all(judged):
        return ""
    rows = []
    for key in dict.fromkeys([*judged[0], *judged[1]]):
        row: list = [f"{key[0]}: {key[1]}", key[2]]
        for found in judged:
            one = found.get(key)
            row += [one and one.verdict, one and markup.estimate(one.estimate)]
        rows.append([*row, "" if row[2] == row[4] else "changed"])
    header = ("claim", "on", "A", "effect in A, points", "B", "effect in B, points", "verdict")
    return table(header, rows)


def _config(a: dict, b: dict) -> str:
    """The keys whose values differ."""
    a, b = (tree.flatten({k: v for k, v in one.items() if k != "hypothesis"}) for one in (a, b))
    rows = [
        [key.replace("/", "."), a.get(key, "not set"), b.get(key, "not set")] for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]  # fmt: skip
    return table(("key", "A", "B"), [[str(value) for value in row] for row in rows]) if rows else "<p>Nothing.</p>"


def _only(in_a: Cells, in_b: Cells) -> str:
    rows = [[*cell, "A"] for cell in in_a if cell not in in_b] + [[*cell, "B"] for cell in in_b if cell not in in_a]
    return table(("setting", "variant", "size", "images", "in"), rows)


def main(argv=None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="jaxpeft compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs=2, type=Path, metavar="DIR", help="the directories of two studies, A and B")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="the page (comparison.html)")
    args = parser.parse_args(argv)
    print(write(*args.studies, args.out))
