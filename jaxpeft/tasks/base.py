"""The interface of a task: examples from a split, a loss over a batch, evaluation examples, and a score over strings."""

import abc
import array
import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import ops
from jaxpeft.data.base import Examples, Split
from jaxpeft.data.mapped import CHUNK, Ragged, empty
from jaxpeft.inputs.processor import Template
from jaxpeft.metrics import METRICS
from jaxpeft.models import decode
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.tree import Tree


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A task. Its fields are the options of `config.task_options`; its functions are pure."""

    smoothing: float = 0.0  # label smoothing of the training loss
    max_new_tokens: int = 0  # of a generated text; 0: those of the longest text in the data
    # of a generated text, in tokens, including the prompt; 0: a caption has at least one token after the prompt
    min_length: int = 0
    metrics: tuple[str, ...] = ()  # keys of metrics.METRICS to report beside the task's own
    name: ClassVar[str] = ""
    asks: ClassVar[bool] = False  # whether an example has a question
    main_metric: ClassVar[str] = ""  # the metric that tables and studies show
    id_key: ClassVar[str] = ""  # the key of the unique id in the rows of `eval_examples`
    answer_key: ClassVar[str] = ""  # of a text in the result format of the task's evaluation server; '': it has none
    # fields that limit the tokens of a text, where 0 stands for the longest text in the data -> their value without any text
    limits: ClassVar[dict[str, int]] = {"max_new_tokens": 36}
    limited_texts: ClassVar[dict[str, str]] = {}  # limit -> the texts that it cuts, for messages
    only_written: ClassVar[tuple[str, ...]] = ()  # limits that apply to generated texts only, not to training texts

    @property
    def kind(self) -> str:
        """The kind of template that the task uses: 'captioning' or 'vqa', also for a task of your own."""
        return "vqa" if self.asks else "captioning"

    def template(self, model: VisionLanguageModel) -> Template:
        """How `model` reads and writes the texts of this task."""
        return model.processor.template(self.kind)

    def search(self, model: VisionLanguageModel, beams: int = 1) -> decode.Search:
        """The decoding settings of this task."""
        template = self.template(model)
        most = min(self.limits["max_new_tokens"], model.positions - len(template.start))
        # an answer may be empty, a caption has at least one token
        least = self.min_length or (0 if self.asks else len(template.start) + 1)
        return decode.Search.of(template, self.max_new_tokens or most, min_length=least, beams=beams)

    @abc.abstractmethod
    def examples(self, split: Split, template: Template) -> Examples:
        """Training examples: arrays 'tokens', 'targets' (n,A,T) int32, 'weights' (n,A,T) float32, optionally 'prompt' (n,P)."""

    @abc.abstractmethod
    def eval_examples(self, split: Split, template: Template) -> Examples:
        """One example per text to generate: arrays 'image_index' and optionally 'prompt', and rows for scoring."""

    def case_ids(self, split: Split) -> list[str] | None:
        """For each of `examples`, the id of the row of `eval_examples` that it is a reference of; None if there is none."""
        return None

    @abc.abstractmethod
    def texts(self, split: Split, template: Template) -> Iterable[str]:
        """Every training text, for the check that the vocabulary covers it."""

    @abc.abstractmethod
    def lengths(self, split: Split, template: Template) -> dict[str, np.ndarray]:
        """Limit -> how much of it each text of the split needs, including prompt and special tokens."""

    @abc.abstractmethod
    def least(self, template: Template) -> dict[str, int]:
        """Limit -> its smallest valid value, which leaves one token of a text."""

    @abc.abstractmethod
    def truths(self, row: dict) -> list[str]:
        """The right texts of an example."""

    @abc.abstractmethod
    def form(self, text: str) -> str:
        """The normalised form of a text that the score compares: texts with the same form are equal."""

    @abc.abstractmethod
    def score(self, rows: list[dict], predictions: list[str]) -> dict:
        """The metrics of a whole split; `rows` are those of `eval_examples`."""

    @abc.abstractmethod
    def per_example(self, rows: list[dict], predictions: list[str]) -> np.ndarray:
        """The main metric of every example; the mean is that of the split."""

    def scores(self, rows: list[dict], predictions: list[str]) -> dict:
        """`score`, with the mean of each metric in `metrics` by name."""
        pairs = list(zip(predictions, map(self.truths, rows), strict=True))
        more = {name: float(np.mean([METRICS.find(name)(*one) for one in pairs])) for name in self.metrics}
        return self.score(rows, predictions) | more

    @abc.abstractmethod
    def guesses(self, train: Split, rows: list[dict]) -> dict[str, list[str]]:
        """Name of a blind baseline -> its text for every example, guessed without the image."""

    def upload(self, rows: list[dict], predictions: list[str]) -> list[dict] | None:
        """The submission to the task's evaluation server, or None where the ids are not numbers as on the server."""
        numbered = self.answer_key and all(row[self.id_key].isdecimal() for row in rows)
        pairs = zip(rows, predictions, strict=True)
        return [{self.id_key: int(row[self.id_key]), self.answer_key: t} for row, t in pairs] if numbered else None

    def candidates(self, train: Split, template: Template) -> list[str] | None:
        """The closed list that answers are chosen from, or None where the model generates them."""
        return None

    def loss(
        self, model: VisionLanguageModel, variables: Tree, batch: Mapping[str, jax.Array], rngs: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """(sum, count), whose ratio is the training loss: by default of the token losses, over all scored tokens."""
        logits_BATV = model.apply(variables, batch, rngs=rngs)
        return ops.token_loss(logits_BATV, batch["targets"], batch["weights"], self.smoothing)

    def nll(
        self, model: VisionLanguageModel, variables: Tree, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """(negative log-likelihood of the targets in nats (B,), number of target tokens (B,)) per example."""
        scored_BAT = (batch["weights"] > 0).astype(jnp.float32)
        nll_BAT = ops.token_nll(model.apply(variables, batch), batch["targets"]) * scored_BAT
        return nll_BAT.sum(axis=(1, 2)), scored_BAT.sum(axis=(1, 2))

    def limited(self, lengths: Iterable[dict[str, np.ndarray]], positions: int, template: Template) -> "Task":
        """The task with every limit that is 0 set to the length of the longest text, at most the model's `positions`.

        Raises ValueError for a limit above `positions`, or one that leaves no token of a text.
        """
        lengths, chosen, least = list(lengths), {}, self.least(template)
        for field, default in self.limits.items():
            most = positions - (len(template.start) if field == "max_new_tokens" else 0)
            asked = getattr(self, field)
            if asked and not least[field] <= asked <= most:
                raise ValueError(
                    f"task_options.{field} is {asked}; with this base and prompt it must be between {least[field]} and "
                    f"{most}, or 0 for the length of the longest text"
                )
            longest = max((int(one[field].max()) for one in lengths if one[field].size), default=default)
            chosen[field] = asked or min(longest, most)
        return dataclasses.replace(self, **chosen)

    def cuts(self, lengths: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
        """Limit -> {'limit', 'longest', 'cut': number of longer texts, 'of': number of texts}; 0 means no limit."""
        found = {}
        for field, n in lengths.items():
            limit = getattr(self, field)
            cut = int((n > limit).sum()) if limit else 0
            found[field] = {"limit": limit, "longest": int(n.max(initial=0)), "cut": cut, "of": int(n.size)}
        return found

    def writable(self, text: str, template: Template) -> str:
        """The closest that the model can come to `text` with this vocabulary and `max_new_tokens`."""
        return template.text(template.pieces(text)[: self.max_new_tokens or None])

    def reachable(self, text: str, template: Template) -> bool:
        """Whether the decoder can generate a text that the score considers equal to `text`."""
        return self.form(self.writable(text, template)) == self.form(text) != ""

    def perfect_writer(self, rows: list[dict], template: Template) -> dict:
        """The score of the best right text of every example as this vocabulary can write it: the upper bound for this base.

        With 'unhindered' (the main metric of the unchanged right texts), 'truths' (the number of right texts), 'out_of_reach'
        (the number of those that cannot be written), and 'examples' of the latter, pairs of a text and what can be written.
        """
        groups = [list(dict.fromkeys(self.truths(row))) for row in rows]
        written = {text: self.writable(text, template) for group in groups for text in group}

        def best(write: Callable[[str], str]) -> list[str]:
            """The best text of each example, among its ten most frequent ones: few data sets have more."""
            tried = [
                [write(group[min(k, len(group) - 1)]) for group in groups]
                for k in range(min(10, max(map(len, groups))))
            ]
            which = np.argmax([self.per_example(rows, texts) for texts in tried], axis=0)
            return [tried[k][i] for i, k in enumerate(which)]

        lost = [text for group in groups for text in group if self.form(written[text]) != self.form(text)]
        found = self.scores(rows, best(written.__getitem__))
        found["unhindered"] = self.score(rows, best(str))[self.main_metric]
        found |= {"truths": sum(map(len, groups)), "out_of_reach": len(lost)}
        return found | {"examples": [[text, written[text]] for text, _ in collections.Counter(lost).most_common(3)]}


def check_ids(cases: Examples, key: str, name: str) -> None:
    """Raise ValueError where two examples of a split have the same id: one of them would not be scored."""
    seen = set()
    for row in cases.rows:
        if row[key] in seen:
            raise ValueError(f"split {name!r}: {key} {row[key]!r} occurs twice; ids in a split must be unique")
        seen.add(row[key])


def teacher_forced(texts: Iterable[list[list[int]]], weights: Iterable[list[float]], template: Template) -> dict:
    """Make inputs, shifted targets and weights from token ids per example and text. Start and padding have weight 0.

    `texts[i][a]` starts with `template.start` and ends with an end token, unless it was cut. All examples are padded to the
    same number of texts with texts of weight 0. Without a start, column 0 of the inputs is a placeholder. Inputs and targets
    are views of one array.
    """
    lead, counts = int(not template.start), array.array("i")

    def each() -> Iterator[list[int]]:
        for group in texts:
            counts.append(len(group))
            yield from group

    ragged, n_texts_N = Ragged(each()), np.array(counts)
    n, most = len(n_texts_N), int(n_texts_N.max())
    # text k of an example is row most * example + k
    row_N = np.repeat(most * np.arange(n) - n_texts_N.cumsum() + n_texts_N, n_texts_N) + np.arange(n_texts_N.sum())
    length = max(lead + int(ragged.length_N.max()), 2)
    ids_NT, weight_NT = empty((n * most, length), np.int32), empty((n * most, length - 1), np.float32)
    ids_NT[:] = template.pad
    ragged.fill(ids_NT, row_N, column=lead)
    length_N, weight_N = np.zeros(n * most, np.int32), np.zeros(n * most, np.float32)
    length_N[row_N] = lead + ragged.length_N
    weight_N[row_N] = np.fromiter((w for group in weights for w in group), np.float32)
    at_1T = np.arange(1, length)[None]
    for k in range(0, n * most, CHUNK):
        some = slice(k, k + CHUNK)
        scored_NT = (at_1T >= len(template.start) + lead) & (at_1T < length_N[some, None])
        weight_NT[some] = scored_NT * weight_N[some, None]
    ids_NAT = ids_NT.reshape(n, most, length)
    weight_NAT = weight_NT.reshape(n, most, length - 1)
    return {"tokens": ids_NAT[..., :-1], "targets": ids_NAT[..., 1:], "weights": weight_NAT}
