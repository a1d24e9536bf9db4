"""What is folded at the end of a report: tables of cells, rates, caps and failures, test images, the recipe."""

import html
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from jaxpeft.runtime import files
from jaxpeft.study.report import answers, markup
from jaxpeft.study.report.markup import Html, escape, table
from jaxpeft.study.report.rows import Study, chosen_by_cell, other_splits


def parts(study: Study) -> dict[str, str]:
    """All of it, by the names that report.html has."""
    # they may not have finished learning
    capped = [row for row in study.rows if row["chosen"] and row["stopped"] == "cap"]
    failed = [row for row in study.runs if row["status"] == "failed"]
    first = next((row for row in study.rows if row["status"] == "done"), {})
    gains = [list(one.values()) for one in answers.budget(study)]
    # of the config of a run
    keys = ("base", "steps", "batch_size", "optim", "stop", "model", "data")
    recipe = {task: {key: point[key] for key in keys} for task, point in study.config["points"].items()}
    made_by = {key: first.get(key) for key in ("machine", "versions", "digests")}
    return {
        "cells": cells(study),
        "gallery": gallery(study),
        "edges": table(("run", "learning rate", "which end"), edges(study)),
        "budget": table(("setting", "variant", "cells", "mean gain", "largest gain"), gains),
        "capped": table(("run", "seed", "steps"), [[row["id"], row["seed"], row["steps"]] for row in capped]),
        "failures": table(("run", "reason"), [[row["id"], row["error"]] for row in failed]),
        "purpose": markup.verbatim((study.config["hypothesis"] or "").strip()),
        "variants": variants(study),
        "learning_rates_tried": ", ".join(f"{factor:.3g}" for factor in study.config["learning_rates"]),
        "recipe": markup.verbatim(json.dumps(recipe, indent=1)),
        "provenance": markup.verbatim(json.dumps(made_by, indent=1)),
    }


def cells(study: Study) -> Html:
    """The table of all cells."""
    others = other_splits(study.rows)
    header = (
        "setting", "variant", "size", "images", "test score", "range over seeds", "seeds", "test nats per token",
        "validation score", *(f"{split} score" for split in others), "stored", "tuned, %", "learning rate", "forgetting",
        "seconds",
    )  # fmt: skip
    rows = []
    for setting in study.config["settings"]:
        for (variant, size, n_images), group in chosen_by_cell(study, setting).items():
            scores = [row["test"] for row in group]
            forgot = [row["forgetting"] for row in group]
            rows.append([
                setting, variant, size, n_images, statistics.fmean(scores), f"{min(scores):.3f} to {max(scores):.3f}",
                len(scores), statistics.fmean(row["test_nll"] for row in group),
                statistics.fmean(row["validation"] for row in group),
                *(_mean(row["others"].get(split) for row in group) for split in others), group[0]["stored"],
                group[0]["percent"], group[0]["lr"], _mean(forgot),
                statistics.fmean(row["total_s"] for row in group),
            ])  # fmt: skip
    return table(header, rows)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that were measured; None where none was."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def edges(study: Study) -> list[list]:
    """Cells whose chosen learning rate is the smallest or largest tried: a wider search may find a better one."""
    return [[row["id"], row["lr"], place] for row, _, place in answers.chosen_rates(study) if place != "inside"]


def variants(study: Study) -> Html:
    """The methods, as the config says."""
    header = ("variant", "method", "head trained too", "middle learning rate", "settings")
    rows = [
        [name, one["method"], one["head"], one["lr"], json.dumps(one["fields"]) if one["fields"] else None]
        for name, one in study.config["variants"].items()
    ]
    return table(header, rows)


def gallery(study: Study, most: int = 6) -> str:
    """Some test images per setting, with the texts of each variant's best cell."""
    parts = []
    for setting in study.config["settings"]:
        kept = (study.directory / "pictures" / setting).glob("*.png")
        pictures = {path.stem: path for path in kept}
        written = _written(study, setting, pictures)[:most] if pictures else []
        cards = [_card(about, said, pictures[files.name_for(about["image_id"])]) for about, said in written]
        if cards:
            parts.append(f"<h3>{escape(setting)}</h3><div class='gallery'>{''.join(cards)}</div>")
    return "".join(parts)


def _written(study: Study, setting: str, pictures) -> list[tuple[dict, dict[str, str]]]:
    """(a line of predictions.jsonl, {variant: the text of its best cell}), for one example of each of `pictures`."""
    best: dict[str, dict] = {}
    for row in study.rows:
        if row["chosen"] and row["setting"] == setting and row["seed"] == 0:
            if row["variant"] not in best or row["choice"] > best[row["variant"]]["choice"]:
                best[row["variant"]] = row
    cases: dict[tuple, tuple[dict, dict]] = {}
    for variant, row in best.items():
        for one in files.read_jsonl(study.directory / "points" / row["id"] / "predictions.jsonl"):
            if one["split"] == "test" and files.name_for(one["image_id"]) in pictures:
                case = cases.setdefault((one["image_id"], one.get("question_id", "")), (one, {}))
                case[1][variant] = one["tuned"]
    shown: dict[str, tuple[dict, dict]] = {}
    for (image_id, _), case in cases.items():
        shown.setdefault(image_id, case)
    return list(shown.values())


def _card(about: dict, said: dict[str, str], picture: Path) -> str:
    truth = about["answers"][0] if "answers" in about else about["references"][0]
    lines = [("Q", about["question"])] if "question" in about else []
    lines += [("truth", truth), *said.items()]
    rows = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in lines)
    shown = markup.image(picture.read_bytes(), f"test image {about['image_id']}")
    return f"<div>{shown}<table>{rows}</table></div>"
