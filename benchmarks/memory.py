"""Resident memory of a LoRA training process on CPU, phase by phase: jaxpeft and transformers + peft.

    python benchmarks/memory.py --out results/memory.json
    python benchmarks/memory.py --size tiny --out /tmp/memory.json          a quick test, seconds

Each side is a separate process, which loads the same BLIP-base (random weights, saved by transformers), attaches LoRA and
trains. For each phase: resident memory after it and the peak so far, from /proc/self/status, split into the process's own
pages ('anon') and pages of mapped files ('file': programs and mapped weights). Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import reference

MB = 1e6
LOSS = 1e-3  # largest difference of the losses of the two sides


def resident() -> dict[str, float]:
    """{'rss', 'anon', 'file', 'peak'} of this process in MB."""
    names = {"VmRSS:": "rss", "RssAnon:": "anon", "RssFile:": "file", "VmHWM:": "peak"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {names[line[0]]: round(int(line[1]) * 1024 / MB, 1) for line in lines if line and line[0] in names}


def arrays() -> float:
    """MB of live JAX arrays, memory that several share (layers of a stacked one) counted once; 0 where jax is not loaded."""
    if "jax" not in sys.modules:
        return 0.0
    import jax

    total = end = 0
    for start, size in sorted((x.unsafe_buffer_pointer(), x.nbytes) for x in jax.live_arrays()):
        total += max(0, start + size - max(start, end))
        end = max(end, start + size)
    return round(total / MB, 1)


def prepare(args) -> None:
    """Write the model and inputs.npz of blip_base.py, with `args.batch` rows."""
    import blip_base

    directory = Path(args.directory)
    blip_base.prepare(args, directory)
    inputs = dict(np.load(directory / "inputs.npz"))
    inputs |= {name: inputs[name][: args.batch] for name in ("image", "prompt", "tokens")}
    np.savez(directory / "inputs.npz", **inputs)


def only(args) -> None:
    """Do one side's work and print its phases for `main`."""
    phases = [{"phase": "start"} | resident() | {"arrays": 0.0}]

    def after(phase):
        phases.append({"phase": phase} | resident() | {"arrays": arrays()})

    if args.only == "jaxpeft":
        import jax

        import jaxpeft  # noqa: F401

        jax.devices()
    else:
        import peft  # noqa: F401
        from transformers import BlipForConditionalGeneration  # noqa: F401
    after("imports")
    from peers import PEERS

    peer = PEERS[args.only](Path(args.directory), args.threads)
    after("load")
    (step,) = peer.steps(others=False).values()
    after("LoRA, optimizer" + (", compile" if args.only == "jaxpeft" else ""))
    losses = [step()]
    after("first step")
    losses += [step() for _ in range(args.steps - 1)]
    after(f"{args.steps} steps")
    if {"jax", "torch"} <= set(sys.modules):
        raise RuntimeError("both frameworks are loaded; this would measure their sum")
    print(json.dumps({"phases": phases, "losses": losses, "trained": peer.trained}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--image-size", type=int, default=384, help="of base; tiny has its own")
    parser.add_argument("--batch", type=int, default=2, help="at most 8")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=["transformers + peft", "jaxpeft"])
    parser.add_argument("--directory", help="keep the model there, and use the one that is there")
    parser.add_argument("--out")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    reference.use_threads(args.threads)
    if args.only:
        return prepare(args) if args.only == "prepare" else only(args)
    if not args.out:
        parser.error("--out is required")
    with tempfile.TemporaryDirectory() as scratch:
        args.directory = args.directory or scratch

        def side(name):
            command = [sys.executable, __file__, "--only", name]
            for option in ("size", "image_size", "batch", "steps", "threads", "directory"):
                command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

        if not (Path(args.directory) / "inputs.npz").exists():
            side("prepare")
        found = {name: json.loads(side(name)) for name in args.sides}
    for name, one in found.items():
        print(f"\n{name}, MB\n{reference.table(one['phases'])}")
    losses = [one["losses"] for one in found.values()]
    bad = [] if np.ptp(losses, axis=0).max() <= LOSS else [f"losses differ: {losses}"]
    if len({one["trained"] for one in found.values()}) > 1:
        bad.append(f"trained parameters: {[one['trained'] for one in found.values()]}")
    peaks = [one["phases"][-1]["peak"] for one in found.values()]
    print(f"\npeak {' and '.join(f'{peak:,.0f}' for peak in peaks)} MB, {peaks[-1] / peaks[0]:.3f} of the first")
    settings = {name: getattr(args, name) for name in ("size", "image_size", "batch", "steps", "threads")}
    reference.write_json(args.out, {**reference.facts(), "settings": settings, "sides": found, "failed": bad})
    if bad:
        raise SystemExit(f"not the same work: {', '.join(bad)}")


if __name__ == "__main__":
    main()
