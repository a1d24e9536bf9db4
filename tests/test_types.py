"""Annotations: every function of the annotated folders says what it takes and returns, and so does jaxpeft's own interface.

`pyright` (CI, pre-commit) says whether that is true.
"""

import ast
import inspect
from pathlib import Path

import pytest

import jaxpeft

PACKAGE = Path(jaxpeft.__file__).parent
ANNOTATED = ("methods", "adapt", "models/base.py", "training")  # as `include` of [tool.pyright] in pyproject.toml
LATER = (
    "training/loop.py",
    "training/checkpoint.py",
)  # annotated on the branch `loop`: to be emptied when it is merged


def bare(source: str):
    """(line, name, what has no annotation) of every function in a file that lacks one."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = [*node.args.posonlyargs, *node.args.args]
        given = given[1:] if given and given[0].arg in ("self", "cls") else given
        given += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
        missing = [one.arg for one in given if one.annotation is None]
        missing += ["return"] if node.returns is None else []
        if missing:
            yield node.lineno, node.name, missing


def files(where: str) -> list[Path]:
    path = PACKAGE / where
    return [path] if path.suffix else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("where", ANNOTATED)
def test_every_function_is_annotated(where):
    found = [path for path in files(where) if path.relative_to(PACKAGE).as_posix() not in LATER]
    assert found
    lines = [
        f"{path}:{line} {name}: {', '.join(some)}" for path in found for line, name, some in bare(path.read_text())
    ]
    assert not lines, "\n".join(lines)


def test_every_function_of_the_interface_is_annotated():
    looked_at, lines = set(), []
    for name in jaxpeft.__all__:
        one = getattr(jaxpeft, name)
        if not (inspect.isclass(one) or inspect.isfunction(one)) or not one.__module__.startswith("jaxpeft."):
            continue  # a registry, a type of arrays
        path = PACKAGE.joinpath(*one.__module__.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        nodes = {node.name: node for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
        if one.__name__ in nodes:
            looked_at.add(name)
            node = ast.unparse(nodes[one.__name__])
            lines += [f"{path} {name}: {owner} {', '.join(some)}" for _, owner, some in bare(node)]
    assert {"LoRA", "attach", "export_peft", "generate", "load", "run", "split"} <= looked_at
    assert not lines, "\n".join(lines)


def test_what_is_not_annotated_is_found():
    source = """
class A:
    def f(self, x: int, *args, y=0, **kwargs) -> None:
        def inner(z): return lambda w: w
    @staticmethod
    def g(x): ...
    @classmethod
    async def h(cls): ...
    def fine(self, x: int) -> int: ...
def fine(x: int, /, *args: int, y: int = 0, **kwargs: int) -> int: ...
"""
    assert [(name, missing) for _, name, missing in bare(source)] == [
        ("f", ["y", "args", "kwargs"]),
        ("g", ["x", "return"]),
        ("h", ["return"]),
        ("inner", ["z", "return"]),
    ]
