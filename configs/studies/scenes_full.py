"""The paper's grid on scenes: five methods with the classifier trained too, five sizes, five nested subsets of the data.

Hypothesis (arXiv 2403.08433): where data and task differ from pre-training (questions), more images and more tunable
parameters help; where they do not (captions), the number of images does not matter, and the effect of the number of parameters
is not monotonic. Each cell has three learning rates, a factor of three apart; the best on validation images gets three seeds.

    python main.py --config=configs/studies/scenes_full.py --workdir=runs/study_scenes_full

The settings range from near to far from pre-training: captions as in pre-training (LoRA and the head alone, for reference),
captions in a new style, and questions about what captions do not state. The five methods are trained together with the
classifier's transform; without it they are trained at the middle size and with all images only. `settings=all` trains every
method in every setting, and adds questions about what captions do state.
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
    # full fine-tuning runs the image encoder in every step, which takes ten times as long: only two subsets of the data
    variants["full"] = variants["full"] | {"n_images": (256, 16384)}
    if a.settings == "main":
        variants = {name: one if name in NEAR else one | {"settings": MAIN} for name, one in variants.items()}
    c = studies.study(
        "scenes_full", __doc__, ("captions_web", *MAIN) if a.settings == "main" else tuple(studies.SETTINGS), variants,
        budgets=(5_000, 15_000, 50_000, 150_000, 450_000), n_images=N_IMAGES, seeds=a.seeds,
    )  # fmt: skip
    c.points.vqa.steps, c.points.captioning.steps = a.vqa_steps, a.caption_steps
    return c
