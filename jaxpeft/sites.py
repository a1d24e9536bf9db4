"""Where model and method meet.

Layers call `linear`, `sublayer`, `kv` and `embed` at four kinds of place and nowhere else. What a method adds at a site
is a value in the Flax collection `peft`, mirroring module paths: a tuple of `Bound` pairs (method, leaves), applied in
order. A `Bound` is a pytree whose leaves are arrays and whose method is static, so the tuned tree carries its own
behaviour: the model needs no list of methods, an evaluation cannot forget them, and jit compiles once per structure.
The base stays in `params`, untouched.

    variables = attach(model, params, LoRA(rank=8), rng)      # {'params': ..., 'peft': ...}
    tuned, frozen = tree.split(variables, trainable(LoRA(rank=8), variables))

Layers are scanned, so a path has no layer index and leaves of a stacked site have a leading axis L.
"""

import dataclasses
import re
import zlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft import tree
from jaxpeft.methods.base import Method, Theta
from jaxpeft.methods.selective import Head
from jaxpeft.tree import Mask, Tree

# What the recorded shape of each kind means; its length tells a stacked site (one more axis, L) from a single one.
KINDS = {"linear": ("in", "out"), "sublayer": ("D",), "kv": ("N", "H"), "embed": ("D",)}


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Bound:
    """One method at one site: static method, traced leaves."""

    method: Method
    theta: Theta

    def tree_flatten_with_keys(self):
        keys = tuple(sorted(self.theta))
        children = tuple((jax.tree_util.DictKey(f"{self.method.name}/{k}"), self.theta[k]) for k in keys)
        return children, (self.method, keys)

    @classmethod
    def tree_unflatten(cls, static, children):
        method, keys = static
        return cls(method, dict(zip(keys, children, strict=True)))


def _bound(module: nn.Module, kind: str, shape: tuple[int, ...]) -> tuple[Bound, ...]:
    """The methods bound at this site; records the site when `sites(model)` is asking."""
    if module.is_mutable_collection("sites"):
        module.put_variable("sites", kind, jnp.zeros(shape))
    return module.get_variable("peft", kind, ())


def linear(module: nn.Module, x, y, kernel):
    """Site of a linear map: x (..., in), y (..., out) = x @ kernel + bias."""
    for bound in _bound(module, "linear", kernel.shape):
        rng = module.make_rng("dropout") if module.has_rng("dropout") else None
        y = bound.method.linear(bound.theta, x, y, kernel, rng)
    return y


def sublayer(module: nn.Module, x_BTD, y_BTD):
    """Site of an attention or MLP: what it read and what it is about to add to the residual stream."""
    for bound in _bound(module, "sublayer", y_BTD.shape[-1:]):
        y_BTD = bound.method.sublayer(bound.theta, x_BTD, y_BTD)
    return y_BTD


def kv(module: nn.Module, k_BSNH, v_BSNH, mask_BTS):
    """Site of an attention's keys, values and mask."""
    for bound in _bound(module, "kv", k_BSNH.shape[-2:]):
        k_BSNH, v_BSNH, mask_BTS = bound.method.kv(bound.theta, k_BSNH, v_BSNH, mask_BTS)
    return k_BSNH, v_BSNH, mask_BTS


def embed(module: nn.Module, x_BTD, mask_BT):
    """Site where a sequence enters a stack."""
    for bound in _bound(module, "embed", x_BTD.shape[-1:]):
        x_BTD, mask_BT = bound.method.embed(bound.theta, x_BTD, mask_BT)
    return x_BTD, mask_BT


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in a model: its module path, kind, shape (see KINDS) and number of stacked layers (None: not stacked)."""

    path: str
    kind: str
    shape: tuple[int, ...]
    layers: int | None


def sites(model: nn.Module) -> list[Site]:
    """Every site of a model, from one abstract trace; nothing is computed."""
    recorded = jax.eval_shape(lambda: model.init(jax.random.key(0), model.example()))["sites"]
    found = []
    for name, leaf in tree.flatten(recorded).items():
        path, kind = name.rsplit("/", 1)
        stacked = len(leaf.shape) > len(KINDS[kind])
        found.append(Site(path, kind, leaf.shape[stacked:], leaf.shape[0] if stacked else None))
    return found


def as_methods(method: Method | Iterable[Method]) -> tuple[Method, ...]:
    """One method or several, as the tuple in which they apply."""
    return (method,) if isinstance(method, Method) else tuple(method)


def attach(model: nn.Module, params: Tree, method: Method | Iterable[Method], rng: jax.Array) -> Tree:
    """Bind methods to the sites of a model: {'params': the same params, 'peft': their own leaves}.

    Pure in (params, method, rng); works under `jax.eval_shape`. A site's leaves depend on its path and the method's
    place in the tuple only, so adding a method does not change what another starts from. Raises ValueError when a
    method matches no site or trains no base leaf, with the nearest paths.
    """
    table, peft = sites(model), {}
    for order, one in enumerate(as_methods(method)):
        hits = [site for site in table if site.kind in one.kinds and re.search(one.where, site.path)]
        if one.kinds and not hits:
            known = [site.path for site in table if site.kind in one.kinds]
            raise ValueError(
                f"{one.name}: where={one.where!r} matches none of the {len(known)} {'/'.join(one.kinds)} sites; "
                f"nearest: {', '.join(tree.nearest(one.where, known))}"
            )
        for site in hits:
            kernel = base_kernel(model, params, site) if site.kind == "linear" else None
            key = jax.random.fold_in(jax.random.fold_in(rng, order), zlib.crc32(f"{site.path}/{site.kind}".encode()))
            theta = _init(one, key, site, kernel)
            node = peft
            for part in site.path.split("/"):
                node = node.setdefault(part, {})
            node[site.kind] = (*node.get(site.kind, ()), Bound(one, theta))
    variables = {"params": params, "peft": peft}
    trainable(method, variables)
    return variables


def _init(method: Method, rng, site: Site, kernel) -> Theta:
    if site.layers is None:
        return method.init(rng, site.kind, site.shape, kernel)
    rngs = jax.random.split(rng, site.layers)
    return jax.vmap(lambda key, one: method.init(key, site.kind, site.shape, one))(rngs, kernel)


def base_kernel(model: nn.Module, params: Tree, site: Site) -> jax.Array:
    """The (stacked) 2-D kernel of a linear site, found in the base; a tied one is read where it is stored."""
    lead = () if site.layers is None else (site.layers,)
    tied = getattr(model, "tied", {}).get(site.path)
    if tied:
        return tree.flatten(params)[tied].T
    return tree.flatten(params)[f"{site.path}/kernel"].reshape(*lead, *site.shape)


def trainable(method: Method | Iterable[Method], variables: Tree) -> Mask:
    """True for the leaves that training moves: the methods' own (less their fixed ones) and the base leaves they name.

    Raises ValueError when a method's `train` names no base leaf, and when nothing at all is trained.
    """
    methods = as_methods(method)
    base = [name for name in tree.flatten(variables) if name.startswith("params/")]
    for one in methods:
        if one.train and not any(re.search(one.train, name) for name in base):
            raise ValueError(
                f"{one.name}: {one.train!r} matches no base leaf; nearest: {', '.join(tree.nearest(one.train, base))}"
            )

    def moves(path, leaf):
        name = tree.path_name(path)
        if name.startswith("params/"):
            return any(one.train and re.search(one.train, name) for one in methods)
        return not any(name.endswith(f"/{one.name}/{fixed}") for one in methods for fixed in one.fixed)

    mask = jax.tree_util.tree_map_with_path(moves, variables)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(f"{', '.join(one.name for one in methods) or 'no method'}: nothing would be trained")
    return mask


def merge(model: nn.Module, variables: Tree) -> Tree:
    """Plain params for the plain model with every bound method folded in, where that is exact; else ValueError."""
    flat = tree.flatten(variables["params"])
    tied = getattr(model, "tied", {})
    for site in sites(model):
        for bound in _at(variables.get("peft", {}), site):
            if site.kind != "linear":
                raise ValueError(f"{bound.method.name} acts on {site.kind} at {site.path} and cannot be merged exactly")
            if site.path in tied:
                if isinstance(bound.method, Head):  # it knows the reason better
                    bound.method.merge(bound.theta, {})
                raise ValueError(f"{bound.method.name}: {site.path} is tied to {tied[site.path]}; merging changes both")
            kernel, bias = f"{site.path}/kernel", f"{site.path}/bias"
            base = {"kernel": base_kernel(model, tree_of(flat, variables["params"]), site), "bias": flat[bias]}
            fold = bound.method.merge if site.layers is None else jax.vmap(bound.method.merge)
            new = fold(bound.theta, base)
            flat |= {kernel: new["kernel"].reshape(flat[kernel].shape), bias: new["bias"]}
    return tree_of(flat, variables["params"])


def tree_of(flat: dict, like: Tree) -> Tree:
    """Leaves by name in the structure of `like`."""
    return tree.unflatten(like, flat, "merged params")


def _at(peft: Tree, site: Site) -> tuple[Bound, ...]:
    node = peft
    for part in site.path.split("/"):
        node = node.get(part, {})
    return node.get(site.kind, ())


def report(variables: Tree, mask: Mask) -> list[dict]:
    """The match report: one row per leaf that is tuned or stored beside the base: name, shape, count, tuned."""
    rows, tuned = [], tree.flatten(mask)
    for name, leaf in tree.flatten(variables).items():
        if tuned[name] or name.startswith("peft/"):
            rows.append(
                {"leaf": name, "shape": list(leaf.shape), "count": tree.count(leaf), "tuned": bool(tuned[name])}
            )
    return rows


def counts(variables: Tree, mask: Mask) -> dict[str, int]:
    """tuned: trained scalars; stored: what a tuned checkpoint holds; total: the base alone, the usual denominator."""
    rows = report(variables, mask)
    return {
        "tuned": sum(row["count"] for row in rows if row["tuned"]),
        "stored": sum(row["count"] for row in rows),
        "total": tree.count(variables["params"]),
    }
