"""The scores of every test case in every run of a study, in one small file for publication: DIR/cases.npz.

    SETTING/runs           the ids of the setting's runs
    SETTING/SPLIT/cases    the ids of the split's cases, questions or images
    SETTING/SPLIT/METRIC   (runs, cases) float16: the main metric of each case
    SETTING/SPLIT/nats     (runs, cases) float16: the negative log-likelihood of its reference texts, in nats
    SETTING/SPLIT/tokens   (cases,) the number of tokens of these texts

A case that a run does not have, as with another `data.types`, is NaN. Exact means over cases are in results.jsonl; these
numbers are for statistics over cases, such as bootstraps. `numpy.load` reads the file.
"""

import collections
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxpeft.runtime import files
from jaxpeft.tasks import TASKS


def write(directory: Path, rows: list[dict], splits: Iterable[str]) -> None:
    """Write DIR/cases.npz from the predictions of finished runs; `rows` are those of results.jsonl, `splits` are kept."""
    found: dict[str, np.ndarray] = {}
    for setting in sorted({row["setting"] for row in rows if row["status"] == "done"}):
        mine = [row for row in rows if row["setting"] == setting and row["status"] == "done"]
        found[f"{setting}/runs"] = np.array([row["id"] for row in mine])
        written = [_predictions(directory / "points" / row["id"], splits) for row in mine]
        key, metric = TASKS.find(mine[0]["task"]).id_key, mine[0]["main_metric"]
        for split in sorted(set().union(*written)):
            for name, array in _of_split([one[split] for one in written], key, metric).items():
                found[f"{setting}/{split}/{name}"] = array
    # launchers of one study may end together, and write it at once
    with files.replacing(directory / "cases.npz") as aside, aside.open("wb") as out:
        np.savez_compressed(out, **found)


def _predictions(workdir: Path, splits: Iterable[str]) -> dict[str, list[dict]]:
    """Split -> the lines of a run's predictions.jsonl; none where the file was removed."""
    found = collections.defaultdict(list)
    for row in files.read_jsonl(workdir / "predictions.jsonl"):
        if row["split"] in splits:
            found[row["split"]].append(row)
    return found


def _of_split(runs: list[list[dict]], key: str, metric: str) -> dict[str, np.ndarray]:
    """The arrays of a split from the rows of each run."""
    place = {name: i for i, name in enumerate(dict.fromkeys(row[key] for rows in runs for row in rows))}
    shape, tokens = (len(runs), len(place)), np.zeros(len(place), np.int32)
    found = {metric: np.full(shape, np.nan, np.float16), "nats": np.full(shape, np.nan, np.float16)}
    for i, rows in enumerate(runs):
        for row in rows:
            at = place[row[key]]
            found[metric][i, at] = row.get(f"tuned_{metric}", np.nan)
            found["nats"][i, at] = row.get("tuned_nats", np.nan)
            tokens[at] = row.get("tokens", tokens[at])
    return {"cases": np.array(list(place)), **found, "tokens": tokens}
