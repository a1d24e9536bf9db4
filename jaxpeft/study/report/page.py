"""The page of a report: report.html filled with answers, tables, figures and test images, all in one file.

What it says first is computed in answers.py; how pieces look is in markup.py.
"""

import html
import json
import re
import shlex
import statistics
import urllib.parse
from pathlib import Path

from jaxpeft.study import claims
from jaxpeft.study.claims import LEAST
from jaxpeft.study.intervals import NOT_TESTED, Estimate
from jaxpeft.study.report import answers, figures, markup
from jaxpeft.study.report.figures import FIGURES, Drawing
from jaxpeft.study.report.markup import Html, escape, fold, paragraph, table
from jaxpeft.study.report.rows import Study, cell_of, chosen_by_cell, read_jsonl

TITLES = {
    "score_size": "Score against stored parameters",
    "pareto_stored": "Score against what is stored, all cells",
    "pareto_seconds": "Score against time, all cells",
    "learning_rates": "Score against learning rate",
}
GLYPHS = {"o": "●○", "s": "■□", "^": "▲△", "v": "▼▽", "D": "◆◇", "x": "✕✕", "*": "★☆", "P": "✚✚", "X": "✖✖", "h": "⬢⬡",
          "<": "◀◁", ">": "▶▷"}  # fmt: skip


def render(study: Study, verdicts: list, selection, share: list[dict], drawings: dict[str, Drawing]) -> str:
    """The HTML page. `verdicts`: claims.judge; `selection`: claims.selection; `share`: rows.consistency; `drawings`: the
    figures that could be drawn."""
    chosen = {setting: answers.choices(study, setting) for setting in study.config["settings"]}
    charts = {name: _chart(study, drawings[name], FIGURES[name][1]) if name in drawings else "" for name in FIGURES}
    return markup.page(
        "report.html",
        name=html.escape(study.config["name"]),
        note=_notes(study),
        sentences="".join(f"<li>{escape(one)}</li>" for one in answers.sentences(study, chosen)),
        counts=_counts(study),
        choices="".join(_choices(study, setting, found) for setting, found in chosen.items()),
        repeat=_repeat(study),
        runs=_runs(study, chosen),
        claims=_claims(study, verdicts, selection),
        slopes=_slopes(study),
        rates=_rates(study),
        more=_more(study, share, verdicts, charts),
        **{name: charts[name] for name in ("score_data", "curves", "forgetting")},
    )


def _notes(study: Study) -> str:
    notes = [study.config["note"]] if study.config["note"] else []
    if study.mixed:
        cells = ", ".join(map(str, study.mixed))
        notes.append(f"The runs of {cells} were made by different code; they are compared because of --mixed_code.")
    return "".join(paragraph(note, "note") for note in notes)


def _counts(study: Study) -> str:
    done = [row for row in study.rows if row["status"] == "done"]
    hours = sum(row["total_s"] for row in done) / 3600
    seeds = study.config["seeds"]
    return escape(
        f"{len(done):,} runs done, {len(study.rows) - len(done)} failed, {hours:.2f} hours of runs. Scores are means over "
        f"{seeds} seed{'s' * (seeds > 1)} on test images; methods, sizes and learning rates were chosen on validation images."
    )


# What to use


def _choices(study: Study, setting: str, found: list[answers.Choice]) -> str:
    if not found:
        return ""
    metric, base = study.metric(setting), study.base(setting)
    header = ["images", "use", f"test {metric}", "range over seeds", "stored", "tied with"]
    header[4:4] = ["less the frozen base"] if base is not None else []
    rows = []
    for one in found:
        scores = [run.score for run in one.runs.values()]
        spread = f"{min(scores):.3f} to {max(scores):.3f}" if len(scores) > 1 else "one seed"
        row = [one.cell[2], answers.name(one.cell), one.score, spread, one.best_run.stored, _tied(one)]
        row[4:4] = [markup.estimate(one.over_base, "+")] if base is not None else []
        rows.append(row)
    about = [] if base is None else [f"frozen base {base:.3f}"]
    if scale := study.scale(setting):
        about += [f"best guess without images {scale.blind:.3f}"]
    said = f" <small>{escape(', '.join(about))}</small>" if about else ""
    return f"<h3>{escape(setting)}{said}</h3>\n{table(header, rows)}"


def _tied(one: answers.Choice) -> str | Html:
    if not one.n_others:
        return "nothing else was run"
    if one.tied is None:
        return "not known: too few seeds"
    if not one.tied:
        return f"none of {one.n_others} others"
    named = answers.names(one.tied)
    return named if len(named) < 60 else fold(f"{len(one.tied)} of {one.n_others} others", escape(named))


# The best runs


def _command(study: Study) -> list[str]:
    """The words of the study's command; [] where it is not known."""
    words = shlex.split(study.command)
    return ["python", *words] if words and not words[0].startswith(("python", "jaxpeft")) else words


def _repeat(study: Study) -> str:
    command = _command(study)
    return " A command repeats a run inside the study, or writes a text with its parameters." if command else ""


def _runs(study: Study, chosen: dict[str, list[answers.Choice]]) -> str:
    rows, by_id = [], {(*_cell(row), row["seed"]): row for row in study.rows if row["chosen"]}
    for setting, found in chosen.items():
        for one in found:
            row = by_id[setting, *one.cell, one.best_run.seed]
            place = study.directory / "points" / row["id"]
            link = f'<a href="../points/{urllib.parse.quote(row["id"])}/">{escape(row["id"])}</a>'
            shown = Html(link) if place.is_dir() else row["id"]
            rows.append([
                setting, row["n_images"], shown, row["validation"], row["test"], f"{row['lr']:.3g}", row["steps"],
                round(row["total_s"], 1), _commands(study, row["id"], place.is_dir()),
            ])  # fmt: skip
    header = ("setting", "images", "run", "validation score", "test score", "learning rate", "steps", "seconds", "commands")
    return table(header, rows) if rows else ""


def _cell(row: dict) -> tuple:
    return row["setting"], row["variant"], row["size"], row["n_images"]


def _commands(study: Study, run_id: str, kept: bool) -> Html | None:
    words = [word for word in _command(study) if not word.startswith("--rerun=")]
    if not words:
        return None
    where = re.search(r"--workdir[= ]('[^']*'|\S+)", shlex.join(words))
    lines = [shlex.join([*words, f"--rerun={run_id}"])]
    if kept and where:
        lines.append(f"jaxpeft generate --workdir={where[1]}/points/{run_id} --image photo.jpg")
    return fold("show", f"<code>{'<br>'.join(map(html.escape, lines))}</code>")


# Claims

HOW_TO_READ = (
    "Effects in points: 0 is the best guess without the image, 100 the ceiling of the setting. Effects of data and size are "
    "changes over the whole axis. The interval is that of Student's t over seeds; the margin, shaded, was set in the study's "
    "config. <b>positive</b>: the interval is above 0. <b>positive, below the margin</b>: and all of it is too small to "
    "matter. <b>flat</b>: it contains 0 and lies within the margin. <b>negative</b>: it is below 0. <b>undecided</b>: no verdict, the "
    f"interval is too wide. <b>not tested</b>: fewer than {LEAST} methods with {LEAST} points each. Each line speaks of its "
    "methods and cells only. A verdict against the paper is a result."
)


def _claims(study: Study, verdicts: list, selection) -> str:
    """The section on claims: a drawn interval and a verdict per line, and what its numbers mean."""
    if not verdicts:
        return ""
    ends = markup.limits([x for one in verdicts if one.effect is not None for x in (one.effect, -one.margin, one.margin)])
    header = (
        "claim", "on", markup.axis(ends), "effect", "margin", "verdict", "the paper predicts", "methods", "seeds",
    )  # fmt: skip
    rows = []
    for one in verdicts:
        found = Estimate(one.effect, one.low, one.high, one.p) if one.low is not None else one.effect
        drawn = markup.interval(found, ends, one.margin, markup.word_class(one.verdict))
        methods = fold(", ".join(one.methods) or "none", escape("; ".join([*one.cells, one.note] if one.note else one.cells)))
        rows.append([
            f"{one.claim}: {one.statement}", one.where, drawn, markup.estimate(found), one.margin, one.verdict, one.predicts,
            methods, one.n_seeds,
        ])  # fmt: skip
    return "\n".join(
        [
            table(header, rows),
            paragraph(_multiplicity(verdicts)),
            paragraph(_selection(selection)),
            fold("How to read this", f"<p>{HOW_TO_READ}</p>" + paragraph(" ".join(_ends(one) for one in study.scales))),
        ]
    )


def _kind(consistent: bool | None) -> str:
    return "consistent" if consistent else "inconsistent" if consistent is not None else "not declared"


def _ends(scale) -> str:
    ceiling = "declared" if scale.declared else "the study's best cell"
    return (
        f"{scale.setting} ({_kind(scale.consistent)}): blind {scale.blind:.3f}, ceiling {scale.ceiling:.3f}, {ceiling}."
    )


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


# Figures and slopes


def _chart(study: Study, drawing: Drawing, caption: str) -> str:
    """The panels of a figure, and a legend in words that fits on a phone."""
    panels = "".join(markup.image(png, f"{caption} {setting}") for setting, png in drawing.panels.items())
    marks = []
    for variant in drawing.variants:
        look = figures.style(study, variant)
        glyph = GLYPHS[look["marker"]]["markerfacecolor" in look]
        marks.append(f'<span><span style="color:{look["color"]}">{glyph}</span> {escape(variant)}</span>')
    legend = f'<div class="legend">{"".join(marks)}</div>'
    return f'<figure>{legend}<div class="panels">{panels}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _slopes(study: Study) -> str:
    """Slopes of each method, and of all together, on data and on size: consistent settings first."""
    scaled = claims.in_points([one for one in study.results if study.scale(one.setting)], study.scales)
    lines, declared = [], any(scale.consistent is not None for scale in study.scales)
    sized = answers.sized(study)
    for scale in sorted(study.scales, key=lambda one: (one.consistent is None, one.consistent is False)):
        mine = [one for one in scaled if one.setting == scale.setting]
        found = {axis: answers.slopes(mine, axis) for axis in ("data", "size")}
        named = [variant for variant in study.config["variants"] if any(variant in one for one in found.values())]
        several = sum(variant in sized for variant in named) > 1
        for variant in ["all methods"] * several + named:
            both = [
                answers.pooled(one, sized) if variant == "all methods"
                else answers.mean(one[variant][0]) if variant in one else None for one in found.values()
            ]  # fmt: skip
            lines.append((scale, variant, both))
    if not lines:
        return ""
    header, rows = ["setting", "method"], []
    ends = []
    for i, words in enumerate(("twice the images", "twice the size")):
        ends.append(markup.limits([x if isinstance(x, float) else x.value for *_, both in lines if (x := both[i]) is not None]))
        header += [Html(f"{words}{markup.axis(ends[-1])}"), words]
    header[1:1] = ["with pre-training"] if declared else []
    for scale, variant, both in lines:
        color = "" if variant == "all methods" else figures.style(study, variant)["color"]
        row = [scale.setting, Html(f"<b>{variant}</b>") if variant == "all methods" else variant]
        row[1:1] = [_kind(scale.consistent)] if declared else []
        for one, axis_ends in zip(both, ends, strict=True):
            row += [None if one is None else markup.interval(one, axis_ends, color=color), markup.estimate(one, "+")]
        rows.append(row)
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]  # no empty columns
    said = (
        "<p>The change of the test score, in points, for twice the images at the middle size, and for twice the method's size "
        "(rank, bottleneck, length) with the most images; 95 % intervals over seeds. All methods: the mean of those with a "
        "size.</p>"
    )
    return said + table([header[i] for i in keep], [[row[i] for i in keep] for row in rows])


def _rates(study: Study) -> str:
    rows = []
    for one in answers.rate_places(study):
        counts = (one["smallest"], one["inside"], one["largest"])
        drawn = markup.shares(counts, ("edge", "inside", "edge"))
        tried = " or ".join(map(str, sorted(one["tried"])))
        rows.append([one["setting"], one["variant"], drawn, *counts, tried])
    header = ("setting", "method", "", "smallest", "in between", "largest", "rates tried a cell")
    return table(header, rows) if rows else ""


# What is folded


def _more(study: Study, share: list[dict], verdicts: list, charts: dict[str, str]) -> str:
    config, done = study.config, [row for row in study.rows if row["status"] == "done"]
    failed = [[row["id"], row["error"]] for row in study.rows if row["status"] == "failed"]
    capped = [[row["id"], row["seed"], row["steps"]] for row in done if row["chosen"] and row["stopped"] == "cap"]
    edges = _edges(study)
    first = done[0] if done else {"machine": {}, "versions": {}, "digests": {}}
    recipe = {task: _recipe(point) for task, point in config["points"].items()}
    tried = ", ".join(f"{factor:.3g}" for factor in config["learning_rates"])
    cells = _cell_rows(study)
    consistency = table(tuple(share[0]), [list(row.values()) for row in share]) if share else ""
    declare = "" if verdicts else (
        "<p>No claim is judged, because no setting says whether it is consistent with pre-training. Declare it in the study's "
        "config: <code>settings.NAME.consistent = True</code> or <code>False</code>.</p>"
    )  # fmt: skip
    purpose = f"<pre>{escape((config['hypothesis'] or '').strip())}</pre>" if config["hypothesis"] else ""
    parts = [
        fold(f"Every chosen cell ({len(cells)})", table(CELLS, cells)),
        *(fold(title, charts[name]) for name, title in TITLES.items()),
        fold("Test images and what was written", _gallery(study)),
        fold("The frozen base as a share of the best test score", consistency),
        fold(f"Chosen learning rates at an end of those tried ({len(edges)})", edges and table(EDGES, edges)),
        fold(f"Chosen runs that reached the cap on steps ({len(capped)})", capped and table(CAPPED, capped)),
        fold(f"Failures ({len(failed)})", failed and table(("run", "reason"), failed)),
        fold("The purpose of this study", purpose + declare),
        fold("The recipe", _variant_table(config["variants"]) + paragraph(RECIPE.format(tried)) + markup.as_json(recipe)),
        fold("Machine, versions and command", markup.as_json({key: first[key] for key in ("machine", "versions", "digests")})
             + f"<pre>{escape(shlex.join(_command(study)) or 'not known')}</pre>"),
    ]  # fmt: skip
    return "\n".join(filter(None, parts))


RECIPE = (
    "Learning rates: the middle one times {}. Steps: until the validation loss stops falling, with a cap. Each seed has its own "
    "subset, initialisation and order. Subsets are nested. Other settings:"
)
CELLS = (
    "setting", "variant", "size", "images", "test score", "range", "seeds", "validation score", "stored", "tuned, %",
    "learning rate", "forgetting", "seconds",
)  # fmt: skip
EDGES, CAPPED = ("cell", "learning rate", "which end"), ("run", "seed", "steps")


def _recipe(point: dict) -> dict:
    """The part of a run's config that the report shows."""
    return {key: point[key] for key in ("base", "steps", "batch_size", "optim", "stop", "model", "data")}


def _variant_table(variants: dict) -> str:
    header = ("variant", "method", "head trained too", "middle learning rate", "settings")
    rows = [
        [name, one["method"], one["head"], f"{one['lr']:.3g}", json.dumps(one["fields"]) if one["fields"] else ""]
        for name, one in variants.items()
    ]
    return table(header, rows)


def _edges(study: Study) -> list[list]:
    """Cells whose chosen learning rate is the smallest or largest tried: a wider search may find a better one."""
    tried = {}
    for row in study.rows:
        if row["seed"] == 0 and row["status"] == "done":
            tried.setdefault(cell_of(row), set()).add(row["lr"])
    found = []
    for row in study.rows:
        all_of = tried.get(cell_of(row), ())
        if row["chosen"] and row["seed"] == 0 and len(all_of) > 1 and row["lr"] in (min(all_of), max(all_of)):
            found.append([row["id"], f"{row['lr']:.3g}", "smallest" if row["lr"] == min(all_of) else "largest"])
    return found


def _cell_rows(study: Study) -> list[list]:
    """The rows of the table with the columns CELLS."""
    rows = []
    for setting in study.config["settings"]:
        for (variant, size, n_images), group in chosen_by_cell(study, setting).items():
            scores = [row["test"] for row in group]
            forgot = [row["forgetting"] for row in group if row["forgetting"] is not None]
            rows.append([
                setting, variant, size, n_images, statistics.fmean(scores), f"{min(scores):.3f} to {max(scores):.3f}",
                len(scores), statistics.fmean(row["validation"] for row in group), group[0]["stored"], group[0]["percent"],
                group[0]["lr"], statistics.fmean(forgot) if forgot else None,
                statistics.fmean(row["total_s"] for row in group),
            ])  # fmt: skip
    return rows


def _gallery(study: Study, most: int = 6) -> str:
    """Some test images per setting, with the texts of each variant's best cell."""
    parts = []
    for setting in study.config["settings"]:
        kept = (study.directory / "pictures" / setting).glob("*.png")
        pictures = {urllib.parse.unquote(path.stem): path for path in kept}
        written = _written(study, setting, pictures)[:most] if pictures else []
        cards = [_card(about, said, pictures[about["image_id"]]) for about, said in written]
        if cards:
            parts.append(f"<h3>{escape(setting)}</h3><div class='gallery'>{''.join(cards)}</div>")
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
    rows = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in lines)
    shown = markup.image(picture.read_bytes(), f"test image {about['image_id']}")
    return f"<div>{shown}<table>{rows}</table></div>"
