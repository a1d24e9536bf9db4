"""PaliGemma's transfer to VQA v2 (Beyer et al. 2024, arXiv 2407.07726, and big_vision's configuration), or any method in its
place.

    jaxpeft prepare vqav2 --root data
    python main.py --config=configs/paligemma_vqa_v2.py:base=google/paligemma-3b-pt-224 --workdir=runs/vqa  # scored here
    python main.py --config=configs/paligemma_vqa_v2.py:base=path/to/paligemma,method=lora,size=16 --workdir=runs/vqa_lora

As published: everything is tuned, image encoder too; prompt "answer en <question>"; batches of 256, 10 epochs; Adam with
b2 = 0.999 at 1e-5 and weight decay 1e-6, 5 % warm-up, cosine to zero, gradients clipped to norm 1; greedy answers.

Different from the publication: each distinct answer is weighted by the share of people who gave it, where theirs draws one
person's answer per epoch; the held-out questions are those of `protocol` (see configs/blip_vqa_v2.py), not the last 10,240.
There are no published learning rates for PEFT methods: those here are not tuned. Memory: see configs/paligemma_coco.py.
"""

from jaxpeft import config
from jaxpeft.models import paligemma_recipe


def get_config(arg=""):
    base = "google/paligemma-3b-pt-224"
    c, _ = config.recipe(arg, "vqa", 1e-5, base=base, epochs=10, batch_size=256, image_size=224, protocol="karpathy")
    paligemma_recipe.transfer(c)
    c.optim.weight_decay, c.optim.no_decay = 1e-6, ""
    c.task_options.update(variant="official2021", max_question=32, max_new_tokens=10)
    return c
