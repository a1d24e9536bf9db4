"""Evaluating a split: generate a text per example, score the texts, and measure the likelihood of the references.

Batches have a fixed size; the last one is padded with copies of a row, which are dropped before scoring, so every example
counts exactly once. Methods are part of the variables, so base and tuned model are evaluated by the same code.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import numpy as np

from jaxpeft import tree
from jaxpeft.data.base import Examples, Split, pad_tokens
from jaxpeft.data.pipeline import one_pass
from jaxpeft.models import decode, stack
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
    """Run `function(model, variables, ...)` with the mesh of its variables set, and on CPU with their layers apart."""

    @functools.wraps(function)
    def run(model: VisionLanguageModel, variables: Tree, *args: P.args, **kwargs: P.kwargs) -> R:
        with sharding.using(variables):
            return function(model, stack.apart(model.config, variables), *args, **kwargs)

    return run


@functools.partial(jax.jit, static_argnames=("model", "name"))
def _stage(model: VisionLanguageModel, variables: Tree, batch: Mapping[str, jax.Array], name: str) -> jax.Array:
    return model.apply(variables, batch, name, method="stage")


@functools.partial(jax.jit, static_argnames="model")
def contexts(model: VisionLanguageModel, variables: Tree, batch: Mapping[str, jax.Array]) -> Context:
    """The model's context of a batch, which its texts are generated from."""
    return model.apply(variables, batch, method="context")


def passes(variables: Tree, examples: Examples, batch_size: int) -> Iterator[tuple[Batch, int]]:
    """`one_pass` on the devices that hold `variables`. Each of several hosts makes its own rows. The batch size is rounded up
    to a multiple of the number of devices that share a batch."""
    on = sharding.mesh_of(variables)
    parts = 1 if on is None else sharding.n_batch(on)
    n = -(-batch_size // parts) * parts
    for batch, n_real in one_pass(examples, n, slice(None) if on is None else sharding.rows(n, on)):
        signals.check()
        yield (batch if on is None else sharding.shard_batch(batch, on, n)), n_real


def _fetched(running: Iterable[tuple[Sequence[jax.Array], int]]) -> Iterator[list[np.ndarray]]:
    """The outputs of every batch in this host's memory, without padding, from (outputs, number of real rows). A batch is
    fetched after the next one was started, so that the device does not wait for the host."""
    for (outputs, n_real), _ in itertools.pairwise(itertools.chain(running, [((), 0)])):
        yield [tree.fetch(x)[:n_real] for x in outputs]


@_on_its_devices
def stage_outputs(
    model: VisionLanguageModel, variables: Tree, examples: Examples, name: str, batch_size: int = 64
) -> np.ndarray:
    """The output of a stage for every example, (n, ...). The examples' batches must hold what the stage reads."""
    batches, found, done = passes(variables, examples, batch_size), np.empty(0), 0
    running = (([_stage(model, variables, batch, name)], n) for batch, n in batches)
    for (rows,) in _fetched(running):
        if not done:  # one table from the start: joining batches at the end would take twice its memory
            found = np.empty((len(examples), *rows.shape[1:]), rows.dtype)
        found[done : done + len(rows)] = rows
        done += len(rows)
    return found


def predict(
    model: VisionLanguageModel, variables: Tree, task: Task, examples: Examples, *, batch_size: int = 64, beams: int = 1
) -> list[dict[str, Any]]:
    """One {'text', 'score'} per example, in order; the score is the log-probability in nats, per token for several beams."""
    return [best for best, *_ in ranked(model, variables, task, examples, batch_size=batch_size, beams=beams)]


@_on_its_devices
def ranked(
    model: VisionLanguageModel, variables: Tree, task: Task, examples: Examples, *, batch_size: int = 64, beams: int = 1
) -> list[list[dict[str, Any]]]:
    """The `beams` best texts of each example as {'text', 'score'}, best first; two of them may be equal texts."""
    template, written = task.template(model), []
    search = task.search(model, beams)
    running = (
        ((_write_mixed if "adapter" in batch else _write)(model, variables, batch, search), n)
        for batch, n in passes(variables, examples, batch_size)
    )
    for tokens_BKT, score_BK in _fetched(running):
        for tokens_KT, score_K in zip(tokens_BKT.tolist(), score_BK, strict=True):
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
    """As `predict`, but the text of each example is the most likely of `candidates` (`decode.rank`).

    Candidates are whole, also beyond `max_new_tokens`: the first tokens of a text are always as likely as the text or more.
    """
    template, found = task.template(model), []
    lead = [] if template.start else [template.pad]
    answers_AT = pad_tokens([[*lead, *template.target(text, model.positions)[0]] for text in candidates], template.pad)
    k = task.rank_k  # pyright: ignore[reportAttributeAccessIssue]  only for tasks with `candidates`
    options = {"pad": template.pad, "k": k, "smoothing": task.smoothing}
    running = (
        (decode.rank(model, variables, contexts(model, variables, batch), answers_AT, **options), n)
        for batch, n in passes(variables, examples, batch_size)
    )
    for which_BK, score_BK in _fetched(running):
        best = zip(which_BK[:, 0], score_BK[:, 0], strict=True)
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
    """`_write` with an adapter per row: batch['adapter'] indexes the leading axis of every leaf of `peft`."""

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
    """The negative log-likelihood of the reference tokens of each example, in nats, and their number: (n, 2) float64."""
    running = ((_nll(model, task, variables, batch), n) for batch, n in passes(variables, examples, batch_size))
    return np.concatenate([np.stack(both, axis=1).astype(np.float64) for both in _fetched(running)])


def nll(model: VisionLanguageModel, variables: Tree, task: Task, examples: Examples, **options: Any) -> float:
    """Mean negative log-likelihood of the reference tokens, in nats per token; `options` as for `nlls`."""
    total, count = nlls(model, variables, task, examples, **options).sum(axis=0)
    return float(total / count)


def worth_of_images(
    model: VisionLanguageModel, variables: Tree, task: Task, examples: Examples, *, swaps: int = 4, **options: Any
) -> dict | None:
    """By how many nats an example is more likely with its own image than with another one: {'gain', 'least', 'n'}.

    'gain' is the mean over the n images; 'least' is the lower end of its one-sided 95 % interval (Student's t over images, as
    examples of one image are correlated). A model that learned the texts but not their relation to the images has a gain of 0.
    Returns None for fewer than 5 images. `examples` must not hold outputs of stages per example. Every image is swapped with
    up to `swaps` others. `options` as for `nlls`.
    """
    from scipy.special import stdtrit  # takes half a second to import

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
    """{label: [mean, low, high]} of a metric over the rows of predictions, and {'label - other': ...} of its difference from
    each of `others`: 95 % bootstrap intervals. Whole images are resampled, as answers about one image are correlated."""
    _, group_N = np.unique([row["image_id"] for row in rows], return_inverse=True)
    size_G = np.bincount(group_N)

    def interval(value_N: np.ndarray) -> list[float]:
        sum_G, rng = np.bincount(group_N, value_N), np.random.default_rng(0)
        drawn = (rng.integers(len(size_G), size=len(size_G)) for _ in range(1000))
        means = [sum_G[some].sum() / size_G[some].sum() for some in drawn]
        ends = np.percentile(means, [50 * (1 - 0.95), 50 * (1 + 0.95)])
        return [float(x) for x in (sum_G.sum() / size_G.sum(), *ends)]

    value = {one: np.array([row[f"{one}_{metric}"] for row in rows]) for one in (label, *others)}
    return {label: interval(value[label])} | {f"{label} - {o}": interval(value[label] - value[o]) for o in others}


def reading(task: Task, split: Split, model: VisionLanguageModel) -> Task:
    """The task with `max_question` set to the longest question of a split. Raises ValueError for a question that is too long
    for the model."""
    if not task.asks:
        return task
    longest = int(task.lengths(split, task.template(model))["max_question"].max())
    if longest > model.positions:
        raise ValueError(f"a question has {longest} tokens; it must have at most {model.positions}, shorten it")
    return dataclasses.replace(task, max_question=longest)
