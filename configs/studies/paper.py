"""The paper's grid: BLIP-base on COCO captions (Karpathy) and VQAv2, with five methods, sizes and fractions of the data.

Hypothesis (arXiv 2403.08433): where data and task differ from pre-training (VQA), more data and more tunable parameters
help; where they do not (captioning), data size does not matter and the effect of parameter size is not monotonic.

    python main.py --config=configs/studies/paper.py:root=coco,base=Salesforce_blip --workdir=runs/study_paper

`root` holds the images; `captions` and `questions` are annotation files that `folder` can read (dataset_coco.json, and
BLIP's rows of VQAv2 with image, question and answers); `base` is a BLIP directory for both tasks, or for captioning only if
`base_vqa=DIR` is given. BLIP's recipe at 384 pixels (captioning) and 480 (VQA); bfloat16 on accelerators. This study has not
been run: neither the data nor an accelerator was available.
"""

from jaxpeft import config
from jaxpeft.study import config as studies

N_IMAGES = (1_000, 5_000, 20_000, 50_000, 80_000)  # nested; the training splits of VQAv2 and COCO: 82,783 and 113,287


def get_config(arg=""):
    a = config.parse_arg(
        arg, root="coco", base="blip-base", base_vqa="", captions="dataset_coco.json", questions="vqa_v2.json", seeds=3,
        dtype="bfloat16",
    )  # fmt: skip

    def point(task):
        c = studies.until_plateau(config.folder(config.get_config(task), a.root), steps=40_000)
        c.base = (a.base_vqa if task == "vqa" else "") or a.base
        c.data.annotations = a.questions if task == "vqa" else a.captions
        c.model.dtype, c.model.image_size = a.dtype, {"captioning": 384, "vqa": 480}[task]
        captions = {"smoothing": 0.1, "max_tokens": 40, "max_words": 50, "max_new_tokens": 36, "variant": "coco"}
        answers = {"max_question": 35, "max_new_tokens": 9, "variant": "official2021"}
        c.task_options.update({"captioning": captions, "vqa": answers}[task])
        c.batch_size, c.optim.weight_decay, c.eval.beams = 64, 0.05, 3
        c.stop.every = 500
        return c

    # a tenth of the learning rates for scenes, because the base has 224 million parameters
    variants = studies.variants() | studies.variants("none") | studies.CONTROLS
    variants = {name: one | {"lr": one["lr"] / 10} for name, one in variants.items()}
    variants["full"] = variants["full"] | {"lr": 1e-5}  # BLIP's for captioning
    settings = {"captions_coco": {"task": "captioning"}, "vqa_v2": {"task": "vqa"}}
    return studies.study(
        "paper", __doc__, settings, variants, budgets=(150_000, 500_000, 1_500_000, 5_000_000, 15_000_000), n_images=N_IMAGES,
        seeds=a.seeds, learning_rates=(0.1, 0.3, 1.0, 3.0, 10.0), make_point=point,
    )  # fmt: skip
