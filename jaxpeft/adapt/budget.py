"""Parameter budgets: the size at which a method stores about a given number of parameters, from shapes alone."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
from flax import linen as nn

from jaxpeft.adapt import sites
from jaxpeft.methods import Gated, Method, Scoped
from jaxpeft.tree import Tree


@dataclasses.dataclass(frozen=True)
class Solved:
    """A method of the size whose stored count is closest to the budget. `capped`: its largest size is below the budget."""

    method: Method | tuple[Method, ...]
    size: int
    stored: int
    budget: int
    capped: bool

    @property
    def gap(self) -> float:
        """(stored count - budget) / budget."""
        return self.stored / self.budget - 1

    def __str__(self) -> str:
        cap = ", the most that this method can store" if self.capped else ""
        return f"size {self.size}: {self.stored:,} stored, {100 * self.gap:+.2f} % of the budget {self.budget:,}{cap}"


def abstract_counts(model: nn.Module, method: Method | Iterable[Method]) -> dict[str, int]:
    """`sites.counts` of a method on a model without computing anything."""
    variables = abstract_variables(model, method)
    return sites.counts(variables, sites.trainable(variables))


def abstract_variables(model: nn.Module, method: Method | Iterable[Method]) -> Tree:
    """The result of `attach`, as shapes."""
    return jax.eval_shape(lambda params: sites.attach(model, params, method, jax.random.key(0)), abstract_params(model))


def abstract_params(model: nn.Module) -> Tree:
    """The parameters of a model, as shapes."""
    return sites.abstract(model)["params"]


def solve_size(model: nn.Module, method: Method | Iterable[Method], budget: int) -> Solved:
    """Choose the rank, bottleneck, length or block of a method so that it stores about `budget` scalars.

    Of several methods the last one with a size is resized (the adapter of MAM), and the budget is for all of them together.
    Raises ValueError for methods without a size.
    """
    many = sites.as_methods(method)
    index = max((i for i, one in enumerate(many) if one.size_field), default=None)
    if index is None:
        raise ValueError(f"{', '.join(one.name for one in many)}: no size to choose; the number of parameters is fixed")
    if budget < 1:
        raise ValueError(f"budget is {budget}; expected a number of parameters, at least 1")
    one = many[index]
    (chosen,) = sites.resolved(model, one)
    where = [site for site in sites.sites(model) if chosen.selects(site)]
    if not where:
        abstract_counts(model, one)  # raises, with the nearest names
    sizes = one.sizes(model, where)

    def sized(size: int) -> tuple[Method, ...]:
        return (*many[:index], _resized(one, size), *many[index + 1 :])

    @functools.cache
    def stored(i: int) -> int:
        return abstract_counts(model, sized(sizes[i]))["stored"]

    last = len(sizes) - 1
    low, high = 0, min(1, last)  # counts grow with the size: double, then narrow
    while high < last and stored(high) < budget:
        low, high = high, min(2 * high, last)
    interpolate = True  # most counts are linear in the size; every other guess bisects, for those that are not
    while high - low > 1:
        share = (budget - stored(low)) / max(stored(high) - stored(low), 1) if interpolate else 0.5
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if stored(middle) < budget else (low, middle)
        interpolate = not interpolate
    best = min((low, high), key=lambda i: abs(stored(i) - budget))
    found = sized(sizes[best])
    count = stored(best)
    capped = best == len(sizes) - 1 and count < budget
    return Solved(found[0] if isinstance(method, Method) else found, sizes[best], count, budget, capped)


def _resized(method: Method, size: int) -> Method:
    if isinstance(method, Gated | Scoped):
        return dataclasses.replace(method, method=_resized(method.inner, size))
    return dataclasses.replace(method, **{method.size_field: size})
