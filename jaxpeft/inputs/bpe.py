"""Byte-pair tokenizers of decoder-only models, read from tokenizer.json: SentencePiece-like with byte fallback (Gemma) and
byte-level (GPT-2, Llama 3, SmolLM).

The file is executed by the `tokenizers` library, so ids equal those of transformers 5.23 (tests/test_vlm_inputs.py), except
that special tokens in a user's text are text: "<image>" or "<end_of_utterance>" in a question becomes several pieces, which
read back as the same characters, where transformers would make it an image or end the user's turn. Added tokens that are not
special, such as PaliGemma's "<loc0001>", are tokens in both.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import tokenizers
from tokenizers import pre_tokenizers

from jaxpeft.inputs.any_tokenizer import AnyTokenizer, library_errors
from jaxpeft.runtime import files

ROLES = ("pad_token", "bos_token", "eos_token", "unk_token")
# steps by which the parts of a prompt and a question can be tokenised one by one: nothing is added, dropped or lower-cased
_STEPS = {"normalizer": ("Replace", "NFC"), "pre_tokenizer": ("ByteLevel", "Digits", "Split")}
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
_LOCAL = (
    "name_or_path",
    "tokenizer_file",
    "auto_map",
    "is_local",
    "local_files_only",
)  # settings that are not the tokenizer's


@dataclasses.dataclass(frozen=True, eq=False)
class Bpe(AnyTokenizer):
    """A byte-pair tokenizer. `ids` maps tokens to ids; `id_of` is the same with an error that names the token."""

    spec: str  # tokenizer.json
    settings: str = "{}"  # tokenizer_config.json
    library: tokenizers.Tokenizer = dataclasses.field(init=False, repr=False)
    roles: dict[str, str] = dataclasses.field(init=False)  # 'eos_token' -> '<eos>'

    def __post_init__(self):
        with library_errors("tokenizer.json cannot be used"):
            library = tokenizers.Tokenizer.from_str(self.spec)
        library.encode_special_tokens = True  # treats them as text in a user's text
        roles = {role: _content(token) for role, token in json.loads(self.settings).items() if role in ROLES and token}
        library.add_special_tokens(
            [tokenizers.AddedToken(token, special=True, normalized=False) for token in roles.values()]
        )
        object.__setattr__(self, "library", library)
        object.__setattr__(self, "roles", roles)

    def __reduce__(self):
        return type(self), (self.spec, self.settings)

    @classmethod
    def from_file(cls, path: str | pathlib.Path) -> Self:
        """Read tokenizer.json, or a Hugging Face directory with it.

        The tokens that pad, begin and end a text are named in tokenizer_config.json or, where it does not, in
        special_tokens_map.json. Raises ValueError, naming file and key, for any other kind of tokenizer, and if a file names
        a token that tokenizer.json does not have.
        """
        path = pathlib.Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy the base's tokenizer there (transformers writes it)")
        spec = files.read_json(path)
        with files.reading(path, "is not a valid tokenizer.json"):
            _check(path, spec)
        spec |= {"truncation": None, "padding": None}
        known = {**spec["model"]["vocab"], **{one["content"]: one["id"] for one in spec.get("added_tokens") or ()}}
        settings = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            beside = path.with_name(name)
            said = files.read_json(beside) if beside.is_file() else {}
            with files.reading(beside, "does not contain valid tokens"):
                _check_tokens(beside, said, known)
            kept = {key: value for key, value in said.items() if key not in _LOCAL and value is not None}
            settings |= {key: value for key, value in kept.items() if name.startswith("tokenizer") or key in ROLES}
        try:
            return cls(*(json.dumps(one, ensure_ascii=False, separators=(",", ":")) for one in (spec, settings)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    # ------------------------------------------------------------ tokens

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id, added tokens too."""
        return self.library.get_vocab(with_added_tokens=True)

    def id_of(self, token: str) -> int:
        """The id of a token. Raises ValueError if there is none."""
        found = self.library.token_to_id(token)
        if found is None:
            raise ValueError(
                f"the tokenizer has no token {token!r}; use the tokenizer that the weights were trained with"
            )
        return found

    def _role(self, role: str) -> int:
        if role not in self.roles:
            raise ValueError(f"the tokenizer has no {role}; name it in tokenizer_config.json beside tokenizer.json")
        return self.id_of(self.roles[role])

    @property
    def pad_id(self) -> int:
        return self._role("pad_token")

    @property
    def bos_id(self) -> int:
        return self._role("bos_token")

    @property
    def eos_id(self) -> int:
        return self._role("eos_token")

    @functools.cached_property
    def special(self) -> dict[str, int]:
        """Token -> id of the tokens that do not represent text."""
        return {one.content: i for i, one in self.library.get_added_tokens_decoder().items() if one.special}

    @functools.cached_property
    def _length(self) -> int:
        return 1 + max(self.ids.values())

    def __len__(self) -> int:
        return self._length

    # ------------------------------------------------------------ value

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of tokenizer.json and of the tokens that pad, begin and end a text."""
        return hashlib.sha256(f"{self.spec}\n{json.dumps(self.roles, sort_keys=True)}".encode()).hexdigest()

    def files(self) -> dict[str, str]:
        settings = json.dumps(json.loads(self.settings), indent=2, ensure_ascii=False)
        return {"tokenizer.json": self.spec + "\n", "tokenizer_config.json": settings + "\n"}

    # ------------------------------------------------------------ texts

    def _tokenized(self, text: str) -> list[int]:
        ids = super()._tokenized(text)
        if self._never.isdisjoint(ids):
            return ids
        # merges can spell a special token; its first character is then tokenised apart
        cuts = [0, *(found.end() for found in self._spelled.finditer(text)), len(text)]
        return [i for a, b in zip(cuts, cuts[1:], strict=False) for i in super(Bpe, self)._tokenized(text[a:b])]

    @functools.cached_property
    def _never(self) -> frozenset[int]:
        """The ids that no text has: special tokens but the unknown one."""
        return frozenset(self.special.values()) - {self.ids.get(self.roles.get("unk_token", ""))}

    @functools.cached_property
    def _spelled(self) -> re.Pattern:
        """The first characters of special tokens in a text."""
        return re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in self.special))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, with special tokens dropped: `decode(skip_special_tokens=True)` of transformers."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < len(self):
                raise ValueError(f"id {i} is not in the vocabulary; ids are 0 to {len(self) - 1}")
        return self.library.decode(ids, skip_special_tokens=True)

    @property
    def has_pieces(self) -> bool:
        return True

    def extended(self, words: Iterable[str]) -> tuple[Self, tuple[str, ...]]:
        """Always without new words: raises ValueError if there are any, as pieces write every word."""
        if words := list(words):
            raise ValueError(
                f"{words[0]!r:.80} cannot be added to a byte-pair tokenizer, whose pieces write every word"
            )
        return self, ()

    def words(self, text: str) -> list[str]:
        return text.split()

    def unknown_words(self, text: str) -> list[str]:
        return [] if self.covers(text) else [word for word in self.words(text) if not self.covers(word)]

    def covers(self, text: str) -> bool:
        """Whether the pieces of `text` write it: always, where the vocabulary has all bytes."""
        return self._has_bytes or self.library.decode(self.pieces(text), skip_special_tokens=False) == text

    @functools.cached_property
    def _has_bytes(self) -> bool:
        """Whether every byte of UTF-8 is a token."""
        if json.loads(self.spec)["model"].get("byte_fallback"):
            return all(f"<0x{byte:02X}>" in self.ids for byte in set(range(256)) - _NEVER_IN_UTF8)
        return set(pre_tokenizers.ByteLevel.alphabet()) - set(map(chr, _NEVER_IN_UTF8)) <= self.ids.keys()


def _content(token: Any) -> str:
    """The text of a token in tokenizer_config.json: a string, or an object with its flags."""
    return token if isinstance(token, str) else token["content"]


def _check_tokens(path: pathlib.Path, said: dict[str, Any], known: dict[str, int]) -> None:
    """Raise ValueError where tokenizer_config.json or special_tokens_map.json contradicts tokenizer.json."""
    named = {role: _content(said[role]) for role in ROLES if said.get(role)}
    later = {f"added_tokens_decoder[{i}]": _content(token) for i, token in said.get("added_tokens_decoder", {}).items()}
    for key, token in (named | later).items():
        if token not in known:
            raise ValueError(
                f"{path}: {key} is {token!r}, which tokenizer.json does not have; save both files again together"
            )
        if key in later and str(known[token]) != key[21:-1]:
            raise ValueError(
                f"{path}: {key} is {token!r}, whose id in tokenizer.json is {known[token]}; save both files again"
            )


def _steps(spec: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer without its sequences."""
    if spec:
        parts = spec.get("normalizers", spec.get("pretokenizers"))
        yield from [spec] if parts is None else (step for part in parts for step in _steps(part))


def _check(path: pathlib.Path, spec: dict[str, Any]) -> None:
    """Raise ValueError for anything but a deterministic byte-pair tokenizer that takes texts as they are."""
    model = spec["model"]
    kind = model.get("type", "BPE" if "merges" in model else "WordPiece")
    if kind != "BPE":
        raise ValueError(f"{path}: model.type is {kind!r}; expected 'BPE'")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{path}: model.{key} is {model[key]!r}, which is unsupported; expected none")
    steps = {key: list(_steps(spec.get(key))) for key in _STEPS}
    for key, found in steps.items():
        for one in found:
            if one["type"] not in _STEPS[key]:
                raise ValueError(f"{path}: {key} has a step {one['type']!r}; supported are {', '.join(_STEPS[key])}")
            if one.get("add_prefix_space", one["type"] == "ByteLevel"):  # the library's default
                raise ValueError(
                    f"{path}: {key}.add_prefix_space is true; expected false, as parts of a prompt are joined"
                )
    byte_level = any(one["type"] == "ByteLevel" for one in steps["pre_tokenizer"])
    if byte_level == bool(model.get("byte_fallback")):
        raise ValueError(
            f"{path}: model.byte_fallback is {model.get('byte_fallback', False)} and pre_tokenizer is "
            f"{'' if byte_level else 'not '}ByteLevel; expected one of the two, so that every text has ids"
        )
