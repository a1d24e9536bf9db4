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

from jaxpeft import results, sites, text
from jaxpeft.models import blip_port
from jaxpeft.tree import Tree

FILES = ("model.safetensors", "config.json", "generation_config.json", *text.FILES, "tokenizer_config.json",
         "preprocessor_config.json", "README.md")  # fmt: skip


def export_blip(model, variables: Tree, directory, card: str = "") -> Path:
    """Write weights, configuration, tokenizer and processor files; `card` is the text of README.md.

    Raises ValueError for a method that cannot be merged exactly, and where the directory holds other files. A model
    without a tokenizer gets no tokenizer files.
    """
    directory = Path(directory)
    params = sites.merge(model, variables) if "peft" in variables else variables["params"]
    tensors = {name: np.asarray(x, np.float32) for name, x in blip_port.to_hf(params, model.config).items()}
    tensors |= {second: tensors[first] for second, first in blip_port.TIED.items() if second not in tensors}
    files = {"config.json": blip_port.hf_config(model.config), "generation_config.json": _generation(model.config)}
    if model.tokenizer is not None:
        size = model.config.image_size
        files["preprocessor_config.json"] = {
            "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor", "do_convert_rgb": True,
            "do_resize": True, "size": {"height": size, "width": size}, "resample": model.config.image_resample,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(model.config.image_mean), "image_std": list(model.config.image_std),
        }  # fmt: skip
        files["tokenizer_config.json"] = {
            "tokenizer_class": "BertTokenizer", "processor_class": "BlipProcessor", "do_lower_case": True,
            "strip_accents": model.tokenizer.strip_accents, "tokenize_chinese_chars": model.tokenizer.split_chinese,
            "model_max_length": model.config.max_positions, "pad_token": "[PAD]", "unk_token": "[UNK]",
            "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "bos_token": "[DEC]",
            "additional_special_tokens": ["[ENC]"], "model_input_names": ["input_ids", "attention_mask"],
        }  # fmt: skip
    texts = {name: json.dumps(value, indent=2, sort_keys=True) + "\n" for name, value in files.items()}
    texts |= model.tokenizer.files() if model.tokenizer is not None else {}
    texts |= {"README.md": card} if card else {}
    with results.whole_directory(directory, (*FILES, ".model.safetensors")) as new:
        results.write_tensors(new / "model.safetensors", tensors, {"format": "pt"})
        for name, content in texts.items():
            results.write_text(new / name, content)
    return directory


def _generation(config) -> dict:
    ids = {"bos_token_id": config.bos_id, "pad_token_id": config.pad_id, "eos_token_id": config.sep_id}
    return ids | {"decoder_start_token_id": config.bos_id}
