"""Names of version 0.1 and their replacements: code that uses an old name gets an error, saved files are translated."""

import re

CONFIG = {  # config keys, flattened
    "accumulate": "grad_accum",
    "method.start": "method.init_weights",
    "method.where": "method.targets",
    "optim.clip": "optim.clip_norm",
    "optim.decay": "optim.weight_decay",
    "task_options.length": "task_options.max_new_tokens",
}
# removed config keys without a replacement, and the end of their error message; ignored in saved configs
GONE = {
    "checkpoint_every": "was removed; set the time between checkpoints, config.checkpoint_seconds (0: every step)",
    "size": "was removed; set the size in the config's argument (:size=16) or the method's own key (config.method.rank)",
    "journal_mb": "was removed with the journal; config.checkpoint_seconds limits how much work a killed run loses",
}
STUDY = {"arms": "variants", "levels": "settings", "rates": "learning_rates"}  # config keys of a study
ROW = {"arm": "variant", "level": "setting"}  # of a row of results.jsonl
FIELDS = {"start": "init_weights", "where": "targets"}  # of methods, in code and in saved manifests
LOADING = {
    "question_encoder": "use task='vqa' for a model that answers questions, task='captioning' for one that does not"
}  # jp.load
NAMES = {  # of jaxpeft itself
    "export_blip": "export_hf", "expand": "adapt.sites.expand",
    **{name: f"methods.{name}" for name in ("HEADS", "METHODS", "Added", "Params", "Site", "build", "defaults")},
}  # fmt: skip
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


def with_defaults(config: dict) -> dict:
    """A saved config (nested dictionaries) with the current defaults.

    Up to version 0.2 `model.remat` was 'none' by default; now it is None, which is the same on CPU. There was a key `size`;
    `min_length` of captions was 5: BLIP's prompt and one token, which 0 means now; and studies of any data set asked for
    `eval.forgetting`, which is of scenes.
    """
    if "size" in config:
        config = {
            key: dict(value) if isinstance(value, dict) else value for key, value in config.items() if key != "size"
        }
        if config.get("task") == "captioning" and config.get("task_options", {}).get("min_length") == 5:
            config["task_options"]["min_length"] = 0
        if "forgetting" in config.get("eval", {}) and config["data"]["name"] != "scenes":
            config["eval"]["forgetting"] = False
    model = config.get("model", {})
    if model.get("remat") != "none" or "attention" in model:  # a key that came with the new default
        return config
    return config | {"model": model | {"remat": None}}


def translated(config: dict) -> dict:
    """A saved config of version 0.1 (nested dictionaries) with the current keys."""
    config = {k: dict(value) if isinstance(value, dict) else value for k, value in config.items() if k not in GONE}
    for old, new in CONFIG.items():
        if old == "task_options.length":  # it included the start of a text: see training/finished.py
            continue
        section, _, key = old.rpartition(".")
        place = config.get(section, {}) if section else config
        if key in place:
            place[new.rpartition(".")[2]] = place.pop(key)
    return config


def check_config(config) -> None:
    """Raise ValueError for a key of version 0.1 in a ConfigDict, naming the current key."""
    for old, new in CONFIG.items():
        section, _, key = old.rpartition(".")
        if key in (config.get(section, {}) if section else config):
            raise ValueError(f"config.{old} is now config.{new}; rename it")
    for key, said in GONE.items():
        if key in config:
            raise ValueError(f"config.{key} {said}")


def translated_study(config: dict) -> dict:
    """A saved study config of version 0.1 with the current keys."""
    config = {STUDY.get(key, key): value for key, value in config.items()}
    config["variants"] = {
        name: {STUDY.get(key, key): value for key, value in one.items()} for name, one in config["variants"].items()
    }
    return config


def translated_row(row: dict) -> dict:
    """A row of a results.jsonl of version 0.1 with the current keys."""
    return {ROW.get(key, key): value for key, value in row.items()}


def check_study(config) -> None:
    """Raise ValueError for a key of version 0.1 in the ConfigDict of a study, naming the current key."""
    for old, new in STUDY.items():
        if old in config:
            raise ValueError(f"config.{old} of a study is now config.{new}; rename it")
    for name, variant in config.variants.items():
        if "levels" in variant:
            raise ValueError(f"config.variants.{name}.levels is now config.variants.{name}.settings; rename it")


def advice(error: Exception) -> str:
    """What to import instead, if `error` is about a module or a config of version 0.1; else ''."""
    if re.search(r"'?common'? from '?configs|No module named 'configs\.common'", str(error)):
        return "; `from configs import common` is now `from jaxpeft import config`"
    return ""
