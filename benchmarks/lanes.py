"""Lanes: K runs that differ only in learning rate, in one vmapped program on the same batches. Are they faster?

    python benchmarks/lanes.py --out results/lanes.json

Milliseconds per step and run of K lanes and of a single run, in turns in one process; image features are computed once in
both. Trainable leaves after `--check` steps must equal those of separate runs within 1e-5. The same command works on an
accelerator.
"""

import argparse
import functools
import statistics
import time

import reference
from reference import facts, write_json


def measure(task: str, method: str, lanes: list[int], runs: int, check: int) -> list[dict]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from methods_learn import Bench

    from jaxpeft import methods, tree
    from jaxpeft.adapt import sites
    from jaxpeft.data import pipeline
    from jaxpeft.training import loop, optim

    bench = Bench(task, 1000)
    chosen = methods.build(method, "transform")
    variables = sites.attach(bench.model, bench.params, chosen, jax.random.key(0))
    tuned, frozen = tree.split(variables, sites.trainable(variables))
    tx = optim.optimizer(bench.config.optim, tuned, 1000)
    step = functools.partial(loop.train_step, loss=functools.partial(bench.task.loss, bench.model), tx=tx, grad_accum=1)
    stream = pipeline.batches(bench.examples("train", cached=True), bench.config.batch_size, seed=0)
    batches = [jax.device_put(next(stream)) for _ in range(max(check, 8))]

    def state(lr):
        *rest, schedule = tx.init(tuned)
        opt = (*rest, schedule._replace(lr=jnp.float32(lr)))
        return loop.TrainState(jnp.int32(0), jax.tree.map(jnp.array, tuned), opt, jnp.uint32(0))

    def stacked(k):
        return jax.tree.map(lambda *x: jnp.stack(x), *(state(1e-3 * (i + 1)) for i in range(k)))

    alone = jax.jit(step)
    together = {k: jax.jit(jax.vmap(step, in_axes=(0, None, None))) for k in lanes}
    first, rows, seconds = {}, [], {k: [] for k in [1, *lanes]}
    states = {1: state(1e-3)} | {k: stacked(k) for k in lanes}
    for k in seconds:  # warm up and check
        separate = [state(1e-3 * (i + 1)) for i in range(k)]
        for i in range(check):
            separate = [alone(one, frozen, batches[i])[0] for one in separate]
            if k > 1:
                states[k], _ = together[k](states[k], frozen, batches[i])
        if k > 1:
            pairs = [
                (x, y[i]) for i, one in enumerate(separate)
                for x, y in zip(jax.tree.leaves(one.tuned), jax.tree.leaves(states[k].tuned), strict=True)
            ]  # fmt: skip
            first[k] = max(float(np.abs(x - y).max()) for x, y in pairs)
    for turn in range(runs):
        for k in list(seconds)[:: 1 if turn % 2 == 0 else -1]:
            began = time.perf_counter()
            for batch in batches[:8]:
                call = alone if k == 1 else together[k]
                states[k], _ = call(states[k], frozen, batch)
            jax.block_until_ready(states[k])
            seconds[k].append((time.perf_counter() - began) / 8 / k)
    for k, values in seconds.items():
        ms = [1000 * v for v in values]
        rows.append({
            "": f"{task}, {method}, {k} lane{'s' * (k > 1)}", "ms a step and run": statistics.median(ms), "min": min(ms),
            "max": max(ms), "speed-up": statistics.median(seconds[1]) / statistics.median(values),
            "largest difference": first.get(k, 0.0),
        })  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--lanes", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--check", type=int, default=10, help="steps after which lanes and separate runs must agree")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    reference.use_threads(args.threads)
    from jaxpeft.runtime import malloc

    malloc.keep_freed_memory()
    rows = [
        row for task in ("vqa", "captioning") for row in measure(task, args.method, args.lanes, args.runs, args.check)
    ]
    print(reference.table(rows))
    bad = [row[""] for row in rows if not row["largest difference"] <= 1e-5]
    write_json(args.out, {**facts(), "settings": vars(args), "rows": rows, "failed": bad})
    if bad:
        raise SystemExit(f"lanes differ from separate runs: {', '.join(bad)}")


if __name__ == "__main__":
    main()
