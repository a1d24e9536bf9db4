"""The report of a study: one self-contained page with figures, tables and verdicts, made from result files.

    DIR/report/index.html   the page, readable without a network
    DIR/report/*.png        the figures; claims.json and results.csv hold the numbers

Reads only DIR/results.jsonl and DIR/study.json, so it can be made anywhere from a copy of them. Test images are shown if
DIR/points/*/predictions.jsonl and DIR/pictures/ are there too, validation curves if DIR/points/*/metrics.jsonl are.
"""

import collections
import dataclasses
from pathlib import Path

from jaxpeft.runtime import files
from jaxpeft.study import claims
from jaxpeft.study.report.figures import FIGURES
from jaxpeft.study.report.page import render
from jaxpeft.study.report.rows import as_csv, read


def write(workdir: str | Path, mixed_code: bool = False) -> str:
    """Write DIR/report from DIR's result files -> a line with its path and the numbers of verdicts.

    Raises ValueError where there are no results, and for cells whose runs were made by different code, unless `mixed_code`.
    """
    directory = Path(workdir)
    study = read(directory, mixed_code)
    out = directory / "report"
    out.mkdir(exist_ok=True)
    verdicts = claims.judge(study.results, study.scales, study.config["margins"])
    selection = claims.selection(study.results)
    drawn = {name: draw(study) for name, (draw, _) in FIGURES.items()}
    drawings = {name: one for name, one in drawn.items() if one}
    for name, one in drawings.items():
        (out / f"{name}.png").write_bytes(one.whole)
    files.write_json(
        out / "claims.json",
        {"verdicts": [dataclasses.asdict(one) for one in verdicts], "margins": dict(study.config["margins"]),
         "scales": [dataclasses.asdict(one) for one in study.scales],
         "selection": selection and dataclasses.asdict(selection)},
    )  # fmt: skip
    files.write_text(out / "results.csv", as_csv(study.rows))
    nats = []
    if study.in_nats:  # the primary measure then
        margins = study.config["margins_nll"]
        nats = claims.judge(*claims.in_nats(study.results, study.scales), margins)
        files.write_json(out / "claims_nll.json", {"verdicts": list(map(dataclasses.asdict, nats)), "margins": margins})
    files.write_text(out / "index.html", render(study, (verdicts, nats), selection, drawings))
    said = collections.Counter(one.verdict for one in verdicts)
    counts = "; ".join(f"{n} {name}" for name, n in sorted(said.items())) or "none, no setting declares `consistent`"
    n_done = sum(row["status"] == "done" for row in study.runs)
    return f"report: {out / 'index.html'} ({n_done} runs; claims: {counts})"
