"""Pre-train the tiny BLIP from scratch on scenes; makes the checkpoint that the package ships.

python main.py --config=configs/pretrain.py --workdir=runs/pretrain
python main.py --config=configs/pretrain.py:steps=20 --workdir=runs/try        every stage cut to 20 steps
"""

import ml_collections

from jaxpeft import config


def get_config(arg=""):
    a = config.parse_arg(arg, steps=0, seed=0)
    c = config.get_config("captioning", "full")
    for key in ("task", "task_options", "base", "init", "method", "head", "size", "model", "data", "eval"):
        del c[key]
    c.pretrain = True
    c.seed = a.seed
    c.architecture = ml_collections.ConfigDict(
        {
            "image_size": 64,
            "patch_size": 8,
            "vision_width": 128,
            "vision_layers": 4,
            "vision_heads": 4,
            "vision_mlp": 512,
            "text_width": 128,
            "text_layers": 3,
            "text_heads": 4,
            "text_mlp": 512,
            "max_positions": 64,
        }  # fmt: skip
    )
    c.batch_size = 32
    c.captions_per_image = 2
    # `first`: the index of a stage's first image in the endless split; no image is used in both image stages
    c.order = ("text", "lm", "lm_itm")
    c.stages = ml_collections.ConfigDict(
        {
            "text": {"steps": 3000, "lr": 1e-3, "schedule": "cosine", "warmup": 0.06, "first": 0},
            "lm": {"steps": 2500, "lr": 1e-3, "schedule": "constant", "warmup": 0.084, "first": 0},
            "lm_itm": {"steps": 2800, "lr": 1e-3, "schedule": "cosine", "warmup": 0.06, "first": 10_000_000},
        }
    )
    for stage in c.stages.values():
        stage.steps = a.steps or stage.steps
    c.optim.weight_decay = 0.05
    c.n_heldout = 512
    return c
