"""BERT's WordPiece tokenizer, the normal form in which texts are compared, and BLIP's text cleaning.

The tokenizer is that of the `tokenizers` library (Devlin et al. 2018, arXiv:1810.04805) in an immutable wrapper. Its ids equal
those of transformers 5.23 `BertTokenizer` (tests/test_text.py), except that special tokens inside a user's text are treated
as text: "[SEP]" in a caption is three ordinary words. A model may add its own special tokens: see `Tokenizer`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self, TypeVar

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from jaxpeft.inputs.any_tokenizer import AnyTokenizer, library_errors
from jaxpeft.runtime import files

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FILES = ("vocab.txt", "tokenizer.json")  # a directory with either of them has a tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer(AnyTokenizer):
    """BERT's tokenizer. A token's id is its index in `vocabulary`; the last ones may be `added` words.

    A model with more special tokens subclasses it and lists them after BERT's in `special`; they are appended if a file does
    not have them.
    """

    vocabulary: tuple[str, ...]
    added: tuple[
        tokenizers.AddedToken, ...
    ] = ()  # matched before words are split, as `add_tokens` of transformers adds them
    strip_accents: bool | None = None  # None: like lower-casing, which is on
    split_chinese: bool = True  # every CJK ideograph is a word
    pad_id: int = dataclasses.field(init=False)
    unk_id: int = dataclasses.field(init=False)
    cls_id: int = dataclasses.field(init=False)
    sep_id: int = dataclasses.field(init=False)
    mask_id: int = dataclasses.field(init=False)
    ids: dict[str, int] = dataclasses.field(init=False, repr=False)
    library: tokenizers.Tokenizer = dataclasses.field(init=False, repr=False)

    special: ClassVar[tuple[str, ...]] = SPECIAL  # tokens that do not represent text

    def __post_init__(self):
        ids = {token: i for i, token in enumerate(self.vocabulary)}
        if len(ids) < len(self.vocabulary):
            twice = next(token for i, token in enumerate(self.vocabulary) if ids[token] != i)
            raise ValueError(f"token {twice!r} occurs twice in the vocabulary; every token must have one id")
        missing = [token for token in self.special if token not in ids]
        if missing:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}; Tokenizer.from_words adds all special tokens")
        names = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id")
        for name, token in zip(names, SPECIAL, strict=True):
            object.__setattr__(self, name, ids[token])
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "library", self._build())

    def _build(self) -> tokenizers.Tokenizer:
        first = self.ids[self.added[0].content] if self.added else len(self)
        words = {word.content: word for word in self.added}
        with library_errors("the vocabulary cannot be used"):
            pieces = dict(zip(self.vocabulary[:first], range(first), strict=True))
            built = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]", max_input_chars_per_word=100))
            built.normalizer = normalizers.BertNormalizer(
                strip_accents=self.strip_accents, handle_chinese_chars=self.split_chinese
            )
            built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            built.post_processor = processors.BertProcessing(("[SEP]", self.sep_id), ("[CLS]", self.cls_id))
            built.add_special_tokens([token for token in self.special if token in pieces])
            for token in self.vocabulary[first:]:  # the library assigns ids in this order
                built.add_tokens([words.get(token, tokenizers.AddedToken(token, special=True, normalized=False))])
            built.encode_special_tokens = True  # treats them as text in a user's text
        return built

    def __reduce__(self):
        return type(self), (self.vocabulary, self.added, self.strip_accents, self.split_chinese)

    @classmethod
    def from_words(cls, words: Iterable[str]) -> Self:
        """A word-level vocabulary for small models: the special tokens, then the distinct words, sorted."""
        return cls(cls.special + tuple(sorted({_whole(word) for word in words})))

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> Self:
        """Read `vocab.txt` (one token per line), or a Hugging Face directory with it or a WordPiece `tokenizer.json`.

        Beside a tokenizer.json, vocab.txt is not read; words added to vocab.txt are read from tokenizer_config.json or
        added_tokens.json. Special tokens that a model adds to BERT's are appended if absent. Raises ValueError, naming the
        file, for anything but an uncased BERT tokenizer.
        """
        path = pathlib.Path(path)
        return _read_directory(cls, path) if path.is_dir() else _made(cls, _read_vocabulary(path), (), {}, path)

    def extended(self, words: Iterable[str]) -> tuple[Self, tuple[str, ...]]:
        """(a tokenizer with the words that are not tokens yet appended in order, those words); existing ids are kept."""
        words = list(words)
        for word in words:
            if self.words(word) != [word]:
                raise ValueError(
                    f"{word!r} can never be a token: it is split into {self.words(word)}; add these instead"
                )
        new = tuple(dict.fromkeys(word for word in words if word not in self.ids))
        # only added words can follow words that were added before
        more = tuple(tokenizers.AddedToken(word, single_word=True) for word in new) if self.added else ()
        return dataclasses.replace(self, vocabulary=self.vocabulary + new, added=self.added + more), new

    @functools.cached_property
    def has_pieces(self) -> bool:
        """Whether words are split into pieces, as in WordPiece; otherwise a word that is not in the vocabulary is [UNK]."""
        return any(word.startswith("##") for word in self.vocabulary)

    def __len__(self) -> int:
        return len(self.vocabulary)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the vocabulary in order, and of options that differ from the defaults."""
        words = [(one.content, one.normalized, one.single_word, one.lstrip, one.rstrip) for one in self.added]
        options = words, self.strip_accents, self.split_chinese
        text = "\n".join(self.vocabulary) + ("" if options == ([], None, True) else json.dumps(options))
        return hashlib.sha256(text.encode()).hexdigest()

    def files(self) -> dict[str, str]:
        """File name -> content of the files that `from_file` and transformers read as this tokenizer."""
        found = {"vocab.txt": "\n".join(self.vocabulary) + "\n"}
        if self.added or self.strip_accents is not None or not self.split_chinese:  # not representable in vocab.txt
            found = {"tokenizer.json": self.library.to_str(pretty=True) + "\n"}
        return found

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """[CLS] pieces [SEP], truncated to at most `max_length` ids with [SEP] kept. No padding."""
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}; it must be at least 2, for [CLS] and [SEP]")
        pieces = self.pieces(text)
        return [self.cls_id, *pieces[: None if max_length is None else max_length - 2], self.sep_id]

    def words(self, text: str) -> list[str]:
        """The words of `text`, before they are split into pieces."""
        with library_errors(f"the text {text!r:.80} cannot be tokenised"):
            return _split(self.library.normalizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first [SEP] or [PAD], with special tokens dropped and ## pieces joined.

        Spaces are cleaned up like in HF `decode(skip_special_tokens=True, clean_up_tokenization_spaces=True)`, which BLIP
        used: before . ? ! , and around ' but not around a hyphen or slash ("don't", "10, 000", "t - shirt").
        """
        tokens = []
        for i in map(int, ids):
            if not 0 <= i < len(self.vocabulary):
                raise ValueError(f"id {i} is not in the vocabulary; ids are 0 to {len(self.vocabulary) - 1}")
            if i in (self.sep_id, self.pad_id):
                break
            if self.vocabulary[i] not in self.special:
                tokens.append(self.vocabulary[i])
        return _clean_up(" ".join(tokens).replace(" ##", ""))

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text`, with repetitions, that become [UNK]."""
        if self.covers(text):
            return []
        found = self.library.encode(text, add_special_tokens=False)
        lost = (text[a:b] for i, (a, b) in zip(found.ids, found.offsets, strict=True) if i == self.unk_id)
        return [word for part in lost for word in self.words(part)]

    def covers(self, text: str) -> bool:
        """Whether no word of `text` becomes [UNK]."""
        return self.unk_id not in self.pieces(text)


_BERT = normalizers.BertNormalizer()
_PRE_TOKENIZER = pre_tokenizers.BertPreTokenizer()


def _split(normalizer, text: str) -> list[str]:
    return [word for word, _ in _PRE_TOKENIZER.pre_tokenize_str(normalizer.normalize_str(text))]


def split_words(text: str) -> list[str]:
    """Split into clean, lower-case, unaccented words; every punctuation mark and CJK ideograph is one word (BERT "basic")."""
    with library_errors(f"the text {text!r:.80} cannot be split"):
        return _split(_BERT, text)


def _clean_up(text):
    for before, after in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
                          (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):  # fmt: skip
        text = text.replace(before, after)
    return text


def _whole(word):
    if split_words(word) != [word]:
        raise ValueError(f"{word!r} can never be a token: it is split into {split_words(word)}; add these instead")
    return word


# ---------------------------------------------------------------------------------------------- reading

T = TypeVar("T", bound=Tokenizer)


def _read_directory(cls: type[T], directory: pathlib.Path) -> T:
    """Read tokenizer.json or, in a directory without it, vocab.txt and the tokens that were added to it."""
    config = directory / "tokenizer_config.json"
    settings = _read_if_there(config)
    for key in ("do_lower_case", "do_basic_tokenize"):
        if settings.get(key, True) is not True:
            raise ValueError(f"{config}: {key} is {settings[key]!r}; only uncased BERT tokenizers are supported")
    if (path := directory / "tokenizer.json").is_file():
        return _read_tokenizer_json(cls, path)
    if not (path := directory / "vocab.txt").is_file():
        raise ValueError(f"{directory} has neither vocab.txt nor tokenizer.json; copy the base's tokenizer there")
    tokens, words = _read_vocabulary(path), []
    source, later = config, settings.get("added_tokens_decoder")
    if not later:  # written before transformers 4.34
        source = directory / "added_tokens.json"
        later = {str(i): {"content": token} for token, i in _read_if_there(source).items()}
    with files.reading(source, "does not contain valid added tokens"):
        while one := later.get(str(len(tokens))):
            word = tokenizers.AddedToken(**one)
            tokens.append(word.content)
            if not word.special and word.content not in cls.special:
                words.append(word)
        by_id = {str(i): token for i, token in enumerate(tokens)}
        wrong = {i: one["content"] for i, one in later.items() if not one["content"] or by_id.get(i) != one["content"]}
    if wrong:
        raise ValueError(f"{source} has tokens whose ids do not continue those of vocab.txt: {wrong!s:.200}")
    options = {"strip_accents": settings.get("strip_accents"),
               "split_chinese": settings.get("tokenize_chinese_chars", True)}  # fmt: skip
    return _made(cls, tokens, words, options, path)


def _read_if_there(path: pathlib.Path) -> dict:
    return files.read_json(path) if path.is_file() else {}


def _read_vocabulary(path: pathlib.Path) -> list[str]:
    if path.stat().st_size > files.MOST_JSON:
        raise ValueError(f"{path} has more than {files.MOST_JSON:,} bytes, the limit for a vocabulary")
    with open(path, encoding="utf-8") as lines, files.reading(path):
        return [line.rstrip("\n") for line in lines]


def _read_tokenizer_json(cls: type[T], path: pathlib.Path) -> T:
    """Raises ValueError for anything that BERT's tokenizer does not have."""
    spec = files.read_json(path)
    with library_errors(f"{path} is not a valid tokenizer.json"):
        library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    model, normalizer = library.model, library.normalizer
    kinds = {"model": models.WordPiece, "normalizer": normalizers.BertNormalizer,
             "pre_tokenizer": pre_tokenizers.BertPreTokenizer}  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(found := getattr(library, key), kind):
            raise ValueError(f"{path}: {key} is {type(found).__name__}; only {kind.__name__} is supported")
    expected = (
        (model, "unk_token", "[UNK]"), (model, "continuing_subword_prefix", "##"), (model, "max_input_chars_per_word", 100),
        (normalizer, "lowercase", True), (normalizer, "clean_text", True),
    )  # fmt: skip
    for part, key, value in expected:
        if (found := getattr(part, key)) != value:
            raise ValueError(f"{path}: {key} is {found!r}; only {value!r} is supported, as in uncased BERT")
    ids, trained = library.get_vocab(), library.get_vocab(with_added_tokens=False)
    # the library gives an added token the next id, whatever the file says
    moved = [one for one in spec.get("added_tokens") or () if ids.get(one["content"]) != one["id"]]
    if moved or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"the ids in {path} are not 0 to {len(ids) - 1}; every id must belong to exactly one token")
    later = [one for _, one in sorted(library.get_added_tokens_decoder().items())]
    words = [one for one in later if not (one.special or one.content in cls.special or one.content in trained)]
    options = {"strip_accents": normalizer.strip_accents, "split_chinese": normalizer.handle_chinese_chars}
    return _made(cls, sorted(ids, key=ids.get), words, options, path)


def _made(
    cls: type[T], tokens: list[str], words: Sequence[tokenizers.AddedToken], options: dict, path: pathlib.Path
) -> T:
    tokens = [*tokens, *(token for token in cls.special if token not in tokens and token not in SPECIAL)]
    try:
        return cls(tuple(tokens), tuple(words), **options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ---------------------------------------------------------------------------------------------- normal form

# Marks that any letter may carry; those of one script (vowels of Devanagari, tones of Thai) distinguish words
_ACCENTS = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]")
_CJK = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


@functools.lru_cache(maxsize=1 << 16)  # answers repeat
def normal_form(text: str) -> str:
    """The form in which texts of a user's data are compared: words and punctuation marks separated by single spaces.

    Unicode NFKC, case folded, without accents and invisible characters, every punctuation mark and CJK ideograph separate:
    BERT's basic split, so that the output of an uncased tokenizer ("t - shirt", "cafe") equals its input ("T-shirt", "Café").
    It does not depend on a vocabulary, so runs with different tokenizers are scored alike. Letters of the Latin, Greek and
    Cyrillic scripts lose their marks, as in BERT (й and the tones of Vietnamese too); marks of other scripts, which
    distinguish words, are kept: Japanese が, Hindi मेल, Thai ม้า.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", text)))
    return " ".join("".join(map(_spaced, text)).split())


@functools.lru_cache(maxsize=1 << 14)
def _spaced(c: str) -> str:
    if c.isspace():
        return " "
    kind = unicodedata.category(c)
    if kind in ("Cc", "Cf", "Cs") or c == "\ufffd" or "\ufe00" <= c <= "\ufe0f":  # variation selectors too
        return ""
    return f" {c} " if is_mark(c) or any(low <= ord(c) <= high for low, high in _CJK) else c


def is_mark(c: str) -> bool:
    """Whether BERT treats a character as punctuation: in ASCII all but letters, digits and space ("$" is one), elsewhere the
    Unicode categories P."""
    return c.isascii() and c.isprintable() and not c.isalnum() and c != " " or unicodedata.category(c).startswith("P")


def clean_caption(text: str, max_words: int = 50) -> str:
    """BLIP's `pre_caption`: lower case, . ! " ( ) * # : ; ~ become spaces, spaces are merged; COCO uses max_words=30."""
    text = re.sub(r"\s{2,}", " ", re.sub(r'[.!"()*#:;~]', " ", text.lower()))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """BLIP's `pre_question`: like `clean_caption`, but marks are removed, and inner and leading spaces and "?" are kept."""
    return " ".join(re.sub(r'[.!"()*#:;~]', "", text.lower()).rstrip(" ").split(" ")[:max_words])
