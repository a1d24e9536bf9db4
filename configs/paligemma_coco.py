"""PaliGemma's transfer to COCO captions (Beyer et al. 2024, arXiv 2407.07726, and big_vision's configuration), or any method in
its place.

    jaxpeft prepare coco_captions --root data
    python main.py --config=configs/paligemma_coco.py:base=google/paligemma-3b-pt-224 --workdir=runs/coco  # full
    python main.py --config=configs/paligemma_coco.py:base=path/to/paligemma,method=lora,size=16 --workdir=runs/coco_lora

As published: everything is tuned, image encoder too; prompt "caption en"; batches of 256, 5 epochs; Adam with b2 = 0.999 at
1e-4, 5 % warm-up, cosine to zero, gradients clipped to norm 1; captions cut to 32 tokens; beam 2. Scored on Karpathy's test
split, with PTB tokens and METEOR if Java is installed.

Different from the publication: the learning rate is the one in the configuration file, where a sweep chose among others; the
beam search is that of transformers. There are no published learning rates for PEFT methods: those here are not tuned.

Memory. Layers are recomputed in the backward pass (`remat=full`), and frozen matrices are bfloat16. Full tuning of 3 billion
parameters needs a mesh (--config.mesh.fsdp=8); `--preflight` says what fits.
"""

from jaxpeft import config
from jaxpeft.models import paligemma_recipe


def get_config(arg=""):
    base = "google/paligemma-3b-pt-224"
    c, _ = config.recipe(arg, "captioning", 1e-4, base=base, epochs=5, batch_size=256, image_size=224)
    paligemma_recipe.transfer(c)
    c.task_options.update(max_tokens=32, max_words=0, max_new_tokens=32, variant="coco", java=True)
    c.eval.beams = 2
    return c
