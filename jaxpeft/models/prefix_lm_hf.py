"""PaliGemma and SmolVLM in transformers: the files beside the weights, and code for a model card.

PEFT's prompt and prefix tuning put their tokens in front of the whole input, where the image's tokens are; ours act in the
decoder. They have no form there; the other methods do, in every tower.
"""

import json
from typing import Any, ClassVar

from jaxpeft.models.hf import HuggingFace


class PrefixLMInTransformers(HuggingFace):
    """A subclass names the classes of transformers."""

    architecture: ClassVar[str]
    processor: ClassVar[str]  # the class that reads the directory in a model card's code

    def text(self, prompt: str) -> str:
        """What the processor turns into a prompt, which is given as text with special tokens."""
        raise NotImplementedError

    def image_settings(self) -> dict[str, Any]:
        """What the image processors of the models do not share."""
        raise NotImplementedError

    def settings(self, task: Any, beams: int) -> dict[str, dict]:
        c, tokenizer = self.model.config, self.model.tokenizer
        said: dict[str, Any] = {"pad_token_id": c.pad_id}
        if tokenizer is not None:
            said |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        if task is not None:
            said |= self.generation(task, beams) | {"eos_token_id": task.template(self.model).stop[0]}
        found = {"config.json": {**self.config, "architectures": [self.architecture]}, "generation_config.json": said}
        if tokenizer is None:
            return found
        images = {
            "do_convert_rgb": True, "do_resize": True, "resample": c.image_resample, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(c.image_mean),
            "image_std": list(c.image_std),
        }  # fmt: skip
        found["preprocessor_config.json"] = images | self.image_settings()
        return found

    def generation(self, task: Any, beams: int) -> dict[str, Any]:
        """Settings with which transformers generates the same texts as `jaxpeft.generate`."""
        search = task.search(self.model)
        lengths = {"max_new_tokens": search.length, "min_new_tokens": search.min_length}
        return lengths | {"num_beams": beams, "do_sample": False}

    def code(
        self, task: Any, out: str, base: str = "", revision: str = "", in_decoder: bool = False, beams: int = 1
    ) -> list[str]:
        out, where = (json.dumps(one, ensure_ascii=False) for one in (out, base or out))
        pinned = f', revision="{revision}"' if revision else ""
        said = ", ".join(f"{name}={value}" for name, value in self.generation(task, beams).items())
        prompt, _ = task.template(self.model).prompt("what is in the picture" if task.asks else "")
        text = self.text(self.model.tokenizer.library.decode(prompt, skip_special_tokens=False))
        return [
            "import torch",
            "from PIL import Image, ImageOps",
            *(["from peft import PeftModel"] if base else []),
            f"from transformers import {self.architecture}, {self.processor}",
            "",
            f"processor = {self.processor}.from_pretrained({where}{pinned})",
            f"model = {self.architecture}.from_pretrained({where}{pinned})",
            *([f"model = PeftModel.from_pretrained(model, {out})"] if base else []),
            "model.eval()",
            "",
            'image = ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB")',
            f"text = {json.dumps(text, ensure_ascii=False)}",
            'inputs = processor(images=image, text=text, return_tensors="pt")',
            "with torch.inference_mode():",
            f"    ids = model.generate(**inputs, {said})",
            'new = ids[0, inputs["input_ids"].shape[1] :]',
            "print(processor.decode(new, skip_special_tokens=True).strip())",
        ]
