"""SmolVLM's chat template for one image and one question:

    <|im_start|>User:<fake_token_around_image><global-img><image><fake_token_around_image>question<end_of_utterance>
    Assistant: text<end_of_utterance>

One <image> stands for all image tokens, which the model puts in its place. The image is one frame, so it is written as by
transformers' processors with `do_image_splitting=False`. Apart from these image tokens, ids equal those of `SmolVLMProcessor`;
special tokens in a user's question stay text here.

<|im_start|> stands for the tokenizer's first token. Idefics3's files begin with <|begin_of_text|> instead: with a template that
differs in nothing else, ids equal those of `Idefics3Processor`. transformers has no template of Idefics3, and no checkpoint of
it was available.
"""

from collections.abc import Callable

from jaxpeft.inputs.bpe import Bpe
from jaxpeft.inputs.processor import Template

IMAGE, AROUND, GLOBAL, END = "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
CAPTION = "Can you describe this image?"


def captioning(tokenizer: Bpe, prompt: str | None = None, max_words: int = 0) -> Template:
    """The user asks `prompt`, by default CAPTION; the assistant writes the caption."""

    def first(text: str) -> str:
        return " ".join(text.split(" ")[: max_words or None])

    return _chat(tokenizer, CAPTION if prompt is None else prompt, first)


def vqa(tokenizer: Bpe) -> Template:
    """The user asks the question; the assistant writes the answer."""
    return _chat(tokenizer, "", str)


def _chat(tokenizer: Bpe, request: str, clean_text: Callable[[str], str]) -> Template:
    around, end, pieces = tokenizer.id_of(AROUND), tokenizer.id_of(END), tokenizer.pieces
    image = (around, *_pieces_of(tokenizer, GLOBAL), tokenizer.id_of(IMAGE), around)
    template = Template(
        tokenizer,
        start=(),
        stop=(end,),
        pad=tokenizer.pad_id,
        before=(tokenizer.bos_id, *pieces("User:"), *image, *pieces(request)),
        after=(end, *pieces("\nAssistant:")),
        clean_text=clean_text,
        lead=" ",
    )
    if template.pad in (*template.before, *template.after):
        raise ValueError(
            f"the padding token {tokenizer.roles['pad_token']!r} is part of every prompt, where padding is masked; name "
            f"another pad_token in tokenizer_config.json"
        )
    return template


def _pieces_of(tokenizer: Bpe, token: str) -> list[int]:
    """The id of an added token, or the pieces that write it: older Idefics3 files lack <global-img>."""
    return [tokenizer.ids[token]] if token in tokenizer.ids else tokenizer.pieces(token)


TEMPLATES = {"captioning": captioning, "vqa": vqa}
