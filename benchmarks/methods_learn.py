"""A check that each method learns: VQA and captioning on scenes from the shipped base, one small budget, several seeds.

    python benchmarks/methods_learn.py --task vqa --out results/methods_learn_vqa.json
    python benchmarks/methods_learn.py --task captioning --out results/methods_learn_captioning.json

Every method stores as close to 50,000 parameters as it can (`solve_size`; size and stored parameters are shown), and the
head's transform is trained as well; the head alone is the control. Each method has three learning rates, a factor of three
apart, around the usual value of its class; all are run with seed 0, and the best on validation images is used for every seed.
All methods have the same examples (4,096 images), a fixed number of steps, AdamW, clipping 1 and a cosine schedule. Scores on
512 test images are those of the chosen learning rate: mean and range over seeds, which vary initialisation and order. This is a
smoke test of learning, not a ranking: with so few steps a score reflects speed as much as capacity. Finished methods are kept
in --out and not run again.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxpeft.runtime import files

sys.path.insert(0, str(Path(__file__).parents[1]))

import jaxpeft as jp
from jaxpeft import config, data, tasks, tree
from jaxpeft.adapt import sites
from jaxpeft.data import pipeline
from jaxpeft.methods import Head
from jaxpeft.models import loading
from jaxpeft.runtime import host, malloc
from jaxpeft.training import evaluate, frozen_cache, loop, optim

BUDGET, RATES = 50_000, (1 / 3, 1, 3)
# method and its middle learning rate
METHODS = {
    "head alone": (None, 3e-3),
    "prompt": (jp.Prompt(), 1e-1),
    "prefix": (jp.Prefix(), 3e-2),
    "serial adapter": (jp.SerialAdapter(), 3e-3),
    "parallel adapter": (jp.ParallelAdapter(), 3e-3),
    "LoRA": (jp.LoRA(), 3e-3),
    "DoRA": (jp.DoRA(), 3e-3),
    "PiSSA": (jp.PiSSA(), 1e-3),
    "VeRA": (jp.VeRA(), 1e-2),
    "IA3": (jp.IA3(), 1e-2),
    "SSF": (jp.SSF(), 3e-3),
    "OFT": (jp.OFT(), 3e-3),
    "compacter": (jp.Compacter(), 3e-3),
    "MAM": (jp.MAM(length=16), 3e-3),
    "UniPELT": (jp.UniPELT(length=8, bottleneck=16), 3e-3),
    "BitFit": (jp.BitFit(), 3e-3),
    "LayerNorms": (jp.LayerNorms(targets="^text_"), 3e-3),
    "VPT deep": (jp.VPT(patch=8, depth="deep"), 3e-2),  # not shallow: it would need 390 tokens for the budget
    "full": (jp.Full(), 3e-4),
}
STEPS = {"vqa": 600, "captioning": 200}


class Bench:
    """The data, base and image features of one task, computed once."""

    def __init__(self, task: str, steps: int):
        c = config.get_config(task, "lora")
        c.data.update({"n_train": 4096, "n_val": 256, "n_test": 512})
        c.steps, self.config = steps, c
        self.task = tasks.build(task, **c.task_options)
        self.model, self.params, _ = loading.read("tiny", task=self.task.kind)
        self.template = self.task.template(self.model)
        self.splits = data.load(c.data, ["train", "val", "test"])
        self.pictures = {name: pipeline.Resized.of(split.images, self.model) for name, split in self.splits.items()}
        base = {"params": self.params}
        found, images = frozen_cache.programs(self.model, base), self.model.stages[:1]
        self.cache = frozen_cache.FrozenCache(self.model, base, images, found, {}, limit=0)

    def examples(self, split, cached):
        """The training examples."""
        return self._filled(split, self.task.examples(self.splits[split], self.template), cached)

    def _filled(self, split, examples, cached):
        """The examples with image features of the base in place of images, where they are `cached`."""
        examples = dataclasses.replace(examples, images=self.pictures[split])
        return self.cache.fill(self.splits[split], examples) if cached else examples

    def score(self, variables, split, cached) -> float:
        cases = self._filled(split, self.task.eval_examples(self.splits[split], self.template), cached)
        written = evaluate.predict(self.model, variables, self.task, cases, batch_size=128)
        return self.task.score(cases.rows, [one["text"] for one in written])[self.task.main_metric]

    def trainer(self, methods, log):
        """A function run(seed, lr) -> variables; its step is compiled once for all learning rates and seeds."""
        variables = sites.attach(self.model, self.params, methods, jax.random.key(0))
        mask = sites.trainable(variables)
        cached = not any(on and "/vision" in name for name, on in tree.flatten(mask).items())
        examples = self.examples("train", cached)
        tx = optim.optimizer(self.config.optim, tree.split(variables, mask)[0], self.config.steps)
        step = functools.partial(
            loop.train_step, loss=functools.partial(self.task.loss, self.model), tx=tx, grad_accum=1
        )
        step = jax.jit(step, donate_argnums=0)

        def run(seed, lr):
            variables = sites.attach(self.model, self.params, methods, jax.random.key(seed))
            tuned, frozen = tree.split(variables, mask)
            tuned = jax.tree.map(jnp.array, tuned)
            *rest, schedule = tx.init(tuned)
            opt = (*rest, schedule._replace(lr=jnp.float32(lr)))
            state = loop.TrainState(jnp.int32(0), tuned, opt, jnp.uint32(seed))
            stream = pipeline.batches(examples, self.config.batch_size, seed=seed)
            for _ in range(self.config.steps):
                state, _ = step(state, frozen, next(stream))
            return tree.join(state.tuned, frozen)

        return run, cached, sites.counts(variables, mask)


def learn(bench, name, seeds, log=print) -> dict:
    method, middle = METHODS[name]
    solved, methods = None, [] if method is None else sites.as_methods(method)
    if any(one.size_field for one in methods):
        solved = jp.solve_size(bench.model, method, BUDGET)
        methods = sites.as_methods(solved.method)
    if name != "full":
        methods = (*methods, Head())
    began = time.perf_counter()
    run, cached, counts = bench.trainer(tuple(methods), log)
    curve, first = {}, {}
    for factor in RATES:
        lr = middle * factor
        first[lr] = run(0, lr)
        curve[lr] = bench.score(first[lr], "val", cached)
    best = max(curve, key=curve.get)
    tests = [bench.score(first[best] if seed == 0 else run(seed, best), "test", cached) for seed in range(seeds)]
    row = {"method": name, "size": solved and solved.size, "capped": bool(solved and solved.capped), "counts": counts}
    row |= {"validation": {f"{lr:.0e}": score for lr, score in curve.items()}, "lr": best, "test": tests}
    row |= {"mean": statistics.mean(tests), "at_edge": best != middle, "seconds": time.perf_counter() - began}
    log(show(row))
    return row


def show(row) -> str:
    rates = " ".join(f"{lr}:{score:.3f}" for lr, score in row["validation"].items())
    size = "-" if row["size"] is None else f"{row['size']}{' (most)' if row['capped'] else ''}"
    return (
        f"{row['method']:18} size {size:10} stored {row['counts']['stored']:>9,}  "
        f"test {row['mean']:.3f} ({min(row['test']):.3f} to {max(row['test']):.3f})  val {rates}  {row['seconds']:.0f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=STEPS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="600 (vqa), 200 (captioning)")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=[*METHODS])
    args = parser.parse_args()
    malloc.keep_freed_memory()
    steps = args.steps or STEPS[args.task]
    settings = {"task": args.task, "steps": steps, "seeds": args.seeds, "budget": BUDGET}
    facts = {"command": "python " + " ".join(sys.argv), "machine": host.machine(), "versions": host.versions()}
    done = json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "rows": []}
    if done["settings"] != settings:
        parser.error(f"{args.out} holds a run with other settings ({done['settings']}); choose another file")
    bench = Bench(args.task, steps)
    base = bench.score({"params": bench.params}, "test", True)
    rows = bench.task.eval_examples(bench.splits["test"], bench.template).rows
    guesses = bench.task.guesses(bench.splits["train"], rows)
    floor = {name: bench.task.scores(rows, texts)[bench.task.main_metric] for name, texts in guesses.items()}
    print(
        f"{args.task}, {steps} steps, test {bench.task.main_metric}: frozen base {base:.3f}, blind {floor}", flush=True
    )
    for name in args.only:
        if name not in {row["method"] for row in done["rows"]}:
            done["rows"].append(learn(bench, name, args.seeds, functools.partial(print, flush=True)))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(args.out, facts | done | {"base": base, "blind": floor})


if __name__ == "__main__":
    main()
