"""PaliGemma checkpoints: names and layout of transformers <-> our parameter tree.

    DIR/config.json, DIR/model.safetensors or its shards with model.safetensors.index.json

Both namings of transformers are read: that of files (`language_model.model.layers...`, `vision_tower.vision_model...`) and that
of modules since 4.52 (`model.language_model.layers...`, `model.vision_tower...`). Gemma's norms multiply by 1 + weight; our
scale is 1 + weight.
"""

from typing import Any

from jaxpeft.inputs import images
from jaxpeft.models import convert, prefix_lm_convert
from jaxpeft.models.convert import Table
from jaxpeft.models.paligemma import PaliGemma, PaliGemmaConfig
from jaxpeft.models.paligemma_hf import PaliGemmaInTransformers

PROJECTOR = (("dense", "model.multi_modal_projector.linear", "projector", "D C"),)
RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)


class _Converter(prefix_lm_convert.PrefixLMConverter):
    kind, settings = PaliGemma, PaliGemmaConfig
    fields = (*prefix_lm_convert.CONFIG, ("image_id", "", "image_token_index"))
    defaults = {
        "image_size": 224, "patch_size": 16, "vision_width": 768, "vision_layers": 12, "vision_heads": 12,
        "vision_mlp": 3072, "vision_eps": 1e-6, "vocab_size": 256000, "text_width": 3072, "text_layers": 28,
        "text_heads": 16, "kv_heads": 16, "head_size": 256, "text_mlp": 24576, "text_eps": 1e-6, "max_positions": 8192,
        "rope_theta": 10000.0, "pad_id": 0, "image_id": 256000, "tied": True,
    }  # fmt: skip
    fixed = (
        ("", "model_type", ("paligemma",)),
        ("vision_config", "hidden_act", ("gelu_pytorch_tanh",)),
        ("text_config", "model_type", ("gemma",)),  # not 'gemma2', which is PaliGemma 2
        ("text_config", "hidden_act", ("gelu_pytorch_tanh", "gelu")),  # in old files 'gelu' means the same
        ("text_config", "hidden_activation", ("gelu_pytorch_tanh",)),
        ("text_config", "attention_bias", (False,)),
    )
    processor = images.SIGLIP
    head = ("lm_head.weight", "model.language_model.embed_tokens.weight")
    form = PaliGemmaInTransformers

    def table(self, config: PaliGemmaConfig) -> Table:
        rules = prefix_lm_convert.rules(config, "model.vision_tower.", "model.language_model.", "scale-1")
        rules += convert.rules(PROJECTOR, "", "", {"D": config.text_width, "C": config.vision_width})
        tied = {} if config.untied_head else dict([self.head])
        return Table(rules, RENAMES, prefix_lm_convert.DROPPED, tied)

    def _raw(self, config: PaliGemmaConfig) -> dict[str, Any]:
        """With what only transformers needs: the projector's width, and that the tower has no pooling head."""
        raw = super()._raw(config)
        raw["vision_config"] |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        return raw | {"hidden_size": config.text_width, "projection_dim": config.text_width}


CONVERTER = _Converter()
