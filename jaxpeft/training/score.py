"""After training: which step is kept, what each version of the model generates on each split, and how it scores."""

import collections
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from jaxpeft import data, tasks, tree
from jaxpeft.data.base import Examples, Split
from jaxpeft.data.pipeline import Resized
from jaxpeft.training import evaluate, results
from jaxpeft.training.inputs import Inputs
from jaxpeft.training.setup import Config, Log, Setup
from jaxpeft.tree import Tree

ENOUGH = 20  # validation images for a test of whether images matter; with fewer the mean alone decides
FEW = 100  # images of a split, below which a warning says that its scores are uncertain


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """The scores that those of a split are compared with; known before training."""

    scores: dict[str, Any]  # {'blind', 'perfect_writer'}, or {'blind': {}} where there are no answers to score with
    guess: list[str] | None  # the text of the best blind baseline for each example


def yardsticks(config: Config, setup: Setup, log: Log) -> dict[str, Yardstick]:
    """The yardstick of every split that is evaluated. Raises ValueError for a split with nothing to score."""
    return {name: _yardstick(setup, name, log) for name in config.eval.splits}


def _yardstick(setup: Setup, name: str, log: Log) -> Yardstick:
    """The scores of blind baselines and of the perfect writer, logged before training. Raises ValueError for duplicate ids."""
    task, template = setup.task, setup.task.template(setup.model)
    cases = task.eval_examples(setup.splits[name], template)
    if not len(cases):
        raise ValueError(
            f"split {name!r} has nothing to score: it has no {' and no '.join(sorted(set(task.limited_texts.values())))}"
        )
    tasks.check_ids(cases, task.id_key, name)
    if not scored(cases):
        return Yardstick({"blind": {}}, None)
    guesses, writer = task.guesses(setup.splits["train"], cases.rows), task.perfect_writer(cases.rows, template)
    blind, metric = {label: task.scores(cases.rows, texts) for label, texts in guesses.items()}, task.main_metric
    best = max(blind, key=lambda label: blind[label][metric])
    log(
        f"{name}, {metric}: {results.LABELS.get(best, best)} {blind[best][metric]:.3f}; perfect writer {writer[metric]:.3f} "
        f"({writer['out_of_reach']:,} of {writer['truths']:,} right texts cannot be written)"
    )
    if writer[metric] < 0.95 * writer["unhindered"]:
        shown = "".join(f"; {text!r} becomes {written!r}" for text, written in writer["examples"])
        log(
            f"warning: {name}: the right texts as this base can write them have {metric} {writer[metric]:.3f}, unchanged "
            f"{writer['unhindered']:.3f}: its vocabulary or task_options.max_new_tokens loses parts of them{shown}"
        )
    n = len({row["image_id"] for row in cases.rows})
    if n < FEW:
        log(
            f"warning: {name} has {n} images, too few to detect small differences: see the intervals in the table"
            + (f" (about +-{98 / math.sqrt(n):.0f} points)" if metric == "accuracy" else "")
        )
    return Yardstick({"blind": blind, "perfect_writer": writer}, guesses[best])


def validation(config: Config, setup: Setup, inputs: Inputs) -> Callable[[Tree], float] | None:
    """A function trainable -> nats per token of the references of a sample of config.stop.split; None without validation."""
    if config.optim.schedule != "plateau":
        return None
    examples, frozen = inputs.validation(config.stop.split, config.stop.examples), setup.frozen
    task, size = setup.task, config.eval.batch_size

    def validate(trainable: Tree) -> float:
        return evaluate.nll(setup.model, tree.join(trainable, frozen), task, examples, batch_size=size)

    return validate


def kept_step(
    config: Config, setup: Setup, inputs: Inputs, trained: tuple[Tree, dict], workdir: Path, log: Log
) -> tuple[Tree, dict | None]:
    """(the trainable leaves that are kept, the validation part of the result): those of the best step, or of step 0 where
    tuning was of no use. `trained`: the best leaves and the timing, whose 'kept_step' is corrected in place."""
    best, timing = trained
    if config.optim.schedule != "plateau":
        return best, None
    worth, split = None, config.stop.split
    if config.stop.get("images_must_matter", False):
        sample = inputs.validation(split, config.stop.examples, per=("image",))
        variables = tree.join(best, setup.frozen)
        worth = evaluate.worth_of_images(setup.model, variables, setup.task, sample, batch_size=config.eval.batch_size)
    validated = results.validation(workdir, split, timing, worth)
    if why := why_step_0(config, validated):
        best, timing["kept_step"] = setup.trainable, 0
        validated |= {"kept_step": 0, "kept": validated["first"]}
        log(f"step 0, the state before training, is kept: {why}")
    elif worth is not None and worth["least"] <= 0:
        log(
            f"warning: {worth['n']} validation images are too few to show that the model uses them; check its texts, "
            f"or use more images for validation"
        )
    return best, validated


def why_step_0(config: Config, validated: dict) -> str:
    """Why tuning was of no use, so that step 0 is kept; '' where it was of use or where that cannot be decided."""
    worth, step = validated["images"], validated["best_step"]
    if step == 0:
        return "the validation loss was never lower; try a lower optim.lr, or use the base as it is"
    # with few images the bound is below zero even for useful models
    if worth is None or (worth["least"] if worth["n"] >= ENOUGH else worth["gain"]) > 0:
        return ""
    return (
        f"at the best step, {step}, it cannot be shown on {worth['n']} validation images that texts are more likely with "
        f"their own image than with another ({worth['gain']:+.3f} nats per text, 95 % lower bound {worth['least']:+.3f}), so "
        f"the model seems to have learned the texts, not what the images show. Check that texts and images match. "
        f"--config.stop.images_must_matter=False --accept_changes keeps step {step} anyway"
    )


@dataclasses.dataclass(frozen=True)
class Scored:
    """`metrics`: split -> its scores; `rows`: those of predictions.jsonl; `forgetting`: None unless config.eval.forgetting."""

    metrics: dict[str, dict]
    rows: list[dict]
    forgetting: dict | None


def score(config: Config, setup: Setup, inputs: Inputs, best: Tree, known: dict[str, Yardstick]) -> Scored:
    """Score every version of the model on every split of config.eval.splits."""
    versions = {"base": {"params": setup.variables["params"]}} if config.eval.base else {}
    versions["tuned"] = tree.join(best, setup.frozen)
    task, metrics, rows = setup.task, {}, []
    for name in config.eval.splits:
        metrics[name], more = _score_split(config, setup, inputs, versions, name)
        metrics[name] |= known[name].scores
        if (guess := known[name].guess) is not None:
            values = task.per_example(inputs.eval_examples(name).rows, guess)
            for row, text, value in zip(more, guess, values, strict=True):
                row["blind"], row[f"blind_{task.main_metric}"] = text, round(float(value), 6)
            others = [one for one in ("blind", "text_only", "base") if one in more[0]]
            metrics[name]["intervals"] = evaluate.intervals(more, task.main_metric, "tuned", others)
        rows += more
    forgot = forgetting(config, setup, inputs, versions["tuned"]) if config.eval.forgetting else None
    return Scored(metrics, rows, forgot)


def scored(examples: Examples) -> bool:
    """Whether every example has a right answer; a test set for an evaluation server has none."""
    return all(row.get("answers", True) for row in examples.rows)


def _score_split(
    config: Config, setup: Setup, inputs: Inputs, versions: dict[str, Tree], name: str
) -> tuple[dict, list[dict]]:
    """Scores of each version of the model on one split, and a row per example.

    A split whose examples have no answers, such as a test set for a server, gets predictions but no scores.
    """
    task, model, options = setup.task, setup.model, {"batch_size": config.eval.batch_size}
    cases = inputs.eval_examples(name)
    known = scored(cases)
    scores, rows = {"n": len(cases), "scored": known}, [{"split": name, **row} for row in cases.rows]
    looks = [(label, variables, cases) for label, variables in versions.items()]
    if config.eval.get("text_only", False) and known:
        looks.insert(-1, ("text_only", versions["tuned"], inputs.without_images(name)))
    # the likelihood of this split was measured during training
    measured = config.optim.schedule == "plateau" and name == config.stop.split
    examples = inputs.examples(name) if known and not measured else None
    for label, variables, shown in looks:
        if setup.candidates is None:
            written = evaluate.predict(model, variables, task, shown, beams=config.eval.beams, **options)
        else:
            written = evaluate.choose(model, variables, task, shown, setup.candidates, **options)
        for row, one in zip(rows, written, strict=True):
            row[label], row[f"{label}_score"] = one["text"], round(one["score"], 4)
        if not known:
            continue
        texts = [one["text"] for one in written]
        scores[label] = task.scores(cases.rows, texts)
        if label != "text_only" and examples is not None:
            nats_N2 = evaluate.nlls(model, variables, task, examples, **options)
            total, count = nats_N2.sum(axis=0)
            scores[label]["nll"] = float(total / count)
            if (ids := task.case_ids(setup.splits[name])) is not None:
                _add_nats(rows, label, task.id_key, ids, nats_N2)
        for row, value in zip(rows, task.per_example(cases.rows, texts), strict=True):
            row[f"{label}_{task.main_metric}"] = round(float(value), 6)
    return scores, rows


def _add_nats(rows: list[dict], label: str, key: str, ids: list[str], nats_N2: np.ndarray) -> None:
    """Add to each row '{label}_nats', the negative log-likelihood of its reference texts in nats, and 'tokens', their number.

    `nats_N2`: both for each reference text; `ids`: row[key] of the row that each belongs to.
    """
    of = collections.defaultdict(lambda: np.zeros(2))
    for one, pair_2 in zip(ids, nats_N2, strict=True):
        of[one] += pair_2
    for row in rows:
        nats, n_tokens = of[row[key]].tolist()
        row[f"{label}_nats"], row["tokens"] = round(nats, 4), round(n_tokens)


def forgetting(config: Config, setup: Setup, inputs: Inputs, tuned: Tree) -> dict:
    """{'base', 'tuned', 'n'}: nats per token of captions of test images in the style of pre-training.

    Forgetting is 'tuned' less 'base', as in Hugging Face's comparison of methods. A model that answers questions writes
    captions with the same parameters.
    """
    settings = dict(config.data.items()) | {"captions": "web", "types": ()}
    split = data.load(ml_collections.ConfigDict(settings), ["test"])["test"]
    split = dataclasses.replace(split, rows=[row | {"captions": row["captions"][:1]} for row in split.rows])
    task, model = tasks.build("captioning", max_tokens=40), setup.model.for_task("captioning")
    examples = task.examples(split, task.template(model))
    examples = dataclasses.replace(examples, images=Resized.of(split.images, model))
    examples = inputs.cache.fill(split, examples, per=("image",))  # the same images as the task's own test split
    versions = {"base": {"params": setup.variables["params"]}, "tuned": tuned}
    size = config.eval.batch_size
    scores = {label: evaluate.nll(model, one, task, examples, batch_size=size) for label, one in versions.items()}
    return scores | {"n": len(split.rows)}


def gallery(workdir: Path, split: Split, rows: list[dict]) -> None:
    """Write a gallery of twelve examples spread over the split: truth, before and after tuning."""
    rows = [row for row in rows if row["split"] == split.name]
    where = {row["image_id"]: i for i, row in enumerate(split.rows)}
    cases = []
    for k in np.linspace(0, len(rows) - 1, min(12, len(rows))).round().astype(int):
        row = rows[k]
        lines = [("Q", row["question"])] if "question" in row else []
        truth = row.get("answers") or row.get("references")
        lines += [("truth", truth[0])] if truth else []
        lines += [(said, row[label]) for said, label in (("before", "base"), ("after", "tuned")) if label in row]
        cases.append({"image": split.images[where[row["image_id"]]], "lines": lines})
    results.gallery(workdir / "gallery.png", cases)
