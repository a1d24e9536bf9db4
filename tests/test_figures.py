"""The drawn figures: made by their script to the byte, readable by machines, and complete."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

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
