"""The README's Python is run as it stands, and every method can be named in a config."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import common, folder, point
from jaxpeft import methods

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save("photo.jpg")
    found = {}
    exec(block, found)
    assert isinstance(found["answers"][0], str) and set(found["merged"]) == {"vision", "text_decoder", "text_encoder"}
    assert {p.name for p in Path("adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {"config.json", "model.safetensors", "vocab.txt"} <= {p.name for p in Path("merged").iterdir()}
    assert {p.name for p in Path("tuned").iterdir()} == {"manifest.json", "tuned.safetensors"}
    assert "of the budget 50,000" in capsys.readouterr().out


def test_every_method_of_the_readme_exists_and_every_method_is_there():
    table = README.split("## Methods")[1].split("**Several at once.**")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    named = [name.strip() for row in rows for name in row.split(",")]
    assert sorted(named) == sorted(methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_a_config(name):
    c = point.get_config(f"method={name},size=4")
    fields = {key: value for key, value in c.method.items() if key != "name"}
    if name == "selective":
        fields["leaves"] = "norm"
    made = methods.build(name, "none", **fields)
    size = methods.size_field(name)
    assert c.size == (4 if size else 0)
    if size:
        inner = [getattr(one, "method", one) for one in made]
        assert 4 in [getattr(one, size, None) for one in inner]
    assert c.optim.lr > 0


def test_common_settings_of_the_readme_can_be_set():
    c = common.get_config("vqa", "lora")
    c.method.alpha = "16"
    assert methods.build("lora", **{k: v for k, v in c.method.items() if k != "name"})[0].scale == 2.0
    assert folder.get_config("root=pics,annotations=captions.csv,method=prefix,size=4").method.length == 4
