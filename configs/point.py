"""One run: a task, a method and its size, a fraction of the data, and a seed.

python main.py --config=configs/point.py:task=vqa,method=lora,size=8,fraction=0.1,seed=0 --workdir=runs/point
"""

from jaxpeft import config

# starting points for a search of the learning rate: for base leaves, prompts, prefixes and scales; 3e-3 for the rest
LR = {"full": 5e-4, "prompt": 1e-1, "vpt": 3e-2, "prefix": 3e-2, "vera": 1e-2, "ia3": 1e-2}


def get_config(arg=""):
    a = config.parse_arg(
        arg,
        task="vqa",
        method="lora",
        size=8,
        head="none",
        fraction=1.0,
        n_images=0,
        seed=0,
        lr=0.0,
        steps=0,
        init="base",
    )
    c = config.get_config(a.task, a.method, a.size, a.head)
    c.seed = c.data.subset_seed = a.seed
    c.data.fraction = a.fraction
    if a.n_images:
        c.data.n_images = a.n_images
    c.init = a.init
    c.optim.lr = a.lr or LR.get(a.method, 3e-3)
    c.steps = a.steps or {"captioning": 400}.get(a.task, c.steps)
    return c
