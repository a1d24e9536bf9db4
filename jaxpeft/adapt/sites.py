"""Sites: the places of a model where methods act.

Layers call the functions below at six kinds of sites (`Site.KINDS`) and nowhere else. What a method adds at a site is a
value in the Flax collection `peft`, mirroring module paths: a tuple of `Bound` (method, parameters), applied in order. A
`Bound` is a pytree whose leaves are arrays and whose method is static, so the tree defines its own behaviour: the model
needs no list of methods, an evaluation cannot omit them, and jit compiles once per structure. The base stays unchanged in
`params`.

    variables = attach(model, params, LoRA(rank=8), rng)      # {'params': ..., 'peft': ...}
    tuned, frozen = tree.split(variables, trainable(variables))

Layers are scanned, so a path has no layer index and leaves of a stacked site have a leading axis L.

Order: at a linear, methods that change its input (OFT, IA3 on the FFN) act first, in their order, then those that
change its output, in their order. A method that reads the base kernel (DoRA) must be the first of the latter. Of several
prefixes or prompts the last one comes first in the sequence.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.serialization import from_state_dict, register_serialization_state, to_state_dict

from jaxpeft import tree
from jaxpeft.methods.base import Base, Method, Params, Site, Stream
from jaxpeft.methods.selective import Head
from jaxpeft.ops import matmul
from jaxpeft.runtime.text import aligned
from jaxpeft.tree import Mask, Tree

SHARED = "_shared"  # key in the peft collection: every method in order, with the parameters that its sites share


NOWHERE = Site("", "linear", ())
Static = tuple[Method, Site, bool, tuple[str, ...]]  # of a `Bound`: method, site, `acts`, names of its parameters


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Bound:
    """One method at one site: static method and site, traced parameters. `acts`: the parameters are expanded.

    Under `SHARED` the site is `NOWHERE`, and the parameters are those that the method's sites share.
    """

    method: Method
    site: Site
    params: Params
    acts: bool

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, jax.Array], ...], Static]:
        keys = tuple(sorted(self.params))
        children = tuple((jax.tree_util.DictKey(f"{self.method.name}/{k}"), self.params[k]) for k in keys)
        return children, (self.method, self.site, self.acts, keys)

    @classmethod
    def tree_unflatten(cls, static: Static, children: Iterable[jax.Array]) -> "Bound":
        method, site, acts, keys = static
        return cls(method, site, dict(zip(keys, children, strict=True)), acts)


def _restored(bound: Bound, state: dict) -> Bound:
    params = {name: from_state_dict(x, state[name], name) for name, x in bound.params.items()}
    return dataclasses.replace(bound, params=params)


# for flax.serialization: it stores the arrays and restores them into a tree of the same methods
register_serialization_state(Bound, lambda bound: to_state_dict(bound.params), _restored)


def _bound(module: nn.Module, kind: str, shape: tuple[int, ...]) -> tuple[Bound, ...]:
    """The methods bound at this site; records the site while `sites(model)` traces the model."""
    if module.is_mutable_collection("sites"):
        module.put_variable("sites", Site.key(kind), jnp.zeros(shape))
    bounds = module.get_variable("peft", Site.key(kind), ())
    for bound in bounds:
        if not bound.acts:
            raise ValueError(f"{bound.method.name} at {bound.site.path} is not expanded; call sites.expand first")
    return bounds


def linear(module: nn.Module, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Site of a linear map: x (..., in) @ kernel (in, out) + bias (out,), in the dtype of x."""
    return linear_by(_bound(module, "linear", kernel.shape), module, x, kernel, bias, None)


def linear_by(
    bounds: tuple[Bound, ...],
    module: nn.Module,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    product: Stream | None,
) -> jax.Array:
    """A linear map with its methods; `product(x)`, if given, computes the map."""
    for bound in bounds:
        if bound.method.on_input(bound.site):
            x = bound.method.inputs(bound.params, x)
    if product is not None:
        y = product(x)
    else:
        y = matmul(x, kernel.astype(x.dtype), None if bias is None else bias.astype(x.dtype))
    for bound in bounds:
        if not bound.method.on_input(bound.site):
            rng = module.make_rng("dropout") if module.has_rng("dropout") else None
            y = bound.method.linear(bound.params, x, y, {"kernel": kernel, "bias": bias}, rng)
    return y


def norm(module: nn.Module, y: jax.Array) -> jax.Array:
    """Site of a LayerNorm's output."""
    for bound in _bound(module, "norm", y.shape[-1:]):
        y = bound.method.norm(bound.params, y)
    return y


def sublayer(module: nn.Module, x_BTD: jax.Array, y_BTD: jax.Array, stream: Stream) -> jax.Array:
    """Site of an attention or MLP: its input, its output before the residual add, and `stream(y_BTD)`, the residual stream
    after the output is added."""
    for bound in _bound(module, "sublayer", y_BTD.shape[-1:]):
        y_BTD = bound.method.sublayer(bound.params, x_BTD, y_BTD, stream)
    return y_BTD


def kv(
    module: nn.Module, x_BTD: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, mask_BTS: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Site of an attention's keys, values and mask -> (keys, values, mask, gain_BTS or None). x_BTD: input of the queries.

    A gain multiplies the scores before the softmax and the weights after it.
    """
    gain_BTS, rows = None, k_BNSH.shape[0]
    for bound in _bound(module, "kv", (x_BTD.shape[-1], k_BNSH.shape[1], k_BNSH.shape[3])):
        added = bound.method.kv(bound.params, x_BTD)
        n_old, n_new = k_BNSH.shape[2], added.k_KNH.shape[0]
        k_BNSH, v_BNSH = (
            jnp.concatenate([jnp.broadcast_to(new[None].astype(old.dtype), (rows, *new.shape)), old], axis=2)
            for new, old in ((added.k_KNH.swapaxes(0, 1), k_BNSH), (added.v_KNH.swapaxes(0, 1), v_BNSH))
        )
        if mask_BTS is None and added.on is not None:
            mask_BTS = jnp.ones((1, 1, n_old), bool)
        if mask_BTS is not None:
            on = jnp.bool_(True) if added.on is None else added.on
            mask_BTS = jnp.concatenate([jnp.broadcast_to(on, (*mask_BTS.shape[:2], n_new)), mask_BTS], axis=-1)
        if gain_BTS is not None or added.gain_BT is not None:
            rest = jnp.ones((1, 1, n_old)) if gain_BTS is None else gain_BTS
            new = jnp.ones((1, 1)) if added.gain_BT is None else added.gain_BT
            lead = jnp.broadcast_shapes(rest.shape[:2], new.shape)
            new_BTK = jnp.broadcast_to(new[..., None], (*lead, n_new))
            gain_BTS = jnp.concatenate([new_BTK, jnp.broadcast_to(rest, (*lead, n_old))], axis=-1)
    return k_BNSH, v_BNSH, mask_BTS, gain_BTS


def block(module: nn.Module, x_BTD: jax.Array) -> jax.Array:
    """Site where a sequence enters one layer of a stack."""
    for bound in _bound(module, "block", x_BTD.shape[-1:]):
        x_BTD = bound.method.block(bound.params, x_BTD)
    return x_BTD


def embed(
    module: nn.Module, x_BTD: jax.Array, mask_BT: jax.Array | None, as_tokens: Stream | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Site where a sequence enters a stack -> (sequence, mask) with learned tokens in front. `as_tokens`: see Method."""
    for bound in _bound(module, "embed", x_BTD.shape[-1:]):
        rows_KD = bound.method.embed(bound.params, x_BTD, as_tokens)
        if rows_KD is None:
            continue
        rows_BKD = jnp.broadcast_to(rows_KD[None].astype(x_BTD.dtype), (x_BTD.shape[0], *rows_KD.shape))
        x_BTD = jnp.concatenate([rows_BKD, x_BTD], axis=1)
        if mask_BT is not None:
            mask_BT = jnp.concatenate([jnp.ones(rows_BKD.shape[:2], bool), mask_BT], axis=1)
    return x_BTD, mask_BT


def shift(module: nn.Module) -> int:
    """The number of positions by which methods shift the tokens of a stack; for the module that calls `embed`."""
    return sum(bound.method.shift(bound.site) for bound in module.get_variable("peft", Site.key("embed"), ()))


class Adaptable(nn.Module):
    """A model with sites: its `apply` expands the stored parameters of methods first."""

    @nn.nowrap
    def apply(self, variables: Tree, *args: Any, **kwargs: Any) -> Any:
        return super().apply(expand(variables), *args, **kwargs)


def is_bound(x: object) -> TypeGuard[Bound]:
    """Whether a node of a tree is a `Bound`."""
    return isinstance(x, Bound)


def expand(variables: Tree) -> Tree:
    """Apply `Method.expand` at every site that needs it. Variables that are already expanded are returned unchanged."""
    peft = variables.get("peft", {})
    shared = {bound.method: bound.params for bound in peft.get(SHARED, {}).values()}

    def one(bound: Bound) -> Bound:
        if bound.acts:
            return bound
        params = bound.method.expand(bound.params, shared.get(bound.method, {}), bound.site)
        return dataclasses.replace(bound, params=params, acts=True)

    if all(bound.acts for bound in jax.tree.leaves(peft, is_leaf=is_bound)):
        return variables
    alone = {order: bound for order, bound in peft.get(SHARED, {}).items() if bound.acts}
    acting = {name: node for name, node in peft.items() if name != SHARED} | ({SHARED: alone} if alone else {})
    return dict(variables) | {"peft": jax.tree.map(one, acting, is_leaf=is_bound)}


def fold(variables: Tree) -> Tree:
    """An equivalent tree without what only training needs: a prefix's MLP is replaced by the prefix that it computes."""

    def one(bound: Bound) -> Bound:
        after = bound.method.folded()
        if after == bound.method:
            return bound
        if bound.site == NOWHERE and not bound.params:
            return dataclasses.replace(bound, method=after)
        return Bound(after, bound.site, bound.method.fold(bound.params, bound.site), not after.expands)

    return dict(variables) | {"peft": jax.tree.map(one, variables.get("peft", {}), is_leaf=is_bound)}


def narrowed(model: nn.Module, variables: Tree, dtype: str, mask: Mask | None = None) -> Tree:
    """Cast the leaves that `model.narrow` names and that are not trained (by `mask`; without it all) to `dtype`, 'float32' or
    'bfloat16'.

    No result changes if products are computed in `dtype`, because the model casts these leaves before any use. What is read in
    float32 keeps its dtype: BERT's word embeddings, which are added to others before anything is rounded, and matrices of which
    a method takes norms.
    """
    if dtype == "float32":
        return variables
    pattern, tied = getattr(model, "narrow", "kernel$"), getattr(model, "tied", {})
    bounds = filter(is_bound, jax.tree.leaves(variables.get("peft", {}), is_leaf=is_bound))
    paths = [bound.site.path for bound in bounds if bound.method.first]
    read = {f"params/{tied.get(path, f'{path}/kernel')}" for path in paths}

    def one(name: str, x: jax.Array, tuned: bool) -> jax.Array:
        kept = tuned or name in read or not re.search(f"^params/.*{pattern}", name)
        return x if kept or x.dtype == dtype else x.astype(dtype)

    names = tree.names(variables)
    return jax.tree.map(one, names, variables, jax.tree.map(lambda _: False, names) if mask is None else mask)


def stack(trees: Iterable[Tree]) -> Tree:
    """Stack adapter parameters of several trees on one base along a new first axis; see `jaxpeft.generate(adapter_ids=...)`.

    Raises ValueError if the trees have different methods or shapes, or differ in base leaves.
    """
    first, *rest = trees = [fold(one) for one in trees]
    for i, other in enumerate(rest, 1):
        if jax.tree.structure(first["peft"]) != jax.tree.structure(other["peft"]):
            raise ValueError(f"tree {i} has other methods or sites than tree 0; all trees of a stack must agree")
        tree.check_same(tree.flatten(first["peft"]), tree.flatten(other["peft"]), f"tree {i} of a stack")
        pairs = zip(jax.tree.leaves(first["params"]), jax.tree.leaves(other["params"]), strict=True)
        if any(a is not b and not jnp.array_equal(a, b) for a, b in pairs):
            raise ValueError(
                f"tree {i} has other base leaves than tree 0 (was a head or bias trained?); a stack must have one base"
            )
    return first | {"peft": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one["peft"] for one in trees))}


@functools.lru_cache(maxsize=32)  # attaching, counting and solving each need it
def abstract(model: nn.Module) -> Tree:
    """The parameters ('params') and sites ('sites') of a model as shapes, from one abstract trace without computation."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), model.example()))


@functools.lru_cache(maxsize=32)
def sites(model: nn.Module) -> tuple[Site, ...]:
    """All sites of a model."""
    found = []
    for name, leaf in tree.flatten(abstract(model)["sites"]).items():
        path, kind = name.rsplit("/@", 1)
        stacked = len(leaf.shape) > len(Site.KINDS[kind])
        found.append(Site(path, kind, leaf.shape[stacked:], leaf.shape[0] if stacked else None))
    return tuple(found)


def as_methods(method: Method | Iterable[Method]) -> tuple[Method, ...]:
    """One or several methods as a tuple, in order of application."""
    return (method,) if isinstance(method, Method) else tuple(method)


def resolved(model: nn.Module, method: Method | Iterable[Method]) -> tuple[Method, ...]:
    """Methods with the names of the model's groups replaced by their regular expressions."""
    return tuple(one.on(getattr(model, "targets", {})) for one in as_methods(method))


def attach(model: nn.Module, params: Tree, method: Method | Iterable[Method], rng: jax.Array) -> Tree:
    """Bind methods to the sites of a model: {'params': the same params, 'peft': adapter parameters}.

    Pure in (params, method, rng); works under `jax.eval_shape`. The initial parameters of a site depend only on its path and
    the method's index in the tuple, so adding a method does not change those of another. Raises ValueError, with the closest
    paths, if a method matches no site or trains no base leaf.
    """
    base = functools.partial(base_of, model, tree.flatten(params))
    variables = {"params": params, "peft": bind(sites(model), base, resolved(model, method), rng)}
    trainable(variables)
    return variables


def bind(
    table: Iterable[Site], base: Callable[[Site], Base], method: Method | Iterable[Method], rng: jax.Array
) -> Tree:
    """The `peft` collection for a table of sites; `base(site)` is what a method's `init` may read there."""
    methods, peft = as_methods(method), {}
    if len(set(methods)) < len(methods):
        raise ValueError("the tuple contains the same method twice; remove one or give them different `targets`")
    for order, one in enumerate(methods):
        hits = [site for site in table if one.selects(site)]
        if one.kinds and not hits:
            known = [site.path for site in table if site.kind in one.kinds]
            if (near := [path for path in known if re.search(one.targets, path)]) and one.acts_at:
                raise ValueError(
                    f"{one.name}: targets={one.targets!r} matches {', '.join(near[:5])}, but it acts at {one.acts_at} only"
                )
            default = one.targets and one.targets == getattr(type(one), "targets", None)
            raise ValueError(
                f"{one.name}: targets={one.targets!r} matches none of the {len(known)} {'/'.join(one.kinds)} sites; "
                f"nearest: {', '.join(tree.nearest(one.targets, known))}"
                + ("; the default is a group of jaxpeft's models; give a regular expression" if default else "")
            )
        own = jax.random.fold_in(rng, order)
        shared = one.init_shared(own, hits)
        peft.setdefault(SHARED, {})[str(order)] = Bound(one, NOWHERE, shared, not shared)
        for site in hits:
            key = jax.random.fold_in(own, zlib.crc32(f"{site.path}/{site.kind}".encode()))
            node = peft
            for part in site.path.split("/"):
                node = node.setdefault(part, {})
            before = node.get(Site.key(site.kind), ())
            if one.first and any(not b.method.on_input(b.site) for b in before):
                raise ValueError(
                    f"{one.name} reads the base kernel of {site.path}: put it before {before[-1].method.name}"
                )
            if site.kind == "embed" and before and any("block" in b.kinds for b in (one, *(b.method for b in before))):
                raise ValueError(
                    f"{before[-1].method.name} and {one.name} both add tokens to {site.path}, and vpt with depth='deep' "
                    "replaces the first ones at every layer: use depth='shallow', or one of the two"
                )
            node[Site.key(site.kind)] = (
                *before,
                Bound(one, site, one.init_site(key, site, base(site)), not one.expands),
            )
    return peft


def base_of(model: nn.Module, flat: dict[str, Any], site: Site) -> Base:
    """The base parameters at a site, in their stacked form: see `Method.init`. A tied kernel is read where it is stored."""
    if site.kind == "norm":
        return {name: flat.get(f"{site.path}/{name}") for name in ("scale", "bias")}
    if site.kind == "embed" and f"{site.path}/embed/word" in flat:
        words = {
            "word": _with_new_rows(flat, f"{site.path}/embed/word"),
            "word_scale": getattr(model, "word_scale", 1.0),
        }
        norm = {name: flat.get(f"{site.path}/embed/{name}") for name in ("norm/scale", "norm/bias")}
        return words | norm | {"tokenizer": getattr(model, "tokenizer", None)}
    if site.kind != "linear":
        return {}
    lead = () if site.layers is None else (site.layers,)
    tied = getattr(model, "tied", {}).get(site.path)
    kernel = _with_new_rows(flat, tied).T if tied else flat[f"{site.path}/kernel"].reshape(*lead, *site.shape)
    bias = flat.get(f"{site.path}/bias")
    return {"kernel": kernel, "bias": None if bias is None else bias.reshape(*lead, site.shape[1])}


def _with_new_rows(flat: dict[str, Any], name: str) -> jax.Array:
    """A word embedding, followed by the rows of words that were added to the base."""
    more = flat.get(re.sub("word$", "new_word", name))
    return flat[name] if more is None else jnp.concatenate([flat[name], more])


def methods_of(variables: Tree) -> tuple[Method, ...]:
    """The methods of a tree made by `attach`, in their order."""
    shared = variables.get("peft", {}).get(SHARED, {})
    return tuple(shared[order].method for order in sorted(shared, key=int))


def trainable(variables: Tree) -> Mask:
    """True for the trainable leaves: adapter parameters (except fixed ones) and the base leaves that the methods train.

    The methods are those that `attach` put into the tree. Raises ValueError if a method's `train` matches no base leaf, or if
    nothing would be trained.
    """
    methods = methods_of(variables)
    base = [name for name in tree.flatten(variables) if name.startswith("params/")]
    for one in methods:
        if one.train and not any(one.trains(name) for name in base):
            raise ValueError(
                f"{one.name}: {one.train!r} matches no base leaf{f' below {one.targets!r}' if one.targets else ''}; "
                f"nearest: {', '.join(tree.nearest(one.train, base))}{f'; {one.instead}' if one.instead else ''}"
            )

    def own(bound: Bound) -> Bound:
        return dataclasses.replace(bound, params={name: name not in bound.method.fixed for name in bound.params})

    def moves(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        return any(one.trains(f"params/{tree.path_name(path)}") for one in methods)

    mask = jax.tree.map(lambda _: False, dict(variables))  # also for other collections, such as batch statistics
    mask["params"] = jax.tree_util.tree_map_with_path(moves, variables["params"])
    if "peft" in variables:
        mask["peft"] = jax.tree.map(own, variables["peft"], is_leaf=is_bound)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(f"{', '.join(one.name for one in methods) or 'no method'}: nothing would be trained")
    return mask


def merge(model: nn.Module, variables: Tree) -> Tree:
    """Merge every bound method into plain params for the plain model. Raises ValueError if that is not exact."""
    return merge_at(sites(model), model, variables)


def merge_at(table: Iterable[Site], model: nn.Module, variables: Tree) -> Tree:
    """`merge` for a given table of sites."""
    variables = expand(variables)
    flat, peft = dict(tree.flatten(variables["params"])), variables.get("peft", {})
    tied, left = getattr(model, "tied", {}), _bound_sites(peft)
    for site in table:
        bounds = at(peft, site)
        left.pop((site.path, site.kind), None)
        for bound in bounds:
            if site.kind not in ("linear", "norm"):
                raise ValueError(f"{bound.method.name} acts on {site.kind} at {site.path}; it cannot be merged exactly")
            if site.path in tied:
                advice = "; train with head='transform' to merge" if isinstance(bound.method, Head) else ""
                raise ValueError(
                    f"{bound.method.name}: {site.path} and {tied[site.path]} are one matrix in the plain model, so changes to "
                    f"the first alone cannot be merged{advice}"
                )
        inner = [bound for bound in bounds if not bound.method.on_input(site)]
        outer = [bound for bound in bounds if bound.method.on_input(site)]
        for bound in [*inner, *reversed(outer)]:
            fold_one = bound.method.merge if site.layers is None else jax.vmap(bound.method.merge)
            new = fold_one(bound.params, base_of(model, flat, site))
            kept = {f"{site.path}/{k}": x for k, x in new.items() if x is not None}
            flat |= {name: x.reshape(flat[name].shape) for name, x in kept.items()}
    if left:
        some = ", ".join(f"{method.name} at {path} ({kind})" for (path, kind), method in list(left.items())[:5])
        raise ValueError(
            f"{len(left)} sites that methods are bound to were not found in the model: {some}. A module under nn.jit that ran "
            "before is served from Flax's cache, which hides its sites; remove nn.jit or call jax.clear_caches() before merging"
        )
    return tree.unflatten(variables["params"], flat, "merged params")


def _bound_sites(peft: Tree) -> dict[tuple[str, str], Method]:
    """(path, kind) -> the last method, for every site with a method."""
    acting = {name: node for name, node in peft.items() if name != SHARED}
    bounds = (one for one in jax.tree.leaves(acting, is_leaf=is_bound) if is_bound(one))
    return {(bound.site.path, bound.site.kind): bound.method for bound in bounds}


def at(peft: Tree, site: Site) -> tuple[Bound, ...]:
    """The methods bound at a site."""
    node = peft
    for part in site.path.split("/"):
        node = node.get(part, {})
    return node.get(Site.key(site.kind), ())


def report(variables: Tree, mask: Mask) -> list[dict]:
    """A row per leaf that is trained or stored beside the base: leaf, shape, trained and stored count.

    Stored is what deployment needs after `fold`: the prefix that an MLP computes, not the MLP; frozen random matrices too.
    """
    shapes, tuned = jax.eval_shape(fold, variables), tree.flatten(mask)
    folded, rows = tree.flatten(shapes), []
    for name, leaf in (tree.flatten(variables) | folded).items():
        on, mine = tuned.get(name, False), name.startswith("peft/")
        if on or mine:
            trained = tree.count(leaf) if on else 0
            rows.append({"leaf": name, "shape": list(leaf.shape), "trained": trained})
            rows[-1]["stored"] = tree.count(leaf) if name in folded else 0
    return rows


def counts(variables: Tree, mask: Mask) -> dict[str, int]:
    """tuned: trained scalars; stored: scalars that deployment keeps beside the base; total: scalars of the base alone."""
    rows = report(variables, mask)
    return {
        "tuned": sum(row["trained"] for row in rows),
        "stored": sum(row["stored"] for row in rows),
        "total": tree.count(variables["params"]),
    }


def describe(variables: Tree, mask: Mask, leaves: bool = True) -> str:
    """A table with a line per leaf (unless `leaves` is False), per tower and kind of site, and for the sum: shape, trained
    scalars, stored scalars, and trained scalars in percent of the base's."""
    rows, total = report(variables, mask), tree.count(variables["params"])
    lines: list[tuple[str, str, int, int]] = []

    def add(name: str, some: list[dict]) -> None:
        lines.append((name, "", sum(row["trained"] for row in some), sum(row["stored"] for row in some)))

    for row in rows if leaves else ():
        lines.append((row["leaf"], "x".join(map(str, row["shape"])) or "scalar", row["trained"], row["stored"]))
    groups: dict[str, list] = {}
    for row in rows:
        collection, tower, *rest = row["leaf"].split("/")
        kind = "base leaves" if collection == "params" else "shared" if tower == SHARED else rest[-4].removeprefix("@")
        groups.setdefault(kind if kind == "shared" else f"{tower}: {kind}", []).append(row)
    for name, mine in groups.items():
        add(name, mine)
    add("sum", rows)
    text = [("leaf" if leaves else "", "shape", "trained", "stored", "% of base")]
    for leaf, shape, trained, stored in lines:
        text.append((leaf, shape, f"{trained:,}", f"{stored:,}", f"{100 * trained / total:.3f}"))
    return "\n".join([*aligned(text, left=2), f"base: {total:,} parameters, shared leaves counted once"])
