"""Greedy and beam search over a KV cache, whole searches inside one jitted call.

The context (image tokens or question states) is projected to cross-attention keys and values once per image and never
repeated per beam: attention folds beams into its query axis. `length` counts all tokens, the prompt included.
Beam search follows the semantics of `transformers` (early_stopping=False): 2K candidates a step, only the best K of
them may finish, a finished score is logp / n_generated ** length_penalty with the end token counted, and a row is
closed once no running beam can beat its worst finished one.
"""

import functools

import jax
import jax.numpy as jnp

from jaxpeft import ops
from jaxpeft.adapt import sites
from jaxpeft.tree import Tree

_LOW = -1e9  # a score no real beam reaches; finite, so that sums of two stay ordered


def _start(model, variables, context_BSD, context_mask_BS, prompt_BT, length):
    if not 0 < prompt_BT.shape[1] < length:
        raise ValueError(f"a prompt of {prompt_BT.shape[1]} tokens leaves nothing to write within length {length}")
    if length > model.config.max_positions:
        raise ValueError(f"length {length} is more than the model's {model.config.max_positions} positions")
    return model.apply(variables, prompt_BT, context_BSD, context_mask_BS, length, method="decode_start")


def _step(model, variables, token_B, cache, context_mask_BS):
    return model.apply(variables, token_B, cache, context_mask_BS, method="decode_step")


def _log_probs(model, logits, t, min_length, eos_id):
    """log softmax, with the end token forbidden while fewer than `min_length` tokens stand, and always the rows that no
    token belongs to: matrices are padded to a multiple of 64 or so."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    n_tokens = len(model.tokenizer or ()) or logits.shape[-1]
    log_probs = log_probs.at[..., n_tokens:].add(_LOW)
    return log_probs.at[..., eos_id].add(jnp.where(t < min_length, _LOW, 0.0))


@functools.partial(jax.jit, static_argnames=("model", "length", "min_length"))
def greedy(model, variables: Tree, context_BSD, context_mask_BS, prompt_BT, *, length: int, min_length: int = 0):
    """The most likely token each time -> (tokens (B, length) padded after the end token, log-probability (B,))."""
    eos_id, pad_id = model.config.sep_id, model.config.pad_id
    n_rows, n_prompt = prompt_BT.shape
    variables = sites.expand(variables)  # once, and not in every step
    logits_BV, cache = _start(model, variables, context_BSD, context_mask_BS, prompt_BT, length)
    tokens_BT = jnp.full((n_rows, length), pad_id, jnp.int32).at[:, :n_prompt].set(prompt_BT)

    def running(state):
        return (state["t"] < length) & ~jnp.all(state["done"])

    def write(state):
        log_probs_BV = _log_probs(model, state["logits"], state["t"], min_length, eos_id)
        token_B = jnp.argmax(log_probs_BV, axis=-1).astype(jnp.int32)
        gain_B = jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=-1)[:, 0]
        token_B = jnp.where(state["done"], pad_id, token_B)
        logits_BV, cache = _step(model, variables, token_B, state["cache"], context_mask_BS)
        return {
            "t": state["t"] + 1,
            "tokens": state["tokens"].at[:, state["t"]].set(token_B),
            "score": state["score"] + jnp.where(state["done"], 0.0, gain_B),
            "done": state["done"] | (token_B == eos_id),
            "logits": logits_BV,
            "cache": cache,
        }

    state = {"t": jnp.int32(n_prompt), "tokens": tokens_BT, "logits": logits_BV, "cache": cache}
    state |= {"score": jnp.zeros(n_rows), "done": jnp.zeros(n_rows, bool)}
    state = jax.lax.while_loop(running, write, state)
    return state["tokens"], state["score"]


@functools.partial(jax.jit, static_argnames=("model", "beams", "length", "min_length", "length_penalty"))
def beam_search(
    model,
    variables: Tree,
    context_BSD,
    context_mask_BS,
    prompt_BT,
    *,
    beams: int,
    length: int,
    min_length: int = 0,
    length_penalty: float = 1.0,
):
    """The `beams` best sequences -> (tokens (B, beams, length), scores (B, beams)), best first."""
    eos_id, pad_id = model.config.sep_id, model.config.pad_id
    n_rows, n_prompt = prompt_BT.shape
    variables = sites.expand(variables)  # once, and not in every step
    logits_BV, cache = _start(model, variables, context_BSD, context_mask_BS, prompt_BT, length)
    tokens_BKT = jnp.full((n_rows, beams, length), pad_id, jnp.int32).at[:, :, :n_prompt].set(prompt_BT[:, None])

    def with_beams(cache, source_BK):
        """Rows of the self-attention cache follow the beams they continue; cross keys stay one per image."""
        rows = (jnp.arange(n_rows)[:, None] * (cache["layers"]["self"][0].shape[1] // n_rows) + source_BK).reshape(-1)
        layers = cache["layers"] | {"self": jax.tree.map(lambda x: x[:, rows], cache["layers"]["self"])}
        return cache | {"layers": layers}

    def running(state):
        return (state["t"] < length) & jnp.any(state["open"]) & ~state["all_ended"]

    def write(state):
        t = state["t"]
        log_probs = _log_probs(model, state["logits"], t, min_length, eos_id)
        total = (log_probs.reshape(n_rows, beams, -1) + state["score"][..., None]).reshape(n_rows, -1)
        score, flat = jax.lax.top_k(total, 2 * beams)  # enough to keep `beams` alive when `beams` of them end
        source, token = flat // log_probs.shape[-1], (flat % log_probs.shape[-1]).astype(jnp.int32)
        sequence = jnp.take_along_axis(state["tokens"], source[..., None], axis=1).at[:, :, t].set(token)
        ends = (token == eos_id) | (t + 1 == length)

        n_generated = (t + 1 - n_prompt).astype(jnp.float32)
        may_finish = ends & (jnp.arange(2 * beams) < beams)[None] & state["open"][:, None]
        finished = jnp.where(may_finish, score / n_generated**length_penalty, _LOW)
        pool_score = jnp.concatenate([state["final_score"], finished], axis=1)
        pool = jnp.concatenate([state["final"], sequence], axis=1)
        final_score, best = jax.lax.top_k(pool_score, beams)
        final = jnp.take_along_axis(pool, best[..., None], axis=1)

        score, kept = jax.lax.top_k(jnp.where(ends, score + _LOW, score), beams)
        tokens = jnp.take_along_axis(sequence, kept[..., None], axis=1)
        source = jnp.take_along_axis(source, kept, axis=1)
        token_B = jnp.take_along_axis(token, kept, axis=1).reshape(-1)
        logits, cache = _step(model, variables, token_B, with_beams(state["cache"], source), context_mask_BS)
        can_improve = score[:, 0] / n_generated**length_penalty > final_score[:, -1]
        return {
            "t": t + 1,
            "tokens": tokens,
            "score": score,
            "final": final,
            "final_score": final_score,
            "open": state["open"] & can_improve,
            "all_ended": jnp.all(ends),
            "logits": logits,
            "cache": cache,
        }

    state = {
        "t": jnp.int32(n_prompt),
        "tokens": tokens_BKT,
        # one live beam at first, or all would write the same
        "score": jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, _LOW)[None], (n_rows, 1)),
        "final": tokens_BKT,
        "final_score": jnp.full((n_rows, beams), _LOW),
        "open": jnp.ones(n_rows, bool),
        "all_ended": jnp.zeros((), bool),
        "logits": jnp.repeat(logits_BV, beams, axis=0),
        "cache": with_beams(cache, jnp.zeros((n_rows, beams), jnp.int32)),
    }
    state = jax.lax.while_loop(running, write, state)
    return state["final"], state["final_score"]


@functools.partial(jax.jit, static_argnames=("model", "k", "smoothing", "chunk"))
def rank(
    model,
    variables: Tree,
    context_BSD,
    context_mask_BS,
    answers_AT,
    *,
    k: int = 128,
    smoothing: float = 0.0,
    chunk: int = 16,
):
    """The answers of a list, best first -> (indices (B, k), scores (B, k)): BLIP's way to answer from a closed list.

    The first word's probability picks `k` of the A answers; those are ordered by the negative loss of the whole answer, in
    nats, summed over its tokens, with the label smoothing of training (as BLIP does). `answers_AT`: [DEC] answer [SEP],
    padded. `chunk` candidates per question are in memory at a time.
    """
    pad_id = model.config.pad_id
    n_rows, k = context_BSD.shape[0], min(k, answers_AT.shape[0])
    variables = sites.expand(variables)
    start_B1 = jnp.broadcast_to(answers_AT[:1, :1], (n_rows, 1))
    logits_B1V = model.apply(variables, start_B1, context_BSD, context_mask_BS, method="decode")
    first_BA = jax.nn.log_softmax(logits_B1V[:, 0])[:, answers_AT[:, 1]]
    top_BK = jax.lax.top_k(first_BA, k)[1]
    chunk = min(chunk, k)
    padded_BK = jnp.pad(top_BK, ((0, 0), (0, -k % chunk)), mode="edge")

    def negative_loss(some_BC):
        tokens_BCT = answers_AT[some_BC]
        inputs, targets = tokens_BCT[..., :-1], tokens_BCT[..., 1:]
        flat = inputs.reshape(-1, inputs.shape[-1])
        logits = model.apply(variables, flat, context_BSD, context_mask_BS, method="decode").reshape(*inputs.shape, -1)
        return -(ops.token_nll(logits, targets, smoothing) * (targets != pad_id)).sum(-1)

    pieces_NBC = padded_BK.reshape(n_rows, -1, chunk).swapaxes(0, 1)
    score_BK = jax.lax.map(negative_loss, pieces_NBC).swapaxes(0, 1).reshape(n_rows, -1)[:, :k]
    score_BK, order_BK = jax.lax.top_k(score_BK, k)
    return jnp.take_along_axis(top_BK, order_BK, axis=1), score_BK
