"""Draw the figures of the documentation: `python docs/figures/draw.py` writes every SVG beside this file.

One language over all: what is frozen is grey, what is trained is red-brown, what is computed is white, activations are
arrows, and every drawing reads from the top down. B, the batch, is left out of all shapes; the other letters are those of
jaxpeft/models/layers.py (T tokens, D width, F hidden width of an MLP, N heads of size H, K learned rows, V words) and of
the methods (r rank, m bottleneck). Positions are numbers in a drawing 640 wide; boxes are named by their centres.
"""

import re
from html import escape
from pathlib import Path

W = 640
STYLE = """
text { font: 16px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; fill: #2a2e35 }
.title { font-size: 22px; font-weight: 700 }
.head { font-weight: 700 }
.small { font-size: 14px; fill: #5a616c }
.tiny { font-size: 12px }
.code { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #454b55 }
.on { fill: #ffffff }
.card { fill: #fbfaf7; stroke: #dedbd3 }
.frozen { fill: #dfe2e7; stroke: #a3aab4 }
.trained { fill: #b4461b; stroke: #8f3512 }
.made { fill: #f6d9cb; stroke: #b4461b }
.plain { fill: #ffffff; stroke: #a3aab4 }
.gone { fill: none; stroke: #b4b9c1; stroke-dasharray: 4 3 }
.band { fill: #f1efe9; stroke: none }
.flow { fill: none; stroke: #59606b; stroke-width: 1.6; stroke-linejoin: round }
.tip { fill: #59606b; stroke: none }
.rule { stroke: #dedbd3 }
"""
LEGEND = {"frozen": "frozen", "trained": "trained", "made": "made of what is trained"}


class Figure:
    """A drawing that grows by calls; `file` writes it. `names`: the methods it shows, as configs call them."""

    def __init__(self, title: str, says: str, height: int, names: str = "", about: str = "", legend: str = "frozen trained"):
        self.title, self.about, self.height, self.parts = title, about, height, []
        self.text(32, 46, title, "title", "start")
        self.text(32, 72, says, "small", "start")
        if names:
            self.text(W - 32, 45, names, "code", "end")
        x, y = 32, height - 30
        for kind in legend.split():
            self.add("rect", x=x, y=y - 12, width=22, height=14, rx=4, class_=kind)
            self.text(x + 30, y, LEGEND[kind], "small", "start")
            x += 54 + 8 * len(LEGEND[kind])
        if legend:
            self.arrow(x, y - 5, x + 24, y - 5)
            self.text(x + 32, y, "activations", "small", "start")

    def add(self, tag: str, text: str | None = None, **attributes):
        said = "".join(f' {name.rstrip("_").replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.parts.append(f"<{tag}{said}/>" if text is None else f"<{tag}{said}>{text}</{tag}>")

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "middle"):
        """Text whose baseline is y. `P_{k}` has an index."""
        first, *rest = re.split(r"_\{(\w+)\}", escape(text))
        for index, after in zip(rest[::2], rest[1::2], strict=True):
            first += f'<tspan dy="4" class="tiny">{index}</tspan>' + (f'<tspan dy="-4">{after}</tspan>' if after else "")
        self.add("text", first, x=x, y=y, text_anchor=anchor, class_=style or "label")

    def box(self, x: float, y: float, w: float, h: float, text: str = "", kind: str = "frozen", small: str = ""):
        """A box around (x, y) with a line of text, and a small one below it."""
        self.add("rect", x=x - w / 2, y=y - h / 2, width=w, height=h, rx=6, class_=kind)
        on = " on" if kind == "trained" else ""
        if text:
            self.text(x, y + (-3 if small else 5.5), text, "label" + on)
        if small:
            self.text(x, y + (15 if text else 5), small, "small" + on)

    def funnel(self, x: float, y: float, top: float, bottom: float, h: float, text: str, kind: str = "trained"):
        """A matrix that changes the width: `top` wide above, `bottom` wide below."""
        corners = (x - top / 2, y - h / 2), (x + top / 2, y - h / 2), (x + bottom / 2, y + h / 2), (x - bottom / 2, y + h / 2)
        self.add("polygon", points=" ".join(f"{a:g},{b:g}" for a, b in corners), class_=kind, stroke_linejoin="round")
        self.text(x, y + 5.5, text, "label" + (" on" if kind == "trained" else ""))

    def line(self, *at: float):
        """A line through points x, y, x, y ..."""
        self.add("polyline", points=" ".join(f"{a:g},{b:g}" for a, b in zip(at[::2], at[1::2], strict=True)), class_="flow")

    def arrow(self, *at: float):
        """A line with a tip; its last piece is horizontal or vertical."""
        (a, b), (x, y) = at[-4:-2], at[-2:]
        dx, dy = (x > a) - (x < a), (y > b) - (y < b)
        self.line(*at[:-2], x - 6 * dx, y - 6 * dy)
        corners = (x, y), (x - 8 * dx - 4 * dy, y - 8 * dy - 4 * dx), (x - 8 * dx + 4 * dy, y - 8 * dy + 4 * dx)
        self.add("polygon", points=" ".join(f"{p:g},{q:g}" for p, q in corners), class_="tip")

    def node(self, x: float, y: float, sign: str = "+"):
        """A sum or a product of activations."""
        self.add("circle", cx=x, cy=y, r=11, class_="plain")
        d = 5 if sign == "+" else 3.8
        ends = ((-d, 0, d, 0), (0, -d, 0, d)) if sign == "+" else ((-d, -d, d, d), (-d, d, d, -d))
        for a, b, c, e in ends:
            self.line(x + a, y + b, x + c, y + e)

    def dot(self, x: float, y: float):
        self.add("circle", cx=x, cy=y, r=3, class_="tip")

    def cells(self, x: float, y: float, n: int, w: float, h: float, kind: str = "plain", texts: tuple = ()):
        """n cells in a row from x on -> where the next one would start."""
        for i in range(n):
            self.box(x + w / 2, y, w, h, "", kind, texts[i] if texts else "")
            x += w + 4
        return x

    def rule(self, y: float):
        self.add("line", x1=32, y1=y, x2=W - 32, y2=y, class_="rule")

    def svg(self) -> str:
        size = f'viewBox="0 0 {W} {self.height}" width="{W}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title desc">'
        named = f'<title id="title">{escape(self.title)}</title>\n<desc id="desc">{escape(self.about)}</desc>'
        card = f'<rect x="0.5" y="0.5" width="{W - 1}" height="{self.height - 1}" rx="14" class="card"/>'
        return "\n".join([head, named, f"<style>{STYLE}</style>", card, *self.parts, "</svg>\n"])


def prompt() -> Figure:
    f = Figure(
        "Prompt", "learned rows before the tokens of a stack, at its input only", 656, "prompt",
        "K trained rows of width D are put before the T embedded tokens, behind the embedding's LayerNorm. Frozen blocks read "
        "K + T rows; the first K rows of the result are dropped.",
    )  # fmt: skip
    words, x, middle = ("a", "small", "red", "cube", "left"), 264, 407
    f.cells(x, 124, 5, 54, 36, texts=words)
    f.arrow(middle, 142, middle, 174)
    f.box(middle, 200, 286, 52, "embedding, LayerNorm", small="words V × D, positions")
    f.arrow(middle, 226, middle, 262)
    f.text(175, 250, "K × D", "small")
    f.text(middle + 12, 250, "T × D", "small", "start")
    f.cells(90, 280, 3, 54, 36, "trained")
    f.cells(x, 280, 5, 54, 36)
    for y, name in ((356, "block 1"), (476, "block L")):
        f.arrow(320, y - 58 if name == "block 1" else y - 46, 320, y - 22)
        f.box(320, y, 460, 44, name)
    f.text(332, 321, "(K + T) × D", "small", "start")
    f.line(320, 378, 320, 396)
    f.text(320, 420, "⋮")
    f.arrow(320, 498, 320, 534)
    f.cells(90, 552, 3, 54, 36, "gone")
    f.cells(x, 552, 5, 54, 36)
    f.text(175, 592, "dropped", "small")
    f.text(middle, 592, "T × D", "small")
    return f


def prefix() -> Figure:
    f = Figure(
        "Prefix", "learned keys and values in front of an attention's own", 620, "prefix",
        "Query, key and value are frozen. K trained keys P_k and values P_v stand before the S computed ones, in every head "
        "of every layer; queries look at all of them. With mlp > 0 an embedding and an MLP make them during training.",
    )  # fmt: skip
    f.text(320, 112, "x")
    f.text(336, 112, "T × D", "small", "start")
    f.arrow(320, 120, 320, 158)
    for x, name in ((110, "query"), (320, "key"), (530, "value")):
        if x != 320:
            f.arrow(320, 138, x, 138, x, 158)
        f.box(x, 181, 112, 46, name, small="D × D")
    for x, name in ((320, "k"), (530, "v")):
        f.arrow(x, 204, x, 246)
        f.text(x - 78, 238, "K × N × H", "small")
        f.box(x - 78, 264, 60, 36, f"P_{{{name}}}", "trained")
        f.box(x, 264, 92, 36, name, "plain")
        f.arrow(x - 46, 282, x - 46, 336)
        f.text(x - 34, 314, f"(K + S) {'keys' if name == 'k' else 'values'}", "small", "start")
    f.arrow(110, 204, 110, 336)
    f.text(122, 275, "q", anchor="start")
    f.box(200, 360, 316, 48, "softmax(q · [P_{k}; k]ᵀ / √H)", "plain")
    f.arrow(358, 360, 392, 360)
    f.box(500, 360, 216, 48, "weights · [P_{v}; v]", "plain")
    f.arrow(500, 384, 500, 414)
    f.box(500, 437, 112, 46, "out", small="D × D")
    f.arrow(500, 460, 500, 494)
    f.text(500, 514, "T × D", "small")
    f.text(42, 428, "with mlp > 0, while training:", "small", "start")
    f.box(76, 464, 68, 46, "E", "trained", "K × D")
    f.arrow(110, 464, 136, 464)
    f.box(218, 464, 164, 46, "W_{1}, tanh, W_{2}", "trained")
    f.arrow(300, 464, 326, 464)
    f.box(358, 464, 64, 46, "P", "made")
    f.text(42, 514, "one E and W_{1} for all layers; only P is kept", "small", "start")
    return f


def adapters() -> Figure:
    f = Figure(
        "Adapters", "a bottleneck D → m → D after or beside a sublayer", 990, "serial_adapter parallel_adapter compacter",
        "Left: a serial adapter reads what an attention or MLP gives, and its output is added to that. Right: a parallel "
        "adapter reads what the sublayer reads. Below: Houlsby's placement has one after every attention and MLP; Pfeiffer's "
        "has one per layer, after the MLP, and reads the normalised residual stream. Last: Compacter's matrices.",
        "frozen trained made",
    )  # fmt: skip
    for x, serial in ((132, True), (432, False)):
        side, top = x + 122, 286 if serial else 196
        f.text(x, 112, "serial" if serial else "parallel", "head")
        f.text(x, 142, "x")
        f.text(x + 16, 142, "T × D", "small", "start")
        mid = 196 if serial else 264
        f.arrow(x, 150, x, mid - 22)
        f.box(x, mid, 116, 44, "sublayer", small="")
        f.arrow(x, mid + 22, x, 387)
        branch = 240 if serial else 162
        f.dot(x, branch)
        f.arrow(x, branch, side, branch, side, top - 20 if serial else 218)
        top = 282 if serial else 238
        f.funnel(side, top, 108, 64, 40, "D × m")
        f.arrow(side, top + 20, side, top + 44)
        f.text(side + 10, top + 37, "act", "small", "start")
        f.funnel(side, top + 64, 64, 108, 40, "m × D")
        f.arrow(side, top + 84, side, 398, x + 11, 398)
        f.text(x + 62, 390, "× s", "small")
        f.text(x + 12, 268 if serial else 320, "y", anchor="start")
        f.node(x, 398)
        f.arrow(x, 409, x, 436)
        f.box(x, 456, 150, 40, "add x, LayerNorm", small="")
        f.dot(x, 158) if serial else None
        f.line(x, 158, x - 90, 158) if False else None
        f.arrow(x, 162 if not serial else 158, x - 92, 162 if not serial else 158, x - 92, 456, x - 75, 456)
        f.arrow(x, 476, x, 502)
    f.rule(524)
    return f


def finished(figures) -> dict[str, str]:
    """File name -> SVG."""
    return {f"{make.__name__}.svg": make().svg() for make in figures}


FIGURES = (prompt, prefix, adapters)

if __name__ == "__main__":
    for name, text in finished(FIGURES).items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8", newline="\n")
