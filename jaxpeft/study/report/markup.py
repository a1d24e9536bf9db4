"""The pieces of the pages: templates, tables, intervals drawn beside their numbers, images. Text is escaped here."""

import base64
import html
import math
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxpeft.study import intervals

HERE = Path(__file__).parent
WIDTH, ROW = 240, 20  # of a drawn interval, in units of its viewBox


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def page(template: str, **values: str) -> str:
    """A template of this folder with its values. A <details> or <section> whose values are all empty is left out."""
    text = (HERE / template).read_text("utf-8")

    def used(part: re.Match) -> str:
        names = string.Template(part[0]).get_identifiers()
        return part[0] if not names or any(values[name] for name in names) else ""

    for tag in ("details", "section"):  # a section may hold details
        text = re.sub(rf"<{tag}>.*?</{tag}>\n", used, text, flags=re.DOTALL)
    values |= {"css": (HERE / "report.css").read_text("utf-8"), "js": (HERE / "report.js").read_text("utf-8")}
    return string.Template(text).substitute(values)


def escape(value) -> str:
    """A value as HTML."""
    return value if isinstance(value, Html) else html.escape(str(value))


def number(value: float) -> str:
    """A number as it is shown: whole ones with commas, others with four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def estimate(found: intervals.Estimate | float | None, sign: str = "") -> str:
    """A mean with its interval; the mean alone where there is one seed. `sign`: '+' to show that of positive numbers too."""
    if found is None:
        return ""
    if isinstance(found, float):
        return f"{found:{sign}.3g}"
    half = max((found.high - found.low) / 2, 1e-4)  # its first two digits are shown
    digits = min(max(0, 1 - math.floor(math.log10(half))), 4)
    shown = f"z.{digits}f"  # z: no sign of a zero
    return f"{found.value:{sign}{shown}} ({found.low:{shown}} to {found.high:{shown}})"


def table(header: Sequence[str], rows: Iterable[Sequence]) -> Html:
    """A table, on a phone a card per row, which report.js makes sortable; '' without rows. Numbers are right-aligned, None is
    empty."""
    rows = [list(row) for row in rows]
    if not rows:
        return Html("")
    numeric = [all(_is_number(row[i]) for row in rows if row[i] is not None) for i in range(len(header))]
    head = "".join(f"<th{_class(num)}>{escape(name)}</th>" for name, num in zip(header, numeric, strict=True))
    body = "".join(
        f"<tr>{''.join(_cell(value, name) for name, value in zip(header, row, strict=True))}</tr>" for row in rows
    )
    return Html(
        f'<div class="wide"><table class="cards"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _class(num: bool) -> str:
    return ' class="num"' if num else ""


def _cell(value, name: str) -> str:
    label = html.escape(str(name).partition("<svg")[0])  # without the axis above drawn intervals
    label = f' data-label="{label}"'
    if value is None:
        return f"<td{label}></td>"
    num = _is_number(value)
    exact = f' data-v="{value!r}"' if num else ""  # what the column is sorted by
    return f"<td{_class(num)}{label}{exact}>{number(value) if num else escape(value)}</td>"


def kind_of(verdict: str) -> str:
    """The CSS class of a verdict."""
    return verdict.split(",")[0].replace(" ", "-")


def strong(text: str, kind: str = "") -> Html:
    """A word that stands out. `kind`: a CSS class."""
    return Html(f'<b class="{kind}">{html.escape(text)}</b>')


def fold(summary: str, body: str) -> Html:
    """A part of the page that opens on a click; '' where there is nothing in it."""
    return Html(f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>" if body else "")


def paragraph(text: str, kind: str = "") -> Html:
    """A paragraph; '' where there is no text. `kind`: a CSS class."""
    return Html(f'<p class="{kind}">{escape(text)}</p>' if text else "")


def verbatim(text: str) -> Html:
    """A text with its lines as they are; '' where there is none."""
    return Html(f"<pre>{html.escape(text)}</pre>" if text else "")


def image(png: bytes, alt: str) -> Html:
    """A picture inside the page."""
    return Html(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')


def limits(shown: Iterable[intervals.Estimate | float | None]) -> tuple[float, float]:
    """The ends of the axis of drawn intervals: all effects and margins are on it; longer intervals are cut off."""
    values = [0.0, *(getattr(one, "value", one) for one in shown if one is not None)]
    room = 0.25 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room


def _place(ends: tuple[float, float]):
    low, high = ends
    return lambda value: round(WIDTH * (min(max(value, low), high) - low) / (high - low), 1)


def axis(ends: tuple[float, float]) -> Html:
    """The axis above a column of drawn intervals: three round numbers, 0 among them."""
    at, far = _place(ends), max(-ends[0], ends[1])
    step = next(s * 10.0**e for e in range(-6, 9) for s in (1, 2, 5) if s * 10.0**e >= 0.4 * far)
    ticks = "".join(
        f'<text x="{at(value)}" y="11" text-anchor="middle">{value:g}</text>'
        for value in (-2 * step, -step, 0.0, step, 2 * step)
        if ends[0] + 0.04 * far < value < ends[1] - 0.04 * far
    )
    return Html(f'<svg class="interval" viewBox="0 0 {WIDTH} 14" aria-hidden="true">{ticks}</svg>')


def interval(
    found: intervals.Estimate | float, ends: tuple[float, float], margin: float = 0.0, kind: str = "", color: str = ""
) -> Html:
    """A mean with its interval in numbers, below a drawing of it on an axis with 0 and a shaded margin. An end that the axis
    cuts off has an arrow. `kind`: a CSS class."""
    at, middle = _place(ends), ROW / 2
    parts = [f'<rect x="{at(-margin)}" width="{at(margin) - at(-margin):.1f}" height="{ROW}"/>'] if margin else []
    parts.append(f'<path class="zero" d="M{at(0)} 0V{ROW}"/>')
    value, low, high = (found, found, found) if isinstance(found, float) else (found.value, found.low, found.high)
    parts.append(f'<path d="M{at(low)} {middle}H{at(high)}"/>')
    for end, cut, way in ((low, low < ends[0], 5), (high, high > ends[1], -5)):
        if cut:
            parts.append(f'<path d="M{at(end) + way} {middle - 4}L{at(end)} {middle}L{at(end) + way} {middle + 4}"/>')
    parts.append(f'<circle cx="{at(value)}" cy="{middle}" r="3.5"/>')
    style = f' style="color:{color}"' if color else ""
    svg = f'<svg class="interval {kind}"{style} viewBox="0 0 {WIDTH} {ROW}" aria-hidden="true">{"".join(parts)}</svg>'
    return Html(f"<div>{svg}{escape(estimate(found, '+'))}</div>")


def shares(counts: Sequence[int], kinds: Sequence[str]) -> Html:
    """A bar divided in proportion to counts, with a CSS class for each part."""
    total, x, parts = max(1, sum(counts)), 0.0, []
    for n, kind in zip(counts, kinds, strict=True):
        width = WIDTH * n / total
        parts.append(f'<rect class="{kind}" x="{x:.1f}" width="{width:.1f}" height="{ROW}"/>')
        x += width
    return Html(f'<svg class="interval" viewBox="0 0 {WIDTH} {ROW}" aria-hidden="true">{"".join(parts)}</svg>')
