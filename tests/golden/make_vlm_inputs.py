"""Ids, texts and pixels of transformers' processors of PaliGemma and SmolVLM -> vlm_inputs/ and vlm_inputs.npz.

    python tests/golden/make_vlm_inputs.py

needs a Python with torch, transformers 5.23.0 and num2words. The tokenizers are toys of the right kinds, trained here:
  vlm_inputs/paligemma   BPE with byte fallback, spaces as U+2581; pieces cross word borders and newlines, so that joining the
                         parts of a prompt matters; merges spell "<eos>"
  vlm_inputs/smolvlm     byte-level BPE behind single digits, as SmolLM2's
PaliGemma's 1,152 tokens of places and segments are cut down to 8. Both image processors are those on Pillow.
"""

import io
import json
import pathlib
import types
import warnings

import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).parent
SIZES = {"paligemma": 28, "smolvlm": 32}
LONGEST = 96  # of SmolVLM's first resize
N_IMAGE = {"paligemma": 4, "smolvlm": 4}

WORDS = (
    "a the red green blue dog cat man woman sitting on top of table in front answer en caption what is it how many color "
    "colour describe this image please yes no there are two three dogs running User Assistant"
).split()
QUESTIONS = [
    "what is it?",
    "",
    " ",
    "\n",
    "  leading and trailing  ",
    "two\nlines?\n",
    "\n\n\n",
    "tab\there\r\nthere",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m e\u0301",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8 \u4e2d\u6587",
    "\U0001f600 smile \U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e9\u05dc\u05d5\u05dd \u0939\u093f\u0928\u094d\u0926\u0940",
    "How MANY Dogs, 10,000 of them, don't run at 9:30?",
    "nul\x00 bell\x07 \u00a0\u3000\u2028 \ufeffbom \ue000",
    "{} {braces} %s \\n \\",
    "\u2581already\u2581a\u2581space",
    "<loc0001> <0x41> <",
    "x" * 300,
    "what is the color of the dog in front of the red table? " * 20,
]
TARGETS = [
    "a cat",
    "",
    " ",
    "no",
    "2",
    "\n",
    "two  dogs",
    "caf\u00e9 \u65e5\u672c \U0001f600",
    "A Dog.",
    " led",
    "? odd",
]


def pictures():
    """Awkward images by name: odd, tall, wide, tiny, and of several modes."""
    rng = np.random.default_rng(0)

    def noise(rows, columns, *channels):
        return rng.integers(0, 256, (rows, columns, *channels), dtype=np.uint8)

    found = {
        f"{rows}x{columns}": Image.fromarray(noise(rows, columns, 3))
        for rows, columns in (
            (37, 51),
            (51, 37),
            (1, 1),
            (1, 90),
            (90, 1),
            (3, 200),
            (200, 3),
            (28, 28),
            (32, 32),
            (64, 96),
        )
    }
    found["grey"] = Image.fromarray(noise(23, 40))
    found["bit"] = Image.fromarray(noise(17, 13) > 127)
    found["rgba"] = Image.fromarray(noise(21, 33, 4))
    found["grey with alpha"] = Image.merge("LA", [Image.fromarray(noise(19, 30)) for _ in range(2)])
    found["palette"] = Image.fromarray(noise(20, 31, 3)).quantize(16)
    return found


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return np.frombuffer(out.getvalue(), np.uint8)


def corpus(rng, n=600):
    lines = []
    for _ in range(n):
        words = " ".join(rng.choice(WORDS, rng.integers(2, 9)))
        lines.append(words + rng.choice(["?\n", "?", ".", "\n", "\n\n", "!"]))
    return [*lines, "< > <>"]


def trained(library, size, first, rng, alphabet=()):
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=first, initial_alphabet=list(alphabet), show_progress=False, max_token_length=24
    )
    library.train_from_iterator(corpus(rng), trainer)
    return json.loads(library.to_str())["model"]


def paligemma(extra=8):
    """PaliGemmaProcessor with a toy tokenizer; `extra`: how many of its tokens of places and segments, None for all."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import GemmaTokenizer, PaliGemmaProcessor
    from transformers.models.paligemma import processing_paligemma
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    library = Tokenizer(models.BPE())
    library.normalizer = normalizers.Replace(" ", "\u2581")
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = trained(library, 420, first, np.random.default_rng(1))
    spelled = [("<", "e"), ("<e", "o"), ("<eo", "s"), ("<eos", ">")]
    vocabulary = model["vocab"] | {"".join(pair): len(model["vocab"]) + i for i, pair in enumerate(spelled[:-1])}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=spelled + [tuple(pair) for pair in model["merges"]])
    size = SIZES["paligemma"]
    images = SiglipImageProcessorPil(size={"height": size, "width": size})
    images.image_seq_length = N_IMAGE["paligemma"]
    everything = processing_paligemma.EXTRA_TOKENS
    if extra is not None:
        processing_paligemma.EXTRA_TOKENS = everything[: extra // 2] + everything[-extra // 2 :]
    try:
        return PaliGemmaProcessor(images, tokenizer)
    finally:
        processing_paligemma.EXTRA_TOKENS = everything


def smolvlm_parts():
    """(image processor, tokenizer) of SmolVLM, the latter a toy."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained(library, 400, first, np.random.default_rng(2), sorted(pre_tokenizers.ByteLevel.alphabet()))
    more = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>"]
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in more])
    names = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, unk_token="<|endoftext|>", **names)
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": LONGEST}, max_image_size={"longest_edge": SIZES["smolvlm"]}, do_image_splitting=False
    )
    return images, tokenizer


def smolvlm():
    """SmolVLMProcessor without its video processor, which needs torchvision and takes no part here."""
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, SmolVLMProcessor

    class Images(SmolVLMProcessor):
        def check_argument_for_proper_class(self, name, value):
            return type(value) if name == "video_processor" else super().check_argument_for_proper_class(name, value)

    no_videos = types.SimpleNamespace(num_frames=1, fps=1)
    return Images(*smolvlm_parts(), no_videos, image_seq_len=N_IMAGE["smolvlm"], chat_template=DEFAULT_CHAT_TEMPLATE)


def idefics3():
    """Idefics3Processor, which writes the same and needs neither num2words nor torchvision."""
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    return Idefics3Processor(*smolvlm_parts(), image_seq_len=N_IMAGE["smolvlm"], chat_template=DEFAULT_CHAT_TEMPLATE)


def idefics3_llama():
    """Idefics3Processor with a toy of Llama 3's kind, as Idefics3-8B has: a pattern cuts words, merges are skipped for words of
    the vocabulary, texts begin with <|begin_of_text|>, and <global-img> is not a token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    words = r" ?\p{L}+|\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+"
    library = Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), byte_level])
    library.decoder = decoders.ByteLevel()
    first = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
    trained(library, 400, first, np.random.default_rng(4), sorted(pre_tokenizers.ByteLevel.alphabet()))
    more = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in more])
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<end_of_utterance>", "pad_token": "<|pad|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, **names)
    chat = DEFAULT_CHAT_TEMPLATE.replace("<|im_start|>", "<|begin_of_text|>")
    return Idefics3Processor(smolvlm_parts()[0], tokenizer, image_seq_len=N_IMAGE["smolvlm"], chat_template=chat)


def paligemma_ids(processor, prompt, target):
    """All ids of an example, image tokens and end token included."""
    found = processor(images=pictures()["28x28"], text=f"<image>{prompt}", suffix=target, return_tensors="np")
    ids, kinds = found["input_ids"][0].tolist(), found["token_type_ids"][0].tolist()
    return {"prompt": [i for i, kind in zip(ids, kinds, strict=True) if not kind],
            "target": [i for i, kind in zip(ids, kinds, strict=True) if kind]}  # fmt: skip


def smolvlm_ids(processor, question, target):
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": asked}]
    answered = [*turns, {"role": "assistant", "content": [{"type": "text", "text": target}]}]
    image = pictures()["28x28"]
    prompt, whole = (
        processor(images=[[image]], text=[processor.apply_chat_template(some, add_generation_prompt=generates)])
        for some, generates in ((turns, True), (answered, False))
    )
    prompt, whole = prompt["input_ids"][0], whole["input_ids"][0]
    return {"prompt": list(prompt), "whole": list(whole)}


def pixels(processor):
    """The float32 pixels (3, Y, X) of every picture by name."""
    return {name: np.asarray(processor([[image]], return_tensors="np")["pixel_values"], np.float32).reshape(3, -1)
            for name, image in pictures().items()}  # fmt: skip


def cases(ids, processor):
    """Every question with the first target, and the first question with every target."""
    pairs = [(question, TARGETS[0]) for question in QUESTIONS] + [(QUESTIONS[0], target) for target in TARGETS]
    return [ids(processor, question, target) for question, target in pairs]


def main():
    warnings.filterwarnings("ignore")
    expected, arrays = {}, {f"png/{name}": png(image) for name, image in pictures().items()}
    for kind, make, ids in (("paligemma", paligemma, paligemma_ids), ("smolvlm", smolvlm, smolvlm_ids)):
        processor = make()
        folder = HERE / "vlm_inputs" / kind
        folder.mkdir(parents=True, exist_ok=True)
        processor.tokenizer.save_pretrained(folder)
        compact = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(compact, ensure_ascii=False, separators=(",", ":")) + "\n")
        settings = processor.image_processor.to_json_string()
        (folder / "preprocessor_config.json").write_text(settings)
        tokenizer = processor.tokenizer
        rng = np.random.default_rng(3)
        random = [rng.integers(0, len(tokenizer), rng.integers(0, 12)).tolist() for _ in range(60)]
        if kind == "paligemma":
            written = cases(lambda p, question, target: paligemma_ids(p, f"answer en {question}", target), processor)
            captions = [paligemma_ids(processor, "caption en", target) for target in TARGETS]
        else:
            written = cases(smolvlm_ids, processor)
            captions = [smolvlm_ids(processor, "Can you describe this image?", target) for target in TARGETS]
        texts = QUESTIONS + TARGETS
        expected[kind] = {
            "vqa": written,
            "captioning": captions,
            "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
            "decoded": [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
                        for text in texts],
            "random": random,
            "random_decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in random],
        }  # fmt: skip
        levels = np.full((3, 256), np.nan, np.float32)
        for name, value in pixels(processor.image_processor).items():
            byte = np.round(value * 127.5 + 127.5).astype(np.uint8)
            for channel in range(3):
                levels[channel, byte[channel]] = value[channel]
                assert np.array_equal(levels[channel, byte[channel]], value[channel]), "a level has two values"
            arrays[f"{kind}/{name}"] = byte
        assert not np.isnan(levels).any()
        arrays[f"{kind}/levels"] = levels  # the float32 of every byte: pixels are stored as bytes without loss
    (HERE / "vlm_inputs" / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")
    np.savez_compressed(HERE / "vlm_inputs.npz", **arrays)
    for path in sorted([*(HERE / "vlm_inputs").rglob("*.json"), HERE / "vlm_inputs.npz"]):
        print(path.relative_to(HERE), path.stat().st_size)


if __name__ == "__main__":
    main()
