"""The optimizer of the tuned half: schedule, weight decay and clipping from a config.

Everything here sees tuned leaves only (they were split off before `jax.grad`), so clipping cannot count frozen
gradients and no state is kept for frozen leaves. The masks inside are for what optax masks are good at: groups.
"""

import dataclasses
import re

import jax
import optax

from jaxpeft import sites, tree
from jaxpeft.tree import Tree

SCHEDULES = ("constant", "cosine", "linear")


def schedule(config, n_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` (a fraction of all steps), then constant, or cosine or linear to zero."""
    if config.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule is {config.schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if not 0 <= config.warmup < 1:
        raise ValueError(f"optim.warmup is {config.warmup}; it is a fraction of all steps, in [0, 1)")
    n_warm = round(config.warmup * n_steps)
    rest = max(1, n_steps - n_warm)
    after = {
        "constant": optax.constant_schedule(config.lr),
        "cosine": optax.cosine_decay_schedule(config.lr, rest),
        "linear": optax.linear_schedule(config.lr, 0.0, rest),
    }[config.schedule]
    if not n_warm:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, n_warm), after], [n_warm])


def optimizer(config, tuned: Tree, n_steps: int) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; leaves whose name contains `no_decay` (a regular expression) do not decay.

    A method may give its leaves a multiple of the learning rate (LoRA+): all of the update, decay too, is multiplied.
    """
    decays = (
        jax.tree.map(lambda name: not re.search(config.no_decay, name), tree.names(tuned)) if config.no_decay else None
    )
    steps = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    steps.append(optax.adamw(schedule(config, n_steps), config.b1, config.b2, weight_decay=config.decay, mask=decays))
    scales = _lr_scales(tuned)
    if any(scale != 1 for scale in jax.tree.leaves(scales)):
        steps.append(optax.stateless(lambda updates, _: jax.tree.map(lambda u, scale: u * scale, updates, scales)))
    return optax.chain(*steps)


def _lr_scales(tuned: Tree) -> Tree:
    """The tree with each leaf replaced by the multiple of the learning rate that its method asks for."""

    def of(node):
        if not sites.is_bound(node):
            return 1.0
        return dataclasses.replace(
            node, theta={k: x if x is None else node.method.lr_scale(k) for k, x in node.theta.items()}
        )

    return jax.tree.map(of, tuned, is_leaf=sites.is_bound)
