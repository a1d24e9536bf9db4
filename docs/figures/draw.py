"""Draw the figures of the documentation: `python docs/figures/draw.py` writes every SVG beside this file.

One language over all: what is frozen is grey, what is trained is red-brown, what is only computed is white, activations are
arrows; drawings read from the top down, rows from left to right. The batch is left out of all shapes. Letters are those of
jaxpeft/models/layers.py (T tokens, S keys, P patches, D width, F hidden width of an MLP, N heads of size H, K learned rows,
V words, L layers) and of the methods (r rank, m bottleneck, b size and n number of blocks).

Positions are numbers in a drawing 640 wide; boxes are placed by their centres, texts by their baselines. A new figure is a
function below and a name in `finished`. Look whether a text leaves its box or meets a line.
"""

import re
from html import escape
from pathlib import Path

W = 640
STYLE = """
text { font: 16px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif }
text { fill: #2a2e35 }
.title { font-size: 22px; font-weight: 700 }
.small { font-size: 14px; fill: #5a616c }
.tiny { font-size: 12px }
.code { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #454b55 }
.head, .strong { font-weight: 700 }
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


def _points(*at: float) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in zip(at[::2], at[1::2], strict=True))


class Figure:
    """A drawing that grows by calls. `names`: the methods it shows, as configs call them; `about`: for screen readers."""

    def __init__(self, title, says, height, names, about, legend="frozen trained", flow="activations"):
        self.title, self.about, self.height, self.parts = title, about, height, []
        self.text(32, 46, title, "title", "start")
        self.note(32, 72, says)
        if names:
            self.text(W - 32, 45, names, "code", "end")
        x, y = 32, height - 30
        for kind in legend.split():
            self.add("rect", x=x, y=y - 12, width=22, height=14, rx=4, class_=kind)
            self.note(x + 30, y, LEGEND[kind])
            x += 54 + 8 * len(LEGEND[kind])
        if flow:
            self.right(y - 5, x, x + 24)
            self.note(x + 32, y, flow)

    def add(self, tag: str, text: str | None = None, **attributes):
        said = "".join(f' {name.rstrip("_").replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.parts.append(f"<{tag}{said}/>" if text is None else f"<{tag}{said}>{text}</{tag}>")

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "middle"):
        """Text whose baseline is y. `P_{k}` has an index."""
        first, *rest = re.split(r"_\{(\w+)\}", escape(text))
        for index, after in zip(rest[::2], rest[1::2], strict=True):
            first += f'<tspan dy="4" class="tiny">{index}</tspan>'
            first += f'<tspan dy="-4">{after}</tspan>' if after else ""
        self.add("text", first, x=x, y=y, text_anchor=anchor, class_=style or "label")

    def note(self, x: float, y: float, text: str):
        self.text(x, y, text, "small", "start")

    def named(self, x: float, y: float, name: str, shape: str):
        """An activation and its shape beside it."""
        self.text(x, y, name)
        self.note(x + 14, y, shape)

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
        a, b, above, below = top / 2, bottom / 2, y - h / 2, y + h / 2
        points = _points(x - a, above, x + a, above, x + b, below, x - b, below)
        self.add("polygon", points=points, class_=kind, stroke_linejoin="round")
        self.text(x, y + 5.5, text, "label" + (" on" if kind == "trained" else ""))

    def line(self, *at: float):
        """A line through points x, y, x, y ..."""
        self.add("polyline", points=_points(*at), class_="flow")

    def arrow(self, *at: float):
        """A line with a tip; its last piece is horizontal or vertical."""
        (a, b), (x, y) = at[-4:-2], at[-2:]
        dx, dy = (x > a) - (x < a), (y > b) - (y < b)
        self.line(*at[:-2], x - 6 * dx, y - 6 * dy)
        a, b = x - 8 * dx, y - 8 * dy
        self.add("polygon", points=_points(x, y, a - 4 * dy, b - 4 * dx, a + 4 * dy, b + 4 * dx), class_="tip")

    def down(self, x: float, *ys: float):
        """Arrows down a column, from the first y to the second, from the third to the fourth ..."""
        for a, b in zip(ys[::2], ys[1::2], strict=True):
            self.arrow(x, a, x, b)

    def right(self, y: float, *xs: float):
        """Arrows along a row."""
        for a, b in zip(xs[::2], xs[1::2], strict=True):
            self.arrow(a, y, b, y)

    def branch(self, *at: float):
        """An arrow that leaves another one at a dot."""
        self.add("circle", cx=at[0], cy=at[1], r=3, class_="tip")
        self.arrow(*at)

    def node(self, x: float, y: float, sign: str = "+"):
        """A sum or a product of activations."""
        self.add("circle", cx=x, cy=y, r=11, class_="plain")
        d = 5 if sign == "+" else 3.8
        ends = ((-d, 0, d, 0), (0, -d, 0, d)) if sign == "+" else ((-d, -d, d, d), (-d, d, d, -d))
        for a, b, c, e in ends:
            self.line(x + a, y + b, x + c, y + e)

    def cells(self, x: float, y: float, n: int, w: float, h: float, kind: str = "plain", texts: str = ""):
        """n cells in a row, from x on."""
        for i in range(n):
            self.box(x + w / 2 + i * (w + 4), y, w, h, "", kind, texts.split()[i] if texts else "")

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
        "Prompt", "learned rows before the tokens of a stack, at its input only", 712, "prompt",
        "K trained rows of width D are put before the T embedded tokens, behind the embedding's LayerNorm. Frozen blocks read "
        "K + T rows; the first K rows of the result are dropped.",
    )  # fmt: skip
    f.cells(264, 124, 5, 54, 36, "plain", "a small red cube left")
    f.box(407, 200, 286, 52, "embedding, LayerNorm", small="words V × D, positions")
    f.down(407, 142, 174, 226, 262)
    f.text(175, 250, "K × D", "small")
    f.note(419, 250, "T × D")
    for y, kind in ((280, "trained"), (552, "gone")):
        f.cells(90, y, 3, 54, 36, kind)
        f.cells(264, y, 5, 54, 36)
    f.box(320, 356, 460, 44, "block 1")
    f.text(320, 422, "⋮")
    f.box(320, 476, 460, 44, "block L")
    f.down(320, 298, 334, 378, 406, 428, 454, 498, 534)
    f.note(332, 321, "(K + T) × D")
    f.text(175, 592, "dropped", "small")
    f.text(407, 592, "T × D", "small")
    f.note(32, 634, "positions='shift': the rows pass the embedding too, at positions 0 to K − 1.")
    return f


def prefix() -> Figure:
    f = Figure(
        "Prefix", "learned keys and values in front of an attention's own", 620, "prefix",
        "Query, key and value are frozen. K trained keys P_k and values P_v stand before the S computed ones, in every head "
        "of every layer; queries look at all of them. With mlp > 0 an embedding and an MLP make them during training.",
        "frozen trained made",
    )  # fmt: skip
    f.named(320, 112, "x", "T × D")
    f.down(320, 120, 158)
    for x, name in ((110, "query"), (320, "key"), (530, "value")):
        if x != 320:
            f.branch(320, 138, x, 138, x, 158)
        f.box(x, 181, 112, 46, name, small="D × D")
    for x, name, many in ((320, "k", "keys"), (530, "v", "values")):
        f.down(x, 204, 246)
        f.text(x - 78, 238, "K × N × H", "small")
        f.box(x - 78, 264, 60, 36, f"P_{{{name}}}", "trained")
        f.box(x, 264, 92, 36, name, "plain")
        f.down(x - 46, 282, 336)
        f.note(x - 34, 314, f"K + S {many}")
    f.down(110, 204, 336)
    f.text(122, 275, "q", anchor="start")
    f.box(200, 360, 316, 48, "softmax(q · [P_{k}; k]ᵀ / √H)", "plain")
    f.box(500, 360, 216, 48, "weights · [P_{v}; v]", "plain")
    f.right(360, 358, 392)
    f.box(500, 437, 112, 46, "out", small="D × D")
    f.down(500, 384, 414, 460, 494)
    f.text(500, 514, "T × D", "small")
    f.note(42, 428, "with mlp > 0, while training:")
    f.box(76, 464, 68, 46, "E", "trained", "K × D")
    f.box(218, 464, 164, 46, "W_{1}, tanh, W_{2}", "trained")
    f.box(358, 464, 64, 46, "P", "made")
    f.right(464, 110, 136, 300, 326)
    f.note(42, 514, "one E and W_{1} for all layers; only P is kept")
    return f


def _serial_row(f: Figure, y: float, boxes: tuple, arrows: tuple, skips: tuple):
    """A text layer from left to right: boxes (centre, width, text), arrows, and skips from a dot to a sum."""
    for x, w, text in boxes:
        f.box(x, y, w, 40, text, "trained" if text == "A" else "frozen")
    f.right(y, *arrows)
    for a, b in skips:
        f.node(b, y)
        f.branch(a, y, a, y - 40, b, y - 40, b, y - 11)


def adapters() -> Figure:
    f = Figure(
        "Adapters", "a bottleneck D → m → D after or beside a sublayer", 1096, "serial_adapter parallel_adapter compacter",
        "Left: a serial adapter reads what an attention or MLP gives, and its output is added to that. Right: a parallel "
        "adapter reads what the sublayer reads. Below: Houlsby's placement has one after every attention and MLP; Pfeiffer's "
        "has one per layer, after the MLP, and reads the normalised residual stream. Last: Compacter's matrices.",
        "frozen trained made",
    )  # fmt: skip
    for x, head, mid, branch, top in ((134, "serial", 198, 240, 264), (434, "parallel", 268, 158, 226)):
        side = x + 120
        f.text(x, 112, head, "head")
        f.named(x, 142, "x", "T × D")
        f.box(x, mid, 116, 44, "sublayer")
        f.branch(x, 158, x - 94, 158, x - 94, 456, x - 82, 456)
        f.branch(x, branch, side, branch, side, top)
        f.funnel(side, top + 20, 108, 64, 40, "D × m")
        f.funnel(side, top + 84, 64, 108, 40, "m × D")
        f.down(side, top + 40, top + 64)
        f.note(side + 10, top + 57, "act")
        f.arrow(side, top + 104, side, 398, x + 11, 398)
        f.text(x + 62, 390, "× s", "small")
        f.text(x + 10, 330, "y", anchor="start")
        f.node(x, 398)
        f.box(x, 456, 164, 40, "add x, LayerNorm")
        f.down(x, 150, mid - 22, mid + 22, 387, 409, 436, 476, 502)
    f.rule(528)
    f.text(32, 564, "placement='houlsby'", "head", "start")
    f.note(32, 586, "A reads y: after every attention and MLP")
    boxes = ((100, 92, "attention"), (184, 32, "A"), (284, 40, "LN"), (359, 62, "MLP"), (428, 32, "A"), (528, 40, "LN"))
    arrows = (30, 54, 146, 168, 200, 221, 243, 264, 304, 328, 390, 412, 444, 465, 487, 508, 548, 608)
    _serial_row(f, 656, boxes, arrows, ((38, 232), (312, 476)))
    f.text(32, 724, "placement='pfeiffer'", "head", "start")
    f.note(32, 746, "A reads LN(x + y): once per layer, after the MLP")
    boxes = ((99, 90, "attention"), (206, 40, "LN"), (278, 52, "MLP"), (572, 40, "LN"))
    arrows = (30, 54, 144, 155, 177, 186, 226, 252, 304, 479, 501, 519, 541, 552, 592, 608)
    _serial_row(f, 818, boxes, arrows, ((38, 166), (234, 530)))
    f.text(252, 770, "x", "small")
    f.text(400, 810, "y", "small")
    f.branch(318, 818, 318, 870, 334, 870)
    f.box(382, 870, 96, 36, "LN(x + y)")
    f.box(460, 870, 32, 36, "A", "trained")
    f.right(870, 430, 444)
    f.arrow(476, 870, 490, 870, 490, 829)
    f.node(490, 818)
    f.text(32, 934, "Compacter", "head", "start")
    f.note(136, 934, "serial; each matrix is a sum of n Kronecker products")
    f.box(74, 978, 84, 48, "D × m", "made")
    f.text(166, 984, "=  Σ_{i}")
    f.box(246, 978, 60, 48, "A_{i}", "trained")
    f.text(304, 984, "⊗")
    f.box(350, 978, 34, 48, "s_{i}", "trained")
    f.box(434, 978, 96, 30, "t_{i}", "trained")
    for x, text in ((246, "n × n, shared"), (350, "D/n × 1"), (434, "1 × m/n")):
        f.text(x, 1020, text, "small")
    return f


def lora() -> Figure:
    f = Figure(
        "LoRA", "a low-rank update beside a linear layer", 812, "lora dora vera loha pissa",
        "x goes through the frozen W and, beside it, through the trained A and B of rank r; the second path times s is added. "
        "Below, four relatives: DoRA scales each output's weights to a trained norm, VeRA trains two vectors around frozen "
        "random matrices, LoHa multiplies two low-rank matrices, PiSSA starts from the principal part of W.",
    )  # fmt: skip
    f.named(182, 112, "x", "T × in")
    f.branch(182, 138, 442, 138, 442, 160)
    f.box(182, 220, 180, 120, "W, b", small="in × out")
    f.funnel(442, 182, 150, 66, 44, "A")
    f.funnel(442, 258, 66, 150, 44, "B")
    f.down(442, 204, 236)
    for x, y, shape in ((454, 224, "T × r"), (530, 187, "in × r"), (530, 263, "r × out")):
        f.note(x, y, shape)
    f.arrow(442, 280, 442, 318, 193, 318)
    f.text(312, 310, "× s", "small")
    f.node(182, 318)
    f.down(182, 120, 160, 280, 307, 329, 358)
    f.named(182, 376, "y", "T × out")
    f.text(296, 352, "y = x W + b + s · x A B", "code", "start")
    f.note(296, 376, "s = α / r; B starts at zero")
    f.note(296, 398, "rsLoRA: s = α / √r. LoRA+: B learns faster")
    f.rule(422)
    relatives = (  # boxes and signs from left to right
        ("DoRA", "m · (W + s A B) / ‖W + s A B‖", "m: out, starts as the norms of W",
         (("W", 40, "frozen"), "+", ("s A B", 62, "trained"), "→", ("÷ norm", 76, "plain"), "×", ("m", 34, "trained"))),
        ("VeRA", "((x A) * d) B * l", "A, B random, shared by all sites",
         (("A", 46, "frozen"), "→", ("d", 34, "trained"), "→", ("B", 46, "frozen"), "→", ("l", 34, "trained"))),
        ("LoHa", "x ((A1 B1) * (A2 B2)) · α / r", "elementwise, a rank of up to r²",
         (("A_{1} B_{1}", 84, "trained"), "*", ("A_{2} B_{2}", 84, "trained"))),
        ("PiSSA", "s · x (A B − A0 B0)", "A, B start as the top r of W's SVD",
         (("A B", 84, "trained"), "−", ("A_{0} B_{0}", 84, "frozen"))),
    )  # fmt: skip
    for i, (name, equation, said, image) in enumerate(relatives):
        x, y = 32 + i % 2 * 304, 456 + i // 2 * 158
        f.text(x, y, name, "head", "start")
        f.text(x, y + 86, equation, "code", "start")
        f.note(x, y + 108, said)
        for part in image:
            if isinstance(part, str):
                f.text(x + 11, y + 44, part)
                x += 22
            else:
                f.box(x + part[1] / 2, y + 38, part[1], 40, part[0], part[2])
                x += part[1]
    return f


def _attention(f: Figure, x: float, strips: dict, chips: str = ""):
    """The first half of a post-norm text layer at x: queries, keys, values, attention, output, residual.

    `strips`: what is done to the output of query, key, value, out; `chips`: what stands in front of keys and values.
    """
    low = 62 if chips else 0
    f.named(x, 142, "x", "T × D")
    f.branch(x, 162, x - 130, 162, x - 130, 408 + low, x - 110, 408 + low)
    f.arrow(x, 162, x + 77, 162, x + 77, 178)
    f.down(x - 77, 162, 178)
    for at, name in ((x - 77, "query"), (x, "key"), (x + 77, "value")):
        end = 238 if name in strips else 214
        f.box(at, 196, 66, 36, name)
        if name in strips:
            f.box(at, 226, 66, 24, "", "trained", strips[name])
        if chips and name != "query":
            f.down(at, end, 262)
            f.box(at - 15, 276, 36, 28, "", "trained", chips)
            f.box(at + 19, 276, 28, 28, "", "plain", name[0])
            end = 290
        f.down(at, end, 256 + low)
    f.box(x, 274 + low, 220, 36, "softmax(q kᵀ / √H) v", "plain")
    f.box(x, 330 + low, 220, 36, "out")
    f.box(x, 408 + low, 220, 36, "add, LayerNorm")
    f.down(x, 150, 178, 292 + low, 312 + low, (372 if "out" in strips else 348) + low, 390 + low)


def scaling() -> Figure:
    f = Figure(
        "IA3 and SSF", "learned scales (and shifts) of what flows through a layer", 880, "ia3 ssf",
        "Left, IA3: keys, values and the inner activation of the MLP are multiplied by trained vectors that start at one. "
        "Right, SSF: after every linear and LayerNorm the output is multiplied by g and t is added.",
    )  # fmt: skip
    for x, name, g in ((182, "IA3", ""), (474, "SSF", "× g + t")):
        f.text(x, 112, name, "head")
        _attention(f, x, dict.fromkeys(("query", "key", "value", "out"), g) if g else {"key": "× l", "value": "× l"})
        for y, text in ((502, "up, D × F"), (656, "down, F × D"), (742, "add, LayerNorm")):
            f.box(x, y, 220, 36, text)
        f.box(x, 580, 220, 32, "GELU", "plain")
        for y in (360, 438, 532, 686, 772) if g else (626,):
            f.box(x, y, 220, 24, "", "trained", g or "× l, width F")
        more = 24 if g else 0
        f.down(x, 426 + more, 484, 520 + more, 564, 596, 614 + more, 674 + more, 724, 760 + more, 810)
        f.branch(x, 467, x - 130, 467, x - 130, 742, x - 110, 742)
    return f


def rotation() -> Figure:
    f = Figure(
        "OFT", "a block-diagonal rotation of the input of a linear layer", 736, "oft",
        "Q_i is a skew matrix of size b whose upper triangle is trained. Cayley's transform makes a rotation R_i of it. The "
        "input of the frozen linear is cut into n groups of b numbers, and group i is rotated by R_i.",
        "frozen trained made",
    )  # fmt: skip
    for i in range(25):
        row, column = divmod(i, 5)
        kind = "trained" if column > row else "made" if column < row else "plain"
        f.box(78 + column * 26, 122 + row * 26, 23, 23, "", kind, "0" if row == column else "")
    f.box(320, 174, 60, 60, "R_{i}", "made")
    f.box(504, 174, 134, 134, "", "plain")
    for i in range(4):
        f.box(456 + 32 * i, 126 + 32 * i, 29, 29, "", "made")
    f.right(174, 204, 290, 350, 437)
    f.text(246, 164, "Cayley", "small")
    names = (130, "Q_{i}", "skew, b(b − 1)/2 trained"), (320, "", "b × b"), (504, "R", "in × in, n blocks")
    for x, name, said in names:
        f.text(x, 268, name)
        f.text(x, 290 if name else 226, said, "small")
    f.text(32, 332, "R_i = (I − Q_i)(I + Q_i)⁻¹", "code", "start")
    f.text(608, 332, "y = (x R) W + b", "code", "end")
    f.rule(356)
    f.named(320, 390, "x", "T × in")
    for i, name in enumerate(("R_{1}", "R_{2}", "…", "R_{n}")):
        x = 149 + i * 114
        f.box(x, 420, 110, 32, "", "plain", "…" if i == 2 else "b")
        f.box(x, 486, 110, 44, name, "made")
        f.down(x, 436, 464, 508, 536)
    f.box(320, 564, 452, 56, "W, b", small="in × out")
    f.down(320, 592, 622)
    f.named(320, 644, "y", "T × out")
    return f


def vision_prompt() -> Figure:
    f = Figure(
        "VPT", "visual prompts: learned rows before the patches of a ViT", 868, "vpt",
        "Left, shallow: K trained rows enter once, before class token and patches, and flow through all blocks. Right, deep: "
        "every block has K trained rows of its own, which take the places of those that come out of the block before.",
    )  # fmt: skip
    for x, name in ((167, "shallow"), (473, "deep")):
        left, main = x - 133, x + 45
        f.text(x, 112, f"depth='{name}'", "head")
        for i in range(9):
            f.box(main - 23 + i % 3 * 23, 144 + i // 3 * 23, 20, 20, kind="plain")
        f.box(main, 250, 176, 48, "patch embedding", small="class token, positions")
        f.text(left + 43, 296, "K × D", "small")
        f.text(x + 133, 296, "(1 + P) × D", "small", "end")
        for y, block in ((322, "block 1"), (450, "block 2"), (578, "block L"), (706, "")):
            kind = "gone" if not block else "trained" if name == "deep" or block == "block 1" else "plain"
            f.cells(left, y, 3, 26, 32, kind)
            f.cells(left + 90, y, 6, 26, 32)
            if block:
                f.box(x, y + 64, 266, 40, block)
                f.down(x, y + 16, y + 44, *(() if block == "block 2" else (y + 84, y + 112)))
        f.text(x, 556, "⋮")
        f.text(left + 43, 744, "dropped", "small")
        f.box(main, 772, 176, 40, "LayerNorm")
        f.down(main, 201, 226, 274, 306, 722, 752)
    return f


def combined() -> Figure:
    f = Figure(
        "MAM and UniPELT", "methods together in one text layer", 890, "mam unipelt",
        "Left, MAM: a prefix in every attention and a scaled parallel adapter on every MLP. Right, UniPELT: a prefix, LoRA on "
        "query and value, and a serial adapter after the MLP, each times a trained gate G of the input.",
    )  # fmt: skip
    for x, name in ((182, "MAM"), (474, "UniPELT")):
        f.text(x, 112, name, "head")
        _attention(f, x, *(({}, "P") if name == "MAM" else (dict.fromkeys(("query", "value"), "+ G A B"), "G P")))
        f.box(x, 712, 220, 36, "add, LayerNorm")
        f.branch(x, 502, x - 130, 502, x - 130, 712, x - 110, 712)
        f.down(x, 730, 758)
    f.line(182, 488, 182, 502)
    f.down(138, 502, 520)
    f.arrow(182, 502, 244, 502, 244, 520)
    f.box(138, 566, 108, 92, "MLP", small="D × F × D")
    f.funnel(244, 538, 92, 56, 36, "D × m")
    f.funnel(244, 594, 56, 92, 36, "m × D")
    f.down(244, 556, 576)
    f.arrow(244, 612, 244, 654, 149, 654)
    f.text(198, 646, "× s", "small")
    f.node(138, 654)
    f.down(138, 612, 643, 665, 694)
    f.box(474, 566, 220, 92, "MLP", small="D × F × D")
    f.box(474, 625, 220, 26, "", "trained", "+ G adapter(LN(x + y))")
    f.down(474, 488, 520, 638, 694)
    for x, lines in ((182, ("prefix P: K = 30", "adapter: m = 512, s = 4")),
                     (474, ("G = σ(x g + c), per token", "K = 10, m = 48, r = 8"))):  # fmt: skip
        f.text(x, 784, lines[0], "small")
        f.text(x, 806, lines[1], "small")
    return f


def selective() -> Figure:
    f = Figure(
        "Selective", "which leaves of the base move", 836, "bitfit layer_norms head full selective",
        "A table of the base's leaves and five methods. BitFit trains biases, LayerNorms trains scales and biases of every "
        "LayerNorm, Head the decoder's head but not its vocabulary matrix, Full everything, Selective what a pattern names.",
        flow="",
    )  # fmt: skip
    leaves = (  # what stands where, and what of it each method trains: k matrices, s scale, b bias
        ("vision tower", "ksb", "", "", "", "ksb", ""),
        ("words, positions", "k", "", "", "", "k", ""),
        ("self-attention", "kb", "b", "", "", "kb", ""),
        ("cross-attention", "kb", "b", "", "", "kb", "kb"),
        ("MLP", "kb", "b", "", "", "kb", ""),
        ("LayerNorms", "sb", "b", "sb", "", "sb", ""),
        ("head, dense", "kb", "b", "", "kb", "kb", ""),
        ("head, LayerNorm", "sb", "b", "sb", "sb", "sb", ""),
        ("head, words", "b", "b", "", "b", "b", ""),
    )
    for i, name in enumerate(("BitFit", "LayerNorms", "Head", "Full", "Selective")):
        f.text(230 + 84 * i, 116, name, "small strong")
    for j, (name, parts, *trained) in enumerate(leaves):
        y = 162 + 62 * j
        f.rule(y - 31)
        f.text(32, y - 4, name, anchor="start")
        f.note(32, y + 16, ", ".join({"k": "matrices", "s": "scale", "b": "bias"}[p] for p in parts))
        for i, some in enumerate(trained):
            top = y - sum(27 if p == "k" else 11 for p in parts) / 2
            for part in parts:
                h = 24 if part == "k" else 8
                f.box(230 + 84 * i, top + h / 2, 48, h, kind="trained" if part in some else "frozen")
                top += h + 3
    f.rule(689)
    f.note(32, 718, "BitFit and LayerNorms: targets='text'. Selective: leaves='cross_attention'.")
    f.note(32, 740, "The head's vocabulary matrix is the words' embedding (tied).")
    f.note(32, 762, "Head(matrix='untied') adds a trained V × D matrix of its own.")
    return f


def data_path() -> Figure:
    f = Figure(
        "From images to a score", "what a run reads, in order", 874, "",
        "A folder of images and a table of texts become a Split, by Template and Processor Examples, then batches, training "
        "steps that change the tuned leaves only, an evaluation, and result.json.", flow="data",
    )  # fmt: skip
    for x, name, small, maker in ((100, "images", "a folder", "Processor"), (242, "texts", "a table", "Template")):
        f.box(x, 126, 132, 50, name, "plain", small)
        f.box(x, 306, 132, 50, maker, "plain")
        f.down(x, 151, 191, 241, 281, 331, 371)
    rooms = (
        ("", "CSV, JSONL, .txt files, COCO,", "Karpathy's, BLIP's or VQA v2 JSON"),
        ("Split", "images[i]: uint8, native size", "rows[i]: captions or questions"),
        ("", "Template: texts to token ids", "Processor: size of the images"),
        ("Examples", "tokens, targets, weights, prompt", "image_index: whose image"),
        ("batches", "a function of (seed, step)", "images are resized here"),
        (" ", "gradients of tuned leaves only", "(state, frozen, batch) → state"),
        ("evaluation", "the model writes, the task scores", "held-out splits, base and tuned"),
        ("result.json", "scores, blind baselines, counts,", "seconds, digests, versions"),
    )
    for i, (name, *lines) in enumerate(rooms):
        f.note(340, 122 + 90 * i, lines[0])
        f.note(340, 142 + 90 * i, lines[1])
        if name:
            f.box(171, 126 + 90 * i, 274, 50, name.strip(), "plain")
    f.down(171, 421, 461, 511, 551, 601, 641, 691, 731)
    f.text(92, 581.5, "train_step")
    f.box(186, 576, 68, 30, "tuned", "trained")
    f.box(264, 576, 68, 30, "frozen")
    f.arrow(308, 396, 324, 396, 324, 666, 308, 666)
    return f


def rooms() -> Figure:
    bands = (
        (("runtime/", "files, signals, locks, registries, the process"), ("tree", "trees of arrays by name: split, join"),
         ("ops", "small array operations")),
        (("methods/", "what is trained"), ("adapt/", "the sites where a method meets a model")),
        (("inputs/", "tokenizers, images, templates"), ("models/", "the protocol, BLIP, mPLUG, decoding")),
        (("data/", "data sets, examples, batches"), ("metrics/", "scores of captions and answers"),
         ("tasks/", "captioning and VQA")),
        (("interchange/", "PEFT and Hugging Face files, in and out"),),
        (("training/", "one run: setup, loop, checkpoints, result"), ("config", "the defaults of a run")),
        (("study/", "a grid of runs and its report"), ("apps/", "generate, export, demo, pretrain"),
         ("cli", "the jaxpeft command")),
    )  # fmt: skip
    order = "; ".join(", ".join(name for name, _ in band) for band in bands)
    f = Figure(
        "The rooms of jaxpeft", "a module imports from its own room and from those above it", 788, "",
        f"The folders of the package in the order of their imports: {order}.", "", "",
    )  # fmt: skip
    y = 96
    for band in bands:
        f.add("rect", x=64, y=y, width=544, height=28 * len(band) + 20, rx=10, class_="band")
        for i, (name, line) in enumerate(band):
            f.text(84, y + 29 + 28 * i, name, "code strong", "start")
            f.note(206, y + 29 + 28 * i, line)
        y += 28 * len(band) + 32
    f.arrow(44, y - 12, 44, 96)
    return f


def finished() -> dict[str, str]:
    """File name -> SVG."""
    made = (prompt, prefix, adapters, lora, scaling, rotation, vision_prompt, combined, selective, data_path, rooms)
    return {f"{one.__name__}.svg": one().svg() for one in made}


if __name__ == "__main__":
    for name, text in finished().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8", newline="\n")
