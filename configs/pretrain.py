"""Pre-train a tiny model from scratch on scenes; makes the checkpoints that the package ships.

python main.py --config=configs/pretrain.py --workdir=runs/pretrain                BLIP: base 'tiny'
python main.py --config=configs/pretrain.py:model=mplug --workdir=runs/pretrain    mPLUG: base 'tiny_mplug'
python main.py --config=configs/pretrain.py:model=smolvlm --workdir=runs/pretrain  decoder-only: base 'tiny_decoder'
python main.py --config=configs/pretrain.py:steps=20 --workdir=runs/try        every stage cut to 20 steps
python main.py --config=configs/pretrain.py:mixture=questions,seed=0 --workdir=runs/bases/Q0   for configs/studies/crossed.py
"""

import ml_collections

from jaxpeft import config

VISION = {"image_size": 64, "patch_size": 8, "vision_layers": 4, "vision_heads": 4}
TEXT = {"text_layers": 3, "text_heads": 4, "max_positions": 64}
WIDTHS = {"vision_width": 128, "vision_mlp": 512, "text_width": 128, "text_mlp": 512}
NARROW = {"vision_width": 96, "vision_mlp": 384, "text_width": 96, "text_mlp": 384}
ARCHITECTURES = {
    "blip": VISION | TEXT | WIDTHS,
    "mplug": VISION | TEXT | NARROW | {"encoder_layers": 1, "fusion_layers": 3, "stride": 2},
    "smolvlm": VISION
    | {"vision_width": 128, "vision_mlp": 512, "image_longest_edge": 64, "shuffle": 2}
    | {"text_width": 128, "text_layers": 4, "text_heads": 4}
    | {"kv_heads": 2, "head_size": 32, "text_mlp": 352, "max_positions": 256, "rope_theta": 1e4, "untied_head": False},
}
# `first`: the index of a stage's first image in the endless split; no image is used in two image stages
STAGES = {
    "blip": {
        "text": {"steps": 3000, "lr": 1e-3, "schedule": "cosine", "warmup": 0.06, "first": 0},
        "lm": {"steps": 2500, "lr": 1e-3, "schedule": "constant", "warmup": 0.084, "first": 0},
        "lm_itm": {"steps": 2800, "lr": 1e-3, "schedule": "cosine", "warmup": 0.06, "first": 10_000_000},
    },
    "mplug": {
        "text": {"steps": 2000, "lr": 1e-3, "schedule": "cosine", "warmup": 0.06, "first": 0},
        "lm": {"steps": 2000, "lr": 1e-3, "schedule": "constant", "warmup": 0.084, "first": 0},
        "lm_prefix_itm": {"steps": 1600, "lr": 1e-3, "schedule": "cosine", "warmup": 0.06, "first": 10_000_000},
    },
    "smolvlm": {
        "lm": {"steps": 2000, "lr": 1e-3, "schedule": "constant", "warmup": 0.1, "first": 0},
        "lm_qa": {"steps": 3000, "lr": 1e-3, "schedule": "cosine", "warmup": 0.06, "first": 10_000_000},
        "lm_qa_again": {"steps": 3000, "lr": 1e-3, "schedule": "cosine", "warmup": 0.06, "first": 20_000_000},
    },
}


# the bases of configs/studies/crossed.py: equal but for what the image stage has, captions or questions
IMAGE_STAGE = {"steps": 5000, "lr": 1e-3, "schedule": "cosine", "warmup": 0.06, "first": 0}
MIXTURES = {"captions": {"lm": IMAGE_STAGE}, "questions": {"qa": IMAGE_STAGE}}


def get_config(arg=""):
    a = config.parse_arg(arg, model="blip", steps=0, seed=0, mixture="")
    if a.mixture and (a.model != "blip" or a.mixture not in MIXTURES):
        raise ValueError(
            f"mixture is {a.mixture!r} with model={a.model}; choose {' or '.join(MIXTURES)} with model=blip"
        )
    if a.model not in STAGES:
        raise ValueError(f"model is {a.model!r}; choose one of {', '.join(STAGES)}")
    c = config.get_config("captioning", "full")
    for key in ("task", "task_options", "base", "init", "method", "head", "model", "data", "eval"):
        del c[key]
    c.pretrain = True
    c.seed = a.seed
    c.model_type = a.model
    c.architecture = ml_collections.ConfigDict(ARCHITECTURES[a.model])
    c.batch_size = 32
    c.captions_per_image = 2
    stages = {"text": STAGES[a.model]["text"]} | MIXTURES[a.mixture] if a.mixture else STAGES[a.model]
    c.mixture, c.order = a.mixture, tuple(stages)
    c.stages = ml_collections.ConfigDict(stages)
    for stage in c.stages.values():
        stage.steps = a.steps or stage.steps
    c.optim.weight_decay = 0.05
    c.n_heldout = 512
    return c
