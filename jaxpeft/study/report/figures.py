"""The figures of a report: matplotlib figures from the rows of a study."""

import collections
import functools
import statistics

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from jaxpeft.study import claims, intervals
from jaxpeft.study.report.rows import Study, chosen_by_cell, consistency

# Okabe and Ito's colours, distinguishable with all common kinds of colour blindness; markers for printing without colour
STYLE = {
    "prompt": ("#E69F00", "o"), "prefix": ("#CC79A7", "s"), "serial_adapter": ("#0072B2", "^"),
    "parallel_adapter": ("#56B4E9", "v"), "lora": ("#009E73", "D"), "head": ("#999999", "x"), "full": ("#000000", "*"),
}  # fmt: skip
OTHERS = (("#D55E00", "P"), ("#F0E442", "X"), ("#661100", "h"), ("#332288", "<"), ("#44AA99", ">"))


def style(study: Study, variant: str) -> dict:
    """The colour and marker of a variant: those of its method; hollow where no head is trained as well."""
    variants = study.config["variants"]
    method, unknown = (
        variants[variant]["method"],
        [one["method"] for one in variants.values() if one["method"] not in STYLE],
    )
    color, marker = STYLE.get(method) or OTHERS[unknown.index(method) % len(OTHERS)]
    hollow = variants[variant].get("head", "none") == "none" and method not in ("head", "full")
    return {"color": color, "marker": marker} | ({"markerfacecolor": "white"} if hollow else {})


def _axes(n: int, columns: int = 2):
    rows = -(-n // columns) if n > 1 else 1
    figure = Figure(figsize=(5.2 * min(n, columns), 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, min(n, columns), squeeze=False).flat)


def _panels(study: Study):
    """(figure, {setting: its axes}), with settings in the study's order."""
    settings = list(study.config["settings"])
    figure, axes = _axes(len(settings))
    for ax in axes[len(settings) :]:
        ax.set_axis_off()
    return figure, dict(zip(settings, axes, strict=False))


def _point(ax, x, y, study: Study, variant: str, **how) -> None:
    ax.plot(x, y, label=variant, linestyle="none", markersize=5.5, **style(study, variant), **how)


def _label(ax, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)


def _legend(figure, axes):
    """Add one legend below all panels, with methods in the order of STYLE."""
    seen, order = {}, {name: i for i, name in enumerate(STYLE)}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    names = sorted(seen, key=lambda variant: (order.get(variant.removesuffix("_head"), len(order)), variant))
    if seen:
        figure.legend(
            [seen[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )


def _log(ax):
    """Make the x axis logarithmic, with plain numbers, few enough to be readable."""
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


def _lines(study: Study, setting: str, axis: str) -> dict[str, list[tuple[float, list[dict]]]]:
    """variant -> [(x, rows)] along one axis, at the variant's middle size or at its largest number of images."""
    cells, lines = chosen_by_cell(study, setting), {}
    for variant in study.config["variants"]:
        mine = {cell: rows for cell, rows in cells.items() if cell[0] == variant}
        if not mine:
            continue
        if axis == "data":
            middle = claims.middle_size([cell[1] for cell in mine])
            line = [(cell[2], rows) for cell, rows in mine.items() if cell[1] == middle]
        else:
            most = max(cell[2] for cell in mine)
            line = [(rows[0]["stored"], rows) for cell, rows in mine.items() if cell[2] == most]
        lines[variant] = sorted(line, key=lambda pair: pair[0])
    return lines


def figure_axis(study: Study, axis: str) -> Figure:
    """Test score against training images, or against stored parameters; mean and range over seeds."""
    figure, panels = _panels(study)
    for setting, ax in panels.items():
        values, metric = set(), ""
        for variant, line in _lines(study, setting, axis).items():
            look = style(study, variant) | {"linestyle": "-" if variant.endswith("_head") else "--"}
            xs = [x for x, _ in line]
            scores = [[row["test"] for row in rows] for _, rows in line]
            mean = [statistics.fmean(one) for one in scores]
            spread = [
                [
                    max(0.0, m - min(one)) for m, one in zip(mean, scores, strict=True)
                ],  # equal scores: their mean rounds
                [max(0.0, max(one) - m) for m, one in zip(mean, scores, strict=True)],
            ]
            ax.errorbar(xs, mean, yerr=spread, label=variant, capsize=2, markersize=5, linewidth=1.2, **look)
            capped = [
                (x, m) for (x, rows), m in zip(line, mean, strict=True) if any(r["stopped"] == "cap" for r in rows)
            ]
            if capped:
                ax.scatter(*zip(*capped, strict=True), s=90, facecolors="none", edgecolors="#D55E00", linewidths=0.8)
            values |= set(xs)
            metric = line[0][1][0]["metric"]
        n = {row["n_test"] for row in study.rows if row["chosen"] and row["setting"] == setting}
        _label(
            ax,
            f"{setting} (n = {', '.join(map(str, sorted(n))) or 0} test examples)",
            "training images" if axis == "data" else "stored parameters",
            f"test {metric}",
        )
        if axis == "data" and values:
            _log_at(ax, values)
        else:
            _log(ax)
    _legend(figure, panels.values())
    return figure


def figure_pareto(study: Study, against: str) -> Figure:
    """Test score of every cell against stored parameters or seconds; the line is the Pareto front."""
    figure, panels = _panels(study)
    for setting, ax in panels.items():
        points = []
        for (variant, _, _), rows in chosen_by_cell(study, setting).items():
            x, y = statistics.fmean(r[against] for r in rows), statistics.fmean(r["test"] for r in rows)
            _point(ax, x, y, study, variant)
            points.append((x, y))
        front = pareto(points)
        if front:
            ax.step(*zip(*front, strict=True), where="post", color="#555555", linewidth=0.8)
        xs = [x for x, _ in points]
        if xs and max(xs) > 5 * min(xs):
            _log(ax)
        _label(ax, setting, {"stored": "stored parameters", "total_s": "seconds of one run"}[against], "test score")
    _legend(figure, panels.values())
    return figure


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of points (cost, score): those for which no other point costs less and scores at least as much, or
    scores more at no higher cost."""
    front = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def figure_learning_rates(study: Study) -> Figure:
    """Validation score against learning rate, a line per cell; the chosen one is filled."""
    figure, panels = _panels(study)
    for setting, ax in panels.items():
        groups = collections.defaultdict(list)
        for row in study.rows:
            if row["setting"] == setting and row["seed"] == 0 and row["status"] == "done":
                groups[row["variant"], row["size"], row["n_images"]].append(row)
        for (variant, _, _), rows in groups.items():
            rows = sorted(rows, key=lambda r: r["lr"])
            look = {"markersize": 4, "linewidth": 0.7} | style(study, variant)
            look["linestyle"] = "-" if variant.endswith("_head") else "--"
            line = {"label": variant} | look | {"markerfacecolor": "white"}
            ax.plot([r["lr"] for r in rows], [r["validation"] for r in rows], **line)
            for r in rows:
                if r["chosen"]:
                    ax.plot(r["lr"], r["validation"], **look | {"markerfacecolor": look["color"]})
        _log(ax)
        _label(ax, setting, "learning rate", "validation score")
    _legend(figure, panels.values())
    return figure


def figure_consistency(study: Study) -> Figure:
    """The effects of data and tunable size, against how consistent a setting is with pre-training."""
    share = {row["setting"]: row["consistency"] for row in consistency(study)}
    results = claims.in_points(study.results, study.scales)
    figure, axes = _axes(2)
    for ax, axis in zip(axes, ("data", "size"), strict=True):
        for setting in share:
            values = claims.trend([one for one in results if one.setting == setting], axis).values
            if len(values) > 1:
                found = intervals.t_interval(values)
                error = [[found.value - found.low], [found.high - found.value]]
                ax.errorbar([share[setting]], [found.value], error, fmt="o", color="#0072B2", capsize=3, markersize=5)
                at = (share[setting], found.value)
                ax.annotate(setting, at, xytext=(6, 4), textcoords="offset points", fontsize=7)
        ax.axhline(0, color="#555555", linewidth=0.7)
        ax.set_xlim(-0.05, 1.25)
        _label(
            ax,
            {"data": "from the fewest images to all", "size": "from the smallest size to the largest"}[axis],
            "consistency: frozen base / best tuned score",
            "points of blind to ceiling",
        )
    return figure


def figure_forgetting(study: Study) -> Figure:
    """Change of the loss on captions in the style of pre-training, against test score: lower right is best."""
    figure, panels = _panels(study)
    for setting, ax in panels.items():
        for (variant, _, _), rows in chosen_by_cell(study, setting).items():
            forgot = [r["forgetting"] for r in rows if r["forgetting"] is not None]
            if forgot:
                _point(ax, statistics.fmean(r["test"] for r in rows), statistics.fmean(forgot), study, variant)
        ax.axhline(0, color="#555555", linewidth=0.7)
        ax.set_yscale("symlog", linthresh=0.1)
        _label(ax, setting, "test score", "nats per token, after - before")
    _legend(figure, panels.values())
    return figure


FIGURES = {
    "score_data": (
        functools.partial(figure_axis, axis="data"),
        "Test score against training images, at each variant's middle size. Points: mean over seeds; bars: range over seeds; "
        "orange rings: a run reached the cap on steps.",
    ),
    "score_size": (
        functools.partial(figure_axis, axis="size"), "Test score against stored parameters, with all training images."
    ),
    "consistency": (
        figure_consistency,
        "Effect of images and of size (rank, bottleneck, length), mean over the paper's methods that were run; 95 % intervals "
        "over seeds.",
    ),
    "pareto_stored": (
        functools.partial(figure_pareto, against="stored"),
        "Every cell: test score against stored parameters. The line is the Pareto front.",
    ),
    "pareto_seconds": (
        functools.partial(figure_pareto, against="total_s"),
        "Every cell: test score against the seconds of one run, including compilation and evaluation.",
    ),
    "learning_rates": (
        figure_learning_rates, "Validation score against learning rate, a line per cell, seed 0. Filled: chosen."
    ),
    "forgetting": (
        figure_forgetting,
        "Forgetting: change of the loss on test captions in the style of pre-training.",
    ),
}  # fmt: skip
