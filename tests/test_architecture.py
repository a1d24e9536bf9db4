"""The shape of the package: which room may import which, and where BLIP may be named."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxpeft"

# A module imports what stands above its own room, its own room, and nothing below.
ROOMS = (
    "runtime",
    "tree",
    "ops",
    "methods",
    "adapt",
    "inputs",
    "models",
    "data",
    "metrics",
    "tasks",
    "interchange",
    "training",
    "config",
    "study",
    "apps",
    "cli",
)
EVERYTHING = ("__init__", "__main__")  # what the package is made of, and its command

# Code outside the files of models and pre-training that names BLIP or its parts, each with the reason.
ALLOWED: dict[str, str] = {
    "models/base.py": "the registry names the models",
    "models/loading.py": "manifests of 0.1 do not say their model's type, and are all BLIPs'",
    "data/pipeline.py": "'blip' is the value of data.augment that saved configs hold",
    "runtime/renamed.py": "old names",
}
OF_BLIP = re.compile(
    r"blip|question_encoder|/vision|\[DEC\]|\[ENC\]|vision_width|text_width|encode_question|text_decoder", re.I
)


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "configs" not in path.parts]


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def name_of(path: Path) -> str:
    return ".".join(("jaxpeft", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports(path: Path):
    """Names of the package's modules that a file imports, wherever in it."""
    names = {name_of(one) for one in modules()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name.split(".")[0] == "jaxpeft")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxpeft":
            for one in node.names:
                whole = f"{node.module}.{one.name}"
                yield whole if whole in names else node.module


def test_every_room_imports_only_rooms_above_it():
    assert {room(name_of(path)) for path in modules()} == {*ROOMS, *EVERYTHING}
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules()
        for name in imports(path)
        if room(name_of(path)) in ROOMS
        and (room(name) not in ROOMS or ROOMS.index(room(name)) > ROOMS.index(room(name_of(path))))
        and name != "jaxpeft"
    ]
    assert not upward, "\n".join(upward)


def test_no_module_imports_itself_through_others():
    graph = {name_of(path): {one for one in imports(path)} for path in modules()}
    seen, path = {}, []

    def visit(name):
        if seen.get(name) == "done" or name == "jaxpeft":
            return
        assert seen.get(name) != "open", " -> ".join([*path[path.index(name) :], name])
        seen[name] = "open"
        path.append(name)
        for one in sorted(graph.get(name, ())):
            if one != name and not (
                name.startswith(one + ".") or one.startswith(name + ".")
            ):  # a package and its parts
                visit(one)
        path.pop()
        seen[name] = "done"

    for name in sorted(graph):
        visit(name)


def code_tokens(path: Path):
    """Names and strings of a file, without comments and docstrings."""
    source = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.STRING) and token.start[0] not in docstrings:
            yield token


def test_blip_is_named_in_its_own_files_only():
    families = (
        "blip",
        "mplug",
        "vit",
        "bert",
        "encoder_decoder",
        "siglip",
        "decoder",
        "prefix_lm",
        "paligemma",
        "smolvlm",
    )
    mine = [
        *PACKAGE.glob("apps/pretrain*.py"),
        *(one for name in families for one in PACKAGE.glob(f"models/{name}*.py")),
    ]
    found = {}
    for path in modules():
        if path not in mine:
            for token in code_tokens(path):
                if OF_BLIP.search(token.string):
                    found.setdefault(str(path.relative_to(PACKAGE)), []).append(f"{token.start[0]}: {token.string:.60}")
    assert len(ALLOWED) <= 5
    assert set(found) == set(ALLOWED), "\n".join(f"{name}\n   " + "\n   ".join(some) for name, some in found.items())


def test_the_package_is_imported_without_what_few_runs_need():
    heavy = ("tensorflow_datasets", "matplotlib", "scipy", "ray", "uvicorn")
    code = f"import sys, jaxpeft, jaxpeft.data.scenes; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["hub", "point", "evals"])
def test_modules_of_version_0_1_say_where_they_are(name):
    import jaxpeft

    with pytest.raises(ImportError, match=rf"jaxpeft\.{name} is now jaxpeft\.\w+\.\w+"):
        getattr(jaxpeft, name)


@pytest.mark.parametrize(
    "name, now", [("export_blip", "export_hf"), ("METHODS", "methods.METHODS"), ("expand", "adapt.sites.expand")]
)
def test_names_that_moved_say_where_they_are(name, now):
    import jaxpeft

    with pytest.raises(ImportError, match=rf"jaxpeft\.{name} is now jaxpeft\.{now}$"):
        getattr(jaxpeft, name)


def test_what_is_public_are_the_methods_and_some_twenty_functions():
    import types

    import jaxpeft
    from jaxpeft.methods import METHODS, Gated, Method, NewWords, Scoped

    public = {
        name
        for name, value in vars(jaxpeft).items()
        if not (name.startswith("_") or isinstance(value, types.ModuleType))
    }
    methods = {one.__name__ for one in (*METHODS.values(), Gated, Method, NewWords, Scoped)}
    assert public == set(jaxpeft.__all__) and methods < public and len(public - methods) <= 24
