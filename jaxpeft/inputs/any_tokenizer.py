"""What templates, tasks and loading use of a tokenizer, whatever its kind: `tokenizer.Tokenizer` (BERT) and `bpe.Bpe`."""

import abc
import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import Self

import tokenizers


class AnyTokenizer(abc.ABC):
    """An immutable tokenizer. Tokenizers of one class with equal digests are equal and have equal hashes, so a base that is
    loaded twice is compiled once."""

    library: tokenizers.Tokenizer
    pad_id: int

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of ids: every id of a token is smaller."""

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """sha256 of all that decides ids and texts."""

    @abc.abstractmethod
    def files(self) -> dict[str, str]:
        """File name -> content of the files that `from_file` and transformers read as this tokenizer."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""

    @property
    @abc.abstractmethod
    def has_pieces(self) -> bool:
        """Whether words are split into pieces; otherwise a word that is not in the vocabulary is unknown."""

    @abc.abstractmethod
    def extended(self, words: Iterable[str]) -> tuple[Self, tuple[str, ...]]:
        """(a tokenizer with the words that are not tokens yet appended in order, those words); existing ids are kept."""

    @abc.abstractmethod
    def words(self, text: str) -> list[str]:
        """The words of `text`, before they are split into pieces."""

    @abc.abstractmethod
    def unknown_words(self, text: str) -> list[str]:
        """The words of `text`, with repetitions, that the vocabulary cannot write."""

    @abc.abstractmethod
    def covers(self, text: str) -> bool:
        """Whether no word of `text` is unknown."""

    def __eq__(self, other):
        return type(other) is type(self) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def pieces(self, text: str) -> list[int]:
        """The ids of a text without special tokens: "[SEP]" or "<eos>" in a text is text."""
        return list(self._pieces(text))

    @functools.cached_property
    def _pieces(self):
        # questions repeat, and every text is tokenized twice
        return functools.lru_cache(maxsize=1 << 17)(self._tokenized)

    def _tokenized(self, text: str) -> list[int]:
        with library_errors(f"the text {text!r:.80} cannot be tokenised"):
            return self.library.encode(text, add_special_tokens=False).ids


@contextlib.contextmanager
def library_errors(what: str):
    """Raise errors of the library as ValueError; its PanicException is not an Exception and would pass every handler."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, ValueError) or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise ValueError(f"{what}: {error}") from error


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"
