"""Where the time of BLIP-base's programs goes on a CPU: milliseconds of each kind of operation.

    python benchmarks/cpu_profile.py --out results/cpu_profile.json

The image encoder, and a LoRA step on stored image tokens, with the settings of blip_base.py: float32, 224 pixels, batch 8.
Times are those of JAX's profiler over three calls; of operations that run at once, each gets its share. KINDS tells kinds of
operations by the layer that XLA says they come from.

Attention over an image's tokens is also timed alone: written out, in parts, and with torch's fused kernel.
"""

import argparse
import collections
import functools
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import blip_base
import numpy as np
import peers
import reference

CALLS = 3
KINDS = {  # the first that is found in the name
    "vocabulary and loss": r"head/|log_softmax|transpose\(jvp\(\)\)|jvp\(\)/",
    "products of MLPs": r"mlp/(up|down)/",
    "GELU": r"mlp/",
    "keys and values of image tokens": r"cross_attention\.keys_values",
    "other products of attention layers": r"attention(\.keys_values)?/(query|key|value|out)/",
    "attention": r"attention",
    "norms": r"norm",
}
# FLOPs of matrix products without LoRA's and without attention itself. The backward pass of the step multiplies with every
# matrix once more, but for keys and values of image tokens
ROWS, WORDS, D, F, V, LAYERS = 8 * 197, 8 * 20, 768, 3072, 30_524, 12
FLOPS = {
    "image encoder": 2 * ROWS * LAYERS * (4 * D * D + 2 * D * F),
    "step on stored image tokens": 2 * ROWS * LAYERS * 2 * D * D
    + 2 * 2 * WORDS * (LAYERS * (6 * D * D + 2 * D * F) + D * V),
}


def programs(directory: Path) -> dict:
    """{label: (a call, the name of its module in XLA's dump)}"""
    import jax

    from jaxpeft.models import stack

    side = peers.Jax(directory, 2)
    image = {"image": jax.numpy.asarray(side.inputs["image"])}
    variables = stack.apart(side.model.config, {"params": side.params})

    def image_encoder(variables, image):
        return side.model.apply(variables, image, "image_tokens", method="stage")

    encode = functools.partial(jax.jit(image_encoder), variables, image)
    return {
        "image encoder": (lambda: jax.block_until_ready(encode()), "image_encoder"),
        "step on stored image tokens": (side.steps()["cached image tokens"], "train_step"),
    }


def profile(call) -> tuple[float, list[tuple[int, int, str]]]:
    """(median seconds of a call, (start ns, end ns, name) of every operation of CALLS calls)"""
    import jax

    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(CALLS):
                call()
        (path,) = Path(directory).rglob("*.xplane.pb")
        found = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in found.planes for line in plane.lines for event in line.events]
    rows = [(e.start_ns, e.end_ns, e.name) for e in events if "hlo_op" in dict(e.stats)]
    return statistics.median(seconds), [row for row in rows if not row[2].startswith(("while", "call", "conditional"))]


def shares(rows: list[tuple[int, int, str]]) -> collections.Counter:
    """Operation -> ms a call; operations that run at once share the time."""
    changes = sorted([(start, 1, name) for start, _, name in rows] + [(end, -1, name) for _, end, name in rows])
    running, before, found = collections.Counter(), 0, collections.Counter()
    for at, change, name in changes:
        active = [one for one, n in running.items() if n]
        for one in active:
            found[one] += (at - before) / len(active) / 1e6 / CALLS
        running[name] += change
        before = at
    return found


def origins(dump: Path, module: str) -> dict[str, str]:
    """Operation -> the name of what it was traced from."""
    text = max(dump.glob(f"*{module}*cpu_after_optimizations.txt"), key=lambda path: path.stat().st_mtime).read_text()
    named = re.finditer(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', text, re.M)
    return {one[1]: one[2] for one in named}


def attentions() -> list[dict]:
    """Medians in ms, and the lowest, for 12 heads of size 64. The three must agree within 1e-5."""
    import jax
    import jax.numpy as jnp
    import torch

    from jaxpeft.models import attention

    def written_out(q, k, v):
        scores_BNTS = attention.products("BNTH,BNSH->BNTS", q, k) * 64**-0.5
        return jnp.einsum("BNTS,BNSH->BNTH", jax.nn.softmax(scores_BNTS), v)

    def in_parts(q, k, v):
        return attention.in_parts(attention.parts("parts", q, k), q, k, v)

    found = []
    for n_images, n_tokens in ((8, 197), (8, 577), (4, 1024)):
        qkv = [jax.random.normal(jax.random.key(i), (n_images, 12, n_tokens, 64)) for i in range(3)]
        theirs = [torch.tensor(np.asarray(x)) for x in qkv]
        written, parts = (jax.jit(function).lower(*qkv).compile() for function in (written_out, in_parts))
        calls = {
            "written out": lambda written=written, qkv=qkv: jax.block_until_ready(written(*qkv)),
            "in parts": lambda parts=parts, qkv=qkv: jax.block_until_ready(parts(*qkv)),
            "torch": lambda theirs=theirs: torch.nn.functional.scaled_dot_product_attention(*theirs),
        }
        first, *others = (np.asarray(call()) for call in calls.values())
        for other in others:
            np.testing.assert_allclose(other, first, atol=1e-5)
        times = {name: [] for name in calls}
        for _ in range(9):  # in turns
            for name, call in calls.items():
                times[name].append(blip_base.timed(call)[0])
        row = {"": f"{n_tokens} tokens of {n_images} images", "parts": attention.parts("parts", *qkv[:2])}
        for name, seconds in times.items():
            row |= {
                f"{name} ms": round(1e3 * statistics.median(seconds), 1),
                f"{name} min": round(1e3 * min(seconds), 1),
            }
        found.append(row)
    print(reference.table(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    reference.use_threads(2)
    found = {}
    with tempfile.TemporaryDirectory() as work:
        dump = Path(work) / "dump"
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=NONE"
        blip_base.prepare(argparse.Namespace(size="base", image_size=224, threads=2), Path(work))
        for label, (call, module) in programs(Path(work)).items():
            seconds, rows = profile(call)
            places, kinds = origins(dump, module), collections.Counter()
            for name, ms in shares(rows).items():
                place = places.get(name, "")
                kinds[next((kind for kind, pattern in KINDS.items() if re.search(pattern, place)), "other")] += ms
            total = sum(kinds.values())
            found[label] = {
                "s": round(seconds, 3),
                "GFLOP of products": round(FLOPS[label] / 1e9, 1),
                "GFLOP/s over the whole call": round(FLOPS[label] / 1e9 / seconds, 1),
                "ms": {kind: round(ms, 1) for kind, ms in kinds.most_common()},
                "share": {kind: round(ms / total, 3) for kind, ms in kinds.most_common()},
            }
            print(label, found[label])
    reference.quiet_torch(2)
    found["attention alone"] = attentions()
    reference.write_json(args.out, {**found, **reference.facts()})


if __name__ == "__main__":
    main()
