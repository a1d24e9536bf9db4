"""`--rerun=PATTERN`: finished runs whose ids match, and those that were given up, are executed again, once.

Each of them is moved to DIR/stale/ID.MARK, where MARK is a digest of the pattern and of the code. A run that is there already
is not moved again: so the same command, repeated after a stop or started in several places, repeats no run twice, unless the
code changed. To execute a run once more with the same code, delete that directory.
"""

import fnmatch
import hashlib
import json
from pathlib import Path

from jaxpeft.study import state
from jaxpeft.training import results


def ask(directory: Path, pattern: str, found: state.State, log=print) -> None:
    """Set aside the runs of `found` that match. Raises ValueError where no run matches."""
    matching = [run.id for run in found.runs if fnmatch.fnmatchcase(run.id, pattern)]
    if not matching:
        raise ValueError(f"--rerun={pattern} matches no run of this study; an example of an id is {found.runs[0].id}")
    mark = hashlib.sha256(json.dumps([pattern, results.code()]).encode()).hexdigest()[:6]
    old = [name for name in matching if name in found.finished or name in found.given_up]
    aside = {name: directory / "stale" / f"{name}.{mark}" for name in old}
    new = [name for name in old if not aside[name].exists()]
    for name in new:
        try:
            state.set_aside(directory, name, mark)
        except OSError:
            if not aside[name].exists():  # else another launcher with the same request was faster
                raise
    log(f"--rerun={pattern}: {len(new)} runs are executed again")
    if len(new) < len(old):
        log(f"{len(old) - len(new)} already were; to repeat them once more, delete {directory}/stale/*.{mark}")
