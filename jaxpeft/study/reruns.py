"""`--rerun=PATTERN`: finished runs whose ids match are executed again, once.

A request is a file, DIR/reruns/NAME.json: the matching ids, each with the time when its result was written. A run whose result
still has that time is out of date; executing it again changes the time, so it is executed again only once. Workers, restarts
after a kill and other launchers find the request in the directory and do not need the flag.

NAME is a digest of the pattern and of the code. So the same command, repeated or started in several places, makes no second
request, unless the code changed. To execute the runs once more with the same code, delete the file.
"""

import contextlib
import fnmatch
import hashlib
import json
import time
from pathlib import Path

from jaxpeft.runtime import files
from jaxpeft.training import results


def written(directory: Path, run_id: str) -> int:
    """The time when the result of a run was written, in nanoseconds. Raises FileNotFoundError where there is none."""
    return (directory / "points" / run_id / "result.json").stat().st_mtime_ns


def asked(directory: Path) -> set[tuple[str, int]]:
    """(id, time when its result was written) of all runs that were requested again."""
    requests = [json.loads(path.read_text()) for path in (directory / "reruns").glob("[!.]*.json")]
    return {pair for one in requests for pair in one["results"].items()}


def ask(directory: Path, pattern: str, state, log=print) -> None:
    """Request that the runs of `state` whose ids match `pattern` are executed again, and delete the recorded failures of those
    that were given up. Raises ValueError where no run matches."""
    name = hashlib.sha256(json.dumps([pattern, results.code()]).encode()).hexdigest()[:16]
    path = directory / "reruns" / f"{name}.json"
    if path.exists():
        when = json.loads(path.read_text())["asked"]
        log(f"--rerun={pattern} was already requested at {when}; to run these once more, delete {path}")
        return
    matching = [run.id for run in state.runs if fnmatch.fnmatchcase(run.id, pattern)]
    if not matching:
        raise ValueError(f"--rerun={pattern} matches no run of this study; an example of an id is {state.runs[0].id}")
    for run_id in state.given_up.intersection(matching):
        (directory / "failures" / f"{run_id}.jsonl").unlink(missing_ok=True)
    found = {}
    for run_id in state.finished.keys() & set(matching):
        with contextlib.suppress(FileNotFoundError):  # the work on another launcher's request has begun
            found[run_id] = written(directory, run_id)
    path.parent.mkdir(exist_ok=True)
    request = {"pattern": pattern, "asked": time.strftime("%Y-%m-%d %H:%M:%S"), "results": found}
    files.create_new(path, json.dumps(request, indent=1) + "\n")  # of two simultaneous requests the first one counts
