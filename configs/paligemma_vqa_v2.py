"""PaliGemma's transfer to VQA v2 (Beyer et al. 2024, arXiv 2407.07726, and big_vision's configuration), or any method in its
place.

    jaxpeft prepare vqav2 --root data
    python main.py --config=configs/paligemma_vqa_v2.py:base=google/paligemma-3b-pt-224 --workdir=runs/vqa  # scored here
    python main.py --config=configs/paligemma_vqa_v2.py:base=path/to/paligemma,method=lora,size=16 --workdir=runs/vqa_lora

As published: everything is tuned, image encoder too; prompt "answer en <question>"; batches of 256, 10 epochs; Adam with
b2 = 0.999 at 1e-5 and weight decay 1e-6, 5 % warm-up, cosine to zero, gradients clipped to norm 1; greedy answers.

Different from the publication: each distinct answer is weighted by the share of people who gave it, where theirs draws one
person's answer per epoch; the held-out questions are those of `protocol` (see configs/blip_vqa_v2.py), not the last 10,240.
There are no published learning rates for PEFT methods: `LR` is not tuned. Memory: see configs/paligemma_coco.py.
"""

from jaxpeft import config
from jaxpeft.models import paligemma_recipe

N_QUESTIONS = {"karpathy": 605_102, "official": 658_111}
LR = {"full": 1e-5, "lora": 2e-4, "serial_adapter": 2e-4, "parallel_adapter": 2e-4, "prompt": 3e-2, "prefix": 1e-3}


def get_config(arg=""):
    a = config.parse_arg(
        arg, base="google/paligemma-3b-pt-224", data_dir="", protocol="karpathy", method="full", size=16, head="none",
        lr=0.0, epochs=10, batch_size=256, steps=0, seed=0, dtype="bfloat16", image_size=224,
    )  # fmt: skip
    if a.protocol not in N_QUESTIONS:
        raise ValueError(f"protocol is {a.protocol!r}; choose 'karpathy' or 'official'")
    c = config.get_config("vqa", a.method, a.size, a.head)
    c.base, c.seed = a.base, a.seed
    c.data.name, c.data.data_dir = "vqav2", a.data_dir
    c.data.protocol, c.data.visual_genome, c.data.train_parts = a.protocol, False, ("train", "val")
    paligemma_recipe.transfer(c, a, N_QUESTIONS[a.protocol], LR.get(a.method, 2e-4))
    c.optim.weight_decay, c.optim.no_decay = 1e-6, ""
    c.task_options.update(variant="official2021", max_question=32, max_new_tokens=10)
    c.eval.splits = ("test",) if a.protocol == "karpathy" else ("test_dev", "test")
    return c
