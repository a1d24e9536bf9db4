"""Stacks of equal layers as one scanned program, and the fields of a configuration that all models have."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import linen as nn

from jaxpeft.models.attention import KINDS

UNROLLED = 4  # layers, on CPU
REMAT = {"none": None, "full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
MOST = 1 << 20  # upper limit of an integer field, so that an untrusted config cannot exhaust memory


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """Base class of the configurations of models. Raises ValueError for fields of a wrong type or out of range."""

    dtype: str = "float32"  # of matrix products
    unroll: int | None = None  # unroll stacks with at most this number of layers; None: UNROLLED on CPU, elsewhere all
    attention: str | None = None  # a key of attention.py; None: 'parts' on CPU, 'cudnn' on GPU in bfloat16
    remat: str = "none"  # what the backward pass recomputes: 'full', whole layers; 'dots', all but matrix products

    most: ClassVar[dict[str, int]] = {}  # upper limits of fields, where they are below MOST

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check(field.name, field.type)
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}; choose one of {', '.join(REMAT)}")
        if self.attention not in (None, *KINDS):
            raise ValueError(f"attention is {self.attention!r}; choose one of {', '.join(KINDS)}")

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

    def _check_heads(self, tower: str) -> None:
        width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
        if width % heads:
            raise ValueError(f"{tower}_width {width} is not divisible by {tower}_heads {heads}")


def stack(block: type[nn.Module], config: StackConfig, n_layers: int, n_shared: int) -> Any:
    """Scan `block` over stacked layers: one compilation, one (L, ...) leaf per weight, a path without layer index.

    The block takes the sequence, one argument per layer (such as its cache), and `n_shared` arguments that all layers get.
    Stacks are unrolled inside the scan; the tree is the same. On CPU only short ones: XLA then fuses operations of several
    layers (tiny ViT, batch 64, gradient: 309 ms instead of 462 ms), but for twelve layers the step time is the same and
    compilation takes longer. On accelerators all: a loop first fills what the backward pass reads with zeros and then writes
    it slice by slice (docs/results/h100_program.md).
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
    )
