"""The figures of a report, drawn by matplotlib from the rows of a study: a panel for each setting.

A figure is a file of its own with a legend below its panels. The page shows the panels one by one, so that a phone can show
them below each other.
"""

import collections
import dataclasses
import io
import math
import statistics
from collections.abc import Callable

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter
from PIL import Image

from jaxpeft.study.claims import on_axis
from jaxpeft.study.report.rows import Study, chosen_by_cell

# Okabe and Ito's colours, distinguishable with all common kinds of colour blindness; markers for printing without colour
STYLE = {
    "prompt": ("#E69F00", "o"), "prefix": ("#CC79A7", "s"), "serial_adapter": ("#0072B2", "^"),
    "parallel_adapter": ("#56B4E9", "v"), "lora": ("#009E73", "D"), "head": ("#999999", "x"), "full": ("#000000", "*"),
}  # fmt: skip
OTHERS = (("#D55E00", "P"), ("#F0E442", "X"), ("#661100", "h"), ("#332288", "<"), ("#44AA99", ">"))
WIDTH, HEIGHT, LEGEND, DPI = 4.0, 3.2, 0.28, 130  # inches: of a panel, and the height of a line of the legend
COLUMNS = 3
LOWEST = -30.0  # points; what lies below is written out, as answers in a wrong format would shrink everything else


@dataclasses.dataclass
class Drawing:
    """A figure as PNG files."""

    whole: bytes  # all panels and the legend
    panels: dict[str, bytes]  # setting -> its panel
    variants: list[str]  # those in the legend


def style(study: Study, variant: str) -> dict:
    """The colour and marker of a variant: those of its method; hollow where no head is trained as well."""
    variants = study.config["variants"]
    method = variants[variant]["method"]
    unknown = list(dict.fromkeys(one["method"] for one in variants.values() if one["method"] not in STYLE))
    color, marker = STYLE.get(method) or OTHERS[unknown.index(method) % len(OTHERS)]
    hollow = variants[variant].get("head", "none") == "none" and method not in ("head", "full")
    return {"color": color, "marker": marker} | ({"markerfacecolor": "white"} if hollow else {})


def drawing(study: Study, found: dict[str, object], panel: Callable) -> Drawing | None:
    """The figure whose panels `panel(ax, setting, found[setting])` draws; None where nothing was found for any setting."""
    found = {setting: one for setting, one in found.items() if one}
    if not found:
        return None
    columns, rows = min(len(found), COLUMNS), -(-len(found) // COLUMNS)
    lines = -(-len(study.config["variants"]) // (2 * columns))
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + LEGEND * lines), dpi=DPI)
    canvas, (width, height), axes = FigureCanvasAgg(figure), figure.get_size_inches(), []
    for i, (setting, one) in enumerate(found.items()):
        left, bottom = WIDTH * (i % columns), height - HEIGHT * (i // columns + 1)
        place = ((left + 0.62) / width, (bottom + 0.5) / height, (WIDTH - 1.24) / width, (HEIGHT - 0.82) / height)
        axes.append(figure.add_axes(place))
        panel(axes[-1], setting, one)
        axes[-1].grid(alpha=0.3)
        axes[-1].tick_params(labelsize=8)
    variants = _legend(figure, axes, study, 2 * columns)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    panels = {}
    for i, setting in enumerate(found):
        x, y = round(WIDTH * DPI) * (i % columns), round(HEIGHT * DPI) * (i // columns)
        panels[setting] = _png(pixels.crop((x, y, x + round(WIDTH * DPI), y + round(HEIGHT * DPI))))
    return Drawing(_png(pixels), panels, variants)


def _png(pixels: Image.Image) -> bytes:
    out = io.BytesIO()
    pixels.quantize(128, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


def _legend(figure: Figure, axes: list, study: Study, columns: int) -> list[str]:
    """Add one legend below all panels, with methods in the order of STYLE -> the variants in it."""
    seen = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    order, variants = {name: i for i, name in enumerate(STYLE)}, study.config["variants"]
    names = sorted(seen, key=lambda one: (order.get(variants[one]["method"], len(order)), "_head" not in one, one))
    if names:
        figure.legend([seen[one] for one in names], names, loc="lower center", ncols=columns, frameon=False, fontsize=8)
    return names


def _label(ax, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)


def _short(x: float, _=None) -> str:
    return f"{x:g}" if x < 1e3 else f"{x / 1e3:g}k" if x < 1e6 else f"{x / 1e6:g}M"


def _log(ax, values=()) -> None:
    """Make the x axis logarithmic with plain numbers: `values`, or few enough to be readable."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    some = LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,))
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(values))) if values else some)
    ax.xaxis.set_major_formatter((lambda x, _: f"{x:,.0f}") if values else _short)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _look(study: Study, variant: str) -> dict:
    solid = variant.endswith("_head") or study.config["variants"][variant]["method"] in ("head", "full")
    return style(study, variant) | {"linestyle": "-" if solid else "--", "label": variant, "markersize": 5}


def _errors(ax, xs, scores: list[list[float]], look: dict) -> None:
    """A line through means, with bars for the range over seeds."""
    means = [statistics.fmean(one) for one in scores]
    # equal scores: their mean rounds, so a bar's length may be below 0
    spread = [[max(0.0, m - min(one)) for m, one in zip(means, scores, strict=True)],
              [max(0.0, max(one) - m) for m, one in zip(means, scores, strict=True)]]  # fmt: skip
    ax.errorbar(xs, means, yerr=spread, capsize=2, linewidth=1.2, **look)


def _title(study: Study, setting: str) -> str:
    n = {row["n_test"] for row in study.rows if row["chosen"] and row["setting"] == setting}
    return f"{setting} ({', '.join(f'{one:,}' for one in sorted(n))} test examples)"


def score_data(study: Study) -> Drawing | None:
    """Test score in points against training images, at each variant's middle size; frozen base, blind guess and ceiling."""
    cells = {setting: chosen_by_cell(study, setting) for setting in study.config["settings"]}
    lines = {setting: on_axis(cells[setting], "data") for setting in cells}
    drawn = [
        scale.points(row["test"]) for setting in lines if (scale := study.scale(setting))
        for line in lines[setting].values() for cell in line for row in cells[setting][cell]
    ]  # fmt: skip
    ends = max(LOWEST, min([0.0, *drawn])) - 6, max([100.0, *drawn]) + 6  # one scale for all settings

    def panel(ax, setting, lines):
        scale, base = study.scale(setting), study.base(setting)
        points = scale.points if scale else lambda score: score
        ns = sorted({cell[2] for line in lines.values() for cell in line})
        for i, (variant, line) in enumerate(lines.items()):
            at = {cell[2]: [points(row["test"]) for row in cells[setting][cell]] for cell in line}
            # bars at one number of images are drawn side by side; a line does not cross a number that was left out
            aside = 1 + 0.035 * (i - (len(lines) - 1) / 2)
            _errors(ax, [n * aside for n in ns], [at.get(n, [math.nan]) for n in ns], _look(study, variant))
            capped = [cell[2] for cell in line if any(row["stopped"] == "cap" for row in cells[setting][cell])]
            xs, means = [n * aside for n in capped], [statistics.fmean(at[n]) for n in capped]
            ax.scatter(xs, means, s=90, facecolors="none", edgecolors="#D55E00", linewidths=0.8)
        _log(ax, ns)
        _label(ax, _title(study, setting), "training images", "points" if scale else f"test {study.metric(setting)}")
        _yardstick(ax, points(study.blind(setting)), "best guess without images")
        if scale:
            _yardstick(ax, 100, "ceiling" if scale.declared else "ceiling: best cell")
            score_of = lambda y: scale.blind + y * (scale.ceiling - scale.blind) / 100  # noqa: E731
            right = ax.secondary_yaxis("right", functions=(score_of, scale.points))
            right.set_ylabel(f"test {study.metric(setting)}", fontsize=8)
            right.tick_params(labelsize=8)
            ax.set_ylim(*ends)
        if base is not None:
            below = scale and points(base) < ends[0]
            text = f"frozen base: {base:.3g}, below" if below else "frozen base"
            _yardstick(ax, ends[0] if below else points(base), text, "--", left=True)

    return drawing(study, lines, panel)


def _yardstick(ax, y: float, text: str, line: str = ":", left: bool = False) -> None:
    ax.axhline(y, color="#444444", linewidth=0.9, linestyle=line)
    place = {"ha": "left"} if left else {"ha": "right"}
    x = 0.015 if left else 0.985
    ax.annotate(text, (x, y), xycoords=ax.get_yaxis_transform(), va="bottom", fontsize=7, color="#444444", **place)


def score_size(study: Study) -> Drawing | None:
    """Test score against stored parameters, with all training images."""

    def panel(ax, setting, lines):
        for variant, line in lines.items():
            rows = [cells[setting][cell] for cell in line]
            _errors(ax, [one[0]["stored"] for one in rows], [[row["test"] for row in one] for one in rows],
                    _look(study, variant))  # fmt: skip
        _log(ax)
        _label(ax, _title(study, setting), "stored parameters", f"test {study.metric(setting)}")

    cells = {setting: chosen_by_cell(study, setting) for setting in study.config["settings"]}
    return drawing(study, {setting: on_axis(cells[setting], "size") for setting in cells}, panel)


def learning_rates(study: Study) -> Drawing | None:
    """Validation score against learning rate, a line per cell; the chosen one is filled."""

    def panel(ax, setting, cells):
        for (variant, _, _), rows in cells.items():
            rows = sorted(rows, key=lambda r: r["lr"])
            look = _look(study, variant) | {"markersize": 4, "linewidth": 0.7}
            ax.plot([r["lr"] for r in rows], [r["choice"] for r in rows], **look | {"markerfacecolor": "white"})
            for r in rows:
                if r["chosen"]:
                    ax.plot(r["lr"], r["choice"], **look | {"markerfacecolor": look["color"]})
        _log(ax)
        measure = "log-likelihood, nats per token" if study.in_nats else study.metric(setting)
        _label(ax, setting, "learning rate", f"validation {measure}")

    found = {setting: collections.defaultdict(list) for setting in study.config["settings"]}
    for row in study.searched:
        if row["status"] == "done":
            found[row["setting"]][row["variant"], row["size"], row["n_images"]].append(row)
    return drawing(study, found, panel)


def curves(study: Study) -> Drawing | None:
    """Validation loss against steps of each variant's chosen run on seed 0, at its middle size with all its images."""

    def panel(ax, setting, lines):
        for variant, (row, curve) in lines.items():
            look = _look(study, variant) | {"markersize": 6, "linewidth": 1.1}
            kept = next((i for i, (step, _) in enumerate(curve) if step == row["kept_step"]), None)
            ax.plot(*zip(*curve, strict=True), markevery=[] if kept is None else [kept], **look)
            if row["stopped"] == "cap":
                ax.plot(*curve[-1], marker="|", color="#D55E00", markersize=11, linestyle="none")
        _label(ax, setting, "steps", "validation loss, nats per token")

    found = {}
    for setting in study.config["settings"]:
        cells = chosen_by_cell(study, setting)
        for variant, line in on_axis(cells, "data").items():
            for row in cells[line[-1]]:
                if row["seed"] == 0 and (curve := study.curve(row)):
                    found.setdefault(setting, {})[variant] = (row, curve)
    return drawing(study, found, panel)


def forgetting(study: Study) -> Drawing | None:
    """Change of the loss on captions in the style of pre-training, against test score, along each variant's sizes."""

    def panel(ax, setting, lines):
        for variant, line in lines.items():
            ax.plot(*zip(*line, strict=True), linewidth=0.8, **_look(study, variant))
        ax.axhline(0, color="#555555", linewidth=0.7)
        if max(y for line in lines.values() for _, y in line) > 1:
            ax.set_yscale("symlog", linthresh=0.1)
        _label(ax, _title(study, setting), f"test {study.metric(setting)}", "forgetting, nats per token")

    found = {}
    for setting in study.config["settings"]:
        cells = chosen_by_cell(study, setting)
        for variant, line in on_axis(cells, "size").items():
            rows = [cells[cell] for cell in line if all(row["forgetting"] is not None for row in cells[cell])]
            points = [[statistics.fmean(row[key] for row in one) for key in ("test", "forgetting")] for one in rows]
            if points:
                found.setdefault(setting, {})[variant] = points
    return drawing(study, found, panel)


# name of the file: (function, caption)
FIGURES = {
    "score_data": (
        score_data,
        "Each method at its middle size. Marks: mean over seeds; bars: range over seeds; orange rings: a run reached the "
        "cap on steps. 0 points is the best guess without images, 100 the ceiling; the right axis has the score itself. There "
        "are no points where nothing is better than that guess.",
    ),
    "curves": (
        curves,
        "Loss on validation images, of the chosen runs of seed 0, at the middle size, with the most images. The mark: the step "
        "that was kept. An orange bar at the end: the run reached the cap on steps.",
    ),
    "forgetting": (
        forgetting,
        "Forgetting: the rise of the loss on test captions in the style of pre-training; lower right is best. A line connects "
        "the sizes of a method, with the most images.",
    ),
    "score_size": (score_size, "Test score against stored parameters, with the most images. Bars: range over seeds."),
    "learning_rates": (
        learning_rates,
        "What learning rates are chosen by, on validation images, against the rate; a line per cell, seed 0. Filled: chosen.",
    ),
}  # fmt: skip
