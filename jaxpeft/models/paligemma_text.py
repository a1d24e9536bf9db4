"""PaliGemma's prompts: `<bos>caption en\\n` and `<bos>answer en <question>\\n` behind the image tokens, then a text and <eos>.

Nothing is cleaned or lower-cased. Ids equal those of transformers' `PaliGemmaProcessor`, whose text is "caption en" or
"answer en <question>" and whose suffix is the text; a question of the user that contains "<image>" stays text here.
"""

from jaxpeft.inputs.bpe import Bpe
from jaxpeft.inputs.processor import Template


def captioning(tokenizer: Bpe, prompt: str | None = None, max_words: int = 0) -> Template:
    """<bos>caption en\\n | <caption><eos>. `prompt` replaces "caption en"."""

    def first(text: str) -> str:
        return " ".join(text.split(" ")[: max_words or None])

    words = "caption en" if prompt is None else prompt
    before = (tokenizer.bos_id, *tokenizer.pieces(f"{words}\n"))
    return Template(tokenizer, (), (tokenizer.eos_id,), tokenizer.pad_id, before=before, clean_text=first)


def vqa(tokenizer: Bpe) -> Template:
    """<bos>answer en <question>\\n | <answer><eos>."""
    return Template(
        tokenizer,
        start=(),
        stop=(tokenizer.eos_id,),
        pad=tokenizer.pad_id,
        before=(tokenizer.bos_id,),
        around=("answer en", "\n"),
        clean_question=" {}".format,  # the space belongs to the first word, also where a long question is cut
    )


TEMPLATES = {"captioning": captioning, "vqa": vqa}
