"""What a method is: a frozen dataclass with pure functions, bound to the sites that its `where` selects.

A method may add leaves at four kinds of site (`sites.KINDS`), train base leaves in place (`train`), or both. A method
file overrides `init` and one or two site functions; everything else stays the identity defined here. Equal dataclasses
hash alike, so two equal methods share one compilation.
"""

import dataclasses
from typing import ClassVar

import jax

Theta = dict[str, jax.Array]  # one site's own leaves


@dataclasses.dataclass(frozen=True)
class Method:
    """The identity on every site. Subclasses add fields (the paper's hyper-parameters) with defaults."""

    where: str = ""  # regular expression searched in site paths
    kinds: ClassVar[tuple[str, ...]] = ()  # kinds of site this method can act on
    train: ClassVar[str] = ""  # regular expression of base leaves trained in place; '' for none
    fixed: ClassVar[tuple[str, ...]] = ()  # own leaves that are stored but not trained

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def init(self, rng: jax.Array, kind: str, shape: tuple[int, ...], kernel: jax.Array | None) -> Theta:
        """Own leaves for one site (one layer of a stack). `shape`: see `sites.KINDS`; `kernel`: the base's, if any."""
        raise ValueError(f"{self.name} adds nothing at a {kind} site")

    def linear(self, theta: Theta, x, y, kernel, rng):
        """x (..., in), y (..., out) = x @ kernel + bias -> new y. `rng` is None when nothing is random (evaluation)."""
        return y

    def sublayer(self, theta: Theta, x_BTD, y_BTD):
        """Input and output of an attention or MLP, before the residual add -> new output."""
        return y_BTD

    def kv(self, theta: Theta, k_BSNH, v_BSNH, mask_BTS):
        """Keys, values and mask (broadcastable to B,T,S, or None) of one attention -> new ones."""
        return k_BSNH, v_BSNH, mask_BTS

    def embed(self, theta: Theta, x_BTD, mask_BT):
        """The sequence and padding mask that enter a stack -> new ones; tokens are added in front."""
        return x_BTD, mask_BT

    def merge(self, theta: Theta, base: Theta) -> Theta:
        """{'kernel', 'bias'} of a linear with this method folded in; raises where that is not exact."""
        raise ValueError(f"{self.name} cannot be merged into the base exactly; export the tuned tree instead")
