"""What turns images and texts into what a model reads: tokenizer, image size, and a template for each task.

All of it runs on the host. A processor is no part of what is compiled: two models that differ in it alone share a program.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxpeft.inputs import images
from jaxpeft.inputs.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Template:
    """How one model reads and writes the texts of one task. Special tokens inside a user's text stay text.

    A text is `start` + pieces + `stop[0]`. In an encoder-decoder `start` holds at least the token that begins a text; it is
    given and not scored. In a prefix-LM it is empty: the first token of a text follows the prompt. The fields `before` and
    `after` frame a prompt, which stays whole where a question is cut.
    """

    tokenizer: Tokenizer
    start: tuple[int, ...]
    stop: tuple[int, ...]  # any of them ends a text
    pad: int
    start_text: str = ""  # the words in `start`
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    clean_question: Callable[[str], str] = str
    clean_text: Callable[[str], str] = str

    def prompt(self, question: str, limit: int = 0) -> tuple[list[int], int]:
        """(ids of a question in its frame, how many were cut); `limit`: most ids, frame included, 0 for any number."""
        return self._framed(self.before, self.tokenizer.pieces(self.clean_question(question)), self.after, limit)

    def target(self, text: str, limit: int = 0) -> tuple[list[int], int]:
        """(ids of a text to learn, how many were cut); `limit`: most ids, start and end included, 0 for any number.

        A text that is cut has no end: nobody should learn to stop there.
        """
        ids = [*self.start, *self.tokenizer.pieces(self.clean_text(text)), self.stop[0]]
        return (ids[:limit], len(ids) - limit) if 0 < limit < len(ids) else (ids, 0)

    def text(self, ids: Iterable[int]) -> str:
        """What written ids, without `start`, say: up to the first end or padding."""
        return self.tokenizer.decode(ids)

    def _framed(
        self, before: Sequence[int], pieces: Sequence[int], after: Sequence[int], limit: int
    ) -> tuple[list[int], int]:
        room = max(0, limit - len(before) - len(after)) if limit else len(pieces)
        return [*before, *pieces[:room], *after], max(0, len(pieces) - room)


@dataclasses.dataclass(frozen=True)
class Processor:
    """`templates`: task name -> a function of the task's text options that gives its template."""

    tokenizer: Tokenizer | None
    image_size: int
    resample: int = images.BICUBIC  # Pillow's number of the filter
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # per channel of pixels in [0, 1]
    templates: dict[str, Callable[..., Template]] = dataclasses.field(default_factory=dict)

    def template(self, task: str, **options: Any) -> Template:
        """The template of a task. Raises ValueError where the model has no tokenizer, or no way to do the task."""
        if self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer: put vocab.txt or tokenizer.json beside its weights and load again"
            )
        if task not in self.templates:
            raise ValueError(f"the model has no template for {task!r}; it has {', '.join(self.templates)}")
        return self.templates[task](**options)
