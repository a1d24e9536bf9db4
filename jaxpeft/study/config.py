"""What the studies share: settings from near to far from pre-training, variants of methods, and the recipe."""

import ml_collections

from jaxpeft import config
from jaxpeft.study import claims

# In order of distance from pre-training. Web captions name colours and shapes, and half of them a side; they never say how
# many objects there are, what is missing, or which object is larger.
# Captions need higher learning rates than answers for every method (results/methods_learn_*.json).
# `consistent`: pre-training has had this task, in this style and on such data. Claims are judged by it.
SETTINGS = {
    "captions_web": {"task": "captioning", "consistent": True, "lr_scale": 2.0, "data": {"captions": "web"}},
    "captions_human": {"task": "captioning", "consistent": False, "lr_scale": 2.0, "data": {"captions": "human"}},
    "vqa_stated": {"task": "vqa", "consistent": False, "data": {"types": ("color", "shape", "position")}},
    "vqa_unstated": {"task": "vqa", "consistent": False, "data": {"types": ("exist", "count", "compare")}},
}
LEARNING_RATES = (1 / 3, 1.0, 3.0)  # factors of each variant's middle learning rate


def variant(method: str, lr: float, head: str = "transform", sizes: tuple = (), **fields) -> dict:
    """A variant: a method with its fields. Without `sizes`, these are solved from the study's budgets."""
    return {"method": method, "head": head, "lr": lr, "sizes": sizes, "fields": fields}


def variants(head: str = "transform", prompts: tuple = (2, 4, 8, 16, 32)) -> dict:
    """The paper's five methods, with or without training the transform of the decoder's head as well.

    A prompt stores one row per token, so no length reaches the budgets of the other methods: it has its own lengths.
    """
    end = "" if head == "none" else "_head"
    return {
        f"prompt{end}": variant("prompt", 1e-1, head, prompts),
        f"prefix{end}": variant("prefix", 3e-2, head),
        f"serial_adapter{end}": variant("serial_adapter", 3e-3, head),
        f"parallel_adapter{end}": variant("parallel_adapter", 3e-3, head),
        f"lora{end}": variant("lora", 3e-3, head, alpha="r"),
    }


CONTROLS = {"head": variant("head", 3e-3, "none") | {"base": True}, "full": variant("full", 5e-4, "none")}


def study(
    name, hypothesis, settings, variants: dict, budgets, n_images, seeds=3, learning_rates=LEARNING_RATES, note="",
    make_point=None, margins=claims.MARGINS,
):  # fmt: skip
    """A study's config. The cells are on two axes through (middle budget, all images), unless `cross` is set.

    `settings`: names of SETTINGS, or {name: {'task': ..., keys of a run's config}}, with 'consistent' (True or False: with
    pre-training) if claims are to be judged, and 'ceiling' if the best possible score is known. `make_point(task)` -> a run's
    config. `margins`: the effects that are too small to matter, set before anything is run: study/claims.py.
    """
    c = ml_collections.ConfigDict()
    c.name, c.hypothesis, c.note = name, hypothesis, note
    named = settings if isinstance(settings, dict) else {one: SETTINGS[one] for one in settings}
    c.settings, c.variants = ml_collections.ConfigDict(named), ml_collections.ConfigDict(variants)
    c.budgets, c.n_images, c.cross = tuple(budgets), tuple(n_images), False
    c.learning_rates, c.seeds, c.select_on = tuple(learning_rates), seeds, "val"
    c.keep_checkpoints, c.margins = False, ml_collections.ConfigDict(dict(margins))
    used = sorted({one["task"] for one in c.settings.values()})
    c.points = ml_collections.ConfigDict({task: (make_point or point)(task) for task in used})
    return c


def point(task: str) -> ml_collections.ConfigDict:
    """The config of one run on scenes: trained until validation stops improving, scored on validation and test images."""
    c = until_plateau(config.get_config(task), steps={"vqa": 3000, "captioning": 2000}[task])
    c.eval.forgetting = True
    c.batch_size = {"vqa": 32, "captioning": 16}[task]  # captions have twenty times as many tokens as answers
    # yes/no questions stay at chance for hundreds of steps before they are learned
    c.stop.patience = {"vqa": 4, "captioning": 2}[task]
    c.stop.min_gain = 0.01
    return c


def until_plateau(c: ml_collections.ConfigDict, steps: int) -> ml_collections.ConfigDict:
    """Change a config to a study's recipe: early stopping with `steps` as a cap, no gallery, and the base not scored."""
    c.optim.schedule, c.optim.warmup, c.steps = "plateau", 0.02, steps
    c.eval.splits, c.eval.base, c.eval.gallery = ("val", "test"), False, False
    return c
