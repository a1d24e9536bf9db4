"""A check of the preflight: BLIP-base on eight virtual CPU devices, planned memory and that of the arrays and the process.

    python benchmarks/preflight_check.py --out results/preflight_check.json

LoRA r8 captioning at 384 pixels, batch 8, image encoder computed in each step (augment=crop), float32, mesh fsdp 8, random
weights. Planned: `jaxpeft.training.preflight`. Measured: the bytes of the shards on each device, and the growth of the process
to its peak during three real steps, for all eight devices together (they share one memory, and XLA on CPU frees memory late).
The loss must equal that of one device. Takes about two minutes on two cores.
"""

import argparse
import dataclasses
import resource
import time

import numpy as np
import reference
from reference import facts, table, write_json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=["base", "tiny"], default="base", help="tiny: to try it")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    reference.use_threads(args.threads)
    import jax
    from growth import TINY, step_of

    from jaxpeft.models.blip import Blip, BlipConfig
    from jaxpeft.runtime import host
    from jaxpeft.training import preflight, sharding

    jax.config.update("jax_num_cpu_devices", args.devices)
    host.keep_compiled_programs()
    config, batch_size = BlipConfig(), args.devices
    if args.size == "tiny":
        config = dataclasses.replace(config, **TINY)
    rules = Blip.build(config).sharding
    found, losses = [], {}
    for n in (1, args.devices):
        mesh = sharding.mesh({"fsdp": n}, jax.devices()[:n])
        step, state, frozen, batch = step_of(config, batch_size)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, frozen, batch))
        plan = preflight.compiled(step, shapes, rules, mesh)
        rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
        planned_frozen = sharding.bytes_per_device(frozen, sharding.shardings(frozen, rules, mesh))
        state = sharding.put(state, sharding.shardings(state, rules, mesh))
        frozen = sharding.put(frozen, sharding.shardings(frozen, rules, mesh))
        batch = {name: jax.device_put(x, rows) for name, x in batch.items()}
        jax.block_until_ready((state, frozen, batch))
        on_device = dict.fromkeys(mesh.devices.flat, 0)
        for leaf in jax.tree.leaves((state, frozen, batch)):
            for shard in leaf.addressable_shards:
                on_device[shard.device] += shard.data.nbytes
        frozen_there = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(frozen))
        before = peak_or_now(reset=True)
        with sharding.using_mesh(mesh):
            jitted, seconds = jax.jit(step, donate_argnums=0), []
            for _ in range(3):
                began = time.perf_counter()
                state, metrics = jitted(state, frozen, batch)
                losses.setdefault(n, float(metrics["loss"]))
                seconds.append(time.perf_counter() - began)
        found.append(
            {
                "": f"{n} device{'s' * (n > 1)}",
                "frozen MB a device, planned": planned_frozen / 1e6, "there": frozen_there / 1e6,
                "arguments MB a device, planned": plan.arguments / 1e6, "there, largest": max(on_device.values()) / 1e6,
                "activations MB, all devices, planned": n * plan.temporary / 1e6,
                "process grew by MB": (peak_or_now() - before) / 1e6, "s a step": min(seconds[1:]), "loss": losses[n],
            }
        )  # fmt: skip
        print(found[-1], flush=True)
        del state, frozen, batch, jitted
    print(table(found))
    one, many = losses.values()
    bad = abs(one - many) > 1e-5 * abs(one)
    exact = all(np.isclose(row["frozen MB a device, planned"], row["there"], rtol=1e-6) for row in found)
    write_json(args.out, {**facts(), "settings": vars(args), "rows": found, "failed": bool(bad or not exact)})
    if bad or not exact:
        raise SystemExit("the plan, or the loss, is not what was measured")


def peak_or_now(reset: bool = False) -> int:
    """Bytes of the process: now, resetting its peak; or the peak since then. Without /proc: the peak since its start."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            values = dict(line.split(":", 1) for line in file)
        return int(values["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
