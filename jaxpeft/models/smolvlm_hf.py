"""SmolVLM in transformers. See prefix_lm_hf.py.

The code reads the directory with Idefics3Processor, which writes the same ids and pixels as SmolVLMProcessor but needs neither
torchvision nor num2words. An image is one square (do_image_splitting=False), as it was in training.
"""

from typing import Any

from jaxpeft.models.prefix_lm_hf import PrefixLMInTransformers
from jaxpeft.models.smolvlm_text import AROUND, GLOBAL, IMAGE


class SmolVLMInTransformers(PrefixLMInTransformers):
    architecture = "SmolVLMForConditionalGeneration"
    processor = "Idefics3Processor"

    def text(self, prompt: str) -> str:
        return prompt.replace(f"{AROUND}{GLOBAL}{IMAGE}{AROUND}", IMAGE)

    def settings(self, task: Any, beams: int) -> dict[str, dict]:
        found = super().settings(task, beams)
        if self.model.tokenizer is not None:
            found["processor_config.json"] = {
                "image_seq_len": self.model.config.n_image_tokens, "processor_class": "SmolVLMProcessor",
            }  # fmt: skip
        return found

    def image_settings(self) -> dict[str, Any]:
        c = self.model.config
        return {
            "image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor", "do_pad": True,
            "do_image_splitting": False, "size": {"longest_edge": c.image_longest_edge},
            "max_image_size": {"longest_edge": c.image_size},
        }  # fmt: skip
