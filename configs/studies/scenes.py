"""A smoke test of the paper's question in about a quarter of an hour on two cores.

Hypothesis (arXiv 2403.08433): where data and task differ from pre-training (questions), more images and more tunable
parameters help; where they do not (captions), the number of images does not matter, and the effect of the number of parameters
is not monotonic. One seed, one learning rate and short caps; `scenes_full.py` is the full study.

    python main.py --config=configs/studies/scenes.py --workdir=runs/study_scenes
"""

from jaxpeft import config
from jaxpeft.study import config as studies


def get_config(arg=""):
    a = config.parse_arg(arg, vqa_steps=1200, caption_steps=400)
    c = studies.study(
        "scenes", __doc__, ("captions_human", "vqa_unstated"), studies.variants() | {"head": studies.CONTROLS["head"]},
        budgets=(20_000, 50_000, 120_000), n_images=(256, 16384), seeds=1, learning_rates=(1.0,),
        note="Smoke test: one seed and one learning rate per method, so no verdict here is evidence about the methods.",
    )  # fmt: skip
    c.points.vqa.steps, c.points.captioning.steps = a.vqa_steps, a.caption_steps
    return c
