"""The table of methods: one row per way of using one, with what it must count and promise on the tiny VQA model."""

import dataclasses
import functools

import jax
import tiny

import jaxpeft as jp
from jaxpeft import methods, tree
from jaxpeft.methods import LoRA, Prefix, Scoped, SerialAdapter

L, D, F, V = 2, 12, 20, len(tiny.TOKENIZER)
LORA = 4 * L * 2 * (D + D)  # query and value of self- and cross-attention in both text stacks, per unit of rank
TRANSFORM = D * D + D + 2 * D + V  # dense, LayerNorm, vocabulary bias
BASE = tree.count(tiny.params())
TIED, KIND = "untied from the word embedding", "cannot be merged exactly"
CHANGES = {"identity": None, "refused": KIND}


@dataclasses.dataclass(frozen=True)
class Row:
    """name in METHODS with its fields and head, or a tuple of methods; exact counts; how near the identity at init; why it does not
    merge, '' if it does."""

    name: str
    count: int
    fields: tuple = ()
    head: str = "none"
    stored: int | None = None  # None: as many as are trained
    identity: float | None = 0.0  # largest change of a logit at the start; None: not the identity
    refused: str = ""
    methods: tuple = ()

    def build(self):
        return self.methods or methods.build(self.name, self.head, **dict(self.fields))


def adapter(m):
    return 2 * D * m + m + D


NORMS = 2 * D * (2 * L + 1 + 2 * (3 * L + 1) + 1)  # vision, both text stacks, the head
TEXT_BIASES = 2 * (L * (2 * 4 * D + F + D + 3 * D) + D)
PREFIX_MLP = 4 * (3 * D + D * 5 + 5 + L * (5 + 1) * 2 * D)
ROWS = [
    Row("prompt", 2 * 3 * D, (("length", 3),), **CHANGES),
    Row("prompt", 3 * D, (("where", "^vision$"), ("length", 3), ("start", "normal")), **CHANGES),
    Row("prompt", 2 * D, (("where", "decoder"), ("length", 2), ("start", "text"), ("text", "w3 w5"), ("positions", "shift")), **CHANGES),
    Row("prefix", 4 * L * 2 * 3 * D, (("length", 3),), **CHANGES),
    Row("prefix", L * 2 * D, (("length", 1), ("where", "^vision/.*attention$")), **CHANGES),
    Row("prefix", PREFIX_MLP, (("length", 3), ("mlp", 5)), stored=4 * L * 2 * 3 * D, **CHANGES),
    Row("prefix", L * 2 * 2 * D, (("length", 2), ("where", "decoder.*self_attention$"), ("positions", "shift")), **CHANGES),
    Row("serial_adapter", 2 * 3 * L * adapter(4), (("bottleneck", 4),), refused=KIND),
    Row("serial_adapter", 3 * L * adapter(4), (("bottleneck", 4), ("where", ""), ("placement", "pfeiffer"), ("init_weights", "normal")), **CHANGES),
    Row("parallel_adapter", 2 * L * adapter(4), (("bottleneck", 4),), refused=KIND),
    Row("parallel_adapter", 5 * L * (adapter(2) + 1), (("bottleneck", 2), ("where", "attention$"), ("learned_scale", True), ("scale", 1.0)), refused=KIND),
    Row("compacter", 4**3 + 2 * 3 * L * (2 * (D + 8) + D + 8), (("bottleneck", 8),), refused=KIND),
    Row("lora", 2 * LORA, (("rank", 2),)),
    Row("lora", 2 * LORA + TRANSFORM, (("rank", 2),), head="transform"),
    Row("lora", 2 * LORA + TRANSFORM + D * V, (("rank", 2),), head="untied", refused=TIED),
    Row("lora", 3 * L * ((D + D) + (D + F)), (("rank", 3), ("where", "^vision/.*(value|up)$"), ("rank_stabilized", True))),
    Row("lora", 4 * (8 * 8 * 3 + D), (("rank", 4), ("where", "^vision/patch$"), ("alpha", 1.0))),
    Row("dora", 2 * LORA + 8 * L * D, (("rank", 2),), identity=1e-5),  # norms in two programs: rounding
    Row("pissa", 2 * LORA, (("rank", 2),), stored=4 * LORA),
    Row("vera", 8 * L * (D + 5), (("rank", 5),), stored=8 * L * (D + 5) + 2 * 5 * D),
    Row("vera", L * (2 * F + D + 3 * 5), (("rank", 5), ("where", "encoder.*mlp/|decoder.*mlp/up")), stored=L * (2 * F + D + 3 * 5) + 2 * 5 * F),
    Row("ia3", 2 * L * (4 * D + F)),
    Row("ssf", 2 * 2 * L * (8 * D + F + D + 3 * D)),
    Row("ssf", 2 * (L * (7 * D + F) + D), (("where", "^vision/(blocks|patch)"),)),
    Row("oft", 8 * L * (D // 4) * 6, (("block", 4),), identity=1e-5),  # x R with R = I is another program
    Row("vpt", 3 * D, (("length", 3), ("patch", 8)), **CHANGES),
    Row("vpt", L * 3 * D, (("length", 3), ("patch", 8), ("depth", "deep")), **CHANGES),
    Row("mam", 4 * L * 2 * 2 * D + 2 * L * adapter(4), (("length", 2), ("bottleneck", 4)), **CHANGES),
    Row("unipelt", 4 * L * (2 * 2 * D + D + 1) + 2 * L * (adapter(4) + D + 1) + 2 * LORA + 8 * L * (D + 1), (("length", 2), ("bottleneck", 4), ("rank", 2)), **CHANGES),
    Row("scoped", 2 * LORA // 4, methods=(Scoped(method=LoRA(rank=2), where="encoder", layers=(1,)),)),
    Row("scoped", 2 * 2 * 3 * D + 3 * adapter(4), methods=(Scoped(method=Prefix(length=3), where="encoder", layers=(0,)), Scoped(method=SerialAdapter(bottleneck=4), where="decoder", layers=(1,))), **CHANGES),
    Row("bitfit", TEXT_BIASES + 2 * D + V),
    Row("layer_norms", NORMS, (("where", ""),)),
    Row("full", BASE),
    Row("head", TRANSFORM),
    Row("head", TRANSFORM + D * V, (("matrix", "untied"),), refused=TIED),
    Row("selective", NORMS, (("leaves", "norm[12]?/"),)),
]  # fmt: skip
IDS = [f"{row.name}{i}" for i, row in enumerate(ROWS)]


@functools.cache
def attached(row):
    variables = jp.attach(tiny.model(), tiny.params(), row.build(), jax.random.key(1))
    return variables, jp.trainable(row.build(), variables)


def perturbed(variables, scale=0.1, seed=3):
    """Every leaf of `peft` moved, so that what is zero at init matters."""
    keys = iter(jax.random.split(jax.random.key(seed), 400))
    return variables | {
        "peft": jax.tree.map(lambda x: x + scale * jax.random.normal(next(keys), x.shape), variables["peft"])
    }
