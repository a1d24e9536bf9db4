"""Atomic writes of files, and bounded reads of untrusted ones.

No code in an untrusted file is executed, sizes are checked before memory is allocated, and every defect is a ValueError that
names the file. Pickled tensors are read by `torch_files`, images by `inputs.images`.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors import SafetensorError
from safetensors.numpy import save_file

MOST_JSON = 64 << 20  # bytes; the largest tokenizer.json files have a few MB


@contextlib.contextmanager
def reading(path: str | Path, what: str = "cannot be read") -> Iterator[None]:
    """Turn any error about a file's content into a ValueError that names the file; disk errors stay OSErrors."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:  # a missing key, a string for a number, 100,000 brackets: all are defects of the file
        raise ValueError(f"{path} {what} ({type(error).__name__}: {error!s:.300})") from error


def name_for(text: str) -> str:
    """A file name of at most 200 bytes for any text, such as a path: quoted as in a URL, and cut where it is longer."""
    quoted = urllib.parse.quote(text, safe="")
    if len(quoted) <= 200:
        return quoted
    return f"{quoted[:160]}-{hashlib.sha256(quoted.encode()).hexdigest()[:32]}"


def read_json(path: str | Path, most: int = MOST_JSON) -> dict:
    """Read the JSON object in a file. Raises ValueError for any other content, and for more than `most` bytes."""
    path = Path(path)
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes, more than the limit of {most:,} for a JSON file")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} contains a JSON {type(value).__name__}, expected an object")
    return value


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file, memory-mapped while the block runs; the sizes in its header are checked against the file.

    Raises ValueError, naming the file, if it is missing or damaged, or has data types that numpy lacks.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            yield file
    except (OSError, ValueError):
        raise
    except Exception as error:  # SafetensorError, and errors about data types that numpy lacks
        raise ValueError(f"{path} cannot be read as safetensors: {error}; download it again") from error


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file: (tensors by name, metadata)."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  no iterator


def beside(directory: Path, name: Any) -> Path:
    """The path of a file that another file refers to; raises ValueError unless `name` is a plain file name."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(
            f"{directory}: invalid reference to a file {name!r}; expected the name of a file in this directory"
        )
    return directory / name


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: the block writes a file next to it, which then takes its place. A reader sees the old content
    or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # hosts that share a directory repeat process ids
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def create_new(path: Path, text: str) -> bool:
    """Write a file unless it exists -> whether it was written. Other processes see the whole file or none; on file systems
    without hard links (mounted buckets, exFAT) they may see a part of it for a moment."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        aside.write_text(text, encoding="utf-8")
        try:
            os.link(aside, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            with path.open("x", encoding="utf-8") as out:
                out.write(text)
        return True
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON value atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_jsonl(path: Path) -> list[Any]:
    """The JSON values of a file, one per line; [] where there is no file."""
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line]  # splitlines() would also split inside texts


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_tensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. The library reports system errors in a class of its own; here they are OSErrors. It also makes
    files that only their owner can read; here they have the mode of other files."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(arrays, path, metadata)
        path.chmod(mode)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


@contextlib.contextmanager
def whole_directory(directory: str | Path, own: Iterable[str]) -> Iterator[Path]:
    """Write a directory atomically: the block writes its files into a sibling directory, which then takes its place.

    Raises ValueError if the directory holds files other than `own`, the names that this writer uses. Leftovers of killed
    writers of this host are deleted; whether a writer of another host lives cannot be seen.
    """
    directory = Path(directory).absolute()
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ValueError(f"{directory} is a symbolic link or a file; choose a new directory")
    mine = f".{directory.name}.jaxpeft-"
    # neither a mount point nor a directory in a read-only parent can be renamed: their files are moved one by one
    inside = directory.exists() and (os.path.ismount(directory) or not os.access(directory.parent, os.W_OK))
    home = directory if inside else directory.parent
    if directory.exists():
        names = {path.name for path in directory.iterdir() if not path.name.startswith(mine)}
        if other := sorted(names - set(own)):
            raise ValueError(f"{directory} holds other files ({', '.join(other[:3])}); choose a new directory")
    home.mkdir(parents=True, exist_ok=True)
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    owner = f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    new, old = (home / f"{mine}{kind}-{owner}" for kind in ("new", "old"))
    for left in home.glob(f"{glob.escape(mine)}*-{host}-*-*"):
        pid = left.name.split("-")[-2]
        if pid.isdecimal() and int(pid) != os.getpid() and lives(int(pid)):
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


def lives(pid: int) -> bool:
    """Whether a process with this id exists on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
