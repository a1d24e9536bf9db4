"""Training base leaves in place: full fine-tuning, the head, or any leaves that a regular expression names.

BLIP's head is a dense layer, GELU and LayerNorm ("transform"), then the vocabulary matrix, tied to the word embedding,
and a free bias. `Head('transform')` trains transform and bias and leaves the tied matrix alone; `Head('untied')` also
gives the head a vocabulary matrix of its own, initialised as a copy (V * D leaves: usually far more than the method
beside it, so it is counted as stored and trained).
"""

import dataclasses
from typing import ClassVar

from jaxpeft.methods.base import Method, Theta
from jaxpeft.ops import matmul

HEADS = ("none", "transform", "untied")


@dataclasses.dataclass(frozen=True)
class Selective(Method):
    """Train the base leaves whose name ('params/...') contains the regular expression `leaves`."""

    leaves: str = ""

    def __post_init__(self):
        if not self.leaves:
            raise ValueError("selective: `leaves` is empty; give a regular expression of base leaves, such as 'norm'")

    @property
    def train(self) -> str:
        return self.leaves


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every base leaf is tuned."""

    train: ClassVar[str] = "^params/"


@dataclasses.dataclass(frozen=True)
class Head(Method):
    """Tune the decoder's head; `matrix` says whether its vocabulary matrix is untied from the embedding and tuned."""

    where: str = r"^text_decoder/head/vocabulary$"
    matrix: str = "transform"  # 'transform' or 'untied'
    train: ClassVar[str] = r"^params/text_decoder/head/"

    def __post_init__(self):
        if self.matrix not in HEADS[1:]:
            raise ValueError(f"head: unknown kind {self.matrix!r}; choose one of {', '.join(HEADS)}")

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("linear",) if self.matrix == "untied" else ()

    def init(self, rng, kind, shape, kernel) -> Theta:
        return {"matrix": kernel.T}  # (V, D), the layout of the embedding: the same product, so identity is exact

    def linear(self, theta, x, y, kernel, rng):
        return matmul(x, theta["matrix"].T.astype(x.dtype))

    def merge(self, theta, base) -> Theta:
        raise ValueError(
            "head: the tuned vocabulary matrix is untied from the word embedding and the plain model has one matrix "
            "for both, so it cannot be merged; tune with head='transform' to merge"
        )
