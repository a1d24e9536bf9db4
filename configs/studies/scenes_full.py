"""The paper's grid on scenes: five methods, the classifier tuned beside them, five sizes, five nested shares of data.

Hypothesis (arXiv 2403.08433): where data and task differ from pre-training (questions), more pictures and more tunable
parameters help; where they do not (captions), the number of pictures does not matter and that of parameters not in one
direction. Each cell: three learning rates a factor of three apart, the best on validation pictures, three seeds.

    python main.py --config=configs/studies/scenes_full.py --workdir=runs/study_scenes_full

The settings run from near to far: captions as in pre-training (LoRA and the head alone, to place the scale),
captions in a new style, and questions on what captions do not say. The five methods have the classifier's transform tuned
beside them; without it they stand at the middle size and all pictures. `settings=all` gives every method every setting, and
adds questions on what captions do say.
"""

from jaxpeft import config
from jaxpeft.study import config as studies

MAIN = ("captions_human", "vqa_unstated")
NEAR = ("lora_head", "head")
N_IMAGES = (64, 256, 1024, 4096, 16384)


def get_config(arg=""):
    a = config.parse_arg(arg, settings="main", seeds=3, vqa_steps=3000, caption_steps=2000)
    if a.settings not in ("main", "all"):
        raise ValueError(f"settings is {a.settings!r}; choose main or all")
    plain = {
        name: one | {"budgets": (50_000,), "n_images": N_IMAGES[-1:]}
        for name, one in studies.variants("none", (8,)).items()
    }
    variants = studies.variants() | plain | studies.CONTROLS
    # every step of full fine-tuning runs the image encoder: ten times the time, so at two shares of the data only
    variants["full"] = variants["full"] | {"n_images": (256, 16384)}
    if a.settings == "main":
        variants = {name: one if name in NEAR else one | {"settings": MAIN} for name, one in variants.items()}
    c = studies.study(
        "scenes_full", __doc__, ("captions_web", *MAIN) if a.settings == "main" else tuple(studies.SETTINGS), variants,
        budgets=(5_000, 15_000, 50_000, 150_000, 450_000), n_images=N_IMAGES, seeds=a.seeds,
    )  # fmt: skip
    c.points.vqa.steps, c.points.captioning.steps = a.vqa_steps, a.caption_steps
    return c
