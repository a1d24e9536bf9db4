"""Text in and out: BERT's uncased WordPiece tokenizer (Devlin et al. 2018, arXiv:1810.04805) and BLIP's text cleaning.

Pure Python over a vocabulary list; the ids equal those of transformers 5.23 `BertTokenizer` (tests/test_text.py) but
for two things: text never becomes a special token, so "[SEP]" inside a caption is three ordinary words; and some 500
rare code points, younger than that library's Unicode tables, are classed as Python does.
BLIP (Li et al. 2022, arXiv:2201.12086) adds [DEC], which starts a decoder, and [ENC], which starts a question encoder.
"""

import dataclasses
import hashlib
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from jaxpeft import untrusted

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
MAX_WORD = 100  # longer words are [UNK], as in BERT
MOST_MET = 100_000  # words whose pieces are remembered: captions repeat few
_CJK = (  # each of these ideographs is a word; hangul and kana are not
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary as a value: equal vocabularies are equal tokenizers. A token's id is its index in `vocabulary`."""

    vocabulary: tuple[str, ...]
    pad_id: int = dataclasses.field(init=False, compare=False)
    unk_id: int = dataclasses.field(init=False, compare=False)
    cls_id: int = dataclasses.field(init=False, compare=False)
    sep_id: int = dataclasses.field(init=False, compare=False)
    mask_id: int = dataclasses.field(init=False, compare=False)
    bos_id: int = dataclasses.field(init=False, compare=False)  # [DEC]
    enc_id: int = dataclasses.field(init=False, compare=False)
    ids: dict[str, int] = dataclasses.field(init=False, compare=False, repr=False)
    _met: dict[str, list[int]] = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self):
        ids = {token: i for i, token in enumerate(self.vocabulary)}
        if len(ids) < len(self.vocabulary):
            twice = next(token for i, token in enumerate(self.vocabulary) if ids[token] != i)
            raise ValueError(f"token {twice!r} occurs twice in the vocabulary; every token must have one id")
        missing = [token for token in SPECIAL if token not in ids]
        if missing:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}; Tokenizer.from_words adds all special tokens")
        names = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id", "bos_id", "enc_id")
        for name, token in zip(names, SPECIAL, strict=True):
            object.__setattr__(self, name, ids[token])
        object.__setattr__(self, "ids", ids)

    @classmethod
    def from_words(cls, words: Iterable[str]) -> "Tokenizer":
        """A word-level vocabulary for small models: the special tokens, then the distinct words, sorted."""
        return cls(SPECIAL + tuple(sorted({_whole(word) for word in words})))

    @classmethod
    def from_file(cls, path) -> "Tokenizer":
        """A `vocab.txt` (one token a line), or a HF directory with `vocab.txt` or a WordPiece `tokenizer.json`.

        [DEC], then [ENC], are appended when absent, as BLIP does: 30522 and 30523 for bert-base-uncased.
        """
        path = pathlib.Path(path)
        config = path / "tokenizer_config.json"
        if config.is_file() and untrusted.read_json(config).get("do_lower_case") is False:
            raise ValueError(f"{config} says do_lower_case=false; only uncased BERT vocabularies are supported")
        if (path / "tokenizer.json").is_file() and not (path / "vocab.txt").is_file():
            tokens = _read_tokenizer_json(path / "tokenizer.json")
        else:
            path = path / "vocab.txt" if path.is_dir() else path
            if untrusted.kept_in(path).stat().st_size > untrusted.MOST_JSON:
                raise ValueError(f"{path} has more than {untrusted.MOST_JSON:,} bytes; is it a vocabulary?")
            with open(path, encoding="utf-8") as lines, untrusted.reading(path):
                tokens = [line.rstrip("\n") for line in lines]
        return cls(tuple(tokens) + tuple(token for token in ("[DEC]", "[ENC]") if token not in tokens))

    def extended(self, words: Iterable[str]) -> tuple["Tokenizer", tuple[str, ...]]:
        """(a tokenizer with the words that are no tokens yet appended in order, those words); old ids stay."""
        new = tuple(dict.fromkeys(word for word in map(_whole, words) if word not in self.ids))
        return Tokenizer(self.vocabulary + new), new

    def __len__(self):
        return len(self.vocabulary)

    def digest(self) -> str:
        """sha256 of the vocabulary in order, for manifests."""
        return hashlib.sha256("\n".join(self.vocabulary).encode()).hexdigest()

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """[CLS] pieces [SEP]; pieces are cut so that at most `max_length` ids come out, [SEP] included. No padding.

        BLIP overwrites the first id with [DEC] (captions, answers) or [ENC] (questions); that is the task's business.
        """
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}; it must be at least 2, for [CLS] and [SEP]")
        pieces = [i for word in split_words(text) for i in self._pieces(word)]
        return [self.cls_id, *pieces[: None if max_length is None else max_length - 2], self.sep_id]

    def _pieces(self, word):
        """Greedy longest match from the left (section 4.1 of arXiv:1609.08144); one [UNK] if anything is left over."""
        found = self._met.get(word)
        if found is None:
            found = self._match(word)
            if len(self._met) < MOST_MET:
                self._met[word] = found
        return found

    def _match(self, word):
        if len(word) > MAX_WORD:
            return [self.unk_id]
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                piece = self.ids.get(prefix + word[start:end])
                if piece is not None:
                    pieces.append(piece)
                    start = end
                    break
            else:
                return [self.unk_id]
        return pieces

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first [SEP] or [PAD]; special tokens dropped, ## pieces joined.

        Spaces are then cleaned up as by HF `decode(skip_special_tokens=True, clean_up_tokenization_spaces=True)`, which
        BLIP used: before . ? ! , and around ' but not around a hyphen or slash ("don't", "10, 000", "t - shirt").
        """
        tokens = []
        for i in map(int, ids):
            if not 0 <= i < len(self.vocabulary):
                raise ValueError(f"id {i} is not in the vocabulary; ids are 0 to {len(self.vocabulary) - 1}")
            if i in (self.sep_id, self.pad_id):
                break
            if self.vocabulary[i] not in SPECIAL:
                tokens.append(self.vocabulary[i])
        return _clean_up(" ".join(tokens).replace(" ##", ""))

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text`, with repeats, that become [UNK]."""
        return [word for word in split_words(text) if self._pieces(word) == [self.unk_id]]

    def covers(self, text: str) -> bool:
        """Whether no word of `text` is lost."""
        return not self.unknown_words(text)


_ASCII_WORD = re.compile(r"[a-z0-9]+|[!-/:-@\[-`{-~]")
_ASCII_CONTROL = {i: None for i in (*range(32), 127) if chr(i) not in "\t\n\r"}


def split_words(text: str) -> list[str]:
    """Clean, lower-case, unaccented words, every punctuation mark and CJK ideograph a word of its own (BERT "basic").

    Lower-casing is by character, as in the reference, so a final Greek sigma is an ordinary one.
    """
    if text.isascii():  # the same, twenty times faster
        return _ASCII_WORD.findall(text.translate(_ASCII_CONTROL).lower())
    spaced = "".join(f" {c} " if _is_cjk(c) else c for c in map(_clean, text))
    plain = (c for c in unicodedata.normalize("NFD", spaced) if unicodedata.category(c) != "Mn")
    lower = "".join(map(str.lower, plain))
    return "".join(f" {c} " if _is_punctuation(c) else c for c in lower).split()


def _clean(c):
    if c.isspace() and unicodedata.category(c) != "Cc" or c in "\t\n\r":
        return " "
    # control, format, private use, surrogate; not "Cn": what is unassigned depends on the version of Python
    return "" if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs") else c


def _is_cjk(c):
    return c > "\u33ff" and any(low <= ord(c) <= high for low, high in _CJK)


def _is_punctuation(c):
    # all of ASCII that is neither letter, digit nor space counts, so "$" and "+" do; elsewhere only Unicode's P classes
    return c.isascii() and c.isprintable() and not c.isalnum() and c != " " or unicodedata.category(c).startswith("P")


def _clean_up(text):
    for before, after in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
                          (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):  # fmt: skip
        text = text.replace(before, after)
    return text


def _whole(word):
    if split_words(word) != [word]:
        raise ValueError(f"{word!r} can never be a token: text is split into {split_words(word)}; give these instead")
    return word


def _read_tokenizer_json(path):
    with untrusted.reading(path, "is no tokenizer.json"):
        spec = untrusted.read_json(path)
        if spec["model"].get("type") != "WordPiece":
            raise ValueError(f"{path} holds a {spec['model'].get('type')} model; only WordPiece is supported")
        ids = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec.get("added_tokens", ())}
        if not all(isinstance(token, str) for token in ids):
            raise ValueError(f"{path}: a token that is not a text")
        tokens = sorted(ids, key=ids.get)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"the ids in {path} are not 0 to {len(tokens) - 1}; every id must belong to one token")
    return tokens


def clean_caption(text: str, max_words: int = 50) -> str:
    """BLIP's `pre_caption`: lower case, . ! " ( ) * # : ; ~ become spaces, spaces merged; COCO uses max_words=30."""
    text = re.sub(r"\s{2,}", " ", re.sub(r'[.!"()*#:;~]', " ", text.lower()))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:max_words])


def clean_question(text: str, max_words: int = 50) -> str:
    """BLIP's `pre_question`: as captions, but the marks vanish and spaces inside and in front stay; "?" stays."""
    return " ".join(re.sub(r'[.!"()*#:;~]', "", text.lower()).rstrip(" ").split(" ")[:max_words])
