"""The quickstart: LoRA and the head's transform, from the shipped tiny BLIP, on procedural scenes; minutes on 2 cores.

python main.py --config=configs/quickstart.py --workdir=runs/quickstart
python main.py --config=configs/quickstart.py:task=captioning --workdir=runs/quickstart_captioning
"""

from configs import common


def get_config(arg=""):
    a = common.parse_arg(arg, task="vqa", steps=0)
    c = common.get_config(a.task, "lora", 16, head="transform")
    c.data.n_train = 8192
    c.data.n_val = 0
    c.optim.lr = 2e-3  # of 1e-3 and 2e-3, on 512 validation pictures, with the base before: .632 and .665
    c.steps = a.steps or {"vqa": 3000, "captioning": 1000}[a.task]
    return c
