"""The page of a report: report.html filled with tables, figures and test images, all in one file."""

import base64
import collections
import html
import json
import statistics
import string
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from jaxpeft.study.claims import LEAST
from jaxpeft.study.intervals import BELOW, FLAT, NEGATIVE, NOT_TESTED, POSITIVE, UNDECIDED
from jaxpeft.study.report.figures import FIGURES
from jaxpeft.study.report.rows import Study, cell_of, chosen_by_cell, read_jsonl

HERE = Path(__file__).parent
LONG = 20  # rows; a longer table is collapsed, because on a phone it would fill a hundred screens
VERDICT_WORDS = (POSITIVE, BELOW, FLAT, NEGATIVE, UNDECIDED, NOT_TESTED)
TITLES = {
    "score_data": "Score against data",
    "score_size": "Score against tunable size",
    "consistency": "The consistency axis",
    "pareto_stored": "What it costs",
    "learning_rates": "Learning rates",
    "forgetting": "Forgetting",
}
VERDICTS = (
    "claim", "verdict", "statement", "the paper predicts", "on", "effect", "95 % interval", "margin", "methods", "seeds",
    "cells",
)  # fmt: skip


def render(study: Study, verdicts: list, selection, share: list[dict], pngs: dict[str, bytes]) -> str:
    """The HTML page. `verdicts`: claims.judge; `selection`: claims.selection; `share`: rows.consistency."""
    config, rows = study.config, study.rows
    done = [row for row in rows if row["status"] == "done"]
    failed = [[row["id"], row["error"]] for row in rows if row["status"] == "failed"]
    capped = [[row["id"], row["seed"], row["steps"]] for row in done if row["chosen"] and row["stopped"] == "cap"]
    first = done[0] if done else {"machine": {}, "versions": {}, "digests": {}}
    edges, recipe = _edges(study), {task: _recipe(point) for task, point in config["points"].items()}
    none = "<p>None.</p>"
    return string.Template((HERE / "report.html").read_text()).substitute(
        css=(HERE / "report.css").read_text(),
        name=html.escape(config["name"]),
        hypothesis=html.escape((config["hypothesis"] or "").strip()),
        note=_notes(study),
        n_done=len(done),
        n_failed=len(failed),
        hours=f"{sum(row['total_s'] for row in done) / 3600:.2f}",
        seeds=config["seeds"],
        claims=_claims(study, verdicts, selection),
        consistency=_table(share[0], [row.values() for row in share]) if share else "<p>The base was not scored.</p>",
        figures=_figures(pngs),
        variants=_variant_table(config["variants"]),
        learning_rates=", ".join(f"{factor:.3g}" for factor in config["learning_rates"]),
        recipe=_json(recipe),
        capped=_table(("cell", "seed", "steps"), capped)
        if capped else "<p>None: every chosen run stopped because its validation loss stopped falling.</p>",
        edges=_table(("cell", "learning rate", "which end"), edges) if edges else none,
        failures=_table(("run", "reason"), failed) if failed else none,
        gallery=_gallery(study) or "<p>No images were saved.</p>",
        cells=_cell_table(study),
        provenance=_json({key: first[key] for key in ("machine", "versions", "digests")}),
        command=html.escape(study.command),
    )  # fmt: skip


def _json(value) -> str:
    return html.escape(json.dumps(value, indent=1))


def _notes(study: Study) -> str:
    notes = [study.config["note"]] if study.config["note"] else []
    if study.mixed:
        cells = ", ".join(map(str, study.mixed))
        notes.append(f"The runs of {cells} were made by different code; they are compared because of --mixed_code.")
    return "".join(f"<p class='note'>{html.escape(note)}</p>\n" for note in notes)


def _recipe(point: dict) -> dict:
    """The part of a run's config that the report shows."""
    return {key: point[key] for key in ("base", "steps", "batch_size", "optim", "stop", "model", "data")}


def _figures(pngs: dict[str, bytes]) -> str:
    parts = []
    for name, (_, caption) in FIGURES.items():
        parts += [f"<h2>{TITLES[name]}</h2>"] if name in TITLES else []
        parts.append(_image(pngs[name], caption, alt=TITLES.get(name, name)))
    return "\n".join(parts)


def _claims(study: Study, verdicts: list, selection) -> str:
    """The section on claims: the table of verdicts and what its numbers mean."""
    if not verdicts:
        return (
            "<p>No claim is judged, because no setting says whether it is consistent with pre-training. Declare it in the "
            "study's config: <code>settings.NAME.consistent = True</code> or <code>False</code>.</p>"
        )
    rows = [
        [
            one.claim, one.verdict, one.statement, one.predicts, one.where, one.effect,
            "" if one.low is None else f"{one.low:.3g} to {one.high:.3g}", one.margin, ", ".join(one.methods), one.n_seeds,
            "; ".join([*one.cells, one.note] if one.note else one.cells),
        ]
        for one in verdicts
    ]  # fmt: skip
    return "\n".join(
        [
            f"<p>{HOW_TO_READ}</p>",
            f"<p>{html.escape(' '.join(_ends(one) for one in study.scales))}</p>",
            _table(VERDICTS, rows, fold=False),
            f"<p>{html.escape(_multiplicity(verdicts))}</p>",
            f"<p>{html.escape(_selection(selection))}</p>",
        ]
    )


HOW_TO_READ = (
    "Effects in points: 0 is the best guess without the image, 100 the ceiling of the setting. Effects of data and size are "
    "changes over the whole axis. The interval is that of Student's t over seeds; the margin was set in the study's config. "
    "<b>positive</b>: the interval is above 0. <b>positive, below the margin</b>: and all of it is too small to matter. "
    "<b>flat</b>: it contains 0 and lies within the margin. <b>negative</b>: it is below 0. <b>undecided</b>: no verdict, the "
    f"interval is too wide. <b>not tested</b>: fewer than {LEAST} methods with {LEAST} points each. Each line speaks of its "
    "methods and cells only. A verdict against the paper is a result."
)


def _ends(scale) -> str:
    kind = "consistent" if scale.consistent else "inconsistent" if scale.consistent is not None else "not declared"
    ceiling = "declared" if scale.declared else "the study's best cell"
    return f"{scale.setting} ({kind}): blind {scale.blind:.3f}, ceiling {scale.ceiling:.3f}, {ceiling}."


def _multiplicity(verdicts: list) -> str:
    """A word on the number of tests."""
    tested = [one for one in verdicts if one.verdict != NOT_TESTED]
    kept = [f"{one.claim} on {one.where} ({one.effect:+.1f})" for one in tested if one.survives]
    return (
        f"{len(tested)} lines were tested, each at 95 %: if all true effects were 0, about {len(tested) / 20:.1f} of them "
        f"would be called positive or negative by chance. Looked at together (Benjamini and Yekutieli's control of false "
        f"discoveries, at 5 %), "
        f"{'these differ from 0: ' + '; '.join(kept) if kept else 'none differs from 0'}."
    )


def _selection(found) -> str:
    """Whether seed 0, on which learning rates are chosen, is better on test images than the other seeds."""
    if found is None:
        return "Too few seeds to check whether learning rates were chosen on the scored images."
    numbers = f"{found.value:+.2f} standard deviations over seeds ({found.low:.2f} to {found.high:.2f})"
    if found.low > 0:
        return (
            f"Warning: seed 0, on which learning rates are chosen, scores {numbers} more than the other seeds on test images. "
            f"Either rates were chosen on the scored images, or the luck of a run is in its scores on both kinds of images. "
            f"Then the scores of seed 0 are too high."
        )
    return f"Check of the choice of rates: seed 0, on which they are chosen, differs from the other seeds by {numbers} on test."


def _variant_table(variants: dict) -> str:
    header = ("variant", "method", "head trained too", "middle learning rate", "settings")
    rows = [
        [name, one["method"], one["head"], f"{one['lr']:.3g}", json.dumps(one["fields"]) if one["fields"] else ""]
        for name, one in variants.items()
    ]
    return _table(header, rows)


def _edges(study: Study) -> list[list]:
    """Cells whose chosen learning rate is the smallest or largest tried: a wider search may find a better one."""
    tried = collections.defaultdict(set)
    for row in study.rows:
        if row["seed"] == 0 and row["status"] == "done":
            tried[cell_of(row)].add(row["lr"])
    found = []
    for row in study.rows:
        all_of = tried[cell_of(row)]
        if row["chosen"] and row["seed"] == 0 and len(all_of) > 1 and row["lr"] in (min(all_of), max(all_of)):
            found.append([row["id"], f"{row['lr']:.3g}", "smallest" if row["lr"] == min(all_of) else "largest"])
    return found


def _cell_table(study: Study) -> str:
    header = (
        "setting", "variant", "size", "images", "stored", "tuned", "learning rate", "test", "range", "seeds",
        "forgetting", "seconds",
    )  # fmt: skip
    rows = []
    for setting in study.config["settings"]:
        for (variant, size, n_images), group in chosen_by_cell(study, setting).items():
            scores = [row["test"] for row in group]
            forgot = [row["forgetting"] for row in group if row["forgetting"] is not None]
            rows.append([
                setting, variant, size, n_images, group[0]["stored"], f"{group[0]['percent']:.2f} %", f"{group[0]['lr']:.3g}",
                statistics.fmean(scores), f"{min(scores):.3f} to {max(scores):.3f}", len(scores),
                statistics.fmean(forgot) if forgot else None, statistics.fmean(row["total_s"] for row in group),
            ])  # fmt: skip
    return _table(header, rows)


def _gallery(study: Study, most: int = 6) -> str:
    """Some test images per setting, with the texts of each variant's best cell."""
    parts = []
    for setting in study.config["settings"]:
        kept = (study.directory / "pictures" / setting).glob("*.png")
        pictures = {urllib.parse.unquote(path.stem): path for path in kept}
        written = _written(study, setting, pictures)[:most] if pictures else []
        cards = [_card(about, said, pictures[about["image_id"]]) for about, said in written]
        if cards:
            parts.append(f"<h3>{html.escape(setting)}</h3><div class='gallery'>{''.join(cards)}</div>")
    return "".join(parts)


def _written(study: Study, setting: str, pictures) -> list[tuple[dict, dict[str, str]]]:
    """(a line of predictions.jsonl, {variant: the text of its best cell}), for one example of each of `pictures`."""
    best: dict[str, dict] = {}
    for row in study.rows:
        if row["chosen"] and row["setting"] == setting and row["seed"] == 0:
            if row["variant"] not in best or row["validation"] > best[row["variant"]]["validation"]:
                best[row["variant"]] = row
    cases: dict[tuple, tuple[dict, dict]] = {}
    for variant, row in best.items():
        for one in read_jsonl(study.directory / "points" / row["id"] / "predictions.jsonl"):
            if one["split"] == "test" and one["image_id"] in pictures:
                case = cases.setdefault((one["image_id"], one.get("question_id", "")), (one, {}))
                case[1][variant] = one["tuned"]
    shown: dict[str, tuple[dict, dict]] = {}
    for (image_id, _), case in cases.items():
        shown.setdefault(image_id, case)
    return list(shown.values())


def _card(about: dict, said: dict[str, str], picture: Path) -> str:
    truth = about["answers"][0] if "answers" in about else about["references"][0]
    lines = [("Q", about["question"])] if "question" in about else []
    lines += [("truth", truth), *said.items()]
    table = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in lines)
    shown = _image(picture.read_bytes(), "", alt=f"test image {about['image_id']}")
    return f"<div>{shown}<table>{table}</table></div>"


def _table(header: Iterable[str], rows: list, fold: bool = True) -> str:
    """An HTML table, shown as a card per row on a phone; numbers are right-aligned, text is escaped, long ones are folded."""

    def cell(tag, value, label=""):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        shown = f"{value:,}" if isinstance(value, int) and number else f"{value:.4g}" if number else str(value)
        extra = f" {value.split(',')[0].replace(' ', '-')}" if value in VERDICT_WORDS else ""
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
    return table if len(rows) <= LONG or not fold else f"<details><summary>{len(rows)} rows</summary>{table}</details>"


def _image(png: bytes, caption: str, alt: str = "") -> str:
    data = base64.b64encode(png).decode()
    shown = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    kind = ' class="chart"' if caption else ""
    return f'<figure{kind}><img alt="{html.escape(alt or caption)}" src="data:image/png;base64,{data}">{shown}</figure>'
