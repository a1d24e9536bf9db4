"""Stacks of equal layers as one scanned program, and the fields of a configuration that all models have."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpeft.models.attention import KINDS
from jaxpeft.tree import Tree

DTYPES = ("float32", "bfloat16")  # of matrix products
UNROLLED = 16  # layers, on CPU; see `stack`
FUSED = "dot_product_attention_fwd_wrapper"  # the primitive of cuDNN's attention


def _kept(primitive: Any, *args: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: keep the results of matrix products and of fused attention, recompute all else."""
    of_products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == FUSED or of_products(primitive, *args, **params)


REMAT = {"none": None, "full": None, "dots": _kept}
MOST = 1 << 20  # upper limit of an integer field, so that an untrusted config cannot exhaust memory


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """Base class of the configurations of models. Raises ValueError for fields of a wrong type or out of range."""

    dtype: str = "float32"  # of matrix products
    unroll: int | None = None  # unroll stacks with at most this number of layers; None: UNROLLED on CPU, elsewhere all
    attention: str | None = None  # a key of attention.py; None: 'parts' on CPU, 'cudnn' on GPU in bfloat16
    remat: str = "none"  # what the backward pass recomputes: 'full', whole layers; 'dots', see `_kept`

    most: ClassVar[dict[str, int]] = {}  # upper limits of fields, where they are below MOST

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check(field.name, field.type)
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}; choose one of {', '.join(REMAT)}")
        if self.attention not in (None, *KINDS):
            raise ValueError(f"attention is {self.attention!r}; choose one of {', '.join(KINDS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")

    def on(self, platform: str) -> dict[str, Any]:
        """What fields that are None stand for on a platform: 'cpu', 'gpu' or 'tpu'."""
        unroll = UNROLLED if platform == "cpu" else MOST
        attention = {"cpu": "parts", "gpu": "cudnn" if self.dtype == "bfloat16" else "plain"}.get(platform, "plain")
        return {
            "unroll": unroll if self.unroll is None else self.unroll,
            "attention": self.attention or attention,
        }

    @property
    def attention_here(self) -> str:
        """How attention is computed by a program for this process's devices, one of `attention.KINDS`."""
        return self.on(jax.default_backend())["attention"]

    def _check(self, name: str, kind: Any) -> None:
        value, most = getattr(self, name), self.most.get(name, MOST)
        least = 0 if name.endswith(("_id", "_resample", "new_words", "token_types")) else 1
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            expected = getattr(kind, "__name__", str(kind))  # of `int | None`, which has no name
            raise ValueError(f"{name} is {value!r:.80}, expected {'an' if expected[0] == 'i' else 'a'} {expected}")
        if kind is int and not least <= value <= most:
            raise ValueError(f"{name} is {value:.3g}; it must be between {least} and {most:,}")
        if name == "dropout" and not 0 <= value < 1:
            raise ValueError(f"dropout is {value}; it must be in [0, 1)")
        if kind is float:
            if not 0 <= value < 1e30:  # nor NaN
                raise ValueError(f"{name} is {value!s:.80}; it must be at least 0 and below 1e30")
            object.__setattr__(self, name, float(value))  # JAX refuses an integer of over 31 bits

    def _check_heads(self, tower: str) -> None:
        width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
        if width % heads:
            raise ValueError(f"{tower}_width {width} is not divisible by {tower}_heads {heads}")


def stack(block: type[nn.Module], config: StackConfig, n_layers: int, n_shared: int) -> Any:
    """Scan `block` over stacked layers: one compilation, one (L, ...) leaf per weight, a path without layer index.

    The block takes the sequence, one argument per layer (such as its cache), and `n_shared` arguments that all layers get.
    Stacks are unrolled inside the scan; the tree is the same. A loop first fills what the backward pass reads with zeros and
    then writes it slice by slice (docs/results/h100_program.md), and copies the weights of each layer.

    On CPU long stacks keep their loop: XLA converts matrices in bfloat16 to float32 there, in unrolled stacks those of all
    layers at once. A LoRA step of PaliGemma-3B would take 13.8 GB beside its weights instead of 4.7.
    """
    unrolls = n_layers <= config.on(jax.default_backend())["unroll"]
    if config.remat != "none":
        # without a loop between them, XLA would merge what is computed twice, and keep it after all
        block = nn.remat(block, prevent_cse=unrolls, policy=REMAT[config.remat])
    return nn.scan(
        block,
        variable_axes={True: 0},
        split_rngs={True: True},
        in_axes=(0, *[nn.broadcast] * n_shared),
        length=n_layers,
        unroll=n_layers if unrolls else 1,
        check_constancy_invariants=False,  # no output is the same for all layers; the check traces the block once more
    )


class Layers(NamedTuple):
    """A stacked leaf (L, ...) as one array for each layer."""

    arrays: tuple[jax.Array, ...]


def apart(config: Any, variables: Tree) -> Tree:
    """The variables, or a part of them, as arguments of programs on one CPU.

    The stacked leaves of `params` in unrolled stacks become `Layers`, which share their memory. XLA copies slices of a stacked
    argument, but reads `Layers` in place.
    """
    if not isinstance(config, StackConfig):
        return variables
    most = config.on("cpu")["unroll"]

    def one(path: tuple[Any, ...], x: Any) -> Any:
        names = [getattr(key, "key", "") for key in path]
        if names[0] != "params" or "blocks" not in names or not isinstance(x, jax.Array) or not 1 < x.shape[0] <= most:
            return x
        if x.ndim < 2 or len(x.devices()) > 1 or next(iter(x.devices())).platform != "cpu":
            return x
        on = getattr(x.sharding, "mesh", None)
        place = x.sharding if on is None else jax.sharding.NamedSharding(on, jax.sharding.PartitionSpec())
        return Layers(tuple(jax.device_put(layer, place) for layer in np.asarray(x)))

    return jax.tree_util.tree_map_with_path(one, variables, is_leaf=_is_layers)


def together(variables: Tree) -> Tree:
    """The inverse of `apart`, inside a program, where XLA resolves it without copies."""
    return jax.tree.map(lambda x: jnp.stack(x.arrays) if _is_layers(x) else x, variables, is_leaf=_is_layers)


def _is_layers(x: object) -> TypeGuard[Layers]:
    return isinstance(x, Layers)
