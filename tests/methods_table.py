"""The table of methods: one row per way of using one, with what it must count and promise on the tiny VQA model."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

import jaxpeft as jp
from jaxpeft import methods, tree
from jaxpeft.methods import LoRA, Prefix, Scoped, SerialAdapter

L, D, F, V = 2, 12, 20, len(tiny.TOKENIZER)
LORA = 4 * L * 2 * (D + D)  # query and value of self- and cross-attention in both text stacks, per unit of rank
TRANSFORM = D * D + D + 2 * D + V  # dense, LayerNorm, vocabulary bias
BASE = tree.count(tiny.params())


# How near the identity a method starts (largest change of a logit; None: not near), and why it does not merge.
EXACT, ROUNDS, STAYS = (0.0, ""), (1e-5, ""), (0.0, "cannot be merged exactly")
MOVES, TIED = (None, "cannot be merged exactly"), (0.0, "are one matrix in the plain model")


@dataclasses.dataclass(frozen=True)
class Row:
    """A method by name and fields, or a tuple of methods, and what it promises."""

    name: str
    tuned: int
    stored: int
    identity: float | None
    refused: str
    head: str
    fields: tuple
    methods: tuple

    def build(self):
        return self.methods or methods.build(self.name, self.head, **dict(self.fields))


def row(name, tuned, rule=EXACT, stored=None, head="none", methods=(), **fields):
    return Row(name, tuned, tuned if stored is None else stored, *rule, head, tuple(fields.items()), methods)


def adapter(m):
    return 2 * D * m + m + D


NORMS = 2 * D * (2 * L + 1 + 2 * (3 * L + 1) + 1)  # vision, both text stacks, the head
TEXT_BIASES = 2 * (L * (2 * 4 * D + F + D + 3 * D) + D)
PREFIX_MLP = 4 * (3 * D + D * 5 + 5 + L * (5 + 1) * 2 * D)
MLP_VERA = L * (2 * F + D + 3 * 5)
VISION_UNIPELT = L * (2 * 2 * D + D + 1) + L * (adapter(4) + D + 1) + 2 * L * (2 * (D + D) + D + 1)
UNIPELT = 4 * L * (2 * 2 * D + D + 1) + 2 * L * (adapter(4) + D + 1) + 2 * LORA + 8 * L * (D + 1)
SOME_LAYERS = (
    Scoped(method=Prefix(length=3), targets="encoder", layers=(0,)),
    Scoped(method=SerialAdapter(bottleneck=4), targets="decoder", layers=(1,)),
)
ROWS = [
    row("prompt", 2 * 3 * D, MOVES, length=3),
    row("prompt", 3 * D, MOVES, targets="^vision$", length=3, init_weights="normal"),
    row("prompt", 2 * D, MOVES, targets="decoder", length=2, init_weights="text", text="w3 w5", positions="shift"),
    row("prefix", 4 * L * 2 * 3 * D, MOVES, length=3),
    row("prefix", L * 2 * D, MOVES, length=1, targets="^vision/.*attention$"),
    row("prefix", PREFIX_MLP, MOVES, stored=4 * L * 2 * 3 * D, length=3, mlp=5),
    row("prefix", L * 2 * 2 * D, MOVES, length=2, targets="decoder.*self_attention$", positions="shift"),
    row("serial_adapter", 2 * 3 * L * adapter(4), STAYS, bottleneck=4),
    row(
        "serial_adapter",
        3 * L * adapter(4),
        MOVES,
        bottleneck=4,
        targets="",
        placement="pfeiffer",
        init_weights="normal",
    ),
    row("parallel_adapter", 2 * L * adapter(4), STAYS, bottleneck=4),
    row("parallel_adapter", 5 * L * (adapter(2) + 1), STAYS, bottleneck=2, targets="attention$", learned_scale=True),
    row("compacter", 4**3 + 2 * 3 * L * (2 * (D + 8) + D + 8), STAYS, bottleneck=8),
    row("lora", 2 * LORA, rank=2),
    row("lora", 2 * LORA + TRANSFORM, head="transform", rank=2),
    row("lora", 2 * LORA + TRANSFORM + D * V, TIED, head="untied", rank=2),
    row("lora", 3 * L * ((D + D) + (D + F)), rank=3, targets="^vision/.*(value|up)$", rank_stabilized=True),
    row("lora", 4 * (8 * 8 * 3 + D), rank=4, targets="^vision/patch$", alpha=1.0),
    row("dora", 2 * LORA + 8 * L * D, ROUNDS, rank=2),  # norms in two programs
    row("loha", 4 * LORA, rank=2),
    row("pissa", 2 * LORA, stored=4 * LORA, rank=2),
    row("vera", 8 * L * (D + 5), stored=8 * L * (D + 5) + 2 * 5 * D, rank=5),
    row("vera", MLP_VERA, stored=MLP_VERA + 2 * 5 * F, rank=5, targets="encoder.*mlp/|decoder.*mlp/up"),
    row("ia3", 2 * L * (4 * D + F)),
    row("ssf", 2 * 2 * L * (12 * D + F)),
    row("ssf", 2 * (L * (7 * D + F) + D), targets="^vision/(blocks|patch)"),
    row("oft", 8 * L * (D // 4) * 6, ROUNDS, block=4),  # x R with R = I is another program
    row("vpt", 3 * D, MOVES, length=3, patch=8),
    row("vpt", L * 3 * D, MOVES, length=3, patch=8, depth="deep"),
    row("mam", 4 * L * 2 * 2 * D + 2 * L * adapter(4), MOVES, length=2, bottleneck=4),
    row("unipelt", UNIPELT, MOVES, length=2, bottleneck=4, rank=2),
    row("scoped", LORA // 2, methods=(Scoped(method=LoRA(rank=2), targets="encoder", layers=(1,)),)),
    row("scoped", 2 * 2 * 3 * D + 3 * adapter(4), MOVES, methods=SOME_LAYERS),
    row("bitfit", TEXT_BIASES + 2 * D + V),
    row("layer_norms", NORMS, targets=""),
    row("full", BASE),
    row("head", TRANSFORM),
    row("head", TRANSFORM + D * V, TIED, matrix="untied"),
    row("selective", NORMS, leaves="norm[12]?/"),
    row("unipelt", VISION_UNIPELT, MOVES, targets="vision", length=2, bottleneck=4, rank=2),
]
BY_NAME = {f"{one.name}{i}": one for i, one in enumerate(ROWS)}
FIRST = {one.name: name for name, one in reversed(BY_NAME.items())}  # of each method; its variants are slow tests
every_row = pytest.mark.parametrize(
    "row",
    [
        pytest.param(one, id=name, marks=() if name in FIRST.values() else pytest.mark.slow)
        for name, one in BY_NAME.items()
    ],
)


@functools.cache
def attached(row: Row):
    variables = jp.attach(tiny.model(), tiny.params(), row.build(), jax.random.key(1))
    return variables, jp.trainable(variables)


def perturbed(variables, scale=0.1, seed=3):
    """Every leaf of `peft` moved, so that what is zero at init matters."""
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(np.float32), variables["peft"])
    return variables | {"peft": moved}
