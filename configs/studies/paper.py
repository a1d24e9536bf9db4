"""The paper's grid: mPLUG on COCO captions and VQAv2, with five methods, sizes and fractions of the data.

Hypothesis (arXiv 2403.08433): where data and task differ from pre-training (VQA), more data and more tunable parameters
help; where they do not (captioning), data size does not matter and the effect of parameter size is not monotonic.

    python main.py --config=configs/studies/paper.py:root=coco,base=mplug_base.pth --workdir=runs/study_paper
    python main.py --config=configs/studies/paper.py:root=coco,base=Salesforce_blip,model=blip --workdir=runs/study_blip

Known of the paper: the abstract; and from a machine-written review of it, whose word we have for the rest: the model is mPLUG;
COCO captions and VQAv2, subsets drawn at random; CIDEr and accuracy; prompt tuning at the input embedding, prefix tuning in all
transformer blocks, adapters in the blocks, LoRA in self-attention; a zero-shot line.
Inferred: the fifth method is the parallel adapter, which is in the paper's references; "all blocks" includes the ViT.
Ours: the base model, sizes, numbers of images, learning rates, the recipe and its fixed number of steps, three seeds.

`root` holds the images; `captions` and `questions` are annotation files that `folder` can read (dataset_coco.json, and rows of
VQAv2 with image, question and answers). `towers=text` leaves the ViT untouched: image tokens are then computed once. With
model=blip, `base` is a BLIP directory for both tasks, or for captioning only if `base_vqa=DIR` is given; 480 pixels for VQA.
This study has not been run: neither data nor checkpoint nor an accelerator was available; docs/results/paper_grid.md plans it.
"""

from jaxpeft import config
from jaxpeft.study import config as studies

N_IMAGES = (1_000, 5_000, 20_000, 50_000, 80_000)  # nested; the training splits of VQAv2 and COCO: 82,783 and 113,287
# where each method acts, in all towers or in text stacks only: regular expressions of site paths
PLACES = {
    "all": {
        "prefix": r"(^vision/blocks/|self_)attention$",
        "lora": r"(^vision/blocks/|self_)attention/(query|value)$",
        "serial_adapter": r"",
        "parallel_adapter": r"mlp$",
    },
    "text": {"prefix": r"self_attention$", "lora": r"self_attention/(query|value)$"},
}
SIZE = {"mplug": {"captioning": 384, "vqa": 384}, "blip": {"captioning": 384, "vqa": 480}}


def get_config(arg=""):
    a = config.parse_arg(
        arg, root="coco", base="mplug_base.pth", base_vqa="", captions="dataset_coco.json", questions="vqa_v2.json", seeds=3,
        dtype="bfloat16", model="mplug", towers="all",
    )  # fmt: skip
    for key, known in (("model", SIZE), ("towers", PLACES)):
        if a[key] not in known:
            raise ValueError(f"{key} is {a[key]!r}; choose one of {', '.join(known)}")

    def point(task):
        c = studies.until_plateau(config.folder(config.get_config(task), a.root), steps=40_000)
        c.base = (a.base_vqa if task == "vqa" else "") or a.base
        c.data.annotations = a.questions if task == "vqa" else a.captions
        c.model.dtype, c.model.frozen_dtype, c.model.image_size = a.dtype, a.dtype, SIZE[a.model][task]
        captions = {"max_tokens": 25, "max_new_tokens": 25, "min_length": 9, "variant": "coco"}
        answers = {"max_question": 25, "max_new_tokens": 10, "variant": "official2021"}
        c.task_options.update({"captioning": captions, "vqa": answers}[task])
        c.batch_size, c.optim.weight_decay, c.eval.beams = 64, 0.05, 3
        c.stop.patience, c.stop.every = 0, 1000  # all steps; the best validation is kept
        return c

    # a tenth of the learning rates for scenes, because the base has 224 million parameters
    variants = studies.variants() | studies.variants("none") | studies.CONTROLS
    variants = {name: one | {"lr": one["lr"] / 10} for name, one in variants.items()}
    for one in variants.values():
        if one["method"] in PLACES[a.towers]:
            one["fields"] = one["fields"] | {"targets": PLACES[a.towers][one["method"]]}
        if one["method"] == "lora":
            one["fields"] = one["fields"] | {"alpha": 16.0}  # one rate then serves all ranks
    variants["full"] = variants["full"] | {"lr": 1e-5}  # the release's for captioning
    # pre-training has had captions, those of COCO among them; it has had no questions
    settings = {
        "captions_coco": {"task": "captioning", "consistent": True}, "vqa_v2": {"task": "vqa", "consistent": False}
    }  # fmt: skip
    return studies.study(
        "paper", __doc__, settings, variants, budgets=(150_000, 500_000, 1_500_000, 5_000_000, 15_000_000), n_images=N_IMAGES,
        seeds=a.seeds, learning_rates=(0.1, 0.3, 1.0, 3.0, 10.0), make_point=point, measure="nll", search_steps=0.25, extend=4,
    )  # fmt: skip
