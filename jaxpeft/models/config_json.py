"""A model's configuration <-> the settings in a file of another library, by a table of its keys.

A line of a table is (our field, section, key, default), section '' for the top of the file. The default is that of the other
library's class, for keys that a file lacks; it may be a function of the fields before it. `fixed` has (section, key, supported
values), the first of which is that of an absent key.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = tuple[str, str, str, Any]
Fixed = Iterable[tuple[str, str, tuple[Any, ...]]]


def read(
    path: str | Path, raw: dict[str, Any], settings: Any, lines: Iterable[Line], fixed: Fixed, **others: Any
) -> tuple[Any, dict[str, Any]]:
    """(the configuration `settings(...)` of a file's content `raw`, {key that it lacks: default}). `others`: more fields.

    Raises ValueError, with file and key, for a section that is missing and a value that is not supported.
    """
    fields, absent, names = {}, {}, {}
    for section, key, supported in fixed:
        value = part(path, raw, section).get(key)
        if value not in (None, *supported):
            raise ValueError(
                f"{path}: {_name(section, key)} is {value!r:.80}; supported: {', '.join(map(repr, supported))}"
            )
    for field, section, key, default in lines:
        name = names[field] = _name(section, key)
        value = part(path, raw, section).get(key, raw.get(key))
        if value is None and callable(default):
            value = default(fields)
        elif value is None:
            value = absent[name] = default
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]  # sizes may be [height, width], and end tokens a list
        fields[field] = value
    try:
        return settings(**fields, **others), absent
    except ValueError as error:  # about our fields
        said = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(error))
        raise ValueError(f"{path}: {said}") from error


def written(config: Any, lines: Iterable[Line], fixed: Fixed) -> dict[str, Any]:
    """The content of a file of which `read` makes this configuration."""
    raw: dict[str, Any] = {}
    values = [(section, key, supported[0]) for section, key, supported in fixed]
    values += [(section, key, getattr(config, field)) for field, section, key, _ in lines]
    for section, key, value in values:
        (raw.setdefault(section, {}) if section else raw)[key] = value
    return raw


def _name(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def part(path: str | Path, raw: dict[str, Any], section: str) -> dict[str, Any]:
    """A section of a file. Raises ValueError if it is missing."""
    found = raw.get(section) if section else raw
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {section} is {found!r:.80}, expected an object; save the config in full")
    return found
