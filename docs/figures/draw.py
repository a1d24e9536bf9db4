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
.head, .strong { font-weight: 700 }
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

    def __init__(self, title: str, says: str, height: int, names: str = "", about: str = "", legend: str = "frozen trained", flow: str = "activations"):
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
            self.text(x + 32, y, flow, "small", "start")

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
        "Adapters", "a bottleneck D → m → D after or beside a sublayer", 1040, "serial_adapter parallel_adapter compacter",
        "Left: a serial adapter reads what an attention or MLP gives, and its output is added to that. Right: a parallel "
        "adapter reads what the sublayer reads. Below: Houlsby's placement has one after every attention and MLP; Pfeiffer's "
        "has one per layer, after the MLP, and reads the normalised residual stream. Last: Compacter's matrices.",
        "frozen trained made",
    )  # fmt: skip
    for x, head, mid, branch, top in ((134, "serial", 196, 236, 258), (434, "parallel", 268, 158, 226)):
        side = x + 120
        f.text(x, 112, head, "head")
        f.text(x, 142, "x")
        f.text(x + 14, 142, "T × D", "small", "start")
        f.arrow(x, 150, x, mid - 22)
        f.box(x, mid, 116, 44, "sublayer")
        f.arrow(x, mid + 22, x, 387)
        f.dot(x, 158)
        f.arrow(x, 158, x - 94, 158, x - 94, 456, x - 82, 456)
        f.dot(x, branch)
        f.arrow(x, branch, side, branch, side, top)
        f.funnel(side, top + 20, 108, 64, 40, "D × m")
        f.arrow(side, top + 40, side, top + 64)
        f.text(side + 10, top + 57, "act", "small", "start")
        f.funnel(side, top + 84, 64, 108, 40, "m × D")
        f.arrow(side, top + 104, side, 398, x + 11, 398)
        f.text(x + 62, 390, "× s", "small")
        f.text(x + 10, 320, "y", anchor="start")
        f.node(x, 398)
        f.arrow(x, 409, x, 436)
        f.box(x, 456, 164, 40, "add x, LayerNorm")
        f.arrow(x, 476, x, 502)
    f.rule(528)
    f.text(32, 562, "placement=\'houlsby\'", "head", "start")
    f.text(32, 584, "A reads y: after every attention and MLP", "small", "start")
    y = 654
    f.arrow(32, y, 50, y)
    for x, w, text, kind in ((98, 96, "attention", "frozen"), (184, 32, "A", "trained"), (284, 40, "LN", "frozen"),
                             (358, 64, "MLP", "frozen"), (428, 32, "A", "trained"), (528, 40, "LN", "frozen")):  # fmt: skip
        f.box(x, y, w, 40, text, kind)
    for a, b in ((146, 168), (200, 221), (243, 264), (304, 326), (390, 412), (444, 465), (487, 508), (548, 606)):
        f.arrow(a, y, b, y)
    for a, b in ((40, 232), (315, 476)):
        f.node(b, y)
        f.dot(a, y)
        f.arrow(a, y, a, y - 40, b, y - 40, b, y - 11)
    f.text(32, 716, "placement=\'pfeiffer\'", "head", "start")
    f.text(32, 738, "A reads LN(x + y): once per layer, after the MLP", "small", "start")
    y = 808
    f.arrow(32, y, 50, y)
    for x, w, text in ((97, 94, "attention"), (206, 40, "LN"), (276, 56, "MLP"), (572, 40, "LN")):
        f.box(x, y, w, 40, text)
    for a, b in ((144, 155), (177, 186), (226, 248), (304, 479), (501, 519), (541, 552), (592, 608)):
        f.arrow(a, y, b, y)
    for a, b in ((40, 166), (237, 530)):
        f.node(b, y)
        f.dot(a, y)
        f.arrow(a, y, a, y - 40, b, y - 40, b, y - 11)
    f.text(252, y - 48, "x", "small")
    f.text(400, y - 8, "y", "small")
    f.dot(318, y)
    f.arrow(318, y, 318, y + 52, 334, y + 52)
    f.box(382, y + 52, 96, 36, "LN(x + y)")
    f.arrow(430, y + 52, 444, y + 52)
    f.box(460, y + 52, 32, 36, "A", "trained")
    f.arrow(476, y + 52, 490, y + 52, 490, y + 11)
    f.node(490, y)
    f.text(32, 912, "Compacter", "head", "start")
    f.text(134, 912, "serial; each matrix a sum of n Kronecker products", "small", "start")
    f.box(84, 948, 84, 40, "D × m", "made")
    f.text(148, 954, "=")
    f.text(184, 954, "Σ_{i}")
    f.box(246, 948, 64, 40, "A_{i}", "trained")
    f.text(302, 954, "⊗")
    f.box(366, 948, 76, 40, "s_{i}", "trained")
    f.box(476, 948, 76, 40, "t_{i}", "trained")
    for x, text in ((246, "n × n, shared"), (366, "D/n × 1"), (476, "1 × m/n")):
        f.text(x, 986, text, "small")
    return f


def lora() -> Figure:
    f = Figure(
        "LoRA", "a low-rank update beside a linear layer", 780, "lora dora vera loha pissa",
        "x goes through the frozen W and, beside it, through the trained A and B of rank r; the second path times s is added. "
        "Below, four relatives: DoRA scales each output's weights to a trained norm, VeRA trains two vectors around frozen "
        "random matrices, LoHa multiplies two low-rank matrices, PiSSA starts from the principal part of W.",
    )  # fmt: skip
    f.text(182, 112, "x")
    f.text(196, 112, "T × in", "small", "start")
    f.arrow(182, 120, 182, 160)
    f.dot(182, 138)
    f.arrow(182, 138, 442, 138, 442, 160)
    f.box(182, 220, 180, 120, "W, b", small="in × out")
    f.funnel(442, 182, 150, 66, 44, "A")
    f.arrow(442, 204, 442, 236)
    f.text(454, 224, "T × r", "small", "start")
    f.funnel(442, 258, 66, 150, 44, "B")
    f.text(530, 187, "in × r", "small", "start")
    f.text(530, 263, "r × out", "small", "start")
    f.arrow(182, 280, 182, 307)
    f.arrow(442, 280, 442, 318, 193, 318)
    f.text(312, 310, "× s", "small")
    f.node(182, 318)
    f.arrow(182, 329, 182, 356)
    f.text(182, 374, "y")
    f.text(196, 374, "T × out", "small", "start")
    f.text(300, 352, "y = x W + b + s · x A B", "code", "start")
    f.text(300, 374, "s = α / r; B starts at zero", "small", "start")
    f.rule(400)
    cells = (
        ("DoRA", "m · (W + s A B) / ‖W + s A B‖", "m: out, starts as the norms of W"),
        ("VeRA", "((x A) * d) B * l", "A, B random, shared by all sites"),
        ("LoHa", "x ((A1 B1) * (A2 B2)) · α / r", "elementwise, a rank of up to r²"),
        ("PiSSA", "s · x (A B − A0 B0)", "A, B start as the top r of W\'s SVD"),
    )
    pictures = (  # boxes and signs from left to right
        (("W", 44, "frozen"), "+", ("s A B", 66, "trained"), ">", ("÷ norm", 70, "plain"), ">", ("m", 34, "trained")),
        (("A", 48, "frozen"), ">", ("d", 34, "trained"), ">", ("B", 48, "frozen"), ">", ("l", 34, "trained")),
        (("A_{1} B_{1}", 84, "trained"), "×", ("A_{2} B_{2}", 84, "trained")),
        (("A B", 84, "trained"), "−", ("A_{0} B_{0}", 84, "frozen")),
    )
    for i, ((name, equation, note), picture) in enumerate(zip(cells, pictures, strict=True)):
        left, y = 32 + i % 2 * 304, 434 + i // 2 * 158
        f.text(left, y, name, "head", "start")
        x = left
        for part in picture:
            if part == ">":
                f.arrow(x + 2, y + 38, x + 16, y + 38)
                x += 18
            elif isinstance(part, str):
                f.text(x + 14, y + 44, part)
                x += 28
            else:
                f.box(x + part[1] / 2, y + 38, part[1], 40, part[0], part[2])
                x += part[1]
        f.text(left, y + 86, equation, "code", "start")
        f.text(left, y + 108, note, "small", "start")
    return f


def _attention(f: Figure, x: float, strips: dict, chips: str = ""):
    """The first half of a post-norm text layer at x: queries, keys, values, attention, output, residual.

    `strips`: what is done to the output of query, key, value; `chips`: what stands in front of keys and values.
    """
    low = 62 if chips else 0
    f.text(x, 142, "x")
    f.arrow(x, 150, x, 178)
    f.dot(x, 162)
    f.arrow(x, 162, x - 130, 162, x - 130, 408 + low, x - 110, 408 + low)
    for at, name in ((x - 77, "query"), (x, "key"), (x + 77, "value")):
        f.arrow(x, 162, at, 162, at, 178) if at != x else None
        f.box(at, 196, 66, 36, name)
        end = 238 if name in strips else 214
        if name in strips:
            f.box(at, 226, 66, 24, "", "trained", strips[name])
        if chips and name != "query":
            f.arrow(at, end, at, 262)
            f.box(at - 15, 276, 36, 28, "", "trained", chips)
            f.box(at + 19, 276, 28, 28, "", "plain", name[0])
            end = 290
        f.arrow(at, end, at, 256 + low)
    f.box(x, 274 + low, 220, 36, "softmax(q kᵀ / √H) v", "plain")
    f.arrow(x, 292 + low, x, 312 + low)
    f.box(x, 330 + low, 220, 36, "out")
    f.arrow(x, (372 if "out" in strips else 348) + low, x, 390 + low)
    f.box(x, 408 + low, 220, 36, "add x, LayerNorm")


def scaling() -> Figure:
    f = Figure(
        "IA3 and SSF", "learned scales (and shifts) of what flows through a layer", 888, "ia3 ssf",
        "Left, IA3: keys, values and the inner activation of the MLP are multiplied by trained vectors that start at one. "
        "Right, SSF: after every linear and LayerNorm the output is multiplied by g and t is added.",
    )  # fmt: skip
    for x, name, ssf in ((182, "IA3", False), (474, "SSF", True)):
        f.text(x, 112, name, "head")
        g = "× g + t"
        _attention(f, x, dict.fromkeys(("query", "key", "value", "out"), g) if ssf else {"key": "× l", "value": "× l"})
        rows = ((502, "up, D × F"), (656, "down, F × D"), (742, "add, LayerNorm"))
        for y, text in rows:
            f.box(x, y, 220, 36, text)
        f.box(x, 580, 220, 32, "GELU", "plain")
        if ssf:
            for y in (360, 438, 532, 686, 772):
                f.box(x, y, 220, 24, "", "trained", g)
        else:
            f.box(x, 626, 220, 24, "", "trained", "× l, F numbers")
        f.arrow(x, 450 if ssf else 426, x, 484)
        f.dot(x, 466)
        f.arrow(x, 466, x - 130, 466, x - 130, 742, x - 110, 742)
        f.arrow(x, 544 if ssf else 520, x, 564)
        f.arrow(x, 596, x, 638 if ssf else 614)
        f.arrow(x, 698 if ssf else 674, x, 724)
        f.arrow(x, 784 if ssf else 760, x, 812)
    return f


def rotation() -> Figure:
    f = Figure(
        "OFT", "a block-diagonal rotation of the input of a linear layer", 720, "oft",
        "Q_i is a skew matrix of size b whose upper triangle is trained. Cayley's transform makes a rotation R_i of it. The "
        "input of the frozen linear is cut into n groups of b numbers, and group i is rotated by R_i.",
        "frozen trained made",
    )  # fmt: skip
    for i in range(25):
        row, column = divmod(i, 5)
        kind = "trained" if column > row else "made" if column < row else "plain"
        f.box(66 + column * 26, 122 + row * 26, 23, 23, "", kind, "0" if row == column else "")
    f.arrow(196, 174, 286, 174)
    f.text(240, 164, "Cayley", "small")
    f.box(320, 174, 60, 60, "R_{i}", "made")
    f.arrow(350, 174, 424, 174)
    f.box(504, 174, 144, 144, "", "plain")
    for i in range(4):
        f.box(452 + 34.67 * i, 122 + 34.67 * i, 31, 31, "", "made")
    f.text(118, 268, "Q_{i}", "label")
    f.text(118, 290, "b(b − 1)/2 numbers", "small")
    f.text(320, 268, "b × b", "small")
    f.text(504, 268, "R", "label")
    f.text(504, 290, "n blocks of b", "small")
    f.text(320, 330, "R_i = (I − Q_i)(I + Q_i)⁻¹      y = (x R) W + b", "code")
    f.rule(354)
    f.text(320, 386, "x")
    f.text(334, 386, "T × in", "small", "start")
    for i in range(4):
        x = 149 + i * 114
        f.box(x, 414, 110, 32, "", "plain", "…" if i == 2 else "b")
        f.arrow(x, 430, x, 456)
        f.box(x, 478, 110, 44, ("R_{1}", "R_{2}", "…", "R_{n}")[i], "made")
        f.arrow(x, 500, x, 526)
    f.box(320, 554, 452, 56, "W, b", small="in × out")
    f.arrow(320, 582, 320, 612)
    f.text(320, 632, "y")
    f.text(334, 632, "T × out", "small", "start")
    return f


def vision_prompt() -> Figure:
    f = Figure(
        "VPT", "visual prompts: learned rows before the patches of a ViT", 862, "vpt",
        "Left, shallow: K trained rows enter once, before class token and patches, and flow through all blocks. Right, deep: "
        "every block has K trained rows of its own, which take the places of those that come out of the block before.",
    )  # fmt: skip
    for x, name in ((172, "shallow"), (468, "deep")):
        left, main = x - 133, x + 45
        f.text(x, 112, f"depth=\'{name}\'", "head")
        for i in range(9):
            f.box(main - 23 + i % 3 * 23, 144 + i // 3 * 23, 20, 20, kind="plain")
        f.arrow(main, 201, main, 226)
        f.box(main, 250, 176, 48, "patch embedding", small="class token, positions")
        f.arrow(main, 274, main, 306)
        f.text(left + 43, 296, "K × D", "small")
        f.text(main + 12, 296, "(1 + P) × D", "small", "start")
        for y, block in ((322, "block 1"), (450, "block 2"), (578, "block L")):
            f.cells(left, y, 3, 26, 32, "trained" if name == "deep" or block == "block 1" else "plain")
            f.cells(left + 90, y, 6, 26, 32)
            f.arrow(x, y + 16, x, y + 44)
            f.box(x, y + 64, 266, 40, block)
            if block == "block 2":
                f.text(x, y + 106, "⋮")
            else:
                f.arrow(x, y + 84, x, y + 112)
        f.cells(left, 706, 3, 26, 32, "gone")
        f.cells(left + 90, 706, 6, 26, 32)
        f.text(left + 43, 744, "dropped", "small")
        f.arrow(main, 722, main, 752)
        f.box(main, 772, 176, 40, "LayerNorm")
    return f


def combined() -> Figure:
    f = Figure(
        "MAM and UniPELT", "methods together in one text layer", 850, "mam unipelt",
        "Left, MAM: a prefix in every attention and a scaled parallel adapter on every MLP. Right, UniPELT: a prefix, LoRA on "
        "query and value, and a serial adapter after the MLP, each times a trained gate G of the input.",
    )  # fmt: skip
    for x, name in ((182, "MAM"), (474, "UniPELT")):
        f.text(x, 112, name, "head")
        mam = name == "MAM"
        _attention(f, x, {} if mam else {"query": "+ G A B", "value": "+ G A B"}, "P" if mam else "G P")
        f.box(x, 712, 220, 36, "add x, LayerNorm")
        f.arrow(x, 730, x, 756)
        f.dot(x, 502)
        if mam:
            f.line(x, 488, x, 502)
            f.arrow(x, 502, x - 50, 502, x - 50, 520)
            f.arrow(x, 502, x + 62, 502, x + 62, 520)
            f.box(x - 50, 566, 104, 92, "MLP", small="D × F × D")
            f.funnel(x + 62, 538, 92, 56, 36, "D × m")
            f.arrow(x + 62, 556, x + 62, 576)
            f.funnel(x + 62, 594, 56, 92, 36, "m × D")
            f.arrow(x - 50, 612, x - 50, 647)
            f.arrow(x + 62, 612, x + 62, 658, x - 39, 658)
            f.text(x + 10, 650, "× s", "small")
            f.node(x - 50, 658)
            f.arrow(x - 50, 669, x - 50, 694)
        else:
            f.arrow(x, 488, x, 520)
            f.box(x, 566, 220, 92, "MLP", small="D × F × D")
            f.box(x, 626, 220, 28, "", "trained", "+ G A(LN(x + y))")
            f.arrow(x, 640, x, 694)
        f.arrow(x, 502, x - 130, 502, x - 130, 712, x - 110, 712)
    f.text(182, 782, "P: K = 30; m = 512, s = 4", "small")
    f.text(474, 782, "G = σ(x g + c) per token", "small")
    return f


def selective() -> Figure:
    f = Figure(
        "Selective", "which leaves of the base move; nothing is added", 824, "bitfit layer_norms head full selective",
        "A table of the base's leaves and five methods. BitFit trains biases, LayerNorms trains scales and biases of every "
        "LayerNorm, Head trains the decoder's head but not its vocabulary matrix, Full trains all, Selective what a pattern names.",
    )  # fmt: skip
    columns = ("BitFit", "LayerNorms", "Head", "Full", "Selective")
    leaves = (  # what stands where, and what of it each column trains: k kernel, s scale, b bias
        ("vision tower", "ksb", "", "", "", "ksb", ""),
        ("words, positions", "k", "", "", "", "k", ""),
        ("self-attention", "kb", "b", "", "", "kb", ""),
        ("cross-attention", "kb", "b", "", "", "kb", "kb"),
        ("MLP", "kb", "b", "", "", "kb", ""),
        ("LayerNorms", "sb", "b", "sb", "", "sb", ""),
        ("head: dense", "kb", "b", "", "kb", "kb", ""),
        ("head: LayerNorm", "sb", "b", "sb", "sb", "sb", ""),
        ("head: bias of words", "b", "b", "", "b", "b", ""),
    )
    for i, name in enumerate(columns):
        f.text(236 + 88 * i, 114, name, "small strong")
    for j, (name, parts, *trained) in enumerate(leaves):
        y = 156 + 62 * j
        f.rule(y - 31)
        f.text(32, y - 3, name, "label", "start")
        said = {"k": "matrices", "s": "scale", "b": "bias"}
        f.text(32, y + 16, ", ".join(said[p] for p in parts), "small", "start")
        for i, some in enumerate(trained):
            heights = [24 if p == "k" else 8 for p in parts]
            top = y - (sum(heights) + 3 * (len(parts) - 1)) / 2
            for part, h in zip(parts, heights, strict=True):
                f.box(236 + 88 * i, top + h / 2, 48, h, kind="trained" if part in some else "frozen")
                top += h + 3
    f.rule(683)
    f.text(32, 710, "BitFit and LayerNorms: targets=\'text\'. Selective: leaves=\'cross_attention\'.", "small", "start")
    f.text(32, 732, "The vocabulary matrix is the words\' embedding (tied).", "small", "start")
    f.text(32, 754, "Head(matrix=\'untied\') adds a trained V × D matrix of its own.", "small", "start")
    return f


def data_path() -> Figure:
    f = Figure(
        "From pictures to a score", "what a run reads, in order", 870, "",
        "A folder of images and a table of texts become a Split, by Template and Processor Examples, then batches, training "
        "steps that change the tuned leaves only, an evaluation, and result.json.", flow="data",
    )  # fmt: skip
    notes = (
        ("images[i]: uint8, native size", "rows[i]: captions or questions"),
        ("Template: texts to token ids", "Processor: square pictures"),
        ("tokens, targets, weights, prompt", "image_index: whose picture"),
        ("a function of (seed, step) alone", "pictures are resized here"),
        ("gradients of tuned leaves only", "(state, frozen, batch) → state"),
        ("the model writes, the task scores", "base and tuned, the same code"),
        ("scores, blind baselines, counts,", "seconds, digests, versions"),
    )
    names = ("Split", "", "Examples", "batches", "", "evaluation", "result.json")
    for x, name, small in ((100, "images", "a folder"), (242, "texts", "a table")):
        f.box(x, 126, 132, 48, name, "plain", small)
        f.arrow(x, 150, x, 190)
        f.arrow(x, 240, x, 280)
        f.box(x, 305, 132, 50, "Processor" if x == 100 else "Template", "frozen")
        f.arrow(x, 330, x, 370)
    f.text(340, 122, "CSV, JSONL, .txt files, COCO,", "small", "start")
    f.text(340, 142, "Karpathy\'s, BLIP\'s or VQA v2 JSON", "small", "start")
    for i, (name, lines) in enumerate(zip(names, notes, strict=True)):
        y = 215 + 90 * i
        for j, line in enumerate(lines):
            f.text(340, y - 4 + 20 * j, line, "small", "start")
        if name:
            f.box(171, y, 274, 50, name, "plain")
        if i in (2, 3, 4, 5):
            f.arrow(171, y + 25, 171, y + 65)
    f.box(171, 575, 274, 50, "", "plain")
    f.text(92, 580.5, "train_step")
    f.box(186, 575, 68, 30, "tuned", "trained")
    f.box(264, 575, 68, 30, "frozen")
    f.arrow(308, 395, 324, 395, 324, 665, 308, 665)
    return f


def rooms() -> Figure:
    bands = (
        (("runtime/", "files, signals, locks, registries, the process"), ("tree", "trees of arrays by name: split, join"),
         ("ops", "small array operations")),
        (("methods/", "what is trained"), ("adapt/", "the sites where a method meets a model")),
        (("inputs/", "tokenizers, images, templates"), ("models/", "the protocol, BLIP, loading, decoding")),
        (("data/", "data sets, examples, batches"), ("metrics/", "scores of captions and answers"),
         ("tasks/", "captioning and VQA")),
        (("interchange/", "PEFT and Hugging Face files, in and out"),),
        (("training/", "one run: setup, loop, checkpoints, result"), ("config", "the defaults of a run")),
        (("study/", "a grid of runs and its report"), ("apps/", "generate, export, demo, pretrain"),
         ("cli", "the jaxpeft command")),
    )  # fmt: skip
    f = Figure(
        "The rooms of jaxpeft", "a module imports from its own room and from those above it", 800, "",
        "The folders of the package in the order of their imports: " + "; ".join(
            ", ".join(name for name, _ in band) for band in bands) + ".", "",
    )  # fmt: skip
    y = 96
    for band in bands:
        f.add("rect", x=64, y=y, width=544, height=28 * len(band) + 20, rx=10, class_="band")
        for i, (name, line) in enumerate(band):
            f.text(84, y + 29 + 28 * i, name, "code strong", "start")
            f.text(206, y + 29 + 28 * i, line, "small", "start")
        y += 28 * len(band) + 32
    f.arrow(44, y - 12, 44, 96)
    f.height = y + 20
    return f


def finished() -> dict[str, str]:
    """File name -> SVG."""
    made = (prompt, prefix, adapters, lora, scaling, rotation, vision_prompt, combined, selective, data_path, rooms)
    return {f"{one.__name__}.svg": one().svg() for one in made}


if __name__ == "__main__":
    for name, text in finished().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8", newline="\n")
