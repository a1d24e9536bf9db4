"""BLIP's fine-tuning for COCO captions (Li et al. 2022, arXiv:2201.12086, section 5.2), or any method in its place.

    jaxpeft prepare coco_captions --root data
    python main.py --config=configs/blip_caption_coco.py:base=path/to/blip --workdir=runs/coco  # full
    python main.py --config=configs/blip_caption_coco.py:base=path/to/blip,method=lora,size=16 --workdir=runs/coco_lora

As published: 384 pixels, batches of 256, 5 epochs, AdamW 1e-5 with weight decay 0.05 on every leaf, no warm-up, no clipping,
label smoothing 0.1, random crop of half the area or more, flip, RandAugment(2, 5); captions cleaned and cut to 30 words; beam
3, 5 to 20 tokens including the prompt. Scored on Karpathy's test split, with PTB tokens and METEOR if Java is installed.
`upload_test.json` has COCO's result format.

Different from the publication: a caption that is cut to 40 tokens is trained without an end token; the cosine schedule changes
every step, not every epoch; the last step is kept, not the epoch with the best CIDEr + BLEU-4 on val
(--config.eval.splits="('val','test')" scores both). Dropout 0.1 is in the text towers at the same places as in BERT; the image
encoder has none, as in BLIP's base model. There are no published learning rates for PEFT methods: those
here are not tuned.
"""

from jaxpeft import config
from jaxpeft.models import blip_recipe


def get_config(arg=""):
    c, _ = config.recipe(arg, "captioning", 1e-5, base="blip-base", epochs=5, batch_size=256, image_size=384)
    blip_recipe.fine_tuning(c)
    c.task_options.update(
        smoothing=0.1, max_tokens=40, max_words=30, max_new_tokens=16, min_length=5, variant="coco", java=True
    )
    c.eval.beams = 3
    return c
