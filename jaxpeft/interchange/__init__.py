"""Save and load tuned models: Hugging Face PEFT directories, and our own format for any method.

    export_peft(model, variables, directory)              for peft.PeftModel.from_pretrained on the transformers model
    import_peft(model, params, directory)                 -> (variables, methods)
    save_tuned(model, variables, directory)               any method: tuned.safetensors and manifest.json
    load_tuned(model, params, directory)                  -> (variables, methods)
    export_hf(model, variables, directory)                everything merged: transformers loads it without PEFT

PEFT checks little: a missing key is a warning; an extra key and a wrong alpha are ignored silently. Here everything is
checked: names and shapes both ways, the digest of the frozen base, and a digest of the configuration in the metadata of the
weights file. Files from PEFT itself have no digests; their names and shapes are checked.

PEFT has a type for LoRA, rsLoRA, LoRA+ and PiSSA (as LORA), DoRA, IA3, LayerNorms, VeRA and OFT on the full model (loaded
with task_type None, as written), for a trained head beside the first three (modules_to_save: cls), and for Prompt and
Prefix with positions='shift' on the text decoder. Where transformers fuses query, key and value to one matrix, as in BLIP's
ViT, LoRA and DoRA become one update with B placed in blocks, and IA3 one vector; VeRA and OFT cannot act on a part of a fused
matrix and are unsupported. The model maps names to transformers (models/hf.py); one without such names is a ValueError.
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
