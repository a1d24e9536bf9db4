"""The report of a study: result files in, one self-contained page with figures, tables and verdicts out.

    DIR/report/index.html   everything, no network needed
    DIR/report/*.png        the figures; claims.json and results.csv the numbers

Reads DIR/results.jsonl, DIR/study.json, DIR/points/*/predictions.jsonl and DIR/pictures/ and nothing else, so it can be
made again anywhere from a copy of the files.
"""

import base64
import collections
import csv
import dataclasses
import functools
import html
import io
import json
import statistics
import urllib.parse
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from jaxpeft.metrics import bootstrap
from jaxpeft.runtime import files
from jaxpeft.study import claims
from jaxpeft.study.claims import Final

# Okabe and Ito's colours, told apart by all common kinds of colour blindness; markers for print without colour
STYLE = {
    "prompt": ("#E69F00", "o"), "prefix": ("#CC79A7", "s"), "serial_adapter": ("#0072B2", "^"),
    "parallel_adapter": ("#56B4E9", "v"), "lora": ("#009E73", "D"), "head": ("#999999", "x"), "full": ("#000000", "*"),
}  # fmt: skip
OTHERS = (("#D55E00", "P"), ("#F0E442", "X"), ("#661100", "h"), ("#332288", "<"), ("#44AA99", ">"))
LONG = 20  # rows; a longer table is folded: on a phone it would be a hundred screens
COLUMNS = (
    "id", "level", "task", "arm", "method", "head", "size", "n_images", "seed", "lr", "chosen", "status", "tuned",
    "stored", "percent", "validation", "test", "test_nll", "forgetting", "steps", "stopped", "step_s", "compile_s",
    "total_s", "error",
)  # fmt: skip


# ---------------------------------------------------------------- rows


@dataclasses.dataclass
class Study:
    """Everything that the report shows, as read."""

    settings: dict
    rows: list[dict]  # flat, one per run, with COLUMNS
    finals: list[Final]
    directory: Path


def read(directory: Path) -> Study:
    """Read a study's files. Raises ValueError where there are none."""
    if not (directory / "results.jsonl").exists():
        raise ValueError(f"{directory} has no results.jsonl; run the study first")
    settings = json.loads((directory / "study.json").read_text())
    raw = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    select_on = settings["config"]["select_on"]
    rows = [_flat(row, settings["config"], select_on) for row in raw]
    best: dict[tuple, dict] = {}
    for row in rows:
        cell = _cell(row)
        if row["status"] == "done" and row["seed"] == 0:
            key = (-row["validation"], row["lr"])
            if cell not in best or key < (-best[cell]["validation"], best[cell]["lr"]):
                best[cell] = row
    for row in rows:
        row["chosen"] = _cell(row) in best and best[_cell(row)]["lr"] == row["lr"] and row["status"] == "done"
    return Study(settings, rows, [_final(row, directory) for row in rows if row["chosen"]], directory)


def _cell(row):
    return row["level"], row["arm"], row["size"], row["n_images"]


def _flat(row: dict, config: dict, select_on: str) -> dict:
    arm = config["arms"][row["arm"]]
    flat = dict.fromkeys(COLUMNS) | {
        key: row.get(key) for key in ("id", "level", "arm", "size", "n_images", "seed", "lr")
    }
    flat |= {"status": row["status"], "error": row.get("error"), "method": arm["method"], "head": arm["head"]}
    flat["task"] = config["levels"][row["level"]]["task"]
    if row["status"] != "done":
        return flat
    metric, counts, timing = row["main_metric"], row["counts"], row["timing"]
    test = row["metrics"]["test"]
    flat |= {"tuned": counts["tuned"], "stored": counts["stored"], "percent": 100 * counts["tuned"] / counts["total"]}
    flat |= {"validation": row["metrics"][select_on]["tuned"][metric], "test": test["tuned"][metric]}
    flat |= {key: timing.get(key) for key in ("steps", "stopped", "step_s", "compile_s", "total_s")}
    flat |= {"test_nll": test["tuned"]["nll"], "metric": metric, "n_test": test["n"], "blind": test["blind"]}
    flat["base"] = test["base"][metric] if "base" in test else None
    if forgot := row.get("forgetting"):
        flat["forgetting"] = forgot["tuned"] - forgot["base"] if "base" in forgot else None
    flat |= {"machine": row.get("machine"), "versions": row.get("versions"), "digests": row.get("digests")}
    return flat


def _final(row: dict, directory: Path) -> Final:
    lines = (directory / "points" / row["id"] / "predictions.jsonl").read_text().splitlines()
    each = [one[f"tuned_{row['metric']}"] for one in map(json.loads, lines) if one["split"] == "test"]
    names = [field.name for field in dataclasses.fields(Final) if field.name not in ("each", "converged")]
    return Final(each=np.array(each), converged=row["stopped"] != "cap", **{name: row[name] for name in names})


# ---------------------------------------------------------------- figures


def style(study: "Study", arm: str) -> dict:
    """Colour and marker of an arm, its method's in every figure; hollow where no head is tuned beside the method."""
    arms = study.settings["config"]["arms"]
    method, unknown = arms[arm]["method"], [one["method"] for one in arms.values() if one["method"] not in STYLE]
    color, marker = STYLE.get(method) or OTHERS[unknown.index(method) % len(OTHERS)]
    hollow = arms[arm].get("head", "none") == "none" and method not in ("head", "full")
    return {"color": color, "marker": marker} | ({"markerfacecolor": "white"} if hollow else {})


def _axes(n: int, columns: int = 2):
    rows = -(-n // columns) if n > 1 else 1
    figure = Figure(figsize=(5.2 * min(n, columns), 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, min(n, columns), squeeze=False).flat)


def _panels(study: Study):
    """(figure, {level: its axes}), in the study's order."""
    levels = list(study.settings["config"]["levels"])
    figure, axes = _axes(len(levels))
    for ax in axes[len(levels) :]:
        ax.set_axis_off()
    return figure, dict(zip(levels, axes, strict=False))


def _points(ax, x, y, study: "Study", arm: str, **how) -> None:
    ax.plot(x, y, label=arm, linestyle="none", markersize=5.5, **style(study, arm), **how)


def _label(ax, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)


def _legend(figure, axes):
    """One legend below all panels, methods in the order of STYLE."""
    seen, order = {}, {name: i for i, name in enumerate(STYLE)}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    names = sorted(seen, key=lambda arm: (order.get(arm.removesuffix("_head"), len(order)), arm))
    if seen:
        figure.legend(
            [seen[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )


def _log(ax):
    """A logarithmic x axis with plain numbers, few enough to be read."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x < 1e3 else f"{x / 1e3:g}k" if x < 1e6 else f"{x / 1e6:g}M")
    ax.xaxis.set_minor_formatter(NullFormatter())


def _log_at(ax, values):
    ax.set_xscale("log")
    ax.set_xticks(sorted(set(values)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())


def _cells(study: Study, level: str) -> dict[tuple, list[dict]]:
    """(arm, size, n_images) -> its chosen rows, a row per seed."""
    groups = collections.defaultdict(list)
    for row in study.rows:
        if row["chosen"] and row["level"] == level:
            groups[row["arm"], row["size"], row["n_images"]].append(row)
    return dict(groups)


def _lines(study: Study, level: str, axis: str) -> dict[str, list[tuple[float, list[dict]]]]:
    """arm -> [(x, rows)] along one axis, at the arm's middle size or at its most pictures."""
    cells, lines = _cells(study, level), {}
    for arm in study.settings["config"]["arms"]:
        mine = {cell: rows for cell, rows in cells.items() if cell[0] == arm}
        if not mine:
            continue
        if axis == "data":
            middle = claims.middle_size([cell[1] for cell in mine])
            line = [(cell[2], rows) for cell, rows in mine.items() if cell[1] == middle]
        else:
            most = max(cell[2] for cell in mine)
            line = [(rows[0]["stored"], rows) for cell, rows in mine.items() if cell[2] == most]
        lines[arm] = sorted(line, key=lambda pair: pair[0])
    return lines


def figure_axis(study: Study, axis: str) -> Figure:
    """Test score against training pictures, or against stored parameters; mean over seeds and their range."""
    figure, panels = _panels(study)
    for level, ax in panels.items():
        values, metric = set(), ""
        for arm, line in _lines(study, level, axis).items():
            look = style(study, arm) | {"linestyle": "-" if arm.endswith("_head") else "--"}
            xs = [x for x, _ in line]
            scores = [[row["test"] for row in rows] for _, rows in line]
            mean = [statistics.fmean(one) for one in scores]
            spread = [
                [m - min(one) for m, one in zip(mean, scores, strict=True)],
                [max(one) - m for m, one in zip(mean, scores, strict=True)],
            ]
            ax.errorbar(xs, mean, yerr=spread, label=arm, capsize=2, markersize=5, linewidth=1.2, **look)
            capped = [
                (x, m) for (x, rows), m in zip(line, mean, strict=True) if any(r["stopped"] == "cap" for r in rows)
            ]
            if capped:
                ax.scatter(*zip(*capped, strict=True), s=90, facecolors="none", edgecolors="#D55E00", linewidths=0.8)
            values |= set(xs)
            metric = line[0][1][0]["metric"]
        n = {row["n_test"] for row in study.rows if row["chosen"] and row["level"] == level}
        _label(
            ax,
            f"{level} (n = {', '.join(map(str, sorted(n))) or 0} test cases)",
            "training pictures" if axis == "data" else "stored parameters",
            f"test {metric}",
        )
        if axis == "data" and values:
            _log_at(ax, values)
        else:
            _log(ax)
    _legend(figure, panels.values())
    return figure


def figure_pareto(study: Study, against: str) -> Figure:
    """Test score of every cell against stored parameters or seconds; the line joins what nothing beats on both."""
    figure, panels = _panels(study)
    for level, ax in panels.items():
        points = []
        for (arm, _, _), rows in _cells(study, level).items():
            x, y = statistics.fmean(r[against] for r in rows), statistics.fmean(r["test"] for r in rows)
            _points(ax, x, y, study, arm)
            points.append((x, y))
        front = pareto(points)
        if front:
            ax.step(*zip(*front, strict=True), where="post", color="#555555", linewidth=0.8)
        xs = [x for x, _ in points]
        if xs and max(xs) > 5 * min(xs):
            _log(ax)
        _label(ax, level, {"stored": "stored parameters", "total_s": "seconds of one run"}[against], "test score")
    _legend(figure, panels.values())
    return figure


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats: none costs (x) at most as much and scores (y) more, or the reverse."""
    front = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def figure_rates(study: Study) -> Figure:
    """Validation score against learning rate, a line per cell; the chosen rate is filled."""
    figure, panels = _panels(study)
    for level, ax in panels.items():
        groups = collections.defaultdict(list)
        for row in study.rows:
            if row["level"] == level and row["seed"] == 0 and row["status"] == "done":
                groups[row["arm"], row["size"], row["n_images"]].append(row)
        for (arm, _, _), rows in groups.items():
            rows = sorted(rows, key=lambda r: r["lr"])
            look = {"markersize": 4, "linewidth": 0.7} | style(study, arm)
            look["linestyle"] = "-" if arm.endswith("_head") else "--"
            line = {"label": arm} | look | {"markerfacecolor": "white"}
            ax.plot([r["lr"] for r in rows], [r["validation"] for r in rows], **line)
            for r in rows:
                if r["chosen"]:
                    ax.plot(r["lr"], r["validation"], **look | {"markerfacecolor": look["color"]})
        _log(ax)
        _label(ax, level, "learning rate", "validation score")
    _legend(figure, panels.values())
    return figure


def consistency(study: Study) -> list[dict]:
    """Per level: how much of the best tuned score the frozen base has already: 1 is wholly consistent with pre-training."""
    found = []
    for level in study.settings["config"]["levels"]:
        rows = [row for row in study.rows if row["level"] == level and row["status"] == "done"]
        base = [row["base"] for row in rows if row["base"] is not None]
        chosen = [row for row in rows if row["chosen"]]
        if not base or not chosen:
            continue
        means = [(statistics.fmean(r["test"] for r in group), cell[0]) for cell, group in _cells(study, level).items()]
        best, arm = max(means)
        blind = max(score[rows[0]["metric"]] for score in chosen[0]["blind"].values())
        found.append(
            {
                "level": level, "metric": rows[0]["metric"], "blind": blind, "frozen base": base[0], "best tuned": best,
                "best arm": arm, "consistency": base[0] / best if best else 0.0, "n": chosen[0]["n_test"],
            }
        )  # fmt: skip
    return found


def figure_consistency(study: Study) -> Figure:
    """How much data and tunable size matter, against how consistent a level is with pre-training."""
    scale = {row["level"]: row["consistency"] for row in consistency(study)}
    figure, axes = _axes(2)
    for ax, axis in zip(axes, ("data", "size"), strict=True):
        for row in claims.slopes(study.finals):
            if row["axis"] == axis and row["level"] in scale:
                x, y = scale[row["level"]], 100 * row["slope"]
                error = [[max(0, y - 100 * row["low"])], [max(0, 100 * row["high"] - y)]]
                ax.errorbar([x], [y], yerr=error, fmt="o", color="#0072B2", capsize=3, markersize=5)
                ax.annotate(row["level"], (x, y), xytext=(6, 4), textcoords="offset points", fontsize=7)
        ax.axhline(0, color="#555555", linewidth=0.7)
        ax.set_xlim(-0.05, 1.25)
        _label(
            ax,
            {"data": "twice the pictures", "size": "twice the size"}[axis],
            "consistency: frozen base / best tuned score",
            "% of the level's mean score",
        )
    return figure


def figure_forgetting(study: Study) -> Figure:
    """Change of the loss on captions in the style of pre-training, against test score: right and low is best."""
    figure, panels = _panels(study)
    for level, ax in panels.items():
        for (arm, _, _), rows in _cells(study, level).items():
            forgot = [r["forgetting"] for r in rows if r["forgetting"] is not None]
            if forgot:
                _points(ax, statistics.fmean(r["test"] for r in rows), statistics.fmean(forgot), study, arm)
        ax.axhline(0, color="#555555", linewidth=0.7)
        ax.set_yscale("symlog", linthresh=0.1)
        _label(ax, level, "test score", "nats per token, after - before")
    _legend(figure, panels.values())
    return figure


FIGURES = {
    "score_data": (
        functools.partial(figure_axis, axis="data"),
        "Test score against training pictures, at each arm's middle size. Points: mean over seeds; bars: their range; "
        "orange rings: a run hit the cap on steps.",
    ),
    "score_size": (
        functools.partial(figure_axis, axis="size"), "Test score against stored parameters, on all training pictures."
    ),
    "consistency": (
        figure_consistency,
        "What doubling pictures or size (rank, bottleneck, length) adds, mean over the PEFT arms, 95 % intervals, all runs.",
    ),
    "pareto_stored": (
        functools.partial(figure_pareto, against="stored"),
        "Every cell: test score against stored parameters. The line joins what nothing beats.",
    ),
    "pareto_seconds": (
        functools.partial(figure_pareto, against="total_s"),
        "Every cell: test score against the seconds of one run, compilation and evaluation included.",
    ),
    "rates": (
        figure_rates, "Validation score against learning rate, a line per cell, seed 0. Filled: chosen."
    ),
    "forgetting": (
        figure_forgetting,
        "Forgetting: change of the loss on captions in the style of pre-training, of test pictures.",
    ),
}  # fmt: skip


# ---------------------------------------------------------------- the page

TITLES = {
    "score_data": "Score against data",
    "score_size": "Score against tunable size",
    "consistency": "The consistency axis",
    "pareto_stored": "What it costs",
    "rates": "Learning rates",
    "forgetting": "Forgetting",
}

CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:0 auto;max-width:68rem;padding:1rem}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .4rem;border-bottom:1px solid #ddd}
img{max-width:100%;height:auto}figure{margin:.5rem 0}figcaption{color:#444;font-size:.88rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem}
td,th{padding:.25rem .55rem;border-bottom:1px solid #e4e4e4;text-align:left;vertical-align:top}
td.num,th.num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.supported{color:#00664a;font-weight:600}.refuted{color:#a33b00;font-weight:600}.undecided{color:#555}
.note{background:#fff6df;border-left:4px solid #E69F00;padding:.5rem .8rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem;background:#f6f6f6;padding:.6rem}
@media(max-width:40rem){
figure.chart{overflow-x:auto}figure.chart img{max-width:none;width:44rem}
figure.chart::before{content:"wider than the screen: swipe \\2192";color:#666;font-size:.8rem}
figure.chart::before,figure.chart figcaption{position:sticky;left:0;width:calc(100vw - 2rem);display:block}
.cards tr{display:block;border-bottom:2px solid #bbb;padding:.3rem 0}.cards tr:first-child{display:none}
.cards td,.cards td.num{display:flex;justify-content:space-between;gap:1rem;text-align:right;border:0;white-space:normal}
.cards td::before{content:attr(data-label);color:#666;text-align:left}.cards td:empty{display:none}}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem;font-size:.82rem}
.gallery img{width:7rem;image-rendering:pixelated}.gallery td{padding:.1rem .3rem}
"""


def _table(header: list[str], rows: list[list]) -> str:
    """An HTML table, on a phone a card per row; numbers are right-aligned, everything is escaped."""

    def cell(tag, value, label=""):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        shown = f"{value:,}" if isinstance(value, int) and number else f"{value:.4g}" if number else str(value)
        extra = f" {value}" if value in ("supported", "refuted", "undecided") else ""
        label = f' data-label="{html.escape(label)}"' if label else ""
        return f'<{tag} class="{"num" if number else ""}{extra}"{label}>{html.escape(shown)}</{tag}>'

    head = "".join(cell("th", name) for name in header)
    body = "".join(
        "<tr>"
        + "".join(cell("td", "" if v is None else v, name) for name, v in zip(header, row, strict=True))
        + "</tr>"
        for row in rows
    )
    table = f'<div class="wide"><table class="cards"><tr>{head}</tr>{body}</table></div>'
    return table if len(rows) <= LONG else f"<details><summary>{len(rows)} rows</summary>{table}</details>"


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _image(png: bytes, caption: str, alt: str = "") -> str:
    data = base64.b64encode(png).decode()
    shown = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    kind = ' class="chart"' if caption else ""
    return f'<figure{kind}><img alt="{html.escape(alt or caption)}" src="data:image/png;base64,{data}">{shown}</figure>'


def _verdict_rows(verdicts) -> list[list]:
    return [
        [
            v.claim, v.verdict, v.statement, v.where, v.effect,
            "" if v.low is None else f"[{v.low:.4g}, {v.high:.4g}]", v.margin, v.unit,
            f"{v.n_cells} cells, {v.n_seeds} seeds, {v.n_examples} cases", v.note,
        ]
        for v in verdicts
    ]  # fmt: skip


def _gallery(study: Study, cases: int = 6) -> str:
    """Test pictures with what each arm's best cell wrote."""
    parts = []
    for level in study.settings["config"]["levels"]:
        pictures = {
            urllib.parse.unquote(path.stem): path for path in (study.directory / "pictures" / level).glob("*.png")
        }
        best: dict[str, dict] = {}
        for row in study.rows:
            if row["chosen"] and row["level"] == level and row["seed"] == 0:
                if row["arm"] not in best or row["validation"] > best[row["arm"]]["validation"]:
                    best[row["arm"]] = row
        written: dict[tuple, dict] = {}
        for arm, row in best.items():
            for line in (study.directory / "points" / row["id"] / "predictions.jsonl").read_text().splitlines():
                one = json.loads(line)
                if one["split"] == "test" and one["image_id"] in pictures:
                    key = one["image_id"], one.get("question_id", "")
                    case = written.setdefault(key, {"about": one, "said": {}})
                    case["said"][arm] = one["tuned"]
        shown = {}
        for (image_id, _), case in written.items():  # one case per picture
            shown.setdefault(image_id, case)
        if not shown:
            continue
        cards = []
        for image_id, case in list(shown.items())[:cases]:
            about = case["about"]
            truth = about["answers"][0] if "answers" in about else about["references"][0]
            lines = [("Q", about["question"])] if "question" in about else []
            lines += [("truth", truth), *case["said"].items()]
            table = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in lines)
            picture = _image(pictures[image_id].read_bytes(), "", alt=f"test picture {image_id}")
            cards.append(f"<div>{picture}<table>{table}</table></div>")
        parts.append(f"<h3>{html.escape(level)}</h3><div class='gallery'>{''.join(cards)}</div>")
    return "".join(parts) or "<p>No pictures were kept.</p>"


def write(workdir: str | Path) -> str:
    """Write DIR/report from DIR's result files -> a line that says where it is and what the verdicts are."""
    directory = Path(workdir)
    study = read(directory)
    out = directory / "report"
    out.mkdir(exist_ok=True)
    config, rows = study.settings["config"], study.rows
    done = [row for row in rows if row["status"] == "done"]
    converged = claims.judge(claims.converged(study.finals))
    everything = claims.judge(study.finals)
    scale = consistency(study)
    figures = {name: (draw(study), caption) for name, (draw, caption) in FIGURES.items()}
    pngs = {name: _png(figure) for name, (figure, _) in figures.items()}
    for name, png in pngs.items():
        (out / f"{name}.png").write_bytes(png)
    files.write_json(
        out / "claims.json",
        {"converged": [dataclasses.asdict(v) for v in converged], "all": [dataclasses.asdict(v) for v in everything],
         "consistency": scale, "margin": claims.MARGIN, "replicates": bootstrap.REPLICATES},
    )  # fmt: skip
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(out / "results.csv", table.getvalue())
    files.write_text(out / "index.html", _page(study, config, done, converged, everything, scale, figures, pngs))
    said = collections.Counter(v.verdict for v in converged)
    counts = ", ".join(f"{n} {name}" for name, n in sorted(said.items())) or "no claim has its cells"
    return f"report: {out / 'index.html'} ({len(done)} runs; converged runs: {counts})"


def _page(study, config, done, converged, everything, scale, figures, pngs) -> str:
    header = ["claim", "verdict", "statement", "on", "effect", "interval", "margin", "unit", "n", "note"]
    capped = [row for row in done if row["chosen"] and row["stopped"] == "cap"]
    failed = [row for row in study.rows if row["status"] == "failed"]
    seconds = sum(row["total_s"] for row in done)
    first = done[0] if done else {"machine": {}, "versions": {}, "digests": {}}
    edges = _edges(study)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(config['name'])}: study report</title><style>{CSS}</style></head><body>",
        f"<h1>{html.escape(config['name'])}</h1><pre>{html.escape((config['hypothesis'] or '').strip())}</pre>",
    ]
    if config["note"]:
        parts.append(f"<p class='note'>{html.escape(config['note'])}</p>")
    parts += [
        f"<p>{len(done)} runs done, {len(failed)} failed, {seconds / 3600:.2f} hours of runs. Steps: until validation loss "
        "stops falling, within a cap. Learning rates: the same number per cell, chosen on validation pictures. "
        f"Seeds: {config['seeds']}, each its own subset, initialisation and order. Subsets nest.</p>",
        "<h2>The paper's claims, on converged runs</h2>",
        "<p>Effects with bootstrap intervals over seeds and test cases. A refuted claim is a result.</p>",
        _table(header, _verdict_rows(converged)) if converged else "<p>No converged run.</p>",
        "<h2>How consistent each level is with pre-training</h2>",
        "<p>Share of the best tuned score that the frozen base has before any tuning.</p>",
        _table(list(scale[0]), [list(row.values()) for row in scale]) if scale else "<p>The base was not scored.</p>",
    ]
    for name, (_, caption) in figures.items():
        parts += [f"<h2>{TITLES[name]}</h2>"] if name in TITLES else []
        parts.append(_image(pngs[name], caption, alt=TITLES.get(name, name)))
    parts += [
        "<h2>The recipe</h2>",
        _table(
            ["arm", "method", "head tuned beside it", "middle rate", "its own settings"],
            [
                [name, arm["method"], arm["head"], f"{arm['lr']:.3g}", json.dumps(arm["fields"]) if arm["fields"] else ""]
                for name, arm in config["arms"].items()
            ],
        ),
        f"<p>Rates tried: the middle one times {', '.join(f'{r:.3g}' for r in config['rates'])}. The rest:</p>",
        f"<pre>{html.escape(json.dumps({t: _recipe(p) for t, p in config['points'].items()}, indent=1))}</pre>",
        "<h2>Runs that hit the cap on steps</h2>",
        _table(["cell", "seed", "steps"], [[row["id"], row["seed"], row["steps"]] for row in capped])
        if capped else "<p>None: every chosen run stopped because validation did.</p>",
        "<p>The same claims with these runs included:</p>",
        _table(header, _verdict_rows(everything)) if everything else "",
        "<h2>Chosen rates at the edge of their search</h2>",
        _table(["cell", "rate", "which end"], edges) if edges else "<p>None.</p>",
        "<h2>Failures</h2>",
        _table(["run", "reason"], [[row["id"], row["error"]] for row in failed]) if failed else "<p>None.</p>",
        "<h2>Test pictures</h2>", _gallery(study),
        "<h2>Every chosen cell</h2>", _cell_table(study),
        "<h2>Provenance</h2>",
        f"<pre>{html.escape(json.dumps({k: first[k] for k in ('machine', 'versions', 'digests')}, indent=1))}</pre>",
        f"<pre>{html.escape(study.settings.get('command', ''))}</pre>",
        "<p>results.csv has every run, claims.json every number of the tables above.</p></body></html>",
    ]  # fmt: skip
    return "\n".join(parts)


def _recipe(one: dict) -> dict:
    """What a reader needs of a point's config."""
    return {key: one[key] for key in ("base", "steps", "batch_size", "optim", "stop", "model", "data")}


def _edges(study: Study) -> list[list]:
    """Cells whose chosen rate is the smallest or largest tried: a wider search may do better."""
    tried = collections.defaultdict(set)
    for row in study.rows:
        if row["seed"] == 0 and row["status"] == "done":
            tried[_cell(row)].add(row["lr"])
    found = []
    for row in study.rows:
        all_of = tried[_cell(row)]
        if row["chosen"] and row["seed"] == 0 and len(all_of) > 1 and row["lr"] in (min(all_of), max(all_of)):
            found.append([row["id"], f"{row['lr']:.3g}", "smallest" if row["lr"] == min(all_of) else "largest"])
    return found


def _cell_table(study: Study) -> str:
    rows = []
    for level in study.settings["config"]["levels"]:
        for (arm, size, n_images), group in _cells(study, level).items():
            scores = [row["test"] for row in group]
            forgot = [row["forgetting"] for row in group if row["forgetting"] is not None]
            rows.append([
                level, arm, size, n_images, group[0]["stored"], f"{group[0]['percent']:.2f} %", f"{group[0]['lr']:.3g}",
                statistics.fmean(scores), f"{min(scores):.3f} to {max(scores):.3f}", len(scores),
                statistics.fmean(forgot) if forgot else None, statistics.fmean(row["total_s"] for row in group),
            ])  # fmt: skip
    header = [
        "level",
        "arm",
        "size",
        "pictures",
        "stored",
        "tuned",
        "rate",
        "test",
        "range",
        "seeds",
        "forgetting",
        "seconds",
    ]
    return _table(header, rows)
