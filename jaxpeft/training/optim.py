"""The optimizer of the trainable parameters: its rule, schedule, weight decay and clipping from a config.

The optimizer gets trainable leaves only (they are split off before `jax.grad`), so clipping never counts gradients of frozen
leaves and no state is kept for them. Masks are used for groups of leaves only, such as those that decay.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxpeft import tree
from jaxpeft.adapt import sites
from jaxpeft.runtime.registry import Registry
from jaxpeft.tree import Mask, Tree

Config = Any  # an ml_collections.ConfigDict, whose values are all annotated as Any
SCHEDULES = ("constant", "cosine", "linear", "plateau")


def adamw(config: Config, decays: Mask | None) -> optax.GradientTransformation:
    """Loshchilov and Hutter 2019, arXiv 1711.05101."""
    return optax.adamw(1.0, config.b1, config.b2, weight_decay=config.weight_decay, mask=decays)


def adafactor(config: Config, decays: Mask | None) -> optax.GradientTransformation:
    """Shazeer and Stern 2018, arXiv 1804.04235, without momentum and without scaling by the parameter's size, as adapters
    start at zero."""
    return optax.adafactor(
        1.0, multiply_by_parameter_scale=False, weight_decay_rate=config.weight_decay or None, weight_decay_mask=decays
    )


def lion(config: Config, decays: Mask | None) -> optax.GradientTransformation:
    """Chen et al. 2023, arXiv 2302.06675. They use b2 = 0.99 and a learning rate three to ten times smaller than AdamW's."""
    return optax.lion(1.0, config.b1, config.b2, weight_decay=config.weight_decay, mask=decays)


def sgd(config: Config, decays: Mask | None) -> optax.GradientTransformation:
    """Gradient descent with momentum b1; the weight decay is decoupled, as in AdamW."""
    return optax.chain(
        optax.trace(config.b1),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(1.0),
    )


def muon(config: Config, decays: Mask | None) -> optax.GradientTransformation:
    """Jordan 2024: orthogonalised momentum b1 for matrices (for each layer of a stack); Adam without decay for the rest."""

    def dimensions(params: Tree) -> Tree:
        return jax.tree.map(_matrix, tree.names(params), params)

    return optax.contrib.muon(
        1.0, beta=config.b1, weight_decay=config.weight_decay, weight_decay_mask=decays, adam_b1=config.b1, adam_b2=config.b2,
        muon_weight_dimension_numbers=dimensions,
    )  # fmt: skip


def _matrix(name: str, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes of a matrix, after the layer axis of a stack; None for other arrays, such as a stack's biases (L, D)."""
    layers = int("/blocks/" in name)
    return optax.contrib.MuonDimensionNumbers(layers, layers + 1) if x.ndim == 2 + layers else None


# optim.name -> a function of config.optim and of the mask of leaves that decay (None: all), which returns an optax
# transformation with a learning rate of 1. To add one: OPTIMIZERS["mine"] = function (see jaxpeft/runtime/registry.py)
OPTIMIZERS = Registry("optimizer", {"adamw": adamw, "adafactor": adafactor, "lion": lion, "sgd": sgd, "muon": muon})


class Schedule(NamedTuple):
    """The numbers of the learning-rate schedule, as scalars in the optimizer's state and not as constants of the program.

    So runs that differ in learning rate, warm-up or steps share one compiled step, and the loop can end a 'plateau' early.
    """

    step: jax.Array
    lr: jax.Array
    n_warm: jax.Array
    decay_from: jax.Array
    n_steps: jax.Array

    def rate(self, kind: str, scale: float = 1.0, ends: tuple[float, float] = (0.0, 0.0)) -> jax.Array:
        """The learning rate: a line from `ends[0]` to lr * scale in the warm-up, then constant; from `decay_from` to `n_steps`
        a cosine or a line to `ends[1]`."""
        done = jnp.clip((self.step - self.decay_from) / jnp.maximum(self.n_steps - self.decay_from, 1), 0.0, 1.0)
        after = {"constant": 1.0, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * done))}.get(kind, 1 - done)
        warming = self.step < self.n_warm
        share = jnp.where(warming, self.step / jnp.maximum(self.n_warm, 1), after)
        end = jnp.where(warming, *ends)
        return end + (self.lr * scale - end) * share


def schedule(config: Config, n_steps: int) -> Schedule:
    """`optim.schedule` at step 0: warm-up over `warmup`, and for 'plateau' a decay over the last `cooldown`, both fractions of
    all steps. For 'plateau' `n_steps` is a cap: the loop starts the decay where validation stops improving. Raises ValueError
    for an unknown schedule and for fractions out of range."""
    if config.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule is {config.schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if not 0 <= config.warmup < 1:
        raise ValueError(f"optim.warmup is {config.warmup}; it must be a fraction of steps, in [0, 1)")
    n_warm = round(config.warmup * n_steps)
    decay_from = n_warm
    if config.schedule == "plateau":
        if not 0 < config.cooldown <= 1 - config.warmup:
            raise ValueError(f"optim.cooldown is {config.cooldown}; it must be a fraction of steps, in (0, 1 - warmup]")
        decay_from = n_steps - round(config.cooldown * n_steps)
    whole = (jnp.int32(x) for x in (n_warm, decay_from, n_steps))
    return Schedule(jnp.int32(0), jnp.float32(config.lr), *whole)


def rate_at(config: Config, planned: Schedule, step: int) -> float:
    """The learning rate that update number `step`, from 1, was made with."""
    ends = config.get("start_lr", 0.0), config.get("end_lr", 0.0)
    return float(_rate(planned._replace(step=jnp.int32(step - 1)), config.schedule, 1.0, ends))


_rate = jax.jit(Schedule.rate, static_argnums=(1, 2, 3))


def optimizer(config: Config, tuned: Tree, n_steps: int) -> optax.GradientTransformation:
    """The rule `config.name` with global-norm clipping. Leaves whose name matches the regular expression `no_decay` do not
    decay.

    A method may multiply the learning rate of its leaves (LoRA+), and so may `lr_groups`, pairs of a pattern of names and a
    factor: the whole update, including weight decay, is multiplied.
    The last item of the state is the `Schedule`.
    """
    start, kind = schedule(config, n_steps), config.schedule
    decays = (
        jax.tree.map(lambda name: not re.search(config.no_decay, name), tree.names(tuned)) if config.no_decay else None
    )
    steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    steps.append(OPTIMIZERS.find(config.get("name", "adamw"))(config, decays))
    scales = _lr_scales(tuned, config.get("lr_groups", ()))
    ends = config.get("start_lr", 0.0), config.get("end_lr", 0.0)

    def init(params: Tree) -> Schedule:
        return jax.tree.map(jnp.array, start)  # copies, because the state's buffers may be donated

    def scaled(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Schedule]:
        rates = {scale: state.rate(kind, scale, ends) for scale in sorted(set(jax.tree.leaves(scales)))}
        return jax.tree.map(lambda u, scale: u * rates[scale].astype(u.dtype), updates, scales), state._replace(
            step=state.step + 1
        )

    return optax.chain(*steps, optax.GradientTransformation(init, scaled))


def _lr_scales(tuned: Tree, groups: Iterable[tuple[str, float]]) -> Tree:
    """The tree with each leaf replaced by the multiple of the learning rate that its method and the first of `groups` whose
    pattern its name matches give it. Raises ValueError for a pattern without a match."""

    def of(node: Tree) -> Tree:
        if not sites.is_bound(node):
            return 1.0
        return dataclasses.replace(
            node, params={k: x if x is None else node.method.lr_scale(k) for k, x in node.params.items()}
        )

    names = tree.names(tuned)
    for pattern, _ in groups:
        if not any(re.search(pattern, name) for name in jax.tree.leaves(names)):
            raise ValueError(
                f"optim.lr_groups: {pattern!r} matches no trained leaf, such as {jax.tree.leaves(names)[0]}"
            )
    first = lambda name: next((factor for pattern, factor in groups if re.search(pattern, name)), 1.0)  # noqa: E731
    of_method = jax.tree.map(of, tuned, is_leaf=sites.is_bound)
    return jax.tree.map(lambda name, scale: scale * first(name), names, of_method)
