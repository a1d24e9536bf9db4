"""Training base leaves in place: full fine-tuning, the head, biases, LayerNorms, or any leaves that a pattern names.

BitFit (Zaken et al. 2021, arXiv 2106.10199) trains every bias, those of LayerNorms included; LayerNorms trains their scales
and biases only. `targets` restricts either to a tower or stack.

BLIP's head is a dense layer, GELU and LayerNorm ("transform"), then the vocabulary matrix, tied to the word embedding,
and a free bias. `Head(matrix='transform')` trains transform and bias and keeps the matrix frozen; 'untied' also gives the
head its own vocabulary matrix, initialised as a copy. It has V * D parameters, usually far more than the method itself,
and is counted as stored and trained.
"""

import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.methods.base import Base, Method, Params, Site
from jaxpeft.ops import matmul

HEADS = ("none", "transform", "untied")


class _BaseLeaves(Method):
    """Trains base leaves of the modules whose path `targets` matches."""

    def trains(self, leaf: str) -> bool:
        return super().trains(leaf) and re.search(self.targets, leaf.removeprefix("params/")) is not None


@dataclasses.dataclass(frozen=True)
class Selective(_BaseLeaves):
    """Train the base leaves whose name ('params/...') matches `leaves`, a regular expression or a named group of the model, in
    the modules whose path `targets` matches."""

    leaves: str = ""
    name: ClassVar[str] = "selective"

    def __post_init__(self) -> None:
        if not self.leaves:
            raise ValueError("selective: `leaves` is empty; expected a regular expression for base leaves, e.g. 'norm'")

    @property
    def train(self) -> str:
        return self.leaves


@dataclasses.dataclass(frozen=True)
class BitFit(_BaseLeaves):
    """Train every bias of the modules whose path `targets` matches (the decoder head's vocabulary bias is one)."""

    targets: str = "text"
    name: ClassVar[str] = "bitfit"
    train: ClassVar[str] = r"bias$"
    instead: ClassVar[str] = "for a decoder without biases use layer_norms, or targets='vision'"


@dataclasses.dataclass(frozen=True)
class LayerNorms(BitFit):
    """Train scale and bias of every LayerNorm whose path `targets` matches."""

    name: ClassVar[str] = "layer_norms"
    instead: ClassVar[str] = ""
    train: ClassVar[str] = r"norm(_in|\d*)/(scale|bias)$"


@dataclasses.dataclass(frozen=True)
class NewWords(Method):
    """Train only the embedding rows and output biases of words that were added to the base's vocabulary.

    `training/setup.py` adds it to the method of a run whose texts have words that the base lacks.
    """

    leaves: str = "new_words"
    name: ClassVar[str] = "new_words"

    @property
    def train(self) -> str:
        return self.leaves


@dataclasses.dataclass(frozen=True)
class Full(_BaseLeaves):
    """Full fine-tuning: train every base leaf of the modules whose path `targets` matches."""

    name: ClassVar[str] = "full"
    train: ClassVar[str] = "^params/"


@dataclasses.dataclass(frozen=True)
class Head(Method):
    """Train the decoder's head; matrix='untied' also unties its vocabulary matrix from the embedding and trains it."""

    targets: str = "head"
    matrix: str = "transform"  # 'transform' or 'untied'
    leaves: str = "head.transform"  # what is trained in place
    name: ClassVar[str] = "head"
    first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.matrix not in HEADS[1:]:
            raise ValueError(f"head: matrix is {self.matrix!r}; choose one of {', '.join(HEADS[1:])}")

    @property
    def train(self) -> str:
        return self.leaves

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("linear",) if self.matrix == "untied" else ()

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        # (V, D) like the embedding: the same product, so it starts as the identity
        return {"matrix": base["kernel"].T.astype(jnp.float32)}

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        return matmul(x, params["matrix"].T.astype(x.dtype))

    def merge(self, params: Params, base: Base) -> Params:
        """For a base whose vocabulary matrix is not tied; `sites.merge` rejects a tied one."""
        return base | {"kernel": params["matrix"].T}
