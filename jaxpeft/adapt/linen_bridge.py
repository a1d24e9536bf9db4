"""Methods on any Flax Linen model, without sites in its code: module calls are recorded once, then intercepted.

    bridge = jp.intercept(jp.LoRA(targets="attention/(query|value)$"))
    variables = bridge.attach(model, params, jax.random.key(0), example)     # {'params': ..., 'peft': ...}
    y = jax.jit(lambda v, x: bridge.apply(model, v, x))(variables, x)        # always call it inside the jitted function

Module calls are visible: Dense and DenseGeneral (and so MultiHeadDotProductAttention) are linears, LayerNorm and RMSNorm are
norms, and every module whose output has the shape of its first input is a sublayer that `targets` may select. A subclass of
Dense is a linear if it calls Dense's own product; the method acts on that product. So methods on linears, norms and
sublayers work, and those that train base leaves in place. Prefix, prompt and VPT depend on the model's keys and sequences
and are unsupported. Products of raw `self.param`, Conv and tied `Embed.attend` are invisible; if `targets` matches nothing
else, the error names them. NNX modules are unsupported.

Interception can fail in several ways, all of which are errors here: a scan or vmap that does not carry the `peft` collection,
or not along axis 0 (write `variable_axes={True: 0}`); a module under `nn.jit` that was compiled before and is served from
Flax's cache; a site that an `apply` never reached. `apply` itself enters the interceptor, so it works in any thread, and a
function jitted around it cannot be stale.
"""

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen.module import InterceptorContext

from jaxpeft import tree
from jaxpeft.adapt import sites
from jaxpeft.methods import Method, Site
from jaxpeft.methods.base import Stream
from jaxpeft.tree import Tree

KINDS = ("linear", "norm", "sublayer")
Call = Callable[..., Any]  # a method of a module of the model
Args = tuple[Any, ...]  # its arguments
Kwargs = dict[str, Any]


def intercept(methods: Method | Iterable[Method]) -> "Bridge":
    """A bridge that applies methods to any Linen model. Raises ValueError for a method that it cannot apply."""
    many = sites.as_methods(methods)
    for one in many:
        if one.kinds and not set(one.kinds) <= set(KINDS):
            wanted = sorted(set(one.kinds) - set(KINDS))
            raise ValueError(f"{one.name} acts at {', '.join(wanted)} sites; supported here are {', '.join(KINDS)}")
    return Bridge(many)


@dataclasses.dataclass(frozen=True)
class Bridge:
    """Methods for a Linen model without sites; created by `intercept`."""

    methods: tuple[Method, ...]

    def sites(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
        """All sites of `model(*args, **kwargs)`, from one abstract trace of `init`.

        Raises ValueError if a scan hides modules, or stacks them along an axis other than 0.
        """
        return self._sites(model, args, kwargs)[0]

    def _sites(self, model: nn.Module, args: Args, kwargs: Kwargs) -> tuple[tuple[Site, ...], dict[str, str]]:
        """(sites, {path: class name} of every module that was called)"""
        if not isinstance(model, nn.Module):
            nnx = sys.modules.get("flax.nnx")  # imported by whoever has such a module; it takes half a second
            what = "a flax.nnx module" if nnx and isinstance(model, nnx.Module) else "not a flax.linen module"
            raise ValueError(f"{type(model).__name__} is {what}; only flax.linen modules are supported")
        seen: dict[tuple[str, str], tuple[int, ...]] = {}
        called: dict[str, str] = {}

        def record(call: Call, call_args: Args, call_kwargs: Kwargs, context: InterceptorContext) -> Any:
            y = call(*call_args, **call_kwargs)
            module = context.module
            called.setdefault("/".join(module.path), type(module).__name__)
            for kind, shape in _kinds(context, _first(context, call_args, call_kwargs), y):
                seen["/".join(module.path), kind] = shape
                if module.is_mutable_collection("peft"):
                    module.put_variable("peft", Site.key(kind), jnp.zeros(shape))
            return y

        def trace() -> Tree:
            with nn.intercept_methods(record):
                return model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *args, **kwargs)

        recorded = tree.flatten(jax.eval_shape(trace).get("peft", {}))
        table = []
        for (path, kind), shape in seen.items():
            found = recorded.get(f"{path}/{Site.key(kind)}")
            if found is None:
                raise ValueError(
                    f"{path} is in a scan or vmap that does not carry the collection 'peft', so methods cannot act there; "
                    "use variable_axes={True: 0}, split_rngs={True: True} ({True: None} for shared parameters)"
                )
            stacked = len(found.shape) - len(shape)
            if found.shape[stacked:] != shape or stacked > 1:
                raise ValueError(
                    f"{path} is stacked as {found.shape} for a {kind} of shape {shape}; only one scan along axis 0 (or "
                    "vmap) is supported: variable_axes={'peft': 0} or {True: 0}"
                )
            table.append(Site(path, kind, shape, found.shape[0] if stacked else None))
        return tuple(table), called

    def attach(self, model: nn.Module, params: Tree, rng: jax.Array, *args: Any, **kwargs: Any) -> Tree:
        """{'params': the same params, 'peft': adapter parameters}; `args` are arguments of the model (only shapes matter).

        Raises ValueError if a method matches nothing (with the closest paths), as `sites.attach` does.
        """
        flat, (table, called) = tree.flatten(params), self._sites(model, args, kwargs)
        try:
            peft = sites.bind(table, lambda site: sites.base_of(model, flat, site), self.methods, rng)
        except ValueError as error:
            owned = {f"{site.path}/{leaf}" for site in table for leaf in ("kernel", "bias", "scale")}
            hidden = [name for name in flat if name not in owned and flat[name].ndim > 1]
            if not hidden or "matches none" not in str(error):
                raise
            some = ", ".join(f"{name} ({called.get(name.rpartition('/')[0], 'not called')})" for name in hidden[:5])
            raise ValueError(f"{error}; not visible, as they do not belong to a Dense layer: {some}") from error
        variables = {"params": params, "peft": peft}
        sites.trainable(variables)
        return variables

    def apply(self, model: nn.Module, variables: Tree, *args: Any, strict: bool = True, **kwargs: Any) -> Any:
        """`model.apply` with the methods. Call it inside the function that you jit.

        Raises ValueError if a bound site was not reached; strict=False allows that (for another entry point of the model).
        """
        variables = sites.expand(variables)
        bound = {
            f"{b.site.path} ({b.site.kind})"
            for b in jax.tree.leaves(variables.get("peft", {}), is_leaf=sites.is_bound)
            if sites.is_bound(b) and b.site != sites.NOWHERE
        }
        reached, active = set(), []

        def act(call: Call, call_args: Args, call_kwargs: Kwargs, context: InterceptorContext) -> Any:
            module = context.module
            if context.method_name != "__call__":
                return call(*call_args, **call_kwargs)
            path, again = "/".join(module.path), module.path in active  # by super().__call__
            active.append(module.path)
            try:
                x = _first(context, call_args, call_kwargs)
                if _own_call(context, LINEARS) and module.has_variable("peft", Site.key("linear")):
                    reached.add(f"{path} (linear)")
                    bounds = module.get_variable("peft", Site.key("linear"))
                    y = _linear(bounds, module, x, lambda new: _with_first(context, call, call_args, call_kwargs, new))
                else:
                    y = call(*call_args, **call_kwargs)
                for kind in ("norm", "sublayer"):
                    if again if kind == "sublayer" else not _own_call(context, NORMS):
                        continue
                    for one in module.get_variable("peft", Site.key(kind), ()):
                        reached.add(f"{path} ({kind})")
                        if kind == "norm":
                            new = one.method.norm(one.params, y)
                        else:
                            new = one.method.sublayer(one.params, x, y, x.__add__)
                        y = new.astype(y.dtype)
                return y
            finally:
                active.pop()

        with nn.intercept_methods(act):
            result = model.apply(variables, *args, **kwargs)
        missed = sorted(bound - reached)
        if strict and missed:
            raise ValueError(
                f"{len(missed)} sites were not reached: {', '.join(missed[:5])}. Remove nn.jit from the modules (its cached "
                "programs bypass interception), or pass strict=False if this is another entry point of the model"
            )
        return result

    def merge(self, model: nn.Module, variables: Tree, *args: Any, **kwargs: Any) -> Tree:
        """Plain params with the methods merged, if that is exact (see `sites.merge`)."""
        return sites.merge_at(self.sites(model, *args, **kwargs), model, variables)


LINEARS, NORMS = (nn.Dense, nn.DenseGeneral), (nn.LayerNorm, nn.RMSNorm)


def _own_call(context: InterceptorContext, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether the intercepted method is the `__call__` that one of these classes itself defines: a subclass that calls it by
    `super()` is intercepted twice, and for a subclass with another product this is never true."""
    function = context.orig_method.func
    return any(
        (function.__module__, function.__qualname__) == (c.__module__, f"{c.__name__}.__call__") for c in classes
    )


def _first_name(context: InterceptorContext) -> str:
    return list(inspect.signature(context.orig_method.func).parameters)[1]  # after self


def _first(context: InterceptorContext, args: Args, kwargs: Kwargs) -> Any:
    """The first argument of a call, by position or by name; None if there is none."""
    if args or not kwargs:
        return args[0] if args else None
    return kwargs.get(_first_name(context))


def _with_first(context: InterceptorContext, call: Call, args: Args, kwargs: Kwargs, x: Any) -> Any:
    """The call with `x` in place of its first argument."""
    return call(x, *args[1:], **kwargs) if args else call(**kwargs | {_first_name(context): x})


def _kinds(context: InterceptorContext, x: Any, y: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of the sites at a call that maps x to y."""
    module = context.module
    if context.method_name != "__call__" or not hasattr(y, "shape") or not hasattr(x, "shape"):
        return
    if _own_call(context, LINEARS):
        if x.ndim == 0 or getattr(module, "batch_dims", ()) or not _trailing(module, x):
            return
        kernel = meta.unbox(module.get_variable("params", "kernel"))
        n_out = math.prod(kernel.shape[kernel.ndim - (y.ndim - (x.ndim - _n_axes(module))) :])
        yield "linear", (kernel.size // n_out, n_out)
    elif _own_call(context, NORMS):
        yield "norm", y.shape[-1:]
    elif not isinstance(module, (*LINEARS, *NORMS)) and x.shape == y.shape and x.ndim >= 2 and module.path:
        yield "sublayer", y.shape[-1:]


def _n_axes(module: nn.Module) -> int:
    axis = getattr(module, "axis", -1)
    return len(axis) if isinstance(axis, list | tuple) else 1


def _trailing(module: nn.Module, x: jax.Array) -> bool:
    """Whether a DenseGeneral contracts the last axes in order, so that it is a matrix product over flattened axes."""
    axis = getattr(module, "axis", -1)
    axes = [a % x.ndim for a in (axis if isinstance(axis, list | tuple) else (axis,))]
    return axes == list(range(x.ndim - len(axes), x.ndim))


def _linear(bounds: tuple[sites.Bound, ...], module: nn.Module, x: jax.Array, call: Stream) -> jax.Array:
    """The linear with methods, which see its axes flattened to (..., in) -> (..., out). `call(x)` computes it."""
    lead = x.shape[: x.ndim - _n_axes(module)]
    plain: list[jax.Array] = []

    def product(flat_x: jax.Array) -> jax.Array:
        plain.append(call(flat_x.reshape(x.shape)))
        return plain[0].reshape(*lead, -1)

    kernel, bias = meta.unbox([module.get_variable("params", name) for name in ("kernel", "bias")])
    n_in, n_out = bounds[0].site.shape
    kernel, bias = kernel.reshape(n_in, n_out), None if bias is None else bias.reshape(n_out)
    y = sites.linear_by(bounds, module, x.reshape(*lead, n_in), kernel, bias, product)
    return y.astype(plain[0].dtype).reshape(plain[0].shape)  # x may be wider than what the layer computes in
