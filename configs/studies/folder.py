"""A study of your own images and texts: LoRA, prefix tuning and the head alone, with the protocol of new studies.

    python main.py --config=configs/studies/folder.py:root=pics,images=100+400 --workdir=runs/my_study --dry_run
    python main.py --config=configs/studies/folder.py:root=pics,images=100+400 --workdir=runs/my_study

`root` and `annotations` are as in configs/folder.py. `images`: the numbers of training images to compare, the largest at most
what the training split has. Every run does `steps` steps and keeps its best validation, that of no training included. Rates are
searched over a factor of 81 in a quarter of the steps, further where the best is at an edge, and chosen by nats per token. No
claim is judged: a setting would have to declare `consistent`.
"""

from jaxpeft import config
from jaxpeft.study import config as studies

SETTING = {"captioning": "my_captions", "vqa": "my_questions"}


def get_config(arg=""):
    a = config.parse_arg(
        arg, root="", annotations="", task="captioning", base="tiny", images="64+256", seeds=3, steps=1000
    )
    if not a.root:
        raise ValueError("configs/studies/folder.py requires root=DIRECTORY")
    if a.task not in SETTING:
        raise ValueError(f"task is {a.task!r}; choose one of {', '.join(SETTING)}")
    if not all(part.isdecimal() for part in a.images.split("+")):
        raise ValueError(f"images is {a.images!r}; give numbers of images with + between them, such as 64+256")

    def point(task):
        c = studies.fixed_budget(config.folder(config.get_config(task), a.root), a.steps)
        c.base, c.data.annotations, c.eval.splits = a.base, a.annotations or None, ("val", "test")
        c.batch_size = c.eval.batch_size = 32 if a.base == "tiny" else 8
        return c

    variants = {
        "lora_head": studies.variant("lora", 2e-3, sizes=(4, 16), alpha=16.0),  # one scale for all ranks
        "prefix_head": studies.variant("prefix", 3e-2, sizes=(4, 16)),
        "head": studies.CONTROLS["head"],
    }
    if a.base != "tiny":  # a large base wants smaller rates
        variants = {name: one | {"lr": one["lr"] / 10} for name, one in variants.items()}
    return studies.study(
        "my_study", "", {SETTING[a.task]: {"task": a.task}}, variants, budgets=(), n_images=map(int, a.images.split("+")),
        seeds=a.seeds, learning_rates=studies.WIDE, make_point=point, measure="nll", search_steps=0.25, extend=4,
    )  # fmt: skip
