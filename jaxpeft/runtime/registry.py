"""What a config names and people can add to: methods, tasks, data sets, optimizers and metrics.

Each has one registry, a dictionary from names to what they stand for. An entry of your own is one line of a module of yours,

    from jaxpeft.methods import METHODS
    METHODS["mine"] = Mine

and `--imports=my_module` (or `my_module.py`) on the command line imports it before anything is looked up. A run records the
modules that its entries came from. Loading a run imports nothing by itself, as a run may be a stranger's: whoever loads it
gives `--imports` again, or `jp.load_run(workdir, imports=["my_module"])`.
"""

import argparse
import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

digests: dict[str, str] = {}  # name of a module that `load` imported -> sha256 of its file as it was then
given: list[str] = []  # what `load` was given in this process, for processes that go on elsewhere


class Unknown(ValueError):
    """A name that no entry has."""


class Registry(dict[str, Any]):
    """Name -> what it stands for. jaxpeft's own entries stay what they are; others can be set again, as notebooks do."""

    def __init__(self, kind: str, entries: Mapping[str, Any]):
        super().__init__(entries)
        self.kind, self._own = kind, frozenset(entries)

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._own:
            raise ValueError(f"{name!r} is a {self.kind} of jaxpeft itself; choose another name for yours")
        super().__setitem__(name, value)

    def find(self, name: str) -> Any:
        """The entry of a name. Raises Unknown, with the known names."""
        if name not in self:
            raise Unknown(
                f"unknown {self.kind} {name!r}{did_you_mean(name, self)}; choose one of {', '.join(sorted(self))}, or give "
                f"--imports=MODULE that adds it"
            )
        return self[name]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the nearest known name, '' where none is near."""
    known, (section, _, last) = list(known), str(name).rpartition(".")
    short = f"{section}." * bool(section) + "".join(word[:1] for word in last.split("_"))  # learning_rate: lr
    near = [short] if short in known else difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def load(names: Iterable[str]) -> None:
    """Import modules by name, as Python finds them from the working directory, or by the path of a .py file.

    Raises ValueError for one that is not there; what a module itself raises comes through.
    """
    for name in (one for some in names for one in some.split(",") if one):
        given.append(name)
        module = _load_file(Path(name)) if name.endswith(".py") else _load_module(name)
        if file := getattr(module, "__file__", None):
            digests.setdefault(module.__name__, hashlib.sha256(Path(file).read_bytes()).hexdigest())


def _load_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ValueError(
            f"--imports={name}: no module of that name; give one that Python finds, or a .py file"
        ) from error
    finally:
        sys.path.remove(here)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"--imports={path}: there is no such file")
    name, path = path.stem, path.resolve()
    loaded = sys.modules.get(name)
    if loaded is not None:
        if (found := getattr(loaded, "__file__", None)) and Path(found).resolve() == path:
            return loaded
        raise ValueError(f"--imports={path}: a module {name!r} is loaded already, from elsewhere; rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


IMPORTS_HELP = "modules or .py files that define the run's own method, task, data set, optimizer or metric"


def add_argument(parser: argparse.ArgumentParser) -> None:
    """`--imports` of a command that loads runs."""
    parser.add_argument("--imports", nargs="+", default=[], metavar="MODULE", help=IMPORTS_HELP)


def modules_of(entries: Iterable[Any]) -> list[str]:
    """The modules outside jaxpeft in which entries (classes or functions) were written, as a run records them."""
    names = {getattr(one, "__module__", None) or "" for one in entries}
    return sorted(name for name in names if name and name.partition(".")[0] != "jaxpeft")
