"""PaliGemma in transformers. See prefix_lm_hf.py."""

from typing import Any

from jaxpeft.models.prefix_lm_hf import PrefixLMInTransformers


class PaliGemmaInTransformers(PrefixLMInTransformers):
    architecture = "PaliGemmaForConditionalGeneration"
    processor = "PaliGemmaProcessor"

    def text(self, prompt: str) -> str:
        return "<image>" + prompt.removeprefix("<bos>").removesuffix("\n")

    def image_settings(self) -> dict[str, Any]:
        c = self.model.config
        return {
            "image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor",
            "size": {"height": c.image_size, "width": c.image_size}, "image_seq_length": c.n_image_tokens,
        }  # fmt: skip
