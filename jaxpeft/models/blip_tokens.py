"""BLIP's tokenizer: BERT's, with a token that begins a decoded text and one that begins a question."""

from typing import ClassVar

from jaxpeft.inputs.tokenizer import Tokenizer

SPECIAL = (*Tokenizer.special, "[DEC]", "[ENC]")


class BlipTokenizer(Tokenizer):
    """`from_file` appends [DEC], then [ENC], if they are absent: 30522 and 30523 for bert-base-uncased."""

    special: ClassVar[tuple[str, ...]] = SPECIAL

    @property
    def bos_id(self) -> int:
        """[DEC], the first token of a caption or an answer."""
        return self.ids["[DEC]"]

    @property
    def enc_id(self) -> int:
        """[ENC], the first token of a question."""
        return self.ids["[ENC]"]
