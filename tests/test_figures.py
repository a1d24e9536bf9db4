"""The drawn figures: made by their script to the byte, readable by machines, complete, and nothing runs into anything."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib import font_manager, ft2font

from jaxpeft.methods import METHODS

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
DRAWN = runpy.run_path(str(FIGURES / "draw.py"))["finished"]()
SVG = "{http://www.w3.org/2000/svg}"


def test_the_script_makes_the_committed_files_to_the_byte():
    assert sorted(DRAWN) == sorted(path.name for path in FIGURES.glob("*.svg"))
    for name, text in DRAWN.items():
        assert (FIGURES / name).read_bytes() == text.encode(), f"{name} is not what docs/figures/draw.py draws: run it"


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_a_figure_is_xml_with_title_and_description_and_stands_alone(name):
    root = ElementTree.fromstring(DRAWN[name])
    assert root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    assert root.get("role") == "img" and int(root.get("width")) <= 760
    assert "href" not in DRAWN[name] and "url(" not in DRAWN[name] and "<script" not in DRAWN[name]


def test_every_method_is_named_in_a_figure():
    words = {
        word
        for text in DRAWN.values()
        for one in ElementTree.fromstring(text).iter(f"{SVG}text")
        for word in "".join(one.itertext()).split()
    }
    assert not set(METHODS) - words


def _texts(root):
    """(text, (left, top, right, bottom)) of every line, in DejaVu, which is wider than the fonts of most systems."""
    for one in root.iter(f"{SVG}text"):
        kinds, said = one.get("class").split(), "".join(one.itertext())
        size = 22 if "title" in kinds else 14 if {"small", "code"} & set(kinds) else 16
        family = "DejaVu Sans Mono" if "code" in kinds else "DejaVu Sans"
        weight = "bold" if {"title", "head", "strong"} & set(kinds) else "normal"
        font = ft2font.FT2Font(font_manager.findfont(font_manager.FontProperties(family=family, weight=weight)))
        font.set_size(size, 72)
        font.set_text(said)
        width, x, y = font.get_width_height()[0] / 64, float(one.get("x")), float(one.get("y"))
        left = x - {"start": 0, "middle": width / 2, "end": width}[one.get("text-anchor")]
        yield said, (left, y - 0.75 * size, left + width, y + 0.2 * size)


def _meet(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _shapes(root):
    """(bounds, whether text may stand inside) of boxes, funnels, circles, and of each piece of a line."""
    for one in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(one.get(key)) for key in ("x", "y", "width", "height"))
        yield (x, y, x + w, y + h), True
    for one in root.iter(f"{SVG}circle"):
        x, y, r = (float(one.get(key)) for key in ("cx", "cy", "r"))
        yield (x - r, y - r, x + r, y + r), False
    for tag in ("polyline", "polygon"):
        for one in root.iter(f"{SVG}{tag}"):
            points = [tuple(map(float, pair.split(","))) for pair in one.get("points").split()]
            if len(points) == 4 and tag == "polygon":  # a funnel holds text where it is narrow
                xs, ys = sorted(x for x, _ in points), [y for _, y in points]
                yield (xs[1] - 14, min(ys), xs[2] + 14, max(ys)), True
            else:
                for (a, b), (c, d) in zip(points, points[1:], strict=False):
                    yield (min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1), False


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_no_text_leaves_its_box_or_meets_a_line_or_another_text(name):
    root = ElementTree.fromstring(DRAWN[name])
    texts, wrong = list(_texts(root)), []
    for i, (said, box) in enumerate(texts):
        wrong += [f"{said!r} meets {other!r}" for other, its in texts[:i] if _meet(box, its)]
        for bounds, holds in _shapes(root):
            inside = bounds[0] + 2 <= box[0] and box[2] <= bounds[2] - 2 and bounds[1] <= box[1] and box[3] <= bounds[3]
            if _meet(box, bounds) and not (holds and inside):
                wrong.append(f"{said!r} at {box} meets a shape at {bounds}")
    assert not wrong, "\n".join(wrong)
