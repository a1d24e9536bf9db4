"""The pages of the site and the README: commands run, Python runs, links lead somewhere, names exist.

Fences. ```bash is run here, on a few images and for two steps. ```sh is only parsed: it needs hardware, hours or other
programs. ```python is run as it stands, all blocks of a page in one namespace; a block that begins with `# mine.py` is a
module in which names like MyMethod stand for one's own.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import jax
import matplotlib
import mini_coco
import numpy as np
import pytest
from PIL import Image

import jaxpeft as jp
from jaxpeft import cli, config, data, methods, metrics, tasks
from jaxpeft.apps import demo
from jaxpeft.data import scenes
from jaxpeft.data.coco import prepare
from jaxpeft.runtime import host, registry
from jaxpeft.study import config as studies
from jaxpeft.study import grid, state
from jaxpeft.training import optim, preflight, results, run, setup

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
}
TEXT = "\n".join(PAGES.values())
REGISTRIES = (methods.METHODS, tasks.TASKS, data.DATASETS, optim.OPTIMIZERS, metrics.METRICS)
APPS = {name: importlib.import_module(module) for name, (module, _) in cli.APPS.items()}

# ml_collections loads config files with an old function of Python
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


# Commands


def lines(text, language):
    """The commands of a page, without comments; variables that the page sets are filled in."""
    joined = "\n".join(blocks(text, language)).replace("\\\n", " ")
    values = dict(re.findall(r"^(\w+)='(.*)'$", joined, re.MULTILINE))
    found = [re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines()]
    return [
        re.sub(r"\$(\w+)", lambda match: values.get(match[1], match[0]), line)
        for line in found
        if line and not re.match(r"\w+='", line)
    ]


def normal(command):
    """`python main.py --config=configs/NAME.py` is `jaxpeft run --config=NAME`."""
    return re.sub(r"--config=configs/(\w+)\.py", r"--config=\1", re.sub(r"^python main\.py\b", "jaxpeft run", command))


def programs(line):
    """The commands of ours in a line, those that another program is told to run too."""
    found = []
    for match in re.finditer(r"(python main\.py|jaxpeft [a-z]+|python (?:benchmarks|tests)/\w+\.py|pip|pytest) ", line):
        before = line[: match.start()]
        quoted = before.count("'") % 2 or before.count('"') % 2  # it stands inside quotes: they end it
        end = re.search("['\"]" if quoted else "$| && ", line[match.start() :]).start()
        found.append(normal(re.sub(r" >.*", "", line[match.start() :][:end]).strip()))
    return found


def distinct(commands):
    """Each command once; a study is planned once, with --dry_run or without."""
    return list({one.replace(" --dry_run", ""): one for one in commands}.values())


COMMANDS = distinct(
    normal(part) for text in PAGES.values() for line in lines(text, "bash") for part in line.split(" && ")
)
USED = {
    word
    for one in COMMANDS
    if not one.startswith("jaxpeft run")
    for word in shlex.split(one)
    if word.startswith("runs/")
}
PARSED = sorted({one for text in PAGES.values() for language in ("bash", "sh") for one in lines(text, language)})


def check_flags(path, words):
    """Every option of a script stands in its source."""
    source = (ROOT / path).read_text()
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            assert f'"{flag}"' in source or f'"{flag[2:]}"' in source, (path, flag)


@pytest.mark.parametrize("line", PARSED)
def test_commands_parse(line):
    for command in programs(line):
        words = shlex.split(command)
        if words[0] == "pip":
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\w+", "".join(re.findall(r"\[(.*)\]", command)))) <= set(known)
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests"))
        elif words[0] == "python":
            check_flags(words[1], words[2:])
        elif words[1] in APPS:
            source = Path(APPS[words[1]].__file__).read_text() + '"--imports"'
            assert all(f'"{word.partition("=")[0]}"' in source for word in words if word.startswith("--")), command
        else:
            args, rest = cli._parser().parse_known_args([word.replace("=I", "=0") for word in words[1:]])
            assert all(word.startswith("--config.") for word in rest), rest
            if not args.imports:
                cli.read_config(args.config, rest)


def test_most_pages_have_commands():
    assert len(COMMANDS) >= 15 and len(PARSED) >= 20 and sum("```python" in text for text in PAGES.values()) >= 12


SMALL = {"steps": 2, "batch_size": 8, "grad_accum": 1, "eval.batch_size": 4, "eval.base": False, "eval.gallery": False}
SCENES = {"data.n_train": 8, "data.n_val": 4, "data.n_test": 4}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with what the commands speak of: images, two tables, a BLIP directory, a drawn COCO."""
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
    model, params = jp.load("tiny", task="captioning")
    jp.export_hf(model, {"params": params}, "path/to/blip")
    jp.export_hf(model, {"params": params}, "Salesforce/blip-image-captioning-base")  # a directory comes before the hub
    mini_coco.draw("data", 6)
    return tmp_path


def do_run(words):
    args, rest = cli._parser().parse_known_args(["run", *words])
    c = cli.read_config(args.config, rest)
    if "settings" in c:
        assert grid.check(c) is None
        assert "runs" in state.plan(c, state.read(c, Path(args.workdir)))
        return
    if "pretrain" in c:  # tests/test_pretrain.py runs it
        assert sum(c.stages[name].steps for name in c.order) > 1000
        return
    if c.data.name in ("coco_captions", "vqav2"):  # tests/test_coco.py runs them
        c.data.data_dir = "prepared"
        last = c.eval.splits[-1]
        assert set(data.load(c.data, ["train", last])) == {"train", last}
        return
    c.update_from_flattened_dict(SMALL | (SCENES if c.data.name == "scenes" else {}))
    if c.data.n_images:
        c.data.n_images = 4
    if c.data.name == "folder":
        c.data.data_dir, c.data.val_fraction = "prepared_folder", 0.2
    if args.workdir not in USED:
        setup.check_config(c)
        step, shapes, _ = preflight.step_in_shapes(c, setup.abstract_model(c))
        jax.eval_shape(step, *shapes)
        return
    result = run.run(c, args.workdir, log=lambda _: None, accept_changes=args.accept_changes)
    assert result["status"] == "done" and result["timing"]["steps"] == 2


def do(command, monkeypatch):
    words = shlex.split(command)
    if words[:2] == ["jaxpeft", "run"]:
        do_run(words[2:])
    elif words[:2] == ["jaxpeft", "prepare"]:
        prepare.main([*words[2:], "--out", "prepared", "--any-size", "--workers", "1"])
    elif words[:2] == ["jaxpeft", "demo"]:
        ran = []
        monkeypatch.setattr("uvicorn.Server.run", lambda server, **_: ran.append(server.config.app))
        demo.main([*words[2:], "--port", "0"])
        assert callable(ran.pop())
    elif words[0] == "jaxpeft" and words[1] in APPS:
        assert not APPS[words[1]].main(words[2:])
    else:  # .ci/run installs and tests
        assert words[0] in ("pip", "pytest"), command


def order(command):
    """Data is prepared first, then runs are done, then used."""
    return next((i for i, start in enumerate(("jaxpeft prepare", "jaxpeft run")) if command.startswith(start)), 2)


def uses_runs(text):
    return any('"runs/mine' in block for block in blocks(text, "python"))


@pytest.mark.slow
def test_every_command_runs(place, monkeypatch, capsys):
    """Each distinct command once, training only in runs that others use, and in shapes elsewhere; then the Python that uses
    the runs they made."""
    monkeypatch.setattr(host, "keep_compiled_programs", lambda: None)  # this test's programs are of no use later
    in_ci = (ROOT / ".ci/run").read_text().replace('"$work/quickstart"', "runs/quickstart").splitlines()
    for command in sorted(COMMANDS, key=order):
        if command not in map(normal, in_ci):
            do(command, monkeypatch)
    assert Path("captions.jsonl").read_text().count("\n") == 20
    for name, text in PAGES.items():
        if uses_runs(text):
            execute(name, text)


# Python


class Named(dict):
    """A namespace in which a name that nobody defined is a new class."""

    def __missing__(self, name):
        if name.startswith("__") or hasattr(__builtins__, name) or name in dir(__import__("builtins")):
            raise KeyError(name)
        self[name] = type(name, (), {})
        return self[name]


def execute(name, text):
    space = {"__name__": "page"}
    for block in blocks(text, "python"):
        if not block.startswith("# mine.py"):
            exec(compile(block, name, "exec"), space)
    return space


@pytest.fixture
def restored():
    """What a page adds to a registry is taken out again."""
    before = [dict(one) for one in REGISTRIES]
    yield
    for one, entries in zip(REGISTRIES, before, strict=True):
        for name in [name for name in one if name not in entries]:
            del one[name]


RUNNABLE = [
    pytest.param(name, marks=pytest.mark.slow if "jp.run(" in text else ())
    for name, text in PAGES.items()
    if blocks(text, "python") and not uses_runs(text)
]


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch, restored):
    """No block raises; blocks with an assertion of their own hold it."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save("photo.jpg")
    execute(name, PAGES[name])


OWN = [(name, one) for name, text in PAGES.items() for one in blocks(text, "python") if one.startswith("# mine.py")]


@pytest.mark.parametrize(("name", "block"), OWN)
def test_entries_of_ones_own_are_found(name, block, restored):
    """In every registry that a `# mine.py` block names, what it sets is what the name then stands for."""
    space = Named()
    exec(block, {}, space)
    found = [one for one in space.values() if isinstance(one, registry.Registry)]
    assert {one.kind for one in found} == {one.kind for one in REGISTRIES}
    assert {one.find("mine") for one in found} == {value for value in space.values() if isinstance(value, type)}


# Links and names

LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def anchors(text):
    """The names of the headings of a page, as the site makes them."""
    heads = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in LINK.findall(without_code(PAGES[name])):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert target.resolve().is_relative_to(ROOT), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name):
    folders = "configs|benchmarks|results|jaxpeft|tests|colab|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", without_code(PAGES[name])):
        assert (ROOT / path).exists(), path


def test_images_have_a_text_in_their_place():
    for name, text in PAGES.items():
        for alt, target in re.findall(r"!\[(.*?)\]\((\S+?)\)", text):
            assert len(alt) > 15, (name, target)


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    for name in PAGES:
        page = name.removeprefix("docs/")
        assert name == "README.md" or page.startswith("results/") or f" {page}" in listed, page


def test_every_method_has_a_page():
    rows = re.findall(r"^\| \[`(\w+)`\]\((\w+\.md)\)", PAGES["docs/methods/index.md"], re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(methods.METHODS)
    for name, page in rows:
        assert f"\n::: jaxpeft.{methods.METHODS[name].__name__}\n" in PAGES[f"docs/methods/{page}"], name


def test_every_public_name_has_a_reference():
    documented = set(re.findall(r"^::: jaxpeft\.(\w+)$", TEXT, re.MULTILINE))
    assert documented == set(jp.__all__)


def known_keys():
    """Key -> its defaults, over both tasks, a folder and every method."""
    found = {}
    for task in ("captioning", "vqa"):
        for c in (config.get_config(task), config.folder(config.get_config(task), "")):
            for section, value in c.items():
                inner = value.items() if hasattr(value, "items") else [("", value)]
                for key, default in inner:
                    found.setdefault(f"{section}.{key}".rstrip("."), []).append(default)
    return found


def test_the_table_of_config_keys_is_complete():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| ", PAGES["docs/api/config.md"], re.MULTILINE)
    table, known = dict(rows), known_keys()
    assert len(table) == len(rows)
    assert set(table) == {key for key in known if not key.startswith("method.")} | {"method.name"}
    for key, text in table.items():
        if not key.startswith("task_options") and key != "data.root":
            default = {"task": "vqa"}.get(key, known[key][0])
            assert text == ("none" if default is None else f"`{default!r}`".replace("|", "\\|")), key


def test_the_tables_of_a_studys_keys_are_complete():
    """Every key of its config with its default, and every key that is read of a setting or a variant."""
    whole, setting, variant = re.split(r"^## .*$", PAGES["docs/api/study.md"], flags=re.MULTILINE)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", whole, re.MULTILINE))
    c = studies.study("x", "", ("vqa_stated",), {}, (), (64,))
    assert rows.keys() == set(c.keys())
    for key, text in rows.items():
        if text not in ("required", "made by `make_point`") and not key.startswith(("margins", "learning_rates")):
            value = c[key].to_dict() if hasattr(c[key], "to_dict") else c[key]
            assert text == f"`{value!r}`", key
    assert set(re.findall(r"^\| `(\w+)` ", setting, re.MULTILINE)) == {*grid.OF_STUDY, "base"}
    source = "".join((ROOT / f"jaxpeft/study/{name}.py").read_text() for name in ("axes", "grid", "search"))
    read = set(re.findall(r'variant(?:\.get\(|\[)"(\w+)"', source)) - {"axes"}  # which the study's axes make
    assert set(re.findall(r"^\| `(\w+)` ", variant, re.MULTILINE)) == read


def test_config_keys_of_the_pages_exist():
    fields = {f"method.{field}" for name in methods.METHODS for field in methods.defaults(name)}
    known = set(known_keys()) | fields
    sections = {key.partition(".")[0] for key in known}
    for name, text in PAGES.items():
        for key in re.findall(r"--config\.([a-z_.\d]+[a-z\d])", text):
            assert key in known | sections | {"key"}, (name, key)


def test_the_table_of_the_quickstart_is_the_result():
    result = json.loads((ROOT / "results/quickstart/vqa.json").read_text())
    table = results.table(result).strip().rpartition("\n")[0]  # its last line is how long it took
    assert table in PAGES["docs/tutorials/quickstart.md"]


def test_every_result_is_named():
    """A table that nobody finds."""
    missing = [path.name for path in (ROOT / "results").iterdir() if f"results/{path.name}" not in TEXT]
    assert not missing


def test_benchmarks_exist_and_have_their_options():
    found = re.findall(r"python (benchmarks/\w+\.py)([^`\n]*)", TEXT)
    assert len(found) >= 3
    for path, options in found:
        check_flags(path, re.findall(r"--[a-z_-]+", options))
