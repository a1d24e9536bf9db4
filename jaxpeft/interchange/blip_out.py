"""A tuned model -> a directory that transformers loads as a plain BLIP, with no adapter beside it.

    transformers.BlipForConditionalGeneration.from_pretrained(directory)    captioning
    transformers.BlipForQuestionAnswering.from_pretrained(directory)        VQA

Every bound method is folded into the weights, which is exact or refused (`merge`). The head's vocabulary matrix is written
twice, as the word embedding too: transformers before 4.57 does not tie them when it loads, and would leave it random.

Of a VQA model transformers attends to the padding of questions: `generate` in every release tried, and from 4.54 on (tried:
4.54.1, 4.57.6, 5.23.0, 5.24.0) the decoder too, whatever mask it is given; 4.53.3 is right. Ask questions of one length at a
time, or one by one, and all releases agree.
"""

import json
from pathlib import Path

import numpy as np

from jaxpeft.adapt import sites
from jaxpeft.inputs import tokenizer
from jaxpeft.models import blip_convert, loading
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime import files
from jaxpeft.tasks import Task
from jaxpeft.tree import Tree

FILES = ("model.safetensors", "config.json", "generation_config.json", *tokenizer.FILES, "tokenizer_config.json",
         "preprocessor_config.json", "README.md")  # fmt: skip


def export_blip(
    model: VisionLanguageModel,
    variables: Tree,
    directory: str | Path,
    card: str = "",
    task: Task | None = None,
    beams: int = 1,
) -> Path:
    """Write weights, configuration, tokenizer and processor files; `card` is the text of README.md.

    With the `task` that was tuned, transformers' `generate` writes texts as long as ours, and from the same prompt (see
    `generation`); `beams` is the number of beams that generation_config.json says.

    Raises ValueError for a method that cannot be merged exactly, and where the directory holds other files. A model without
    a tokenizer gets no tokenizer files.
    """
    directory = Path(directory)
    params = sites.merge(model, variables) if "peft" in variables else variables["params"]
    model, params = loading.joined(model, params)
    tensors = {name: np.asarray(x, np.float32) for name, x in blip_convert.to_hf(params, model.config).items()}
    tensors |= {second: tensors[first] for second, first in blip_convert.TIED.items() if second not in tensors}
    config, said = blip_convert.hf_config(model.config), _ids(model.config)
    if task is not None:
        more, unprompted = generation(model, task, beams)
        said |= more
        config["text_config"] |= unprompted
    settings = {"config.json": config, "generation_config.json": said}
    if model.tokenizer is not None:
        size = model.config.image_size
        # transformers begins a question with the "cls" token; BLIP's questions begin with [ENC]
        first = "[ENC]" if model.config.question_encoder else "[CLS]"
        settings["preprocessor_config.json"] = {
            "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor", "do_convert_rgb": True,
            "do_resize": True, "size": {"height": size, "width": size}, "resample": model.config.image_resample,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(model.config.image_mean), "image_std": list(model.config.image_std),
        }  # fmt: skip
        settings["tokenizer_config.json"] = {
            "tokenizer_class": "BertTokenizer", "processor_class": "BlipProcessor", "do_lower_case": True,
            "strip_accents": model.tokenizer.strip_accents, "tokenize_chinese_chars": model.tokenizer.split_chinese,
            "model_max_length": model.config.max_positions, "pad_token": "[PAD]", "unk_token": "[UNK]",
            "cls_token": first, "sep_token": "[SEP]", "mask_token": "[MASK]", "bos_token": "[DEC]",
            "additional_special_tokens": ["[ENC]"], "model_input_names": ["input_ids", "attention_mask"],
        }  # fmt: skip
    contents = {name: json.dumps(value, indent=2, sort_keys=True) + "\n" for name, value in settings.items()}
    contents |= model.tokenizer.files() if model.tokenizer is not None else {}
    contents |= {"README.md": card} if card else {}
    with files.whole_directory(directory, (*FILES, ".model.safetensors")) as new:
        files.write_tensors(new / "model.safetensors", tensors, {"format": "pt"})
        for name, content in contents.items():
            files.write_text(new / name, content)
    return directory


def generation(model: VisionLanguageModel, task: Task, beams: int = 1) -> tuple[dict, dict]:
    """(settings for generation_config.json, settings for the text_config of config.json) that make transformers write as
    `jaxpeft.generate` does.

    The first are for inputs that begin with the prompt, as in the model card's code. A plain `model.generate(**inputs)` asks
    the text decoder, whose settings transformers takes from text_config; there the prompt is a sequence bias, which makes
    each of its tokens certain after the one before. Of the releases tried, 5.23 and 5.24 follow it, and 4.53 to 5.17 ignore
    it, as they do not bias a second token. It distorts the scores of beams, so beams need the prompt in the inputs.
    """
    search = task.search(model)
    prompt, length = list(search.start), search.length

    def lengths(n_given: int) -> dict[str, int]:
        return {"max_new_tokens": length - n_given, "min_new_tokens": max(0, task.min_length - n_given)}

    biases = [[prompt[: i + 1], 100.0] for i in range(1, len(prompt))]
    unprompted = lengths(1) | ({"sequence_bias": biases} if biases else {})
    return lengths(len(prompt)) | {"num_beams": beams, "do_sample": False}, unprompted


def _ids(config) -> dict:
    ids = {"bos_token_id": config.bos_id, "pad_token_id": config.pad_id, "eos_token_id": config.sep_id}
    return ids | {"decoder_start_token_id": config.bos_id}
