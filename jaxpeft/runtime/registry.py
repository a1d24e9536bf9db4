"""Registries of what a config can name: methods, tasks, data sets, optimizers and metrics.

A registry is a dictionary from names to classes or functions. Your own module adds an entry in one line,

    from jaxpeft.methods import METHODS
    METHODS["mine"] = Mine

and `--imports=my_module` (or `my_module.py`) on the command line imports it before any name is looked up. A run records the
modules that its entries came from, but loading a run does not import them, as the run may be untrusted: give `--imports`
again, or call `jp.load_run(workdir, imports=["my_module"])`.
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

digests: dict[str, str] = {}  # name of a module that `load` imported -> sha256 of its file at that time
given: list[str] = []  # all arguments of `load` in this process, to pass on to worker processes


class Unknown(ValueError):
    """A name that is not in a registry."""


class Registry(dict[str, Any]):
    """Name -> entry. Built-in entries cannot be replaced; others can be set again, as notebooks do."""

    def __init__(self, kind: str, entries: Mapping[str, Any]):
        super().__init__(entries)
        self.kind, self._own = kind, frozenset(entries)

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._own:
            raise ValueError(f"{name!r} is a built-in {self.kind}; choose another name")
        super().__setitem__(name, value)

    def find(self, name: str) -> Any:
        """The entry with this name. Raises Unknown, listing the known names."""
        if name not in self:
            raise Unknown(
                f"unknown {self.kind} {name!r}{did_you_mean(name, self)}; choose one of {', '.join(sorted(self))}, or add it "
                f"with --imports=MODULE"
            )
        return self[name]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the closest known name, '' if none is close."""
    known, (section, _, last) = list(known), str(name).rpartition(".")
    short = f"{section}." * bool(section) + "".join(word[:1] for word in last.split("_"))  # learning_rate: lr
    elsewhere = [one for one in known if one.endswith(f".{name}")]  # lr: optim.lr
    near = [short] if short in known else elsewhere or difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def load(names: Iterable[str]) -> None:
    """Import modules by name, also from the working directory, or by the path of a .py file.

    Raises ValueError if a module is not found; exceptions of the module itself propagate.
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
            raise  # the module exists, but something that it imports does not
        raise ValueError(f"--imports={name}: module not found; give an importable module or a .py file") from error
    finally:
        sys.path.remove(here)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"--imports={path}: file not found")
    name, path = path.stem, path.resolve()
    loaded = sys.modules.get(name)
    if loaded is not None:
        if (found := getattr(loaded, "__file__", None)) and Path(found).resolve() == path:
            return loaded
        raise ValueError(f"--imports={path}: another module named {name!r} is already loaded; rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


IMPORTS_HELP = "modules or .py files that define the run's own method, task, data set, optimizer or metric"


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--imports` to a command that loads runs."""
    parser.add_argument("--imports", nargs="+", default=[], metavar="MODULE", help=IMPORTS_HELP)


def modules_of(entries: Iterable[Any]) -> list[str]:
    """The modules outside jaxpeft that define the entries (classes or functions), as a run records them."""
    names = {getattr(one, "__module__", None) or "" for one in entries}
    return sorted(name for name in names if name and name.partition(".")[0] != "jaxpeft")
