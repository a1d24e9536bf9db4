"""The README's Python is run as it stands, and every method can be named in a config."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
from pathlib import Path

import mini_coco
import numpy as np
import pytest
from PIL import Image

import jaxpeft as jp
from configs import folder
from configs import point as point_config
from jaxpeft import config, data, methods
from jaxpeft.apps import demo, export, generate
from jaxpeft.data import scenes
from jaxpeft.data.coco import prepare
from jaxpeft.runtime import host, registry
from jaxpeft.study import grid, state
from jaxpeft.training import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_python_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    block, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save("photo.jpg")
    found = {}
    exec(block, found)
    assert isinstance(found["answers"][0], str) and set(found["merged"]) == {"vision", "text_decoder", "text_encoder"}
    assert {p.name for p in Path("adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {"config.json", "model.safetensors", "vocab.txt"} <= {p.name for p in Path("merged").iterdir()}
    assert {p.name for p in Path("tuned").iterdir()} == {"manifest.json", "tuned.safetensors"}
    assert "of the budget 50,000" in capsys.readouterr().out


def test_the_entries_of_ones_own_in_the_readme_are_found():
    """In every registry that the block names, what it sets is what the name then stands for."""
    _, block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    things = {name: type(name, (), {}) for name in ("MyMethod", "MyTask", "load", "rule", "score")}
    found = dict(things)
    exec(block, found)
    registries = [one for one in found.values() if isinstance(one, registry.Registry)]
    try:
        assert {one.kind for one in registries} == {"method", "task", "data set", "optimizer", "metric"}
        assert {one.find("mine") for one in registries} == set(things.values())
    finally:
        for one in registries:
            del one["mine"]


def test_every_method_of_the_readme_exists_and_every_method_is_there():
    table = README.split("## Methods")[1].split("**Several at once.**")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    named = [name.strip() for row in rows for name in row.split(",")]
    assert sorted(named) == sorted(methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_has_a_config(name):
    c = point_config.get_config(f"method={name},size=4")
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
    c = config.get_config("vqa", "lora")
    c.method.alpha = "16"
    assert methods.build("lora", **{k: v for k, v in c.method.items() if k != "name"})[0].scale == 2.0
    assert folder.get_config("root=pics,annotations=captions.csv,method=prefix,size=4").method.length == 4


# Commands. Each is run with its own arguments, from the README's own order, on a few pictures and for two steps.

SMALL = {"steps": 2, "batch_size": 8, "eval.batch_size": 4, "eval.base": False, "eval.gallery": False}
SCENES = {"data.n_train": 8, "data.n_val": 4, "data.n_test": 4}


def commands():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    return [
        re.sub(r"\s+#.*", "", part).strip()
        for line in blocks.splitlines()
        for part in line.split(" && ")
        if part.strip()
    ]


def _config(argument):
    """--config=FILE.py:ARGUMENTS -> the config."""
    path, _, arguments = argument.removeprefix("--config=").partition(":")
    spec = importlib.util.spec_from_file_location("config", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arguments) if arguments else module.get_config()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with what the README's commands speak of: pictures, two tables, a BLIP directory, a drawn COCO."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("pics")
    split = scenes.load({"n_train": 20}, ["train"])["train"]
    for i in range(20):
        Image.fromarray(split.images[i]).save(f"pics/{i}.png")
    shutil.copy("pics/0.png", "a.jpg")
    captions = [f"{i}.png,{row['captions'][0]}" for i, row in enumerate(split.rows)]
    questions = [
        f"{i}.png,{q['question']},{q['answers'][0]}" for i, row in enumerate(split.rows) for q in row["questions"][:1]
    ]
    Path("pics/metadata.csv").write_text("\n".join(["file_name,text", *captions]))
    Path("pics/questions.csv").write_text("\n".join(["image,question,answer", *questions]))
    jp.export_hf(*_plain(), "path/to/blip")
    jp.export_hf(*_plain(), "Salesforce/blip-image-captioning-base")  # a directory of that name comes before the hub
    mini_coco.draw("data", 6)
    return tmp_path


def _plain():
    model, params = jp.load("tiny", task="captioning")
    return model, {"params": params}


def _prepared(config):
    config.data.data_dir = "prepared"
    return config.data


def _run(words):
    settings = dict(word.removeprefix("--config.").split("=", 1) for word in words if word.startswith("--config."))
    config = _config(next(word for word in words if word.startswith("--config=")))
    workdir = next(word for word in words if word.startswith("--workdir=")).removeprefix("--workdir=")
    if "settings" in config:
        assert grid.check(config) is None
        assert "runs" in state.plan(config, state.read(config, Path(workdir)))
        return
    if "pretrain" in config:  # tests/test_pretrain.py runs it
        assert sum(config.stages[name].steps for name in config.order) > 1000
        return
    config.update_from_flattened_dict({key: ast.literal_eval(value) for key, value in settings.items()})
    config.update_from_flattened_dict(SMALL | (SCENES if config.data.name == "scenes" else {}))
    if config.data.n_images:
        config.data.n_images = 4
    if config.data.name == "folder":
        config.data.data_dir, config.data.val_fraction = "prepared_folder", 0.2
    if config.data.name in ("coco_captions", "vqav2"):  # tests/test_coco.py runs them
        assert set(data.load(_prepared(config), ["train", "test"])) == {"train", "test"}
        return
    result = run.run(config, workdir, log=lambda _: None)
    assert result["status"] == "done" and result["timing"]["steps"] == 2


@pytest.mark.slow
def test_every_command_of_the_readme_runs(place, monkeypatch, capsys):
    monkeypatch.setattr(host, "keep_compiled_programs", lambda: None)  # this test's programs are of no use later
    ran = []
    for command in commands():
        words = shlex.split(command)
        if command in (ROOT / ".ci/run").read_text().replace('"$work/quickstart"', "runs/quickstart"):
            continue
        if words[:2] == ["python", "main.py"]:
            _run(words[2:])
        elif words[:2] == ["jaxpeft", "generate"]:
            assert generate.main(words[2:]) == 0
        elif words[:2] == ["jaxpeft", "export"]:
            assert export.main(words[2:]) == 0
        elif words[:2] == ["jaxpeft", "prepare"]:
            assert prepare.main([*words[2:], "--out", "prepared", "--any-size", "--workers", "1"]) == 0
        elif words[:2] == ["jaxpeft", "demo"]:
            monkeypatch.setattr("uvicorn.Server.run", lambda server, **_: ran.append(server.config.app))
            demo.main([*words[2:], "--port", "0"])
            assert callable(ran.pop())
        else:  # what .ci/run does not install is tested where it is used
            assert words[:3] == ["pip", "install", "-e"], command
            continue
        ran.append(command)
    assert len(ran) >= 14 and Path("captions.jsonl").read_text().count("\n") == 20


def test_every_result_is_in_the_readme():
    """A table that nobody finds; and a section that an edit has cut away by accident."""
    missing = [path.name for path in (ROOT / "results").iterdir() if f"results/{path.name}" not in README]
    assert not missing
    assert "### Scale and survival" in README


def test_benchmarks_of_the_readme_exist_and_have_their_options():
    found = re.findall(r"python (benchmarks/\w+\.py)([^`\n]*)", README)
    assert len(found) >= 8
    for path, options in found:
        text = (ROOT / path).read_text()
        for option in re.findall(r"(--[a-z-]+)", options):
            assert f'"{option}"' in text, (path, option)
