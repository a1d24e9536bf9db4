"""What a task is: examples from a split, a loss over a batch, a prompt to answer from, and a score over strings."""

import abc
import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxpeft import losses
from jaxpeft.data import Examples, pad_tokens
from jaxpeft.datasets import Split
from jaxpeft.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Fields are the options of `config.task_options`. Subclasses define the functions below; all are pure."""

    smoothing: float = 0.0  # label smoothing of the training loss
    name: ClassVar[str] = ""
    question_encoder: ClassVar[bool] = False  # whether the model needs one
    main_metric: ClassVar[str] = ""  # the metric that tables and studies show

    @abc.abstractmethod
    def examples(self, split: Split, tokenizer: Tokenizer) -> Examples:
        """Training examples: arrays 'tokens', 'targets' (n,A,T) int32, 'weights' (n,A,T) float32, maybe 'question'."""

    @abc.abstractmethod
    def cases(self, split: Split, tokenizer: Tokenizer) -> Examples:
        """Evaluation cases, one per answer to write: arrays 'image_index' and maybe 'question'; rows for scoring."""

    @abc.abstractmethod
    def texts(self, split: Split) -> list[str]:
        """Every text that training reads, for the check that the vocabulary covers it."""

    @abc.abstractmethod
    def prompt_ids(self, tokenizer: Tokenizer) -> list[int]:
        """What the decoder is given before it writes: [DEC], and the prompt's words."""

    @abc.abstractmethod
    def score(self, rows: list[dict], predictions: list[str]) -> dict:
        """Metrics of a whole split; `rows` are those of `cases`."""

    @abc.abstractmethod
    def each(self, rows: list[dict], predictions: list[str]) -> np.ndarray:
        """The main metric of every case; its mean is the split's."""

    @abc.abstractmethod
    def blind(self, train: Split, rows: list[dict]) -> dict:
        """Scores of guesses that look at no picture, by name."""

    def upload(self, rows: list[dict], predictions: list[str]) -> list[dict] | None:
        """What the evaluation server of the task takes, or None where the ids are not numbers, as theirs are."""
        return None

    def candidates(self, train: Split) -> list[str] | None:
        """The closed list that answers are chosen from, or None where the decoder writes freely."""
        return None

    def loss(self, model, variables, batch, rngs):
        """(sum, count) whose ratio is the training loss: by default token losses over scored tokens."""
        logits_BATV = model.apply(variables, batch, rngs=rngs)
        return losses.token_loss(logits_BATV, batch["targets"], batch["weights"], self.smoothing)

    def nll(self, model, variables, batch):
        """Per example (sum of target nats (B,), number of target tokens (B,)): reported as nats per token."""
        scored_BAT = (batch["weights"] > 0).astype(jnp.float32)
        nll_BAT = losses.token_nll(model.apply(variables, batch), batch["targets"]) * scored_BAT
        return nll_BAT.sum(axis=(1, 2)), scored_BAT.sum(axis=(1, 2))


def teacher_forced(texts: list[list[list[int]]], weights: list[list[float]], n_prompt: int, pad_id: int) -> dict:
    """Token ids per example and text -> inputs, shifted targets, and weights (0 on the prompt and on padding).

    `texts[i][a]` starts with the first decoder token and ends with the end token; examples with fewer texts than the
    most are filled up with texts of weight 0.
    """
    most, blank = max(map(len, texts)), [pad_id, pad_id]
    flat = [text for group in texts for text in [*group, *[blank] * (most - len(group))]]
    ids_NT = pad_tokens(flat, pad_id)
    length_N = np.array([len(text) for text in flat])
    weight_N = np.array([w for group in weights for w in [*group, *[0.0] * (most - len(group))]], np.float32)
    at_T = np.arange(1, ids_NT.shape[1])
    scored_NT = (at_T >= n_prompt) & (at_T < length_N[:, None])
    shape = (len(texts), most, -1)
    return {
        "tokens": ids_NT[:, :-1].reshape(shape),
        "targets": ids_NT[:, 1:].reshape(shape),
        "weights": (scored_NT * weight_N[:, None]).astype(np.float32).reshape(shape),
    }
