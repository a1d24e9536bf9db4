"""`--rerun=PATTERN`: finished runs whose ids match are done again, once.

A request is a file, DIR/reruns/NAME.json: the ids that match, each with the time when its result was written. A run whose
result has that very time is out of date; when it is done again the time is another, so nobody does it twice. Workers, restarts
after a kill and other launchers find the request in the directory and need no flag of their own.

NAME is made of the pattern and of the code. So the same command typed again, or started in several places, makes no second
request, unless the code has changed in between. To do runs again with the same code, delete the file.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import time
import uuid
from pathlib import Path

from jaxpeft.runtime import files
from jaxpeft.training import results


def written(directory: Path, run_id: str) -> int:
    """When the result of a run was written, in nanoseconds. Raises FileNotFoundError where there is none."""
    return (directory / "points" / run_id / "result.json").stat().st_mtime_ns


def asked(directory: Path) -> set[tuple[str, int]]:
    """(id, when its result was written) of all results that are to be made again."""
    requests = [json.loads(path.read_text()) for path in (directory / "reruns").glob("[!.]*.json")]
    return {pair for one in requests for pair in one["results"].items()}


def ask(directory: Path, pattern: str, state, log=print) -> None:
    """Write down that the runs of `state` whose ids match `pattern` are to be done again, and forget the failures of those
    that were given up. Raises ValueError where no run matches."""
    name = hashlib.sha256(json.dumps([pattern, results.code()]).encode()).hexdigest()[:16]
    path = directory / "reruns" / f"{name}.json"
    if path.exists():
        when = json.loads(path.read_text())["asked"]
        log(
            f"--rerun={pattern} was asked for at {when} and is not asked for again; to do these runs once more, delete {path}"
        )
        return
    matching = [run.id for run in state.runs if fnmatch.fnmatchcase(run.id, pattern)]
    if not matching:
        raise ValueError(f"--rerun={pattern} matches no run of this study; ids are like {state.runs[0].id}")
    for run_id in state.given_up.intersection(matching):
        (directory / "failures" / f"{run_id}.jsonl").unlink(missing_ok=True)
    found = {}
    for run_id in state.finished.keys() & set(matching):
        with contextlib.suppress(FileNotFoundError):  # another launcher asked at the same time, and its work has begun
            found[run_id] = written(directory, run_id)
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{uuid.uuid4().hex}")
    files.write_json(aside, {"pattern": pattern, "asked": time.strftime("%Y-%m-%d %H:%M:%S"), "results": found})
    with contextlib.suppress(FileExistsError):  # of two launchers that ask at once, the first counts
        os.link(aside, path)
    aside.unlink()
