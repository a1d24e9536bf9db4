"""Processors turn images and texts into model inputs: a tokenizer, image settings, and a template for each task.

They run on the host and are not part of the compiled program: models that differ only in the processor share programs.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxpeft.inputs import images
from jaxpeft.inputs.any_tokenizer import AnyTokenizer


@dataclasses.dataclass(frozen=True)
class Template:
    """How a model reads and writes the texts of a task. Special tokens inside a user's text are treated as text.

    A text is `start` + pieces + `stop[0]`, its pieces those of `lead` and the words together. In an encoder-decoder `start`
    holds at least the token that begins a text; it is given and not scored. In a prefix-LM it is empty: the first token of a
    text follows the prompt. A prompt is `before` + question + `after`; truncation shortens only the question. Of the image
    tokens of a prefix-LM it holds at most one id, which stands for all of them.
    """

    tokenizer: AnyTokenizer
    start: tuple[int, ...]
    stop: tuple[int, ...]  # each of them ends a text
    pad: int
    start_text: str = ""  # the words of `start`
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    clean_question: Callable[[str], str] = str
    clean_text: Callable[[str], str] = str
    lead: str = ""  # what a text is tokenised together with, in front of it: the space after "Assistant:"
    around: tuple[str, str] = ("", "")  # texts in front of and behind the question that are tokenised together with it
    beam_search: str = "transformers"  # a key of models.decode.BEAM_SEARCHES: how beams are scored and when they stop

    def prompt(self, question: str, limit: int = 0) -> tuple[list[int], int]:
        """(ids of a prompt, number of ids cut off); `limit`: maximum number of ids in all, 0 for no limit."""
        question, (first, last), pieces = self.clean_question(question), self.around, self.tokenizer.pieces
        ids, cut = self._framed(self.before, pieces(first + question + last), self.after, limit)
        if cut and any(self.around):  # a question that is cut is tokenised apart
            ids, cut = self._framed(
                (*self.before, *pieces(first)), pieces(question), (*pieces(last), *self.after), limit
            )
        return ids, cut

    def target(self, text: str, limit: int = 0) -> tuple[list[int], int]:
        """(ids of a training text, number of ids cut off); `limit`: maximum number of ids, with start and end, 0 for no limit.

        A truncated text has no end token, as the model should not learn to stop there.
        """
        ids = [*self.start, *self.pieces(self.clean_text(text)), self.stop[0]]
        return (ids[:limit], len(ids) - limit) if 0 < limit < len(ids) else (ids, 0)

    def pieces(self, text: str) -> list[int]:
        """The ids that write a text, without start and end."""
        return self.tokenizer.pieces(self.lead + text)

    def text(self, ids: Iterable[int]) -> str:
        """The text of generated ids, given without `start`, up to the first end token or padding, without outer spaces."""
        written = itertools.takewhile(lambda i: i != self.pad and i not in self.stop, map(int, ids))
        return self.tokenizer.decode(list(written)).strip()

    def _framed(
        self, before: Sequence[int], pieces: Sequence[int], after: Sequence[int], limit: int
    ) -> tuple[list[int], int]:
        room = max(0, limit - len(before) - len(after)) if limit else len(pieces)
        return [*before, *pieces[:room], *after], max(0, len(pieces) - room)


@dataclasses.dataclass(frozen=True)
class Processor:
    """Tokenizer, image settings, and `templates`: task name -> a function from the task's text options to its template."""

    tokenizer: AnyTokenizer | None
    image_size: int
    resample: int = images.BICUBIC  # number of a Pillow filter
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # per channel of pixels in [0, 1]
    templates: dict[str, Callable[..., Template]] = dataclasses.field(default_factory=dict)
    longest_edge: int = 0  # the longer side after a first resize, see `images.resize`; 0: images are resized once

    def template(self, task: str, **options: Any) -> Template:
        """The template of a task. Raises ValueError if the model has no tokenizer or does not support the task."""
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer; put vocab.txt or tokenizer.json beside its weights and load it again"
            )
        if task not in self.templates:
            raise ValueError(f"the model has no template for task {task!r}; choose one of {', '.join(self.templates)}")
        return self.templates[task](**options)
