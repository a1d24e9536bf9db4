"""Training base leaves in place: full fine-tuning, the head, biases, LayerNorms, or any leaves that a pattern names.

BitFit (Zaken et al. 2021, arXiv 2106.10199) trains every bias, LayerNorms' included; tuning LayerNorms alone trains
scale and bias of each. Their `targets` narrows the choice to a tower or stack.

BLIP's head is a dense layer, GELU and LayerNorm ("transform"), then the vocabulary matrix, tied to the word embedding,
and a free bias. `Head(matrix='transform')` trains transform and bias and leaves the matrix alone; 'untied' also
gives the head a vocabulary matrix of its own, initialised as a copy (V * D leaves: usually far more than the method
beside it, so it is counted as stored and trained).
"""

import dataclasses
import re
from typing import ClassVar

import jax

from jaxpeft.methods.base import Base, Method, Params, Site
from jaxpeft.ops import matmul

HEADS = ("none", "transform", "untied")


@dataclasses.dataclass(frozen=True)
class Selective(Method):
    """Train the base leaves whose name ('params/...') contains the regular expression `leaves`, or a group of the model's."""

    leaves: str = ""
    name: ClassVar[str] = "selective"

    def __post_init__(self) -> None:
        if not self.leaves:
            raise ValueError("selective: `leaves` is empty; give a regular expression of base leaves, such as 'norm'")

    @property
    def train(self) -> str:
        return self.leaves


@dataclasses.dataclass(frozen=True)
class BitFit(Method):
    """Train every bias of the modules whose path `targets` matches (the decoder head's vocabulary bias is one)."""

    targets: str = "text"
    name: ClassVar[str] = "bitfit"
    train: ClassVar[str] = r"bias$"

    def trains(self, leaf: str) -> bool:
        return super().trains(leaf) and re.search(self.targets, leaf.removeprefix("params/")) is not None


@dataclasses.dataclass(frozen=True)
class LayerNorms(BitFit):
    """Train scale and bias of every LayerNorm whose path `targets` matches."""

    name: ClassVar[str] = "layer_norms"
    train: ClassVar[str] = r"norm\d?/(scale|bias)$"


@dataclasses.dataclass(frozen=True)
class NewWords(Method):
    """Train the rows of words that were added to the base's vocabulary: embedding, output bias and nothing else.

    `training/setup.py` puts it beside the method of a run whose texts have words that the base lacks.
    """

    leaves: str = "new_words"
    name: ClassVar[str] = "new_words"

    @property
    def train(self) -> str:
        return self.leaves


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every base leaf is tuned."""

    name: ClassVar[str] = "full"
    train: ClassVar[str] = "^params/"


@dataclasses.dataclass(frozen=True)
class Head(Method):
    """Tune the decoder's head; `matrix` says whether its vocabulary matrix is untied from the embedding and tuned."""

    targets: str = "head"
    matrix: str = "transform"  # 'transform' or 'untied'
    leaves: str = "head.transform"  # what is trained in place
    name: ClassVar[str] = "head"
    first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.matrix not in HEADS[1:]:
            raise ValueError(f"head: unknown kind {self.matrix!r}; choose one of {', '.join(HEADS)}")

    @property
    def train(self) -> str:
        return self.leaves

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("linear",) if self.matrix == "untied" else ()

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        return {
            "matrix": base["kernel"].T
        }  # (V, D), the layout of the embedding: the same product, so identity is exact

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        return matmul(x, params["matrix"].T.astype(x.dtype))

    def merge(self, params: Params, base: Base) -> Params:
        """Where the base has a vocabulary matrix of its own; `sites.merge` refuses a tied one."""
        return base | {"kernel": params["matrix"].T}
