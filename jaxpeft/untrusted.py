"""Reading files that strangers made: nothing in them is run, sizes are bounded before memory is taken, and whatever is wrong
is a ValueError that names the file. Pickled tensors have a reader of their own, `torch_files`; pictures have `images`."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import safetensors

MOST_JSON = 64 << 20  # bytes of a settings file; the largest tokenizer.json are a few MB
_REPEATED_GROUP = re.compile(r"\)\s*[*+{?]")


@contextlib.contextmanager
def reading(path, what: str = "cannot be read"):
    """Inside, any error about what a file holds becomes a ValueError naming it; those of the disk stay OSErrors."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except (
        Exception
    ) as error:  # a missing key, a text for a number, one bracket 100,000 times: all are the file's fault
        raise ValueError(f"{path} {what} ({type(error).__name__}: {error!s:.300})") from error


def kept_in(path: Path) -> Path:
    """`path`; raises ValueError where it is a link to something outside of its directory.

    A downloaded directory could otherwise have any file of this machine read. Hugging Face's cache keeps its files in a
    directory 'blobs' beside 'snapshots', with links to them, and those may link on to blobs/XX that all repositories of the
    cache share; these links are followed.
    """
    if not path.is_symlink():
        return path
    directory, real = path.parent.resolve(), path.resolve()
    repository = directory.parent.parent if directory.parent.name == "snapshots" else None
    stores = (repository / "blobs", repository.parent / "blobs" / real.parent.name) if repository else ()
    if not real.is_relative_to(directory) and real.parent not in stores:
        raise ValueError(
            f"{path} is a link to {real}, outside of its directory; such links are not followed: copy the file, or name "
            f"the one that it points to"
        )
    return path


def read_json(path, most: int = MOST_JSON) -> dict:
    """The JSON object in a settings file. Raises ValueError for anything else, and for more than `most` bytes."""
    path = kept_in(Path(path))
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes, more than the {most:,} that a file of settings may have")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def read_safetensors(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors by name, metadata) of a safetensors file, whose header cannot ask for more than the file holds."""
    path = kept_in(Path(path))
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  no iterator
    except OSError:
        raise
    except Exception as error:  # its own kind, and those of types that numpy lacks
        raise ValueError(f"{path} cannot be read as safetensors: {error}; fetch it again") from error


def beside(directory: Path, name) -> Path:
    """The file that another one names by `name`; raises ValueError where that is not a plain name in its directory."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(
            f"{directory}: a file beside it is called {name!r}; only plain names in that directory are followed"
        )
    return directory / name


def pattern(text, where) -> re.Pattern:
    """A regular expression from a file. Raises ValueError for one that is broken, or that could take for ever to match:
    a repeated group, more than four repeats, or more than 500 characters."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", text)) if isinstance(text, str) else 0
    if not isinstance(text, str) or len(text) > 500 or repeats > 4 or _REPEATED_GROUP.search(text):
        raise ValueError(f"{where}: the pattern {text!r:.80} is too long or repeats too much to be matched safely")
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {text!r:.80} is no regular expression: {error}") from error
