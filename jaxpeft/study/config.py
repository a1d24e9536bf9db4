"""What the studies share: settings from near to far from pre-training, variants of methods, and the recipe."""

import ml_collections
from flax import traverse_util

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
WIDE = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)  # of a search over a factor of 81
# all linear layers of the text towers: attention, and the MLP, which LoRA's default leaves out
TEXT_LINEARS = r"^text_.*(attention/(query|key|value|out)|mlp/(up|down))$"


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


def centred(prompts: tuple = (2, 4, 8, 16, 32)) -> dict:
    """The paper's five methods and their controls for `fixed_budget`, at middle learning rates from results/scenes_full.

    LoRA is on all linear layers of the text towers, also with the classic placement as `lora_qv`. Its alpha is fixed, so that
    its scale falls with the rank and one rate serves all ranks; the rates of adapters fall with the square root of their size.
    `full_text` trains all text leaves and leaves the image encoder frozen, as the methods do; `full` trains that too.
    """
    lora = {"alpha": 16.0, "targets": TEXT_LINEARS}
    return {
        "prompt_head": variant("prompt", 3e-2, sizes=prompts),
        "prefix_head": variant("prefix", 3e-2),
        "serial_adapter_head": variant("serial_adapter", 2e-3) | {"lr_size": 16},
        "parallel_adapter_head": variant("parallel_adapter", 7e-4) | {"lr_size": 32},
        "lora_head": variant("lora", 2e-3, **lora),
        "lora_qv_head": variant("lora", 2e-3, alpha=16.0),
        "head": variant("head", 3e-3, "none") | {"base": True},
        "full_text": variant("selective", 7e-4, "none", leaves="^params/text_"),
        "full": variant("full", 4e-4, "none"),
    }


def study(
    name, hypothesis, settings, variants: dict, budgets, n_images, seeds=3, learning_rates=LEARNING_RATES, note="",
    make_point=None, margins=claims.MARGINS, margins_nll=claims.MARGINS_NLL, axes=None, steps=(), measure="main",
    search_steps=1.0, extend=0, random=None,
):  # fmt: skip
    """A study's config. The cells are on two axes through (middle budget, all images), unless `cross` is set.

    `settings`: names of SETTINGS, or {name: {'task': ..., keys of a run's config}}, with 'consistent' (True or False: with
    pre-training) if claims are to be judged, and 'ceiling' if the best possible score is known. `make_point(task)` -> a run's
    config. `margins`: the effects that are too small to matter, set before anything is run: study/claims.py.
    `axes`: {'optim.weight_decay': (0.0, 0.05)}, more axes of any keys of a run's config (study/axes.py). `steps`, `measure`:
    study/grid.py. `search_steps`, `extend`, `random`: study/search.py. The defaults are the protocol of version 0.1.
    """
    c = ml_collections.ConfigDict()
    c.name, c.hypothesis, c.note = name, hypothesis, note
    named = settings if isinstance(settings, dict) else {one: SETTINGS[one] for one in settings}
    c.settings, c.variants = ml_collections.ConfigDict(named), ml_collections.ConfigDict(variants)
    c.budgets, c.n_images, c.cross = tuple(budgets), tuple(n_images), False
    c.learning_rates, c.seeds, c.select_on = tuple(learning_rates), seeds, "val"
    c.steps, c.measure, c.keep_checkpoints = steps, measure, False
    c.search_steps, c.extend, c.random = search_steps, extend, ml_collections.ConfigDict(random or {})
    c.margins, c.margins_nll = (ml_collections.ConfigDict(dict(one)) for one in (margins, margins_nll))
    c.axes = ml_collections.ConfigDict(traverse_util.unflatten_dict(axes or {}, sep="."))
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


def fixed_budget(c: ml_collections.ConfigDict, steps: int) -> ml_collections.ConfigDict:
    """Change a config to a study's protocol: all `steps` are done, constant and then 20 % of them a linear decay, with 40
    validations of which the best is kept, step 0 included; test images with new pairs of shape and colour are scored too."""
    c = until_plateau(c, steps)
    c.stop.patience, c.stop.every = 0, 0
    c.eval.splits = ("val", "test", "test_comp")
    return c
