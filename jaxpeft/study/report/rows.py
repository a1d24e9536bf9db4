"""The data of a report, read from a study's files: a flat row per run, and the runs that claims are judged on."""

import collections
import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from jaxpeft.runtime import files, renamed
from jaxpeft.study import search
from jaxpeft.study.claims import MARGINS, Result, Scale
from jaxpeft.study.grid import Cell, best_learning_rate, validation_score

COLUMNS = (
    "id", "setting", "task", "variant", "method", "head", "size", "n_images", "seed", "lr", "chosen", "status", "tuned",
    "stored", "percent", "validation", "test", "test_nll", "forgetting", "steps", "stopped", "step_s", "compile_s",
    "total_s", "error",
)  # fmt: skip


@dataclasses.dataclass
class Study:
    """The data of a report."""

    config: dict
    command: str
    rows: list[dict]  # flat, one per run, with COLUMNS
    # the runs of the search, failed ones too; the rate of each cell was chosen by the 'choice' of those that are done, not all
    # of which have test scores
    searched: list[dict]
    results: list[Result]  # what claims are judged on: the chosen run of each cell and seed
    scales: list[Scale]
    mixed: list[Cell]  # cells whose runs were made by different code or from different data or bases
    directory: Path
    gains: dict[str, float] = dataclasses.field(default_factory=dict)  # search.budget_gains

    @property
    def runs(self) -> list[dict]:
        """All runs: those of the search are among `rows`, unless it had fewer steps than the other runs."""
        return [*{row["id"]: row for row in (*self.rows, *self.searched)}.values()]

    @property
    def in_nats(self) -> bool:
        """Whether nats per token are the study's measure, by which the best is chosen."""
        return self.config.get("measure") == "nll"

    def metric(self, setting: str) -> str:
        """The main metric of a setting; '' before its first run."""
        return next((row["metric"] for row in self.rows if row["setting"] == setting and row["status"] == "done"), "")

    def bases(self, setting: str) -> dict[int, float]:
        """seed -> the test score of the frozen base. A base that all seeds share is scored with the first one only."""
        mine = [row for row in self.rows if row["setting"] == setting]
        return {row["seed"]: row["base"] for row in mine if row.get("base") is not None}

    def base(self, setting: str) -> float | None:
        """The mean test score of the frozen base; None where it was not scored."""
        return statistics.fmean(found.values()) if (found := self.bases(setting)) else None

    def blind(self, setting: str) -> float:
        """The test score of the best guess without images."""
        return _blind(self.rows, setting)

    def scale(self, setting: str) -> Scale | None:
        """The scale of a setting; None where no score is above the best guess without images."""
        return next((one for one in self.scales if one.setting == setting), None)

    def curve(self, row: dict) -> list[tuple[int, float]]:
        """(step, validation loss) of a run: those in its result, or else in its metrics.jsonl; [] where there are neither."""
        if row["curve"]:
            return [tuple(pair) for pair in row["curve"]]
        lines = files.read_jsonl(self.directory / "points" / row["id"] / "metrics.jsonl")
        return [(one["step"], one["validation_loss"]) for one in lines if "validation_loss" in one]


def read(directory: Path, mixed_code: bool = False) -> Study:
    """Read a study's files, also those of version 0.1.

    Raises ValueError where there are none, and where runs of one cell were made by different code or from different data or
    bases, unless `mixed_code`: runs that are compared within a cell must differ in learning rate and seed only.
    """
    if not (directory / "results.jsonl").exists():
        raise ValueError(f"{directory} has no results.jsonl; run the study first")
    about = json.loads((directory / "study.json").read_text())
    config = renamed.translated_study(about["config"])
    whole = files.read_jsonl(directory / "results.jsonl")
    rows = [_flat(renamed.translated_row(row), config) for row in whole]
    mixed = _mixed(rows, config)
    if mixed and not mixed_code:
        raise ValueError(_refusal(directory, mixed))
    short = files.read_jsonl(directory / "search.jsonl")
    searched = [_of_search(row, config) for row in short] or [row for row in rows if row["seed"] == 0]
    tried = collections.defaultdict(list)
    for row in searched:
        if row["status"] == "done":
            tried[cell_of(row)].append((row["lr"], row["choice"]))
    best = {cell: best_learning_rate(pairs) for cell, pairs in tried.items()}
    for row in [*rows, *searched]:
        row["chosen"] = row["status"] == "done" and row["lr"] == best.get(cell_of(row))
    config.setdefault("margins", MARGINS)
    names = [field.name for field in dataclasses.fields(Result) if field.name not in ("score", "validation")]
    results = [
        Result(score=row["test"], validation=row["choice"], **{name: row[name] for name in names})
        for row in rows
        if row["chosen"]
    ]
    command, gains = about.get("command", ""), search.budget_gains(whole, short)
    return Study(config, command, rows, searched, results, scales(rows, config), list(mixed), directory, gains)


def _of_search(row: dict, config: dict) -> dict:
    """A run of search.jsonl with what the report says of it."""
    if row["status"] != "done":
        return row
    return row | {"choice": validation_score(config, row), "total_s": row["timing"]["total_s"]}


def cell_of(row: dict) -> Cell:
    """The cell of the grid that a row of results.jsonl belongs to."""
    return Cell(row["setting"], row["variant"], row["size"], row["n_images"])


def _mixed(rows: list[dict], config: dict) -> dict[Cell, dict[str, list[str]]]:
    """Cell -> a code, data set or base that made runs of it -> their ids, for cells whose runs differ in one of these."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in (row for row in rows if row["status"] == "done"):
        for what, value in _made_of(row, config):
            found[cell_of(row), what][value].append(row["id"])
    mixed = {}
    for (cell, _), by_value in found.items():
        if len(by_value) > 1:
            mixed.setdefault(cell, dict(by_value))
    return mixed


def _made_of(row: dict, config: dict) -> Iterator[tuple[str, str]]:
    """Pairs of something that must be equal in a cell, and what it is in a finished run.

    A seed has its own training subset, and may have its own base. Results of version 0.1 have no code, and other digests.
    """
    yield "code", row["code"] or "version 0.1"
    digests = (row["digests"] or {}) if row["code"] else {}
    drawn = "data" in (config.get("random") or {}).get("ranges", {})  # anew for each rate
    for name, digest in digests.get("data", {}).items():
        if name != "train":
            yield f"{name} data", f"{name} data {digest}"
        elif not drawn:
            yield f"train data of seed {row['seed']}", f"train data {digest}"
    if "base" in digests:
        yield f"base of seed {row['seed']}", f"base {digests['base']}"


def _refusal(directory: Path, mixed: dict[Cell, dict[str, list[str]]], most: int = 3) -> str:
    shown = "; ".join(
        f"{', '.join(ids)} by {value}"
        for by_value in list(mixed.values())[:most] for value, ids in by_value.items()
    )  # fmt: skip
    more = f"; and {len(mixed) - most} more cells" if len(mixed) > most else ""
    patterns = f"--rerun='{next(iter(mixed))}-*'" + (" or --rerun='*'" if len(mixed) > 1 else "")
    return (
        f"{directory}: to be compared, runs of one cell must be made by the same code from the same data and base: {shown}"
        f"{more}. Add {patterns} to the study's command to run them again, or --mixed_code to report them as they are"
    )


def _flat(row: dict, config: dict) -> dict:
    variant = config["variants"][row["variant"]]
    flat = dict.fromkeys(COLUMNS) | {
        key: row.get(key) for key in ("id", "setting", "variant", "size", "n_images", "seed", "lr")
    }
    flat |= {"status": row["status"], "error": row.get("error"), "method": variant["method"], "head": variant["head"]}
    flat["task"] = config["settings"][row["setting"]]["task"]
    if row["status"] != "done":
        return flat
    metric, counts, timing = row["main_metric"], row["counts"], row["timing"]
    test = row["metrics"]["test"]
    flat |= {"tuned": counts["tuned"], "stored": counts["stored"], "percent": 100 * counts["tuned"] / counts["total"]}
    flat |= {"validation": row["metrics"][config["select_on"]]["tuned"][metric], "test": test["tuned"][metric]}
    flat |= {key: timing.get(key) for key in ("steps", "stopped", "step_s", "compile_s", "total_s")}
    flat |= {"test_nll": test["tuned"]["nll"], "metric": metric, "n_test": test["n"], "blind": test["blind"]}
    known = ("test", config["select_on"])
    flat["others"] = {name: one["tuned"][metric] for name, one in row["metrics"].items() if name not in known}
    flat["base"] = test["base"][metric] if "base" in test else None
    if forgot := row.get("forgetting"):
        flat["forgetting"] = forgot["tuned"] - forgot["base"] if "base" in forgot else None
    validated = row.get("validation") or {}  # not in results of version 0.1
    flat |= {"curve": validated.get("curve"), "kept_step": validated.get("kept_step")}
    flat["choice"] = validation_score(config, row)
    flat |= {"machine": row.get("machine"), "versions": row.get("versions"), "digests": row.get("digests")}
    return flat | {"code": row.get("code", "")}


def scales(rows: list[dict], config: dict) -> list[Scale]:
    """The scale of every setting that has finished runs: its best guess without the image, and its ceiling.

    Where a setting declares no `ceiling`, the best mean score of a cell stands in. A setting in which no cell is better than
    that guess has no scale.
    """
    found = []
    for setting, about in config["settings"].items():
        mine = [row for row in rows if row["setting"] == setting and row["status"] == "done"]
        by_cell = collections.defaultdict(list)
        for row in mine:
            if row["chosen"]:
                by_cell[cell_of(row)].append(row["test"])
        if by_cell:
            best = max(map(statistics.fmean, by_cell.values()))
            ends = (_blind(rows, setting), about.get("ceiling", best))
            if ends[0] >= ends[1]:
                continue
            found.append(Scale(setting, about["task"], about.get("consistent"), *ends, "ceiling" in about))
    return found


def _blind(rows: list[dict], setting: str) -> float:
    mine = [row for row in rows if row["setting"] == setting and row["status"] == "done"]
    return max((score[row["metric"]] for row in mine for score in row["blind"].values()), default=0.0)


def chosen_by_cell(study: Study, setting: str) -> dict[tuple, list[dict]]:
    """(variant, size, n_images) -> its chosen rows, one per seed."""
    groups = collections.defaultdict(list)
    for row in study.rows:
        if row["chosen"] and row["setting"] == setting:
            groups[row["variant"], row["size"], row["n_images"]].append(row)
    return dict(groups)


def other_splits(rows: list[dict]) -> list[str]:
    """The splits that finished runs are scored on beside 'test' and the one that rates are chosen on."""
    return list(dict.fromkeys(name for row in rows if row["status"] == "done" for name in row["others"]))


def as_csv(rows: list[dict]) -> str:
    """The COLUMNS of all rows and their scores on other splits as CSV."""
    table, others = io.StringIO(), other_splits(rows)
    writer = csv.DictWriter(table, (*COLUMNS, *others), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(row | row.get("others", {}) for row in rows)
    return table.getvalue()
