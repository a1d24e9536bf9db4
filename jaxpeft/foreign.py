"""Methods on Flax Linen models that know nothing of sites: recorded once, checked, applied by interception.

    bridge = jp.intercept(jp.LoRA(where="attention/(query|value)$"))
    variables = bridge.attach(model, params, jax.random.key(0), example)     # {'params': ..., 'peft': ...}
    y = jax.jit(lambda v, x: bridge.apply(model, v, x))(variables, x)        # inside the traced function, always

What can be seen is what Flax calls: Dense and DenseGeneral (so, MultiHeadDotProductAttention) are linears, LayerNorm
and RMSNorm are norms, and every module whose output is shaped as its first input is a sublayer that `where` may select.
So methods on linears, norms and sublayers work, and those that train base leaves in place. Prefix, prompt and VPT need
to know where keys and sequences are, and are refused. Raw `self.param` products, Conv and tied `Embed.attend` are
invisible.

Interception has traps; each is an error here. A scan that does not carry the `peft` collection, or not along axis 0
(write `variable_axes={True: 0}`). A module under `nn.jit` that was compiled before and answers from Flax's cache. A
site that an `apply` never reached. `apply` enters the interceptor itself, so it works in any thread, and a function
jitted around it cannot be stale.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft import sites, tree
from jaxpeft.methods import Method, Site
from jaxpeft.tree import Tree

KINDS = ("linear", "norm", "sublayer")


def intercept(methods: Method | Iterable[Method]) -> "Bridge":
    """A bridge that puts methods on foreign Linen models. Raises ValueError for a method that it cannot apply."""
    many = sites.as_methods(methods)
    for one in many:
        if one.kinds and not set(one.kinds) <= set(KINDS):
            wanted = sorted(set(one.kinds) - set(KINDS))
            raise ValueError(f"{one.name} acts at {', '.join(wanted)} sites, which a foreign model does not show")
    return Bridge(many)


@dataclasses.dataclass(frozen=True)
class Bridge:
    """Methods for foreign models; made by `intercept`."""

    methods: tuple[Method, ...]

    def sites(self, model: nn.Module, *args, **kwargs) -> tuple[Site, ...]:
        """Every place that methods can act on in `model(*args, **kwargs)`, from one abstract trace of `init`.

        Raises ValueError where a scan hides modules or stacks them along another axis than 0.
        """
        seen: dict[tuple[str, str], tuple[int, ...]] = {}

        def record(call, call_args, call_kwargs, context):
            y = call(*call_args, **call_kwargs)
            for kind, shape in _kinds(context, call_args, y):
                module = context.module
                seen["/".join(module.path), kind] = shape
                if module.is_mutable_collection("peft"):
                    module.put_variable("peft", Site.key(kind), jnp.zeros(shape))
            return y

        def trace():
            with nn.intercept_methods(record):
                return model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *args, **kwargs)

        recorded = tree.flatten(jax.eval_shape(trace).get("peft", {}))
        table = []
        for (path, kind), shape in seen.items():
            found = recorded.get(f"{path}/{Site.key(kind)}")
            if found is None:
                raise ValueError(
                    f"{path} lies in a scan that does not carry the collection 'peft', so methods could not act there; "
                    "write nn.scan(..., variable_axes={True: 0}, split_rngs={True: True})"
                )
            stacked = len(found.shape) - len(shape)
            if found.shape[stacked:] != shape or stacked > 1:
                raise ValueError(
                    f"{path} is stacked as {found.shape} for a {kind} of shape {shape}; only one scan along axis 0 is "
                    "supported: variable_axes={'peft': 0} or {True: 0}"
                )
            table.append(Site(path, kind, shape, found.shape[0] if stacked else None))
        return tuple(table)

    def attach(self, model: nn.Module, params: Tree, rng: jax.Array, *args, **kwargs) -> Tree:
        """{'params': the same params, 'peft': own leaves}; `args` are what the model is called with (shapes matter).

        Raises ValueError when a method matches nothing (with the nearest paths), as `sites.attach` does.
        """
        flat, table = tree.flatten(params), self.sites(model, *args, **kwargs)
        try:
            peft = sites.bind(table, lambda site: sites.base_of(model, flat, site), self.methods, rng)
        except ValueError as error:
            owned = {f"{site.path}/kernel" for site in table}
            hidden = [name for name in flat if name.endswith("kernel") and name not in owned]
            if not hidden or "matches none" not in str(error):
                raise
            raise ValueError(f"{error}; kernels that no visible Dense owns: {', '.join(hidden[:5])}") from error
        variables = {"params": params, "peft": peft}
        sites.trainable(self.methods, variables)
        return variables

    def apply(self, model: nn.Module, variables: Tree, *args, strict: bool = True, **kwargs):
        """`model.apply` with the methods acting. Call it inside the function that you jit.

        Raises ValueError when a bound site was not reached; strict=False allows it (another entry point of the model).
        """
        variables = sites.expand(variables)
        bound = {
            f"{b.site.path} ({b.site.kind})"
            for b in jax.tree.leaves(variables.get("peft", {}), is_leaf=sites.is_bound)
            if sites.is_bound(b)
        }
        reached = set()

        def act(call, call_args, call_kwargs, context):
            module = context.module
            if context.method_name != "__call__" or not module.has_variable("peft", Site.key("linear")):
                y = call(*call_args, **call_kwargs)
            else:
                bounds = module.get_variable("peft", Site.key("linear"))
                reached.add(f"{'/'.join(module.path)} (linear)")
                y = _linear(bounds, module, call, call_args, call_kwargs)
            if context.method_name == "__call__":
                for kind in ("norm", "sublayer"):
                    for one in module.get_variable("peft", Site.key(kind), ()):
                        reached.add(f"{'/'.join(module.path)} ({kind})")
                        if kind == "norm":
                            y = one.method.norm(one.theta, y)
                        else:
                            x = call_args[0]
                            y = one.method.sublayer(one.theta, x, y, x.__add__)
            return y

        with nn.intercept_methods(act):
            result = model.apply(variables, *args, **kwargs)
        missed = sorted(bound - reached)
        if strict and missed:
            raise ValueError(
                f"{len(missed)} sites were not reached: {', '.join(missed[:5])}. Is a module wrapped in nn.jit (its cached "
                "program knows no interceptor), or is this another entry point (strict=False)?"
            )
        return result

    def merge(self, model: nn.Module, variables: Tree, *args, **kwargs) -> Tree:
        """Plain params with the methods folded in, where that is exact (see `sites.merge`)."""
        return sites.merge_at(self.sites(model, *args, **kwargs), model, variables)


def _kinds(context, args, y):
    """(kind, shape) of the sites at a call that just returned y."""
    module = context.module
    if context.method_name != "__call__" or not args or not hasattr(y, "shape") or not hasattr(args[0], "shape"):
        return
    x = args[0]
    if isinstance(module, nn.Dense | nn.DenseGeneral):
        if x.ndim == 0 or getattr(module, "batch_dims", ()) or not _trailing(module, x):
            return
        kernel = module.get_variable("params", "kernel")
        n_out = math.prod(kernel.shape[kernel.ndim - (y.ndim - (x.ndim - _n_axes(module))) :])
        yield "linear", (kernel.size // n_out, n_out)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        yield "norm", y.shape[-1:]
    elif x.shape == y.shape and x.ndim >= 2 and module.path:
        yield "sublayer", y.shape[-1:]


def _n_axes(module) -> int:
    axis = getattr(module, "axis", -1)
    return len(axis) if isinstance(axis, list | tuple) else 1


def _trailing(module, x) -> bool:
    """Whether a DenseGeneral contracts the last axes, in order: then it is a matrix product of flattened axes."""
    axis = getattr(module, "axis", -1)
    axes = [a % x.ndim for a in (axis if isinstance(axis, list | tuple) else (axis,))]
    return axes == list(range(x.ndim - len(axes), x.ndim))


def _linear(bounds, module, call, args, kwargs):
    """The linear with its axes flattened to (..., in) -> (..., out) for the methods, and back."""
    x, *rest = args
    lead = x.shape[: x.ndim - _n_axes(module)]
    shapes = {}

    def product(flat_x):
        y = call(flat_x.reshape(x.shape), *rest, **kwargs)
        shapes["y"] = y.shape
        return y.reshape(*lead, -1)

    kernel = module.get_variable("params", "kernel")
    bias = module.get_variable("params", "bias")
    n_in, n_out = bounds[0].site.shape
    kernel, bias = kernel.reshape(n_in, n_out), None if bias is None else bias.reshape(n_out)
    y = sites.linear_by(bounds, module, x.reshape(*lead, n_in), kernel, bias, product)
    return y.reshape(shapes["y"])
