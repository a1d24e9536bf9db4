"""Real pictures: emoji in four drawing styles, from the tiny base, which knows only scenes.

Hypothesis (arXiv 2403.08433): nothing here is like pre-training, so more pictures and more tunable parameters help both
captions and questions. New words are added to the vocabulary and their rows tuned in every arm. `python -m
jaxpeft.datasets.emoji --out data/emoji --floors` fetches the pictures; test is a style that training never shows.

    python main.py --config=configs/studies/real_pictures.py:root=data/emoji --workdir=runs/study_real
"""

from configs import common
from configs.studies import base
from jaxpeft.datasets.emoji_words import SPLITS


def get_config(arg=""):
    a = common.parse_arg(arg, root="data/emoji", seeds=3, steps=4000)

    def point(task):
        c = base.until_plateau(common.folder(common.get_config(task), a.root), a.steps)
        c.data.annotations = {split: f"annotations/{split}.jsonl" for split in SPLITS}
        c.data.annotations["test"] = c.data.annotations.pop("test_style")
        c.task_options.length = {"vqa": 12, "captioning": 20}[task]
        return c

    levels = {"captions": {"task": "captioning"}, "vqa": {"task": "vqa"}}
    return base.study(
        "real_pictures", __doc__, levels, base.arms() | base.CONTROLS, budgets=(15_000, 50_000, 150_000),
        n_images=(190, 380, 760, 1500), seeds=a.seeds, make_point=point,
    )  # fmt: skip
