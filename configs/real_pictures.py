"""Real pictures, emoji of four drawing styles: from the tiny base, which knows only scenes, every parameter tuned.

    python -m jaxpeft.datasets.emoji --out data/emoji --floors
    python main.py --config=configs/real_pictures.py:task=vqa,root=data/emoji --workdir=runs/real_vqa
    python main.py --config=configs/real_pictures.py:task=captioning,root=data/emoji --workdir=runs/real_captioning

Learns Google's and Twitter's drawings. test_style and test_style_hard show the same concepts in styles that it never
saw; test_concept shows concepts that it never saw: their names cannot be right, kind and animal can. Compare with the
floors in floors.json. The words are human-written; captions, questions and answers are rule-derived.
"""

from configs import common
from jaxpeft.datasets.emoji_words import SPLITS


def get_config(arg=""):
    a = common.parse_arg(arg, task="vqa", root="data/emoji", steps=8000, seed=0)
    c = common.folder(common.get_config(a.task, "full"), a.root)
    c.seed = a.seed
    c.data.annotations = {split: f"annotations/{split}.jsonl" for split in SPLITS}
    # Styles face to either side, so mirroring teaches something that is true; clocks and moons, some 30 of 1,013
    # concepts, are taught wrongly by it. 'crop' leaves it out.
    c.data.augment = "crop_flip"
    c.model.dropout = 0.1  # 1,541 pictures and 900 (vqa) or 2,000 new words: overfitting is the risk
    c.optim.lr = 1e-3
    c.optim.decay = 0.05
    c.steps = a.steps
    c.eval.splits = SPLITS[2:]
    # names have up to 8 words and captions 12; beside them stand [DEC], [SEP] and the prompt of captions
    c.task_options.length = {"vqa": 12, "captioning": 20}[a.task]
    return c
