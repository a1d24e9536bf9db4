"""The files below a data directory: images, found by path, name or id, and the texts beside them."""

import functools
import os
import re
import unicodedata
from pathlib import Path

from jaxpeft.inputs import images


class Files:
    """The files below a directory. An image is found by its path, by a unique name, or by the id at the end of its name.

    A path must not leave the directory through '..' or an absolute path; symbolic links inside it are followed. Hidden files
    and directories, and __MACOSX, are ignored, unless a path names one exactly.
    """

    def __init__(self, root):
        self.root, self._known = Path(root), {}

    def all(self):
        """Every image file, as a path relative to the root, in order."""
        return [name for name in self.names if images.is_read(name)]

    def unread(self):
        """Images of unsupported formats, such as .svg, as paths relative to the root, in order."""
        return [name for name in self.names if images.is_unread(name)]

    def find(self, record, problems, directory=""):
        """The record's file as a path relative to the root, or None after a note (one per image, not per record).

        The record's name is relative to `directory` or, if it contains a directory, to the root.
        """
        key = (record["image"], None if record["image"] else record["image_id"], record["hint"], directory)
        if key not in self._known:
            self._known[key] = self._find(*key, record["where"], problems)
        return self._known[key]

    def _find(self, name, image_id, hint, directory, where, problems):
        what = f"{where}: {name or f'image id {image_id!r}'}"
        found = self._by_name(name, directory) if name else self._by_id(image_id, hint)
        if found is None:
            return problems.note("outside the directory", what)
        if len(found) > 1:
            return problems.note("ambiguous image", f"{what} matches {' and '.join(found[:2])}")
        if not found:
            at = f" not found in {directory}, the directory of this file" if name and directory else ""
            return problems.note("missing image", what + at)
        if not _is_text(found[0]):
            return problems.note("bad value", f"{what}: the name {ascii(found[0])} is not UTF-8; rename the file")
        return found[0]

    def _by_name(self, name, directory):
        """The files that match a name, several where it is ambiguous; None where it is outside the root."""
        spellings = dict.fromkeys([name, name.replace("\\", "/")])
        starts = {one: [directory, ""] if "/" in one and directory else [directory] for one in spellings}
        paths = [self._inside(one, start) for one in spellings for start in starts[one]]
        if not any(paths):
            return None
        for path in filter(None, paths):
            if os.path.isfile(self.root / path):
                return [path]
            if found := self._paths.get(normal(path)):
                return found
        below = f"{directory}/" if directory else ""
        found = [path for path in self._names.get(normal(name), []) if path.startswith(below)]
        return [path for path in found if path.split("/")[-1] == name] or found

    def _inside(self, name, start):
        """A name relative to a directory below the root, as a path relative to the root; None where it is outside."""
        if os.path.isabs(name):  # below the root as it was given or, where that is a link, as it is
            paths = [os.path.relpath(name, root) for root in (self.root.absolute(), self.root.resolve())]
        else:
            paths = [os.path.normpath(os.path.join(start, name))]
        return next((path.replace(os.sep, "/") for path in paths if path.split(os.sep)[0] != os.pardir), None)

    def _by_id(self, image_id, hint):
        key = str(int(image_id)) if image_id and image_id.isdecimal() else image_id
        found = self._ends.get(key and normal(key), [])
        return [path for path in found if len(found) > 1 and hint and hint in path] or found

    @functools.cached_property
    def names(self):
        """Every file that is not hidden, as a path relative to the root, in order."""
        names, seen = [], set()
        for directory, below, files in os.walk(self.root, followlinks=True):
            real = os.path.realpath(directory)
            if real in seen:  # symbolic links may form a cycle
                below[:] = []
                continue
            seen.add(real)
            below[:] = sorted(name for name in below if not name.startswith(".") and name != "__MACOSX")
            start = os.path.relpath(directory, self.root).replace(os.sep, "/")
            names += [name if start == "." else f"{start}/{name}" for name in files if not name.startswith(".")]
        return sorted(names)

    @functools.cached_property
    def _paths(self):
        """{normal path: paths}."""
        return _grouped((normal(path), path) for path in self.names)

    @functools.cached_property
    def _names(self):
        """{normal name of an image, supported or not: paths}."""
        return _grouped((normal(path.split("/")[-1]), path) for path in sorted(self.all() + self.unread()))

    @functools.cached_property
    def _ends(self):
        """{end of an image's name: paths}: COCO_val2014_000000000042.jpg ends in '42'."""
        stems = {path: normal(os.path.splitext(path.split("/")[-1])[0]) for path in self.all()}
        return _grouped((end, path) for path, stem in stems.items() for end in _ends(stem))


def _grouped(pairs):
    groups = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def normal(name):
    """A name in Unicode form NFC: macOS writes é as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def _is_text(name):
    try:
        name.encode()
    except UnicodeEncodeError:  # the file system has bytes that are not UTF-8
        return False
    return True


def _ends(stem):
    ends = {stem[match.start() :] for match in re.finditer(r"(?<![^\W_])[^\W_]", stem)} | {stem}
    if digits := re.search(r"[0-9]+$", stem):
        ends.add(str(int(digits[0])))
    return ends
