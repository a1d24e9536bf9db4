"""What the program computed before it was moved, as digests and exact numbers: `python tests/golden/make_before.py [--check]`.

Without --check it writes tests/golden/before.json; with it, everything is computed again and every difference is listed. Run it
from the project's root. Numbers are exact on one machine only.
"""

import functools
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

from jaxpeft.data import base

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path[:0] = [".", "tests"]

import jax
import jax.numpy as jnp
import methods_table
import mini_coco
import numpy as np
import optax
import tiny
from ml_collections import ConfigDict
from PIL import Image

import jaxpeft as jp
from jaxpeft import data, methods, tree
from jaxpeft.adapt import sites
from jaxpeft.data import pipeline, scenes
from jaxpeft.data.coco import prepare
from jaxpeft.tasks import build
from jaxpeft.training import evaluate, loop, run

jax.config.update("jax_disable_most_optimizations", True)
BEFORE = Path(__file__).with_name("before.json")


def digest(*arrays) -> str:
    found = hashlib.sha256()
    for x in arrays:
        x = np.asarray(x)
        found.update(f"{x.dtype}{x.shape}".encode() + x.tobytes())
    return found.hexdigest()[:16]


def of_tree(leaves) -> str:
    flat = tree.flatten(leaves)
    return digest(*(flat[name] for name in sorted(flat)), np.array(sorted(flat)))


def table():
    """Leaves that `attach` makes, counts and sites, for every row of the table of methods."""
    found = {}
    for i, row in enumerate(methods_table.ROWS):
        variables, mask = methods_table.attached(row)
        names = [one["leaf"] for one in sites.report(variables, mask)]
        found[f"{row.name}{i}"] = {
            "leaves": of_tree(variables["peft"]), "counts": sites.counts(variables, mask), "report": digest(np.array(names))
        }  # fmt: skip
    return found


def all_sites():
    found = {}
    for ask in (False, True):
        model = tiny.model(ask)
        found[f"vqa={ask}"] = [f"{s.kind} {s.path} {s.shape} {s.layers}" for s in sites.sites(model)]
    return found


def own_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = ["image,caption"]
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (40 + i, 60 - i, 3), np.uint8)).save(root / f"{i}.png")
        rows += [f"{i}.png,the {c} thing number {i % 7}" for c in ("red", "blue")]
    (root / "captions.csv").write_text("\n".join(rows) + "\n")
    return root


def loaded(scratch: Path):
    """(task, split of training, whether augmented) for each data set."""
    scene = dict(name="scenes", seed=0, n_train=64, n_val=0, n_test=8, captions="human", types=())
    root = own_folder(scratch)
    folder = dict(
        name="folder", root=str(root), annotations="captions.csv", questions=None, on_error="raise", val_fraction=0.1,
        test_fraction=0.1, data_dir=str(scratch / "prepared_folder"),
    )  # fmt: skip
    drawn = mini_coco.draw(scratch / "coco", 12)
    for name in ("coco_captions", "vqav2"):
        prepare.prepare(
            name, drawn, scratch / "prepared", visual_genome=False, workers=1, check_sizes=False, log=lambda _: None
        )
    coco = dict(data_dir=str(scratch / "prepared"))
    for task, options in (
        ("captioning", scene), ("vqa", scene), ("captioning", folder), ("captioning", dict(name="coco_captions", **coco)),
        ("vqa", dict(name="vqav2", **coco)),
    ):  # fmt: skip
        yield task, options["name"], data.load(ConfigDict(options), ["train"])["train"]


def batches():
    found = {}
    model, _ = jp.load("tiny", task="vqa")
    with tempfile.TemporaryDirectory() as scratch:
        for name, kind, split in loaded(Path(scratch)):
            task = (
                build(name, max_tokens=30) if name == "captioning" else build(name, max_question=35, max_new_tokens=9)
            )
            examples = task.examples(split, task.template(model))
            images = pipeline.Resized.of(split.images, model)
            for augment in ("none", "blip"):
                examples = base.Examples(examples.arrays, images, examples.rows)
                stream = pipeline.batches(examples, 6, seed=3, augment=augment)
                old = {"prompt": "question"}  # the batch key of version 0.1
                batches = ({old.get(key, key): x for key, x in next(stream).items()} for _ in range(3))
                found[f"{name} {kind} {augment}"] = [of_tree(one) for one in batches]
    return found


def tokens():
    model, _ = jp.load("tiny", task="vqa")
    texts = [scenes.text(i, k) for i in range(250) for k in range(4)]
    golden = json.loads(Path("tests/golden/text.json").read_text())
    strange = ["Café  déjà-vu!!", "[SEP] [MASK] a [DEC]", "", "日本語 text", "it's 3.5\tpounds\n", "UPPER lower"]
    return {
        "ids": digest(*(np.array(model.tokenizer.encode(t)) for t in texts + strange)),
        "golden": len(golden),
    }


def losses():
    """Three steps with dropout in the model and in LoRA."""
    found = {}
    for name in ("captioning", "vqa"):
        ask = name == "vqa"
        model = tiny.model(ask, dropout=0.1)
        method = methods.LoRA(rank=2, dropout=0.2)
        variables = sites.attach(model, tiny.params(ask), method, jax.random.key(0))
        tuned, frozen = tree.split(variables, sites.trainable(variables))
        tx = optax.adamw(1e-2)
        state = loop.TrainState(jnp.int32(0), tuned, tx.init(tuned))
        step = jax.jit(
            functools.partial(loop.train_step, loss=functools.partial(build(name).loss, model), tx=tx, grad_accum=1)
        )
        out = []
        for i in range(3):
            batch = tiny.batch(4, 3 if ask else 1, seed=i)
            if not ask:
                del batch["prompt"]
            state, metrics = step(state, frozen, batch)
            out.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        found[name] = out
    return found


def answers():
    """What the shipped model writes, greedy and with beams, with scores."""
    found = {}
    images = [scenes.Images("test", 6)[i] for i in range(6)]
    asks = [scenes.record("test", i)["questions"][0]["question"] for i in range(6)]
    for ask in (False, True):
        model, params = jp.load("tiny", task="vqa" if ask else "captioning")
        for beams in (1, 3):
            found[f"vqa={ask} beams={beams}"] = jp.generate(
                model, {"params": params}, images, asks if ask else None, beams=beams, top=beams
            )
    task = build("vqa", rank_answers=20) if "rank_answers" in build("vqa").__dataclass_fields__ else None
    found["rank"] = None
    if task is None:
        split = data.load(
            ConfigDict(dict(name="scenes", seed=0, n_train=64, n_val=0, n_test=8, captions="human", types=())), ["test"]
        )["test"]
        task = build("vqa", max_question=35, max_new_tokens=9)
        cases = task.eval_examples(split, task.template(model))
        cases = base.Examples(cases.arrays, pipeline.Resized.of(split.images, model), cases.rows)
        found["rank"] = evaluate.choose(
            model, {"params": params}, task, cases, ["yes", "no", "red", "2", "circle"], batch_size=8
        )
    return found


def whole_run():
    """A run of 20 steps with the shipped base."""
    found = {}
    for name, method, head in (
        ("vqa", "lora", "none"),
        ("captioning", "prefix", "none"),
        ("vqa", "serial_adapter", "transform"),
    ):
        c = tiny.config_of("tiny", name, method, head, steps=20)
        with tempfile.TemporaryDirectory() as workdir:
            result = run.run(c, workdir, log=lambda *_: None)
            lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
            texts = [
                json.loads(line)["tuned"] for line in (Path(workdir) / "predictions.jsonl").read_text().splitlines()
            ]
        found[f"{name} {method} {head}"] = {
            "metrics": {k: v for k, v in result["metrics"]["test"].items()}, "counts": result["counts"],
            "digests": result["digests"], "losses": [line["loss"] for line in lines if "loss" in line], "texts": texts,
        }  # fmt: skip
    return found


def differences(old, new, where=""):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{where}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{where}/{i}")
    elif old != new:
        yield f"{where}: {str(old):.90} -> {str(new):.90}"


PARTS = {
    "methods": table, "sites": all_sites, "batches": batches, "tokens": tokens, "losses": losses, "answers": answers,
    "runs": whole_run,
}  # fmt: skip

if __name__ == "__main__":
    only = [word for word in sys.argv[1:] if word in PARTS]
    now = json.loads(json.dumps({name: PARTS[name]() for name in only or PARTS}))
    if "--check" not in sys.argv:
        BEFORE.write_text(json.dumps(now, indent=1) + "\n")
        sys.exit(f"wrote {BEFORE}")
    before = {name: part for name, part in json.loads(BEFORE.read_text()).items() if name in now}
    different = list(differences(before, now))
    print("\n".join(different) or f"nothing differs: {', '.join(now)}")
    sys.exit(bool(different))
