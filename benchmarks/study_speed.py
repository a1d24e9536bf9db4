"""Seconds for the same 24 runs of a study: one by one, in two processes, with cached frozen stages, as lanes, and in PyTorch.

    python benchmarks/study_speed.py --out results/study_speed.json

The runs: captions and questions on scenes, LoRA and prefix, two sizes, three learning rates, 1,024 images, a fixed number of
steps, then texts and likelihoods of 256 validation and 256 test images. Each way does all of it in new processes with an empty
compilation cache, from start to results on disk, on the same cores:

- one by one: one process, with every stage computed in each step, or image features computed once.
- two processes: pinned to a core each, sharing runs by claims.
- lanes: the three learning rates of a cell in one vmapped program, evaluated one after the other; image features once.
- transformers + peft: the twelve LoRA runs with the same base, batches, learning rates and steps (jaxpeft's loader feeds both),
  AdamW in eager mode; images encoded under no_grad in each step, or once. Compared with the twelve LoRA runs of jaxpeft.

All ways must agree on a run's test likelihood within 1e-3; PyTorch's, with other random LoRA matrices, is printed with that of
jaxpeft in brackets. Finished ways are kept in --out and not run again. Run all on an idle machine; this takes about 40 minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxpeft.data import base
from jaxpeft.runtime import files

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
PEERS = ("lora",)  # the methods of PyTorch's loop


def get_config(arg=""):
    """The study, for `main.py --config=benchmarks/study_speed.py:cached=false`."""
    from jaxpeft import config
    from jaxpeft.study import config as studies

    a = config.parse_arg(arg, steps=100, cached=True, only="")
    variants = {
        "lora": studies.variant("lora", 3e-3, "none", (4, 16), alpha="r"),
        "prefix": studies.variant("prefix", 3e-2, "none", (8, 32)),
    }
    variants = {name: one for name, one in variants.items() if a.only in ("", name)}
    settings = ("captions_human", "vqa_unstated")
    c = studies.study("speed", __doc__, settings, variants, budgets=(), n_images=(1024,), seeds=1, note="timing only")
    for point in c.points.values():
        point.data.n_train, point.data.n_val, point.data.n_test = 1024, 256, 256
        point.steps, point.optim.schedule, point.eval.forgetting = a.steps, "cosine", False
        if not a.cached:
            point.data.feature_bytes = 0
    return c


def lanes(config, workdir: Path) -> None:
    """The study with the learning rates of each cell together in one program; writes results.jsonl as a study does."""
    import functools

    import jax
    import jax.numpy as jnp

    from jaxpeft.data import pipeline
    from jaxpeft.runtime import host, malloc
    from jaxpeft.study import grid
    from jaxpeft.training import inputs, loop, optim, score, setup

    malloc.keep_freed_memory()
    host.keep_compiled_programs()
    rows = []
    for cell in grid.cells(config):
        runs = [grid.Run(cell, 0, lr, config) for lr in grid.learning_rates(config, cell)]
        c = runs[0].config
        found = setup.prepare(c, lambda _: None)
        known = score.yardsticks(c, found, lambda _: None)
        read = inputs.prepare(c, found, workdir / "features", lambda _: None)
        tuned, frozen = found.trainable, found.frozen
        tx = optim.optimizer(c.optim, tuned, c.steps)

        def start(lr, tx=tx, tuned=tuned):
            *rest, schedule = tx.init(tuned)
            opt = (*rest, schedule._replace(lr=jnp.float32(lr)))
            return loop.TrainState(jnp.int32(0), tuned, opt, jnp.uint32(0))

        state = jax.tree.map(lambda *x: jnp.stack(x), *(start(run.lr) for run in runs))
        step = functools.partial(
            loop.train_step, loss=functools.partial(found.task.loss, found.model), tx=tx, grad_accum=1
        )
        step = jax.jit(jax.vmap(step, in_axes=(0, None, None)), donate_argnums=0)
        batches = pipeline.batches(read.examples("train"), c.batch_size, seed=c.seed)
        for _ in range(c.steps):
            state, _ = step(state, frozen, next(batches))
        for i, run in enumerate(runs):
            mine = jax.tree.map(lambda x, i=i: x[i], state.tuned)
            rows.append({"id": run.id, "metrics": score.score(c, found, read, mine, known).metrics})
    files.write_jsonl(workdir / "results.jsonl", rows)


def without_images(examples):
    """Texts alone; 'index' is the index of each text's image."""
    return base.Examples(examples.arrays | {"index": examples.arrays["image_index"]}, None, [])


class Peer:
    """One LoRA run with transformers and peft, as their users write it: eager mode, AdamW."""

    def __init__(self, run, directory: Path, cached: bool):
        import peft
        import torch
        import transformers

        from jaxpeft import data, tasks
        from jaxpeft.models import loading

        self.c, c = run.config, run.config
        self.task = tasks.build(c.task, **c.task_options)
        self.asks = self.task.asks
        model = loading.abstract(c.base, task=self.task.kind)
        self.template, self.search = self.task.template(model), self.task.search(model)
        self.splits = data.load(c.data, ["train", *c.eval.splits])
        kind = transformers.BlipForQuestionAnswering if self.asks else transformers.BlipForConditionalGeneration
        where = r".*text_(encoder|decoder).*\.(query|value)" if self.asks else r".*text_decoder.*\.(query|value)"
        lora = peft.LoraConfig(r=run.cell.size, lora_alpha=run.cell.size, lora_dropout=0.0, target_modules=where)
        torch.manual_seed(c.seed)
        self.model = peft.get_peft_model(kind.from_pretrained(directory), lora)
        self.inner = self.model.base_model.model
        self.tables = {name: self._table(split) for name, split in self.splits.items()} if cached else {}

    def _encode(self, pictures):
        import torch

        from jaxpeft.inputs import images

        mean, std = (torch.tensor(c)[:, None, None] for c in (images.MEAN_C, images.STD_C))
        image_BCYX = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            return self.inner.vision_model((image_BCYX - mean) / std)[0]

    def _table(self, split):
        import torch

        n = len(split.rows)
        starts = range(0, n, 64)
        return torch.cat([self._encode([split.images[i] for i in range(s, min(s + 64, n))]) for s in starts])

    def _context(self, batch, name):
        """(what the decoder attends to, its mask) for a batch of the split."""
        import torch

        index = batch["index"]
        found = self.tables.get(name)
        states = self._encode([self.splits[name].images[i] for i in index]) if found is None else found[index]
        if not self.asks:
            return states, None
        question = torch.tensor(batch["prompt"]).long()
        mask = (question != self.template.pad).long()
        return self.inner.text_encoder(question, mask, encoder_hidden_states=states)[0], mask

    def _losses(self, batch, name):
        """Cross-entropies (B, A, T)."""
        import torch

        states, mask = self._context(batch, name)
        tokens, targets = (torch.tensor(batch[key]).long() for key in ("tokens", "targets"))
        n, a, t = tokens.shape
        flat = tokens.reshape(-1, t)
        if a > 1:
            states, mask = (None if x is None else x.repeat_interleave(a, 0) for x in (states, mask))
        there = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        logits = self.inner.text_decoder(flat, (flat != self.template.pad).long(), **there).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), reduction="none")
        return losses.reshape(n, a, t)

    def train(self):
        import torch

        from jaxpeft.data import pipeline

        c, tuned = self.c, [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(tuned, lr=c.optim.lr, weight_decay=0.0)
        n_warm = round(c.optim.warmup * c.steps)

        def rate(step):
            cosine = 0.5 * (1 + np.cos(np.pi * min(1, (step - n_warm) / (c.steps - n_warm))))
            return step / n_warm if step < n_warm else cosine

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        examples = without_images(self.task.examples(self.splits["train"], self.template))
        batches = pipeline.batches(examples, c.batch_size, seed=c.seed)
        self.model.train()
        for _ in range(c.steps):
            batch = next(batches)
            weights = torch.tensor(batch["weights"])
            loss = (self._losses(batch, "train") * weights).sum() / (len(weights) if self.asks else weights.sum())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tuned, c.optim.clip_norm)
            optimizer.step()
            schedule.step()

    def evaluate(self, name: str) -> dict:
        """The scores of greedily decoded texts, and nats per reference token."""
        import torch

        from jaxpeft.data import pipeline

        self.model.eval()
        c, task, template, split = self.c, self.task, self.template, self.splits[name]
        examples, cases = task.examples(split, template), task.eval_examples(split, template)
        total, count, texts, prompt = 0.0, 0.0, [], list(template.start)
        with torch.no_grad():
            for batch, n_real in pipeline.one_pass(without_images(examples), c.eval.batch_size):
                scored = torch.tensor(batch["weights"] > 0)
                total += float((self._losses(batch, name) * scored)[:n_real].double().sum())
                count += float(scored[:n_real].sum())
            for batch, n_real in pipeline.one_pass(without_images(cases), c.eval.batch_size):
                states, mask = self._context(batch, name)
                written = self.inner.text_decoder.generate(
                    input_ids=torch.tensor([prompt] * len(states)), encoder_hidden_states=states,
                    encoder_attention_mask=mask, do_sample=False, num_beams=1, max_length=self.search.length,
                    min_length=self.search.min_length, pad_token_id=template.pad, eos_token_id=template.stop[0],
                )  # fmt: skip
                texts += [template.text(row[len(prompt) :]) for row in written[:n_real].tolist()]
        return task.score(cases.rows, texts) | {"nll": total / count}


def torch_points(config, workdir: Path, cached: bool) -> None:
    """The LoRA runs with transformers and peft, one by one; base_TASK directories are in `workdir`."""
    import reference

    from jaxpeft.study import grid

    reference.quiet_torch(len(os.sched_getaffinity(0)))
    reference.golden().pass_cross_attention_mask()
    rows = []
    for cell in grid.cells(config):
        for lr in grid.learning_rates(config, cell):
            run = grid.Run(cell, 0, lr, config)
            peer = Peer(run, workdir / f"base_{run.config.task}", cached)
            peer.train()
            metrics = {name: {"tuned": peer.evaluate(name)} for name in run.config.eval.splits}
            rows.append({"id": run.id, "metrics": metrics})
    files.write_jsonl(workdir / "results.jsonl", rows)


def bases(workdir: Path) -> None:
    """Write the shipped base as transformers directories."""
    import jaxpeft as jp

    for task in ("captioning", "vqa"):
        model, params = jp.load("tiny", task=task)
        jp.export_hf(model, {"params": params}, workdir / f"base_{task}")


WAYS = {  # label: (frozen stages once, processes, what runs)
    "one by one, every stage each step": (False, 1, "study"),
    "two processes, every stage each step": (False, 2, "study"),
    "one by one, image features once": (True, 1, "study"),
    "two processes, image features once": (True, 2, "study"),
    "lanes of three rates, image features once": (True, 1, "lanes"),
    "transformers + peft, images each step": (False, 1, "torch"),
    "transformers + peft, image features once": (True, 1, "torch"),
    "jaxpeft, the same twelve, every stage each step": (False, 1, "study lora"),
    "jaxpeft, the same twelve, image features once": (True, 1, "study lora"),
}


def timed(way: str, steps: int, workdir: Path) -> dict:
    """Do the runs one way in new processes -> {'', points, s, s a point, nll: {run: test nats per token}}."""
    cached, processes, kind = WAYS[way]
    only = "lora" if kind in ("torch", "study lora") else ""
    config = f"steps={steps},cached={str(cached).lower()},only={only}"
    child = [sys.executable, __file__, "--child"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(workdir / "programs")}
    if kind == "torch":
        subprocess.run([*child, "bases", config, str(workdir)], check=True, cwd=ROOT, env=environment)
    command = [*child, kind, config, str(workdir)]
    if kind.startswith("study"):
        command = [sys.executable, "main.py", f"--config=benchmarks/study_speed.py:{config}"]
        command += [f"--workdir={workdir}", f"--workers={processes}"]
    began = time.perf_counter()
    with (workdir / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit((workdir / "log.txt").read_text()[-3000:])
    found = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    row = {"": way, "points": len(found), "s": round(seconds, 1), "s a point": round(seconds / len(found), 2)}
    return row | {"nll": {one["id"]: one["metrics"]["test"]["tuned"]["nll"] for one in found}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, config, workdir = args.child
        if kind == "bases":
            return bases(Path(workdir))
        config = get_config(config)
        if kind == "lanes":
            return lanes(config, Path(workdir))
        return torch_points(config, Path(workdir), config.points.vqa.data.feature_bytes > 0)
    if not args.out:
        parser.error("--out is required")
    import reference

    reference.use_threads(args.threads)
    settings, rows = {"steps": args.steps, "threads": args.threads}, []
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if before["settings"] != settings:
            parser.error(f"{args.out} has other settings ({before['settings']}); choose another file")
        rows = before["rows"]
    facts = reference.facts()
    for way in args.ways:
        if way not in {row[""] for row in rows}:
            with tempfile.TemporaryDirectory() as workdir:
                rows.append(timed(way, args.steps, Path(workdir)))
            reference.write_json(args.out, {**facts, "settings": settings, "rows": rows})
    print(reference.table([{key: x for key, x in row.items() if key != "nll"} for row in rows]))

    ours = [row["nll"] for row in rows if WAYS[row[""]][2] != "torch"]
    first = {name: nll for row in reversed(ours) for name, nll in row.items()}
    gap = max((abs(nll - first[name]) for row in ours for name, nll in row.items()), default=0.0)
    print(f"largest difference of test nats per token between ways of jaxpeft: {gap:.2e}")
    for row in rows:
        if WAYS[row[""]][2] == "torch":
            print(
                f"{row['']}, nats: " + ", ".join(f"{n} {x:.3f} ({first.get(n, 0):.3f})" for n, x in row["nll"].items())
            )
    if gap > 1e-3:
        raise SystemExit("not the same work: the likelihoods differ")


if __name__ == "__main__":
    main()
