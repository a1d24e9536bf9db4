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
out. There are no published learning rates for PEFT methods: `LR` is not tuned.
"""

from jaxpeft import config
from jaxpeft.models import blip_recipe

N_QUESTIONS = {"karpathy": 605_102, "official": 658_111, "visual_genome": 1_445_322}
LR = {"full": 2e-5, "lora": 2e-4, "serial_adapter": 2e-4, "parallel_adapter": 2e-4, "prompt": 3e-2, "prefix": 1e-3}


def get_config(arg=""):
    a = config.parse_arg(
        arg, base="blip-base", data_dir="", protocol="karpathy", visual_genome=True, answer_list="", inference="rank",
        method="full", size=16, head="none", lr=0.0, epochs=10, batch_size=256, steps=0, seed=0, dtype="bfloat16",
        image_size=480,
    )  # fmt: skip
    if a.protocol not in N_QUESTIONS:
        raise ValueError(f"protocol is {a.protocol!r}; choose 'karpathy' or 'official'")
    c = config.get_config("vqa", a.method, a.size, a.head)
    c.base, c.seed = a.base, a.seed
    c.data.name, c.data.augment = "vqav2", "blip"
    c.data.data_dir = a.data_dir
    c.data.protocol, c.data.visual_genome, c.data.train_parts = a.protocol, a.visual_genome, ("train", "val")
    c.task_options.update(
        smoothing=0.1,
        inference=a.inference,
        answer_list=a.answer_list,
        variant="official2021",
        max_question=35,
        max_new_tokens=9,
    )
    n = N_QUESTIONS[a.protocol] + (N_QUESTIONS["visual_genome"] if a.visual_genome else 0)
    blip_recipe.fine_tuning(c, a, n, LR.get(a.method, 2e-4))
    c.eval.splits = ("test",) if a.protocol == "karpathy" else ("test_dev", "test")
    return c
