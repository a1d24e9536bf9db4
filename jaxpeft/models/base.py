"""The models that checkpoints can hold, by the `model_type` of config.json (Hugging Face) or manifest.json (ours)."""

from collections.abc import Callable

from jaxpeft.models.convert import Converter
from jaxpeft.runtime.registry import Registry


def _blip() -> Converter:
    from jaxpeft.models import blip_convert

    return blip_convert.CONVERTER


# model_type -> a function that gives its converter, so that a model is imported when it is wanted
MODELS: dict[str, Callable[[], Converter]] = Registry("model type", {"blip": _blip})
