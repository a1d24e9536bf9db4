"""mPLUG's fine-tuning for COCO captions (Li et al. 2022, arXiv 2205.12005, and its release), or any method in its place.

    jaxpeft prepare coco_captions --root data
    python main.py --config=configs/mplug_caption_coco.py:base=path/to/mplug_base.pth --workdir=runs/coco  # full
    python main.py --config=configs/mplug_caption_coco.py:base=path/to/mplug_base.pth,method=lora,size=16 --workdir=runs/lora

`base`: the release's file with bert-base-uncased's vocab.txt next to it, or a directory (docs/guides/mplug.md).

As released (base model, cross-entropy stage): 384 pixels, batches of 1024, 5 epochs, AdamW with weight decay 0.02 except on
biases and BERT's LayerNorms, learning rates 1e-5 (text) and 5e-6 (ViT), both from 1e-5 over the first 400 iterations, then a
cosine to 1e-6; no clipping, no label smoothing, dropout 0.1; random crop of half the area or more, flip, RandAugment(2, 7);
captions lower-cased and cut to 25 tokens; the release's beam search with 5 beams, 8 to 25 tokens. Scored on Karpathy's test
split, with PTB tokens and METEOR if Java is installed.

Different from the release: warm-up and cosine change every step, not every 100 iterations and every epoch; the last step is
kept; the second stage, which optimises CIDEr itself, is left out. There are no published learning rates for PEFT methods: those
here are not tuned, and their schedule is a cosine to zero without warm-up.
"""

from jaxpeft import config
from jaxpeft.models import mplug_recipe


def get_config(arg=""):
    c, _ = config.recipe(arg, "captioning", 1e-5, base="mplug_base.pth", epochs=5, batch_size=1024, image_size=384)
    mplug_recipe.fine_tuning(c)
    # lengths count [CLS]: at least 8 and at most 25 tokens are generated after it
    c.task_options.update(
        smoothing=0.0, max_tokens=25, max_words=0, max_new_tokens=25, min_length=9, variant="coco", java=True
    )
    return c
