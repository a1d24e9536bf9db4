"""The crossed design: two tasks, each on bases that were pre-trained on it and on bases that were pre-trained on the other.

Hypothesis (arXiv 2403.08433): where a task differs from pre-training, more images and more tunable parameters help; where it
does not, they do not. Here the same task, data, metric and method are compared, and only the base's pre-training differs:
mixture C (noisy captions) or Q (noisy questions and answers), on the same images and the same number of steps, after the same
text stage. Both tasks have clean texts, so that a consistent base too has something to learn.

    for s in 0 1 2; do
      python main.py --config=configs/pretrain.py:mixture=captions,seed=$s --workdir=runs/bases/C$s
      python main.py --config=configs/pretrain.py:mixture=questions,seed=$s --workdir=runs/bases/Q$s
    done
    python main.py --config=configs/studies/crossed.py:part=gates --workdir=runs/crossed
    python benchmarks/crossed.py --workdir=runs/crossed                    gates, which must pass; later the estimands
    python main.py --config=configs/studies/crossed.py:part=lora --workdir=runs/crossed
    python main.py --config=configs/studies/crossed.py --workdir=runs/crossed
    python main.py --config=configs/studies/crossed.py:bases=tiny --workdir=runs/none --dry_run            hours, without bases

| setting | task | base | consistent |
|---|---|---|---|
| cap_C | captions in the style of C, without noise | C | yes |
| cap_Q | the same | Q | no |
| qa_Q | questions of Q's types, without noise | Q | yes |
| qa_C | the same | C | no |

The unit is the base: seed s of a run is on base s, so intervals over seeds are intervals over bases. The estimands are C7 of
study/claims.py, data and size. Every run has a fixed budget, by the number of images and equal in both tasks, and keeps its
best validation, step 0 included. Rates are searched over a factor of 81 in a quarter of the budget, further where the best is
at an edge. Nats per token choose the rate and are the primary measure. The parts share one directory: nothing is run twice.
"""

from jaxpeft import config
from jaxpeft.study import config as studies

STEPS = {64: 800, 256: 1500, 1024: 3000, 4096: 5000}
TYPES = ("color", "shape", "position")  # what captions state too: pretrain.STATED
CEILING = {"cap": 7.0, "qa": 1.0}  # python benchmarks/crossed.py --ceiling; the one right answer
PARTS = {"gates": ("full_text",), "lora": ("full_text", "head", "lora_head"), "all": None}
BUDGETS = (
    20_000,
    40_000,
    80_000,
    160_000,
)  # stored parameters of the method; LoRA of rank 1 on all text linears has 19,968


def get_config(arg=""):
    a = config.parse_arg(arg, bases="runs/bases", part="all", seeds=3)
    if a.part not in PARTS:
        raise ValueError(f"part is {a.part!r}; choose one of {', '.join(PARTS)}")

    def setting(task, mixture, **about):
        base = a.bases if a.bases == "tiny" else f"{a.bases}/{mixture}{{seed}}/checkpoint"
        return {"task": task, "base": base, **about}

    cap = {"data": {"captions": "clean"}, "ceiling": CEILING["cap"]}
    qa = {"data": {"types": TYPES}, "ceiling": CEILING["qa"]}
    settings = {
        "cap_C": setting("captioning", "C", consistent=True, **cap),
        "cap_Q": setting("captioning", "Q", consistent=False, **cap),
        "qa_Q": setting("vqa", "Q", consistent=True, **qa),
        "qa_C": setting("vqa", "C", consistent=False, **qa),
    }
    variants = studies.centred(prompts=(2, 8, 32))
    variants["full_text"] |= {"base": True}  # its runs score the frozen base too, for the gates
    variants["head"] |= {"base": False}
    variants["lora_qv_head"] |= {"budgets": BUDGETS[1:2], "n_images": (256, 4096)}
    variants["full"] |= {"n_images": (256, 4096)}
    used = {name: one for name, one in variants.items() if name in (PARTS[a.part] or variants)}
    return studies.study(
        "crossed", __doc__, settings, used, BUDGETS, tuple(STEPS), seeds=a.seeds, learning_rates=studies.WIDE, make_point=point,
        steps=tuple(STEPS.values()), measure="nll", search_steps=0.25, extend=4,
    )  # fmt: skip


def point(task):
    """The config of one run: equal budgets and equal numbers of texts per image in both tasks."""
    c = studies.fixed_budget(config.get_config(task), max(STEPS.values()))
    c.data.n_train, c.data.n_test, c.data.texts = max(STEPS), 1024, 2
    c.batch_size = 32
    return c
