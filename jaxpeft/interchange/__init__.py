"""Tuned trees in and out: Hugging Face PEFT directories, and our own for what PEFT has no type for.

    export_peft(model, variables, directory)              what peft.PeftModel.from_pretrained loads on transformers' model
    import_peft(model, params, directory)                 -> (variables, methods)
    save_tuned(model, variables, directory)               any method: tuned.safetensors and manifest.json
    load_tuned(model, params, directory)                  -> (variables, methods)
    export_hf(model, variables, directory)                everything merged: transformers loads it without PEFT

PEFT checks little: a missing key is a warning, an extra one and a wrong alpha are silent. Here everything is checked:
names and shapes both ways, the digest of the frozen base, and a digest of the configuration that is kept in the
metadata of the weights file. Files from PEFT itself carry no digests; their names and shapes are checked.

What has a PEFT type: LoRA, rsLoRA, LoRA+ and PiSSA (as LORA), DoRA, IA3, LayerNorms, VeRA, OFT on the full model (load
with task_type None, which is what is written), a tuned head beside the first three (modules_to_save: cls), and Prompt
and Prefix with positions='shift' on the text decoder. Where query, key and value are one matrix over there, as in BLIP's
ViT, LoRA and DoRA become one update with block-placed B, IA3 one vector; VeRA and OFT cannot act on a part of it and are
refused. What transformers' names are is said by the model (models/hf.py); one without them is a ValueError.
"""

from jaxpeft.interchange.hf_out import export_hf
from jaxpeft.interchange.peft_in import import_peft
from jaxpeft.interchange.peft_out import export_peft
from jaxpeft.interchange.tuned import from_json, load_tuned, save_tuned, to_json

__all__ = [
    "export_hf",
    "export_peft",
    "from_json",
    "import_peft",
    "load_tuned",
    "save_tuned",
    "to_json",
]
