"""BLIP in transformers: module names, the files beside the weights, and code for a model card.

    transformers.BlipForConditionalGeneration    captioning
    transformers.BlipForQuestionAnswering        VQA

The head's vocabulary matrix is written twice, also as the word embedding: transformers before 4.57 does not tie them when
loading, and would leave the head's random.

In VQA models transformers attends to the padding of questions: `generate` in every release tested, and from 4.54 on (tested:
4.54.1, 4.57.6, 5.23.0, 5.24.0) the decoder too, regardless of the mask; 4.53.3 is correct. For batches of questions of equal
length, and for single questions, all releases agree.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxpeft.models.hf import HeadPlace, HuggingFace
from jaxpeft.tree import Tree

PREDICTIONS = "text_decoder.cls.predictions"
HEAD_PLACE = HeadPlace(
    saved_as=("cls",),
    tensors=(
        f"{PREDICTIONS}.transform.dense.weight",
        f"{PREDICTIONS}.transform.dense.bias",
        f"{PREDICTIONS}.transform.LayerNorm.weight",
        f"{PREDICTIONS}.transform.LayerNorm.bias",
        f"{PREDICTIONS}.bias",
    ),
    linear=f"{PREDICTIONS}.decoder",
    vocabulary="text_decoder/head/vocabulary",
    embedding="text_decoder/embed/word",
    bias="text_decoder/head/bias",
)


class BlipInTransformers(HuggingFace):
    """See the docstring of this file."""

    def tensors(self, params: Tree) -> Iterator[tuple[str, np.ndarray]]:
        """With tied tensors under each name, as some releases do not tie them when loading."""
        seconds = {first: second for second, first in self.table.tied.items()}
        for name, x in super().tensors(params):
            yield name, x
            if name in seconds:
                yield seconds[name], x

    def settings(self, task: Any, beams: int) -> dict[str, dict]:
        """With the `task` that was trained, `generate` of transformers has the same prompt and text length as ours (see
        `generation`)."""
        c, tokenizer = self.model.config, self.model.tokenizer
        config = self.config | {"text_config": dict(self.config["text_config"])}
        said = {"bos_token_id": c.bos_id, "pad_token_id": c.pad_id, "eos_token_id": c.sep_id}
        said["decoder_start_token_id"] = c.bos_id
        if task is not None:
            more, unprompted = self.generation(task, beams)
            said |= more
            config["text_config"] |= unprompted
        settings = {"config.json": config, "generation_config.json": said}
        if tokenizer is None:
            return settings
        # transformers begins a question with the "cls" token, BLIP with [ENC]
        first = "[ENC]" if c.question_encoder else "[CLS]"
        settings["preprocessor_config.json"] = {
            "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor", "do_convert_rgb": True,
            "do_resize": True, "size": {"height": c.image_size, "width": c.image_size}, "resample": c.image_resample,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(c.image_mean),
            "image_std": list(c.image_std),
        }  # fmt: skip
        settings["tokenizer_config.json"] = {
            "tokenizer_class": "BertTokenizer", "processor_class": "BlipProcessor", "do_lower_case": True,
            "strip_accents": tokenizer.strip_accents, "tokenize_chinese_chars": tokenizer.split_chinese,
            "model_max_length": c.max_positions, "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": first,
            "sep_token": "[SEP]", "mask_token": "[MASK]", "bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"],
            "model_input_names": ["input_ids", "attention_mask"],
        }  # fmt: skip
        return settings

    def generation(self, task: Any, beams: int = 1) -> tuple[dict, dict]:
        """(settings for generation_config.json, settings for the text_config of config.json) with which transformers
        generates the same texts as `jaxpeft.generate`.

        The first are for inputs that begin with the prompt, as in the model card's code. A plain `model.generate(**inputs)`
        uses the text decoder with the settings of text_config; there the prompt is a sequence bias, which makes each of its
        tokens certain after the previous one. Of the releases tested, 5.23 and 5.24 follow it, and 4.53 to 5.17 ignore it, as
        they do not bias a second token. It distorts the scores of beams, so beam search needs the prompt in the inputs.
        """
        search = task.search(self.model)
        prompt, length = list(search.start), search.length

        def lengths(n_given):
            return {"max_new_tokens": length - n_given, "min_new_tokens": max(0, search.min_length - n_given)}

        biases = [[prompt[: i + 1], 100.0] for i in range(1, len(prompt))]
        unprompted = lengths(1) | ({"sequence_bias": biases} if biases else {})
        return lengths(len(prompt)) | {"num_beams": beams, "do_sample": False}, unprompted

    def code(
        self, task: Any, out: str, base: str = "", revision: str = "", in_decoder: bool = False, beams: int = 1
    ) -> list[str]:
        quoted = functools.partial(json.dumps, ensure_ascii=False)  # a Python literal
        (kind,), out, where = self.config["architectures"], quoted(out), quoted(base or out)
        pinned = f', revision="{revision}"' if revision else ""
        lines = [
            "import torch",
            "from PIL import Image, ImageOps",
            *(["from peft import PeftModel"] if base else []),
            f"from transformers import {kind}, BlipProcessor",
            "",
            f"processor = BlipProcessor.from_pretrained({where}{pinned})",
            f"model = {kind}.from_pretrained({where}{pinned})",
        ]
        if base and in_decoder:
            lines.append(f"model.text_decoder = PeftModel.from_pretrained(model.text_decoder, {out})")
        elif base:
            lines.append(f"model = PeftModel.from_pretrained(model, {out})")
        template = task.template(self.model)
        text = quoted("what is in the picture" if task.asks else template.start_text)
        settings, _ = self.generation(task, beams)
        said = ", ".join(f"{name}={value}" for name, value in settings.items())
        first = f'inputs["input_ids"][:, 0] = {self.model.config.enc_id}  # [ENC]'
        return [
            *lines,
            "model.eval()",
            "",
            'image = ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB")',
            f'inputs = processor(images=image, text={text}, return_tensors="pt")',
            *([first] if base and task.asks else []),
            "with torch.inference_mode():",
            f"    ids = model.generate(**inputs, {said})",
            f"print(processor.decode(ids[0, {len(template.start)}:], skip_special_tokens=True))  # after the prompt",
        ]

    def notes(self, task: Any) -> list[str]:
        if not task.asks:
            return []
        return [
            "Batch only questions of equal length, or ask one at a time: transformers attends to the padding of questions "
            "(`generate` in every release tested; from 4.54 on the decoder too), so answers in a padded batch may differ."
        ]
