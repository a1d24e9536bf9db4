"""The page of a report: report.html filled with answers, tables, figures and test images, all in one file.

What comes first is computed in answers.py; what is folded at the end is in folded.py; how pieces look is in markup.py.
"""

import html
import shlex
import statistics
import urllib.parse

from jaxpeft.study import claims
from jaxpeft.study.intervals import NOT_TESTED
from jaxpeft.study.report import answers, figures, folded, markup
from jaxpeft.study.report.figures import FIGURES, Drawing
from jaxpeft.study.report.markup import Html, escape, fold, table
from jaxpeft.study.report.rows import Cell, Study, cell_of

GLYPHS = {"o": "●○", "s": "■□", "^": "▲△", "v": "▼▽", "D": "◆◇", "x": "✕✕", "*": "★☆", "P": "✚✚", "X": "✖✖", "h": "⬢⬡",
          "<": "◀◁", ">": "▶▷"}  # fmt: skip


def render(study: Study, judged: tuple[list, list], selection, drawings: dict[str, Drawing]) -> str:
    """The HTML page. `judged`: claims.judge in points, and in nats where that is the study's measure; `selection`:
    claims.selection; `drawings`: the figures that could be drawn."""
    verdicts, nats = judged
    chosen = {setting: answers.choices(study, setting) for setting in study.config["settings"]}
    charts = {name: _chart(study, drawings[name], FIGURES[name][1]) if name in drawings else "" for name in FIGURES}
    return markup.page(
        "report.html",
        name=html.escape(study.config["name"]),
        note=_notes(study),
        sentences="".join(f"<li>{escape(one)}</li>" for one in answers.sentences(study, chosen)),
        counts=_counts(study),
        choices="".join(_choices(study, setting, found) for setting, found in chosen.items()),
        runs=_runs(study, chosen),
        claims=_claims(verdicts),
        claims_nll=_claims(nats),
        multiplicity=escape(_multiplicity(verdicts)) if verdicts else "",
        multiplicity_nll=escape(_multiplicity(nats)) if nats else "",
        selection=escape(_selection(selection)) if verdicts else "",
        ends=escape(" ".join(_ends(one) for one in study.scales)) if verdicts else "",
        undeclared=escape(
            ", ".join(one for one, about in study.config["settings"].items() if "consistent" not in about)
        ),
        slopes=_slopes(study),
        rates=_rates(study),
        command=markup.verbatim(shlex.join(_command(study))),
        **folded.parts(study),
        **charts,
    )


def _notes(study: Study) -> str:
    notes = [study.config["note"]] if study.config["note"] else []
    if study.mixed:
        cells = ", ".join(map(str, study.mixed))
        notes.append(
            f"The runs of {cells} were made by different code or from different data; --mixed_code compares them."
        )
    return "".join(markup.paragraph(note, "note") for note in notes)


def _counts(study: Study) -> str:
    done = [row for row in study.runs if row["status"] == "done"]
    hours = sum(row["total_s"] for row in done) / 3600
    seeds = study.config["seeds"]
    by = " by nats per token" if study.in_nats else ""
    return escape(
        f"{len(done):,} runs done, {len(study.runs) - len(done)} failed, {hours:.2f} hours of runs. Scores are means over "
        f"{seeds} seed{'s' * (seeds > 1)} on test images; methods, sizes and learning rates were chosen on validation "
        f"images{by}."
    )


# What to use


def _choices(study: Study, setting: str, found: list[answers.Choice]) -> str:
    if not found:
        return ""
    metric, base = study.metric(setting), study.base(setting)
    header = ["images", "use", f"test {metric} (range over seeds)", "tied with"]
    header[3:3] = ["less the frozen base"] if base is not None else []
    header[2:2] = ["test nats per token"] if study.in_nats else []
    header[-1] += " (in nats)" * study.in_nats
    rows = []
    for one in found:
        scores = [run.score for run in one.runs.values()]
        spread = f"{min(scores):.3f} to {max(scores):.3f}" if len(scores) > 1 else "one seed"
        nats = statistics.fmean(run.test_nll for run in one.runs.values())
        use = answers.name(one.cell) if one.gains else f"the frozen base (best method: {answers.name(one.cell)})"
        row = [one.cell[2], use, f"{one.score:.3f} ({spread})", _tied(one)]
        row[3:3] = [markup.estimate(one.over_base, "+")] if base is not None else []
        row[2:2] = [f"{nats:.3f}"] if study.in_nats else []
        rows.append(row)
    about = f"best guess without images {study.blind(setting):.3f}" + (
        "" if base is None else f", frozen base {base:.3f}"
    )
    return f"<h3>{escape(setting)} <small>{about}</small></h3>\n{table(header, rows)}"


def _tied(one: answers.Choice) -> str | Html:
    if not one.n_others:
        return "nothing else was run"
    if one.tied is None:
        return "not known: too few seeds"
    if not one.tied:
        return "nothing: the other is worse" if one.n_others == 1 else f"nothing: {one.n_others} others are worse"
    named = answers.names(one.tied)
    return named if len(named) < 60 else fold(f"{len(one.tied)} of {one.n_others} others", escape(named))


# The best runs


def _command(study: Study) -> list[str]:
    """The words of the study's command; [] where it is not known."""
    words = shlex.split(study.command)
    return ["python", *words] if words and not words[0].startswith(("python", "jaxpeft")) else words


def _runs(study: Study, chosen: dict[str, list[answers.Choice]]) -> str:
    rows, by_id = [], {(cell_of(row), row["seed"]): row for row in study.rows if row["chosen"]}
    for setting, found in chosen.items():
        if found:
            best = max(found, key=lambda one: one.best_run.validation)
            row = by_id[Cell(setting, *best.cell), best.best_run.seed]
            kept = (study.directory / "points" / row["id"]).is_dir()
            link = f'<a href="../points/{urllib.parse.quote(row["id"])}/">{escape(row["id"])}</a>'
            rows.append([
                setting, Html(link) if kept else row["id"], row["validation"], row["test"], row["lr"], row["steps"],
                round(row["total_s"]), _commands(study, row["id"], kept),
            ])  # fmt: skip
    return table(
        ("setting", "run", "validation score", "test score", "learning rate", "steps", "seconds", "commands"), rows
    )


def _commands(study: Study, run_id: str, kept: bool) -> Html | None:
    words = [word for word in _command(study) if not word.startswith("--rerun=")]
    if not words:
        return None
    lines = [[*words, f"--rerun={run_id}"]]
    spread = [part for word in words for part in (word.split("=", 1) if word.startswith("--workdir=") else [word])]
    if kept and "--workdir" in spread[:-1]:
        where = spread[spread.index("--workdir") + 1]
        lines.append(["jaxpeft", "generate", f"--workdir={where}/points/{run_id}", "--image", "photo.jpg"])
    return fold("show", f"<code>{'<br>'.join(escape(shlex.join(line)) for line in lines)}</code>")


# Claims


def _claims(verdicts: list) -> str:
    """A line per claim: its interval drawn, and the verdict; folded where none could be tested. '' where none was judged."""
    shown = [x for one in verdicts if one.effect is not None for x in (one.effect, -one.margin, one.margin)]
    ends, rows = markup.limits(shown), []
    for one in verdicts:
        found, n = one.estimate, len(one.methods)
        kind, used = markup.kind_of(one.verdict), [*filter(None, [one.note, ", ".join(one.methods), *one.cells])]
        rows.append([
            f"{one.claim}: {one.statement}", one.where,
            None if found is None else markup.interval(found, ends, one.margin, kind), f"{one.margin:.3g}",
            markup.strong(one.verdict, kind), one.predicts,
            fold(f"{n} method{'s' * (n != 1)}, {one.n_seeds} seeds", escape("; ".join(used))),
        ])  # fmt: skip
    effect = Html(f"effect{markup.axis(ends)}")
    whole = table(("claim", "on", effect, "margin", "verdict", "the paper predicts", "of"), rows)
    tested = any(one.verdict != NOT_TESTED for one in verdicts)
    return whole if tested else fold("No claim could be tested. What each of them needs, and what was found", whole)


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
    if not tested:
        return ""
    kept = [f"{one.claim} on {one.where} ({one.effect:+.3g})" for one in tested if one.survives]
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
    scaled = claims.in_points(study.results, study.scales)
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
                else answers.mean([*one[variant][0].values()]) if variant in one else None for one in found.values()
            ]  # fmt: skip
            lines.append((scale, variant, both))
    if not lines:
        return ""
    header, rows = ["setting", "method"], []
    ends = []
    for i, words in enumerate(("twice the images", "twice the size")):
        ends.append(markup.limits([both[i] for *_, both in lines]))
        header.append(Html(f"{words}{markup.axis(ends[-1])}"))
    header[1:1] = ["with pre-training"] if declared else []
    for scale, variant, both in lines:
        color = "" if variant == "all methods" else figures.style(study, variant)["color"]
        row = [scale.setting, markup.strong(variant) if variant == "all methods" else variant]
        row[1:1] = [_kind(scale.consistent)] if declared else []
        drawn = [
            None if one is None else markup.interval(one, at, color=color) for one, at in zip(both, ends, strict=True)
        ]
        rows.append([*row, *drawn])
    keep = [i for i in range(len(header)) if any(row[i] for row in rows)]  # no empty columns
    return table([header[i] for i in keep], [[row[i] for i in keep] for row in rows])


def _rates(study: Study) -> str:
    rows = []
    for one in answers.rate_places(study):
        counts = (one["smallest"], one["inside"], one["largest"])
        drawn = markup.shares(counts, ("edge", "inside", "edge"))
        tried = " or ".join(map(str, sorted(one["tried"])))
        rows.append([one["setting"], one["variant"], drawn, *counts, tried])
    header = ("setting", "method", "", "smallest", "in between", "largest", "rates tried a cell")
    return table(header, rows)
