"""A smoke test of a study: two methods, two sizes and two subsets of the data; takes minutes, and is no evidence.

Hypothesis: none; a smoke test of the study's engine and report.

    python main.py --config=configs/studies/tiny.py --workdir=runs/study_tiny
    python main.py --config=configs/studies/tiny.py:base=tiny_mplug --workdir=runs/study_tiny_mplug
"""

from jaxpeft import config
from jaxpeft.study import config as studies


def get_config(arg=""):
    a = config.parse_arg(arg, steps=60, seeds=2, small=False, base="tiny")  # small: 10 runs per seed, for tests
    variants = {
        "lora_head": studies.variant("lora", 3e-3, sizes=(2, 8)),
        "prefix_head": studies.variant("prefix", 3e-2, sizes=(4, 16)),
        "head": studies.CONTROLS["head"],
    }
    settings = ("vqa_stated",) if a.small else ("captions_human", "vqa_stated")
    if a.small:
        del variants["prefix_head"]
    c = studies.study(
        "tiny", __doc__, settings, variants, budgets=(), n_images=(64, 256), seeds=a.seeds,
        learning_rates=(1.0, 3.0), note="Smoke test: a few steps, no evidence about the methods.",
    )  # fmt: skip
    for point in c.points.values():
        point.base = a.base
        point.data.n_train, point.data.n_val, point.data.n_test = 256, 64, 64
        point.steps, point.stop.every, point.stop.patience = a.steps, 20, 2
    return c
