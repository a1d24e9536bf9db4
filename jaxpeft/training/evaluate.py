"""Scoring a split: write an answer per case, score the strings, and measure the likelihood of the references.

Batches have one fixed size; the last one is padded by repeating a row and the copies are dropped before scoring, so
every case counts exactly once. The variables carry their methods, so base and tuned model go through the same code.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import numpy as np
from scipy.special import stdtrit

from jaxpeft import tree
from jaxpeft.data.base import Examples, Split, pad_tokens
from jaxpeft.data.pipeline import one_pass
from jaxpeft.metrics import bootstrap
from jaxpeft.models import decode
from jaxpeft.models.base import Context, VisionLanguageModel
from jaxpeft.runtime import signals
from jaxpeft.tasks.base import Task
from jaxpeft.training import sharding
from jaxpeft.tree import Tree

Batch = Mapping[str, jax.Array | np.ndarray]
P = ParamSpec("P")
R = TypeVar("R")


def _on_its_devices(
    function: Callable[Concatenate[VisionLanguageModel, Tree, P], R],
) -> Callable[Concatenate[VisionLanguageModel, Tree, P], R]:
    """Run `function(model, variables, ...)` with the mesh of its variables set."""

    @functools.wraps(function)
    def run(model: VisionLanguageModel, variables: Tree, *args: P.args, **kwargs: P.kwargs) -> R:
        with sharding.using(variables):
            return function(model, variables, *args, **kwargs)

    return run


@functools.partial(jax.jit, static_argnames=("model", "name"))
def _stage(model: VisionLanguageModel, variables: Tree, batch: Mapping[str, jax.Array], name: str) -> jax.Array:
    return model.apply(variables, batch, name, method="stage")


@functools.partial(jax.jit, static_argnames="model")
def contexts(model: VisionLanguageModel, variables: Tree, batch: Mapping[str, jax.Array]) -> Context:
    """What texts are written about; jitted once per model."""
    return model.apply(variables, batch, method="context")


def passes(variables: Tree, examples: Examples, batch_size: int) -> Iterator[tuple[Batch, int]]:
    """`one_pass` on the devices that hold `variables`; of several hosts each makes its rows. Batches that their number does
    not divide are made larger."""
    on = sharding.mesh_of(variables)
    if on is None:
        for one in one_pass(examples, batch_size):
            signals.check()
            yield one
        return
    n = -(-batch_size // sharding.n_batch(on)) * sharding.n_batch(on)
    for batch, n_real in one_pass(examples, n, sharding.rows(n, on)):
        signals.check()
        yield sharding.shard_batch(batch, on, n), n_real


@_on_its_devices
def stage_outputs(
    model: VisionLanguageModel, variables: Tree, examples: Examples, name: str, batch_size: int = 64
) -> np.ndarray:
    """The output of a stage for every example, (n, ...); what it reads must be in the examples' batches."""
    batches = passes(variables, examples, batch_size)
    return np.concatenate([tree.fetch(_stage(model, variables, batch, name))[:n] for batch, n in batches])


def predict(
    model: VisionLanguageModel, variables: Tree, task: Task, examples: Examples, *, batch_size: int = 64, beams: int = 1
) -> list[dict[str, Any]]:
    """One {'text', 'score'} per example, in order; score is the (length-normalised, for beams) log-probability in nats."""
    return [best for best, *_ in ranked(model, variables, task, examples, batch_size=batch_size, beams=beams)]


@_on_its_devices
def ranked(
    model: VisionLanguageModel, variables: Tree, task: Task, examples: Examples, *, batch_size: int = 64, beams: int = 1
) -> list[list[dict[str, Any]]]:
    """Per example the `beams` best texts as {'text', 'score'}, best first; different tokens may read the same."""
    template, written = task.template(model), []
    search = task.search(model, beams)
    for batch, n_real in passes(variables, examples, batch_size):
        write = _write_mixed if "adapter" in batch else _write
        tokens_BKT, score_BK = write(model, variables, batch, search)
        for tokens_KT, score_K in zip(tree.fetch(tokens_BKT)[:n_real].tolist(), tree.fetch(score_BK), strict=False):
            texts = [template.text(tokens[len(search.start) :]) for tokens in tokens_KT]
            written.append([{"text": t, "score": float(s)} for t, s in zip(texts, score_K, strict=True)])
    return written


@_on_its_devices
def choose(
    model: VisionLanguageModel,
    variables: Tree,
    task: Task,
    examples: Examples,
    candidates: Sequence[str],
    *,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """`predict` from a list of texts: per example the likeliest of `candidates` (`decode.rank`)."""
    template, found = task.template(model), []
    room = task.max_new_tokens and task.max_new_tokens + len(template.start)
    lead = [] if template.start else [template.pad]
    answers_AT = pad_tokens([[*lead, *template.target(text, room)[0]] for text in candidates], template.pad)
    k = task.rank_k  # pyright: ignore[reportAttributeAccessIssue]  of a task that answers from a list
    options = {"pad": template.pad, "k": k, "smoothing": task.smoothing}
    for batch, n_real in passes(variables, examples, batch_size):
        context = contexts(model, variables, batch)
        which_BK, score_BK = decode.rank(model, variables, context, answers_AT, **options)
        best = zip(tree.fetch(which_BK)[:n_real, 0], tree.fetch(score_BK)[:n_real, 0], strict=True)
        found += [{"text": candidates[i], "score": float(score)} for i, score in best]
    return found


def _write(
    model: VisionLanguageModel, variables: Tree, batch: Batch, search: decode.Search
) -> tuple[jax.Array, jax.Array]:
    """(tokens_BKT, score_BK) of the K = beams best texts per row."""
    context = contexts(model, variables, batch)
    if search.beams == 1:
        tokens_BT, score_B = decode.greedy(model, variables, context, search)
        return tokens_BT[:, None], score_B[:, None]
    return decode.beam_search(model, variables, context, search)


@functools.partial(jax.jit, static_argnames=("model", "search"))
def _write_mixed(
    model: VisionLanguageModel, variables: Tree, batch: Batch, search: decode.Search
) -> tuple[jax.Array, jax.Array]:
    """`_write` with a tuned tree per row: batch['adapter'] indexes the leading axis of every leaf of `peft`."""

    def one(row: Batch) -> tuple[jax.Array, jax.Array]:
        mine = variables | {"peft": jax.tree.map(lambda x: x[row["adapter"]], variables["peft"])}
        row = {name: x[None] for name, x in row.items() if name != "adapter"}
        tokens_1KT, score_1K = _write(model, mine, row, search)
        return tokens_1KT[0], score_1K[0]

    return jax.vmap(one)(batch)


@functools.partial(jax.jit, static_argnames=("model", "task"))
def _nll(
    model: VisionLanguageModel, task: Task, variables: Tree, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return task.nll(model, variables, batch)


@_on_its_devices
def nlls(
    model: VisionLanguageModel, variables: Tree, task: Task, examples: Examples, *, batch_size: int = 64
) -> np.ndarray:
    """Per example the negative log-likelihood of the reference tokens, in nats, and their number: (n, 2) float64."""
    found = []
    for batch, n_real in passes(variables, examples, batch_size):
        both = _nll(model, task, variables, batch)
        found.append(np.stack([tree.fetch(x)[:n_real] for x in both], axis=1).astype(np.float64))
    return np.concatenate(found)


def nll(model: VisionLanguageModel, variables: Tree, task: Task, examples: Examples, **options: Any) -> float:
    """Mean negative log-likelihood of the reference tokens, in nats per token; `options` as of `nlls`."""
    total, count = nlls(model, variables, task, examples, **options).sum(axis=0)
    return float(total / count)


def worth_of_images(
    model: VisionLanguageModel, variables: Tree, task: Task, examples: Examples, *, swaps: int = 4, **options: Any
) -> dict | None:
    """By how many nats an example is likelier with its own picture than with that of another: {'gain', 'least', 'n'}.

    The mean over the n pictures; 'least' is the lower end of its one-sided 95 % interval (Student's t over pictures, as
    examples of one picture are alike). A model that learned the texts and not what they have to do with the pictures gains
    nothing. None of fewer than 5 pictures. `examples` have no outputs of stages per example; every image is swapped with up
    to `swaps` others. `options` as of `nlls`.
    """
    mine = examples.arrays["image_index"]
    pictures, at = np.unique(mine, return_inverse=True)
    n = len(pictures)
    if n < 5:
        return None
    order = np.random.default_rng(0).permutation(n)
    place = np.argsort(order)
    own, others = nlls(model, variables, task, examples, **options)[:, 0], []
    for k in range(1, min(swaps, n - 1) + 1):
        arrays = examples.arrays | {"image_index": pictures[order[(place[at] + k) % n]].astype(mine.dtype)}
        swapped = dataclasses.replace(examples, arrays=arrays)
        others.append(nlls(model, variables, task, swapped, **options)[:, 0])
    gain_N = np.bincount(at, np.mean(others, axis=0) - own) / np.bincount(at)
    spread = gain_N.std(ddof=1) / np.sqrt(n)
    return {"gain": float(gain_N.mean()), "least": float(gain_N.mean() - stdtrit(n - 1, 0.95) * spread), "n": n}


def intervals(rows: list[dict], metric: str, label: str, others: Iterable[str]) -> dict[str, list[float]]:
    """{label: [mean, low, high]} of a metric over the rows of predictions, and of its difference to each of `others`, as
    {'label - other': ...}: 95 % bootstrap intervals that draw whole pictures, as answers about one picture are alike."""
    _, group_N = np.unique([row["image_id"] for row in rows], return_inverse=True)
    size_G = np.bincount(group_N)

    def interval(value_N: np.ndarray) -> list[float]:
        sum_G = np.bincount(group_N, value_N)

        def mean(rng: np.random.Generator | None) -> float:
            some = slice(None) if rng is None else rng.integers(len(size_G), size=len(size_G))
            return sum_G[some].sum() / size_G[some].sum()

        return list(bootstrap.interval(mean))

    value = {one: np.array([row[f"{one}_{metric}"] for row in rows]) for one in (label, *others)}
    return {label: interval(value[label])} | {f"{label} - {o}": interval(value[label] - value[o]) for o in others}


def reading(task: Task, split: Split, model: VisionLanguageModel) -> Task:
    """The task with room for the questions of a split, whatever it was tuned with. Raises ValueError for one that the model
    cannot read to its end."""
    if not task.asks:
        return task
    longest = int(task.lengths(split, task.template(model))["max_question"].max())
    if longest > model.positions:
        raise ValueError(
            f"a question of {longest} tokens is longer than the {model.positions} that the model reads; shorten it"
        )
    return dataclasses.replace(task, max_question=longest)
