"""Names of version 0.1: what they are now. Code that uses an old one gets an error with the new one; saved files are read."""

import re

CONFIG = {  # config keys, flattened
    "accumulate": "grad_accum",
    "method.start": "method.init_weights",
    "method.where": "method.targets",
    "optim.clip": "optim.clip_norm",
    "optim.decay": "optim.weight_decay",
}
FIELDS = {"start": "init_weights", "where": "targets"}  # of methods, in code and in saved manifests
LOADING = {
    "question_encoder": "task='vqa' for a model that answers questions, task='captioning' for one without"
}  # jp.load
MODULES = {  # below jaxpeft
    "budget": "adapt.budget", "checkpoint": "training.checkpoint", "claims": "study.claims",
    "cluster": "study.ray_executor", "datasets": "data", "decode": "models.decode", "demo": "apps.demo",
    "downloads": "models.downloads", "evals": "training.evaluate", "export": "apps.export",
    "features": "training.frozen_cache", "foreign": "adapt.linen_bridge", "host": "runtime.host",
    "hub": "models.loading", "images": "inputs.images", "java": "metrics.coco_java", "layers": "models.layers",
    "locks": "runtime.locks", "losses": "ops", "optim": "training.optim", "point": "training.run",
    "preflight": "training.preflight", "pretrain": "apps.pretrain", "randaugment": "data.randaugment",
    "registry": "runtime.registry", "report": "study.report", "results": "training.results",
    "sharding": "training.sharding", "sites": "adapt.sites", "stop": "runtime.signals", "text": "inputs.tokenizer",
    "torch_files": "runtime.torch_files", "train": "training.loop", "untrusted": "runtime.files",
    "use": "apps.generate",
}  # fmt: skip


def translated(config: dict) -> dict:
    """A saved config of version 0.1, nested as JSON has it, with today's keys."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for old, new in CONFIG.items():
        section, _, key = old.rpartition(".")
        place = config.get(section, {}) if section else config
        if key in place:
            place[new.rpartition(".")[2]] = place.pop(key)
    return config


def check_config(config) -> None:
    """Raise ValueError for a key of version 0.1 in a ConfigDict, naming today's."""
    for old, new in CONFIG.items():
        section, _, key = old.rpartition(".")
        if key in (config.get(section, {}) if section else config):
            raise ValueError(f"config.{old} is now config.{new}; rename it")


def advice(error: Exception) -> str:
    """What to import instead, where `error` is about a module or a config of version 0.1; else ''."""
    if re.search(r"'?common'? from '?configs|No module named 'configs\.common'", str(error)):
        return "; `from configs import common` is now `from jaxpeft import config`"
    return ""
