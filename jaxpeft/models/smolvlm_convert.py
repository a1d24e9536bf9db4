"""SmolVLM and Idefics3 checkpoints: names and layout of transformers <-> our parameter tree.

    DIR/config.json, DIR/model.safetensors or its shards with model.safetensors.index.json

Names are `model.text_model...`, `model.vision_model...`, `model.connector...`; those of a model that was saved without its head
lack `model.`. Whether the head is tied is read from the weights.
"""

from jaxpeft.inputs import images
from jaxpeft.models import convert, prefix_lm_convert
from jaxpeft.models.convert import Table
from jaxpeft.models.smolvlm import SmolVLM, SmolVLMConfig
from jaxpeft.models.smolvlm_hf import SmolVLMInTransformers

PROJECTOR = (("matrix", "model.connector.modality_projection.proj", "projector", "D C"),)
RENAMES = ((r"^(text_model|vision_model|connector)\.", r"model.\1."),)


class _Converter(prefix_lm_convert.PrefixLMConverter):
    kind, settings = SmolVLM, SmolVLMConfig
    fields = (
        *prefix_lm_convert.CONFIG,
        ("shuffle", "", "scale_factor"),
        ("image_id", "", "image_token_id"),
    )
    defaults = {
        "image_size": 224, "patch_size": 32, "vision_width": 1152, "vision_layers": 12, "vision_heads": 16,
        "vision_mlp": 3072, "vision_eps": 1e-6, "vocab_size": 32000, "text_width": 4096, "text_layers": 32,
        "text_heads": 32, "text_mlp": 11008, "text_eps": 1e-5, "max_positions": 2048, "rope_theta": 10000.0,
        "pad_id": 128002, "shuffle": 2, "image_id": 128257, "tied": False,
        # Llama's of keys that may be null: a key head per query head, and heads that fill the width
        "kv_heads": lambda fields: fields["text_heads"],
        "head_size": lambda fields: fields["text_width"] // fields["text_heads"],
    }  # fmt: skip
    fixed = (
        ("", "model_type", ("smolvlm", "idefics3")),
        ("vision_config", "hidden_act", ("gelu_pytorch_tanh",)),
        ("text_config", "model_type", ("llama",)),
        ("text_config", "hidden_act", ("silu",)),
        ("text_config", "attention_bias", (False,)),
        ("text_config", "mlp_bias", (False,)),
    )
    processor = images.SMOLVLM
    head = ("lm_head.weight", "model.text_model.embed_tokens.weight")
    form = SmolVLMInTransformers

    def table(self, config: SmolVLMConfig) -> Table:
        rules = prefix_lm_convert.rules(config, "model.vision_model.", "model.text_model.", "scale")
        sizes = {"D": config.text_width, "C": config.vision_width * config.shuffle**2}
        rules += convert.rules(PROJECTOR, "", "", sizes)
        tied = {} if config.untied_head else dict([self.head])
        return Table(rules, RENAMES, prefix_lm_convert.DROPPED, tied)


CONVERTER = _Converter()
