"""Files: written whole or not at all, and read with bounds where others made them.

Nothing in a file of others is run, sizes are bounded before memory is taken, and whatever is wrong is a ValueError that names
the file. Pickled tensors have a reader of their own, `torch_files`; pictures have `inputs.images`.
"""

import contextlib
import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors import SafetensorError
from safetensors.numpy import save_file

MOST_JSON = 64 << 20  # bytes of a settings file; the largest tokenizer.json are a few MB


@contextlib.contextmanager
def reading(path: str | Path, what: str = "cannot be read") -> Iterator[None]:
    """Inside, any error about what a file holds becomes a ValueError naming it; those of the disk stay OSErrors."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except (
        Exception
    ) as error:  # a missing key, a text for a number, one bracket 100,000 times: all are the file's fault
        raise ValueError(f"{path} {what} ({type(error).__name__}: {error!s:.300})") from error


def read_json(path: str | Path, most: int = MOST_JSON) -> dict:
    """The JSON object in a settings file. Raises ValueError for anything else, and for more than `most` bytes."""
    path = Path(path)
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes, more than the {most:,} that a file of settings may have")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """A safetensors file, mapped while the block runs; its header cannot ask for more than the file holds.

    Raises ValueError naming the file for one that is missing, damaged, or has types that numpy lacks.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            yield file
    except (OSError, ValueError):
        raise
    except Exception as error:  # its own kind, and those of types that numpy lacks
        raise ValueError(f"{path} cannot be read as safetensors: {error}; fetch it again") from error


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors by name, metadata) of a safetensors file."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  no iterator


def beside(directory: Path, name: Any) -> Path:
    """The file that another one names by `name`; raises ValueError where that is not a plain name in its directory."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(
            f"{directory}: a file beside it is called {name!r}; only plain names in that directory are followed"
        )
    return directory / name


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """A JSON value, indented, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON value a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_tensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Its library tells errors of the system in a class of its own; here they are OSErrors."""
    try:
        save_file(arrays, path, metadata)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


@contextlib.contextmanager
def whole_directory(directory: str | Path, own: Iterable[str]) -> Iterator[Path]:
    """Write a directory so that it is there whole or not at all: inside, files go into a sibling, which then takes its place.

    Raises ValueError where the directory holds other files than `own`, the names that this writer gives. What killed writers
    left beside it is deleted.
    """
    directory = Path(directory).absolute()
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ValueError(f"{directory} is a link or a file; choose a new directory")
    mine = f".{directory.name}.jaxpeft-"
    # a mount point cannot be renamed, nor anything in a directory that is not ours: then files are moved one by one
    inside = directory.exists() and (os.path.ismount(directory) or not os.access(directory.parent, os.W_OK))
    home = directory if inside else directory.parent
    if directory.exists():
        names = {path.name for path in directory.iterdir() if not path.name.startswith(mine)}
        if other := sorted(names - set(own)):
            raise ValueError(f"{directory} holds other files ({', '.join(other[:3])}); choose a new directory")
    home.mkdir(parents=True, exist_ok=True)
    new, old = (home / f"{mine}{kind}-{os.getpid()}" for kind in ("new", "old"))
    for left in home.glob(f"{glob.escape(mine)}*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdecimal() and int(pid) != os.getpid() and _lives(int(pid)):
            continue  # another process is writing
        if left.name.startswith(f"{mine}old-") and not directory.exists():  # killed between the two renames below
            os.rename(left, directory)
        shutil.rmtree(left, ignore_errors=True)
    try:
        new.mkdir()
        yield new
        if inside:
            for path in sorted(new.iterdir()):
                os.replace(path, directory / path.name)
        else:
            if directory.exists():
                os.rename(directory, old)
            os.rename(new, directory)
    except BaseException:
        if old.exists() and not directory.exists():
            os.rename(old, directory)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _lives(pid: int) -> bool:
    """Whether a process of this host has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
