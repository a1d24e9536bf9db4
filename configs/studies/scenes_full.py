"""The paper's grid on scenes: five methods, the classifier tuned beside them, five sizes, five nested shares of data.

Hypothesis (arXiv 2403.08433): where data and task differ from pre-training (questions), more pictures and more tunable
parameters help; where they do not (captions), the number of pictures does not matter and that of parameters not in one
direction. Each cell: three learning rates a factor of three apart, the best on validation pictures, three seeds.

    python main.py --config=configs/studies/scenes_full.py --workdir=runs/study_scenes_full

`levels=all` adds captions in the style of pre-training and questions on what captions state; `no_head=true` the five
methods without a tuned classifier.
"""

from configs import common
from configs.studies import base

MAIN = ("captions_human", "vqa_unstated")


def get_config(arg=""):
    a = common.parse_arg(arg, levels="main", no_head=False, seeds=3, vqa_steps=3000, caption_steps=1500)
    if a.levels not in ("main", "all"):
        raise ValueError(f"levels is {a.levels!r}; choose main or all")
    arms = base.arms() | (base.arms("none") if a.no_head else {}) | base.CONTROLS
    # every step of full fine-tuning runs the image encoder: ten times the time, so at both ends of the data only
    arms["full"] = arms["full"] | {"n_images": (256, 16384)}
    c = base.study(
        "scenes_full", __doc__, MAIN if a.levels == "main" else tuple(base.LEVELS), arms,
        budgets=(5_000, 15_000, 50_000, 150_000, 450_000), n_images=(256, 1024, 4096, 8192, 16384), seeds=a.seeds,
    )  # fmt: skip
    c.points.vqa.steps, c.points.captioning.steps = a.vqa_steps, a.caption_steps
    return c
