"""The interface of a vision-language model for everything that trains, decodes or exports it.

A model is a Flax module whose `apply(..., method=...)` computes the functions below. The interface covers encoder-decoders (a
text attends to image tokens or question states) and prefix-LMs (a text follows image and prompt in one sequence): only the
model itself reads `Context.memory`.

Axes: B rows of the context, R = B * A rows of texts (rows b*A .. b*A+A-1 belong to context row b), S context positions, T text
positions, V words.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import jax
from flax import linen as nn

from jaxpeft.adapt import sites
from jaxpeft.inputs.any_tokenizer import AnyTokenizer
from jaxpeft.inputs.processor import Processor, Template
from jaxpeft.models.convert import Converter
from jaxpeft.models.hf import HuggingFace
from jaxpeft.models.stack import MOST, together
from jaxpeft.runtime.registry import Registry


class Context(NamedTuple):
    """What texts are conditioned on, computed once per row. A pytree."""

    memory: Any  # states (B, S, D), or keys and values of every layer; only the model reads it
    mask_BS: jax.Array | None  # True at real entries, on either padding side; None if all entries are real
    next_B: jax.Array  # position of the first text token: zeros in an encoder-decoder
    first_BV: jax.Array | None = None  # logits of the first text token; None if a text begins with `template.start`


class Cache(NamedTuple):
    """State of decoding. `rows` has a row per text on axis 1 of every leaf, after the layers; beam search reorders it."""

    rows: Any  # keys and values of the text so far, (L, R, ...)
    shared: Any  # what all texts of a context row share, and counters


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of `context` that can be computed once if it is frozen. Stages form a DAG over batch keys."""

    name: str  # the batch key of its output, (B, ...)
    reads: tuple[str, ...]  # batch keys, or names of other stages
    per: str  # 'image' or 'example': what each row of its output belongs to


class VisionLanguageModel(sites.Adaptable):
    """Base class of models. Functions that return another model need `nn.nowrap`, or it would become a submodule.

    Fields: `config`, a frozen dataclass; `processor`, which is not part of the jit key."""

    config: Any
    processor: Processor | None = dataclasses.field(default=None, compare=False, repr=False)

    model_type: ClassVar[str] = ""  # the key in MODELS, and in the files of a checkpoint
    stages: ClassVar[tuple[Stage, ...]] = ()  # in order of computation
    targets: ClassVar[dict[str, str]] = {}  # named groups of sites: name -> regular expression of site paths
    templates: ClassVar[dict[str, Callable[..., Template]]] = {}  # task -> (tokenizer, text options) -> template
    # (pattern of leaf paths, mesh axes of its last dimensions), see training/sharding.py
    sharding: ClassVar[tuple[tuple[str, tuple[str | None, ...]], ...]] = ()
    tied: ClassVar[dict[str, str]] = {}  # path of a linear without its own kernel -> the leaf that it uses, transposed
    word_scale: ClassVar[float] = 1.0  # factor of word embeddings when they enter a text stack
    narrow: ClassVar[str] = (
        r"kernel$"  # leaves that are used only after a cast to `config.dtype`, so may be stored in it
    )

    if TYPE_CHECKING:  # Flax adds it to every module, but not to its type

        def __hash__(self) -> int: ...

    @classmethod
    def build(cls, config: Any, tokenizer: AnyTokenizer | None = None) -> Self:
        """The model with its processor: `tokenizer`, the class's templates, and the image settings of `config`."""
        c, templates = config, {name: functools.partial(make, tokenizer) for name, make in cls.templates.items()}
        return cls(
            c, Processor(tokenizer, c.image_size, c.image_resample, c.image_mean, templates, c.image_longest_edge)
        )

    @property
    def tokenizer(self) -> AnyTokenizer | None:
        """The processor's tokenizer, or None."""
        return self.processor and self.processor.tokenizer

    @property
    def hf(self) -> HuggingFace | None:
        """The form of this model in transformers and PEFT; None if they do not have it."""
        return MODELS[self.model_type]().hf(self) if self.model_type in MODELS else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that this model supports."""
        raise NotImplementedError

    @property
    def positions(self) -> int:
        """The maximum number of text tokens."""
        raise NotImplementedError

    @nn.nowrap
    def replaced(self, tokenizer: AnyTokenizer | None = None, **fields: Any) -> Self:
        """The model with changed fields of its config and, if given, another tokenizer; the processor is updated."""
        return self.build(dataclasses.replace(self.config, **fields), tokenizer or self.tokenizer)

    def for_task(self, task: str) -> "VisionLanguageModel":
        """The model for another task with the same parameters. Raises ValueError if they do not support it."""
        raise NotImplementedError

    @nn.nowrap
    def unrolled(self) -> Self:
        """The same model without loops over layers or heads, to count FLOPs: XLA counts the body of a loop once."""
        return self.replaced(unroll=MOST, attention="plain")

    def example(self) -> dict:
        """A small batch that uses every stage, for `init` and for finding sites."""
        raise NotImplementedError

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Flax's `apply`, also for variables of `stack.apart`."""
        return super().apply(together(variables), *args, **kwargs)

    def stage(self, batch: dict, name: str) -> jax.Array:
        """The output of one stage, from a batch that has its inputs."""
        raise NotImplementedError

    def context(self, batch: dict) -> Context:
        """The context of a batch, starting from the latest stages whose outputs it contains."""
        raise NotImplementedError

    def score(self, tokens_RT: jax.Array, context: Context) -> jax.Array:
        """Teacher-forced logits (R, T, V): column t predicts the token after tokens_RT[:, t].

        In a prefix-LM column 0 of tokens_RT is a placeholder: its logits are the context's `first_BV`.
        """
        raise NotImplementedError

    def start(self, tokens_RS: jax.Array, context: Context, room: int) -> tuple[jax.Array, Cache]:
        """(logits (R, V) of the token after `template.start`, a cache for `room` tokens including the start)."""
        raise NotImplementedError

    def step(self, token_R: jax.Array, cache: Cache, context: Context) -> tuple[jax.Array, Cache]:
        """(logits (R, V) of the next token, the new cache)."""
        raise NotImplementedError

    def __call__(self, batch: dict) -> jax.Array:
        """{what `context` reads, 'tokens' (B, A, T)} -> logits (B, A, T, V)."""
        n_rows, n_texts, n_tokens = batch["tokens"].shape
        logits_RTV = self.score(batch["tokens"].reshape(-1, n_tokens), self.context(batch))
        return logits_RTV.reshape(n_rows, n_texts, n_tokens, -1)


def _in(module: str) -> Callable[[], Converter]:
    """The `CONVERTER` of a module, imported on first use."""
    return lambda: importlib.import_module(module).CONVERTER


# model_type of config.json (Hugging Face) or manifest.json (jaxpeft) -> a function that returns its converter
MODELS: dict[str, Callable[[], Converter]] = Registry(
    "model type",
    {
        "blip": _in("jaxpeft.models.blip_convert"),
        "mplug": _in("jaxpeft.models.mplug_convert"),
        "paligemma": _in("jaxpeft.models.paligemma_convert"),
        "smolvlm": _in("jaxpeft.models.smolvlm_convert"),
        "idefics3": _in("jaxpeft.models.smolvlm_convert"),  # the same architecture under its first name
    },
)
