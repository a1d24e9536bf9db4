"""Greedy and beam search with a model's cache, and ranking of a closed list; a whole search is one jitted call.

What texts of one context row share (an image's keys and values) is computed once and not repeated per beam.
There are two beam searches, and the template of a model names its own (`BEAM_SEARCHES`):

    transformers   with early_stopping=False: 2K candidates per step, only the best K of them may finish, a finished score is
                   logp / n_generated ** length_penalty with the end token counted, and a row is closed once no running beam
                   can beat its worst finished one
    mplug          mPLUG's release: a score is logp / ((5 + n_generated) / 6) ** 0.6; a beam that ends is stored but goes on,
                   also after its end token; a row is closed once its best beam ends, and all its beams are then stored
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import ops
from jaxpeft.adapt import sites
from jaxpeft.inputs.processor import Template
from jaxpeft.models.base import Cache, Context, VisionLanguageModel
from jaxpeft.models.stack import together
from jaxpeft.tree import Tree

_LOW = -1e9  # a score no real beam reaches; finite, so that sums of two stay ordered


@dataclasses.dataclass(frozen=True)
class Search:
    """Settings of a search: `length` and `min_length` count all ids of a text, `start` included."""

    start: tuple[int, ...]
    stop: tuple[int, ...]
    pad: int
    n_words: int  # vocabulary matrices may be padded: rows from here on do not belong to a token
    length: int
    min_length: int = 0
    beams: int = 1
    length_penalty: float = 1.0  # of beam search 'transformers'
    kind: str = "transformers"  # a key of BEAM_SEARCHES

    @classmethod
    def of(cls, template: Template, max_new_tokens: int, **options: Any) -> "Search":
        """The search for at most `max_new_tokens` tokens after a template's start."""
        ids = {"start": template.start, "stop": template.stop, "pad": template.pad, "n_words": len(template.tokenizer)}
        return cls(**ids, length=len(template.start) + max_new_tokens, kind=template.beam_search, **options)


def _once(model: VisionLanguageModel, variables: Tree) -> Tree:
    """What would be done again at every token: methods are expanded, and matrices cast to the dtype of the products."""
    return sites.narrowed(model, sites.expand(together(variables)), getattr(model.config, "dtype", "float32"))


def _start(
    model: VisionLanguageModel, variables: Tree, context: Context, search: Search
) -> tuple[int, jax.Array, Cache]:
    if search.length <= len(search.start):
        raise ValueError(
            f"a prompt of {len(search.start)} tokens leaves no tokens to generate within length {search.length}"
        )
    if search.length > model.positions:
        raise ValueError(f"length {search.length} exceeds the model's {model.positions} positions")
    n_rows = context.next_B.shape[0]
    start_RS = jnp.broadcast_to(jnp.array(search.start, jnp.int32), (n_rows, len(search.start)))
    logits_RV, cache = model.apply(variables, start_RS, context, search.length, method="start")
    return n_rows, logits_RV, cache


def _log_probs(logits: jax.Array, t: jax.Array, search: Search) -> jax.Array:
    """log softmax without padding rows of the vocabulary and, in texts of less than `min_length` tokens, without end tokens."""
    log_probs = jax.nn.log_softmax(logits, axis=-1).at[..., search.n_words :].add(_LOW)
    return log_probs.at[..., np.array(search.stop)].add(jnp.where(t < search.min_length, _LOW, 0.0))


def _ends(token: jax.Array, search: Search) -> jax.Array:
    return jnp.isin(token, jnp.array(search.stop))


@functools.partial(jax.jit, static_argnames=("model", "search"))
def greedy(
    model: VisionLanguageModel, variables: Tree, context: Context, search: Search
) -> tuple[jax.Array, jax.Array]:
    """Greedy search -> (tokens (B, length) padded after the end token, log-probability (B,))."""
    variables = _once(model, variables)
    n_rows, logits_BV, cache = _start(model, variables, context, search)
    n_start, length, pad = len(search.start), search.length, search.pad
    tokens_BT = jnp.full((n_rows, length), pad, jnp.int32).at[:, :n_start].set(jnp.array(search.start, jnp.int32))

    def running(state: dict[str, Any]) -> jax.Array:
        return (state["t"] < length) & ~jnp.all(state["done"])

    def chosen(state: dict[str, Any], logits_BV: jax.Array, cache: Cache) -> dict[str, Any]:
        log_probs_BV = _log_probs(logits_BV, state["t"], search)
        token_B = jnp.argmax(log_probs_BV, axis=-1).astype(jnp.int32)
        gain_B = jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=-1)[:, 0]
        token_B = jnp.where(state["done"], pad, token_B)
        return {
            "t": state["t"] + 1,
            "tokens": state["tokens"].at[:, state["t"]].set(token_B),
            "score": state["score"] + jnp.where(state["done"], 0.0, gain_B),
            "done": state["done"] | _ends(token_B, search),
            "last": token_B,
            "cache": cache,
        }

    def write(state: dict[str, Any]) -> dict[str, Any]:
        return chosen(state, *model.apply(variables, state["last"], state["cache"], context, method="step"))

    state = {"t": jnp.int32(n_start), "tokens": tokens_BT}
    state |= {"score": jnp.zeros(n_rows), "done": jnp.zeros(n_rows, bool)}
    state = jax.lax.while_loop(running, write, chosen(state, logits_BV, cache))
    return state["tokens"], state["score"]


@functools.partial(jax.jit, static_argnames=("model", "search"))
def beam_search(
    model: VisionLanguageModel, variables: Tree, context: Context, search: Search
) -> tuple[jax.Array, jax.Array]:
    """The beam search `search.kind` -> (tokens (B, beams, length), scores (B, beams)), best first."""
    variables = _once(model, variables)

    def running(state: dict[str, Any]) -> jax.Array:
        return (state["t"] < search.length) & jnp.any(state["open"])

    def chosen(state: dict[str, Any], logits: jax.Array, cache: Cache) -> dict[str, Any]:
        new = BEAM_SEARCHES[search.kind](state, logits, search)
        source, token = new.pop("source"), new.pop("token")
        return state | new | {"t": state["t"] + 1, "last": token.reshape(-1), "cache": _with_beams(cache, source)}

    def write(state: dict[str, Any]) -> dict[str, Any]:
        return chosen(state, *model.apply(variables, state["last"], state["cache"], context, method="step"))

    state = jax.lax.while_loop(running, write, chosen(*_first(model, variables, context, search)))
    return state["final"], state["final_score"]


def _transformers_beams(state: dict[str, Any], logits: jax.Array, search: Search) -> dict[str, Any]:
    t, beams = state["t"], search.beams
    # enough to keep `beams` running if `beams` of them end
    score, source, token, tokens = _continued(state, logits, search, 2 * beams)
    ends = _ends(token, search) | (t + 1 == search.length)

    n_generated = (t + 1 - len(search.start)).astype(jnp.float32)
    may_finish = ends & (jnp.arange(2 * beams) < beams)[None]
    final = _stored(state, tokens, may_finish, score / n_generated**search.length_penalty)

    score, kept = jax.lax.top_k(jnp.where(ends, score + _LOW, score), beams)
    can_improve = score[:, 0] / n_generated**search.length_penalty > final["final_score"][:, -1]
    source, token = (jnp.take_along_axis(x, kept, axis=1) for x in (source, token))
    tokens = jnp.take_along_axis(tokens, kept[..., None], axis=1)
    open_B = state["open"] & can_improve & ~jnp.all(ends)
    return final | {"tokens": tokens, "score": score, "open": open_B, "source": source, "token": token}


def _mplug_beams(state: dict[str, Any], logits: jax.Array, search: Search) -> dict[str, Any]:
    t = state["t"]
    total, source, token, tokens = _continued(state, logits, search, search.beams)
    score = total / ((5 + t + 1 - len(search.start)) / 6) ** 0.6
    ends = _ends(token, search) | (t + 1 == search.length)
    closes_B1 = ends[:, :1]
    final, open_B = _stored(state, tokens, ends | closes_B1, score), state["open"] & ~closes_B1[:, 0]
    return final | {"tokens": tokens, "score": total, "open": open_B, "source": source, "token": token}


def _stored(state: dict[str, Any], tokens: jax.Array, which: jax.Array, score: jax.Array) -> dict[str, Any]:
    """The best finished texts, when those that `which` marks in open rows are added."""
    score = jnp.where(which & state["open"][:, None], score, _LOW)
    score, best = jax.lax.top_k(jnp.concatenate([state["final_score"], score], axis=1), state["score"].shape[1])
    final = jnp.concatenate([state["final"], tokens], axis=1)
    return {"final": jnp.take_along_axis(final, best[..., None], axis=1), "final_score": score}


def _first(
    model: VisionLanguageModel, variables: Tree, context: Context, search: Search
) -> tuple[dict[str, Any], jax.Array, Cache]:
    """The state of a beam search before its first token, the logits of that token (B * K, V), and the cache."""
    n_rows, logits_BV, cache = _start(model, variables, context, search)
    n_start, beams = len(search.start), search.beams
    tokens_BKT = jnp.full((n_rows, beams, search.length), search.pad, jnp.int32)
    tokens_BKT = tokens_BKT.at[:, :, :n_start].set(jnp.array(search.start, jnp.int32))
    state = {
        "t": jnp.int32(n_start),
        "tokens": tokens_BKT,
        # only one beam runs at first, or all would be the same
        "score": jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, _LOW)[None], (n_rows, 1)),
        "final": tokens_BKT,
        "final_score": jnp.full((n_rows, beams), _LOW),
        "open": jnp.ones(n_rows, bool),
    }
    cache = _with_beams(cache, jnp.zeros((n_rows, beams), jnp.int32))
    return state, jnp.repeat(logits_BV, beams, axis=0), cache


def _continued(
    state: dict[str, Any], logits: jax.Array, search: Search, n: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The `n` best continuations of the running beams by one token, best first: log-probability, beam that is continued and
    token, each (B, n), and the texts (B, n, length)."""
    n_rows, beams = state["score"].shape
    log_probs = _log_probs(logits, state["t"], search)
    total = (log_probs.reshape(n_rows, beams, -1) + state["score"][..., None]).reshape(n_rows, -1)
    score, flat = jax.lax.top_k(total, n)
    source, token = flat // log_probs.shape[-1], (flat % log_probs.shape[-1]).astype(jnp.int32)
    texts = jnp.take_along_axis(state["tokens"], source[..., None], axis=1).at[:, :, state["t"]].set(token)
    return score, source, token, texts


def _with_beams(cache: Cache, source_BK: jax.Array) -> Cache:
    """The cache with rows reordered to follow the beams that they continue."""
    n_rows, n_now = source_BK.shape[0], jax.tree.leaves(cache.rows)[0].shape[1] // source_BK.shape[0]
    rows = (jnp.arange(n_rows)[:, None] * n_now + source_BK).reshape(-1)
    return cache._replace(rows=jax.tree.map(lambda x: x[:, rows], cache.rows))


BEAM_SEARCHES = {"transformers": _transformers_beams, "mplug": _mplug_beams}


@functools.partial(jax.jit, static_argnames=("model", "pad", "k", "smoothing", "chunk"))
def rank(
    model: VisionLanguageModel,
    variables: Tree,
    context: Context,
    answers_AT: jax.Array,
    *,
    pad: int,
    k: int = 128,
    smoothing: float = 0.0,
    chunk: int = 16,
) -> tuple[jax.Array, jax.Array]:
    """Rank the answers of a closed list, as BLIP does -> (indices (B, k), scores (B, k)), best first.

    The probability of the first token selects `k` of the A answers, which are ordered by the negative loss of the whole
    answer, in nats, summed over its tokens, with the label smoothing of training. `answers_AT`: [first token or placeholder,
    answer, end], padded. `chunk` candidates per row are in memory at a time.
    """
    n_rows, k = context.next_B.shape[0], min(k, answers_AT.shape[0])
    variables = _once(model, variables)
    start_B1 = jnp.broadcast_to(answers_AT[:1, :1], (n_rows, 1))
    logits_B1V = model.apply(variables, start_B1, context, method="score")
    first_BA = jax.nn.log_softmax(logits_B1V[:, 0])[:, answers_AT[:, 1]]
    top_BK = jax.lax.top_k(first_BA, k)[1]
    chunk = min(chunk, k)
    padded_BK = jnp.pad(top_BK, ((0, 0), (0, -k % chunk)), mode="edge")

    def negative_loss(some_BC: jax.Array) -> jax.Array:
        tokens_BCT = answers_AT[some_BC]
        inputs, targets = tokens_BCT[..., :-1], tokens_BCT[..., 1:]
        flat = inputs.reshape(-1, inputs.shape[-1])
        logits = model.apply(variables, flat, context, method="score").reshape(*inputs.shape, -1)
        return -(ops.token_nll(logits, targets, smoothing) * (targets != pad)).sum(-1)

    pieces_NBC = padded_BK.reshape(n_rows, -1, chunk).swapaxes(0, 1)
    score_BK = jax.lax.map(negative_loss, pieces_NBC).swapaxes(0, 1).reshape(n_rows, -1)[:, :k]
    score_BK, order_BK = jax.lax.top_k(score_BK, k)
    return jnp.take_along_axis(top_BK, order_BK, axis=1), score_BK
