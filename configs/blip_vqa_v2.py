"""BLIP's fine-tuning for VQA v2 (Li et al. 2022, arXiv:2201.12086, section 5.3), or any method in its place.

    jaxpeft prepare vqav2 --root data --visual-genome
    python main.py --config=configs/blip_vqa_v2.py:base=path/to/blip --workdir=runs/vqa  # scored here
    python main.py --config=configs/blip_vqa_v2.py:base=path/to/blip,protocol=official --workdir=runs/vqa_server

`protocol=official` trains on train2014, val2014 and Visual Genome, and writes `upload_test_dev.json` and `upload_test.json` for
the evaluation server; `karpathy` (the protocol of most PEFT papers) holds out val and test images of val2014.

As published: 480 pixels, batches of 256, 10 epochs, AdamW 2e-5 with weight decay 0.05 on every leaf, no warm-up, no clipping,
label smoothing 0.1, random crop of half the area or more, flip, RandAugment(2, 5); each distinct answer is weighted by the
share of people who gave it, Visual Genome's by 0.2; answers are ranked: the first token selects 128 of a closed list, and the
full loss decides.

Different from the publication: the cosine schedule changes every step, not every epoch; the list is the 3,128 most frequent
training answers, unless `answer_list=FILE` gives BLIP's own; an answer that is cut to 10 tokens is trained without an end
token; there is no stochastic depth (0.1) in the image encoder; images of Visual Genome that are in COCO's val or test are left
out. There are no published learning rates for PEFT methods: those here are not tuned.
"""

from jaxpeft import config
from jaxpeft.models import blip_recipe


def get_config(arg=""):
    c, a = config.recipe(
        arg, "vqa", 2e-5, base="blip-base", epochs=10, batch_size=256, image_size=480, protocol="karpathy",
        visual_genome=True, inference="rank", answer_list="",
    )  # fmt: skip
    blip_recipe.fine_tuning(c)
    c.task_options.update(smoothing=0.1, inference=a.inference, answer_list=a.answer_list)
    c.task_options.update(variant="official2021", max_question=35, max_new_tokens=9)
    return c
