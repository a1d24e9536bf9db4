"""A long run killed many times, compared with the same run undisturbed: is anything lost, and does memory grow?

    python benchmarks/soak.py --out results/soak

Two runs of the same command, each on half of the cores: 20,000 steps of LoRA on the tiny base (captions of scenes), with a
checkpoint every second and every step logged. One of them is killed with SIGKILL at random times and restarted with the same
command. Resident memory, open files and threads of each are sampled every second.

Required: metrics.jsonl has every step once, with the same loss, and the trained weights and scores are equal bit for bit.
Printed: the slopes of memory and of open files over the undisturbed run (least squares after the first tenth, with the standard
error from blocks of a twentieth), and how many steps each kill cost: the last step in metrics.jsonl minus the step from which
the next start resumed. Takes about ten minutes.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxpeft.runtime import files, host

ROOT = Path(__file__).resolve().parents[1]

SETTINGS = {
    "batch_size": 4, "log_every": 1, "data.n_train": 256, "data.n_val": 0, "data.n_test": 16, "optim.lr": 3e-3,
    "eval.batch_size": 16,
}  # fmt: skip


class Run:
    """The command, restarted after each kill, and the resources of its process."""

    def __init__(self, workdir: Path, steps: int, every: float, cores: set[int]):
        settings = SETTINGS | {"steps": steps, "checkpoint_seconds": every}
        self.command = [
            "main.py",
            "--config=configs/point.py:task=captioning,method=lora,size=4",
            f"--workdir={workdir}",
        ]
        self.command += [f"--config.{name}={value}" for name, value in settings.items()]
        self.workdir, self.cores, self.samples, self.starts, self.logged = workdir, cores, [], 0, []
        self.start()

    def start(self):
        self.starts += 1
        pin = lambda: os.sched_setaffinity(0, self.cores)  # noqa: E731
        out = self.log(self.starts).open("w")
        self.process = subprocess.Popen(
            [sys.executable, *self.command], cwd=ROOT, stdout=out, stderr=out, preexec_fn=pin
        )

    def done(self) -> bool:
        code = self.process.poll()
        if code not in (None, 0, -9):
            raise RuntimeError(f"{shlex.join(self.command)} ended with {code}: see {self.log(self.starts)}")
        return code == 0

    def log(self, n: int) -> Path:
        """The log of the n-th start."""
        return self.workdir.parent / f"{self.workdir.name}-{n}.log"

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        try:
            with (self.workdir / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                lines = file.read().split(b"\n")[1:-1]  # whole ones
            return max((json.loads(line)["step"] for line in lines), default=0)
        except (FileNotFoundError, ValueError):
            return 0

    def sample(self, began: float):
        proc = Path("/proc") / str(self.process.pid)
        try:
            resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            taken = resident, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))
        except (OSError, IndexError):  # it has just ended
            return
        self.samples.append((time.perf_counter() - began, self.step(), self.starts, *taken))

    def kill(self):
        """Send SIGKILL, then run the same command again."""
        self.process.kill()
        self.process.wait()
        self.logged.append(self.step())
        self.start()

    def repeated(self) -> list[int]:
        """For each kill after which the next start resumed: the number of logged steps that were repeated."""
        found = []
        for n, logged in enumerate(self.logged, 2):
            if went_on := re.search(r"resumed from step (\d+)", self.log(n).read_text()):
                found.append(logged - int(went_on[1]))
        return found


def slope(xs, ys) -> tuple[float, float]:
    """(least-squares slope per step, its standard error). The error is from blocks, as neighbouring samples are correlated."""
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)
    blocks = np.array_split(np.arange(len(xs)), 20)
    x = np.array([xs[b].mean() for b in blocks])
    y = np.array([ys[b].mean() for b in blocks])
    (found, intercept), left = np.polyfit(x, y, 1), len(x) - 2
    residual = y - found * x - intercept
    return float(found), float(np.sqrt((residual**2).sum() / left / ((x - x.mean()) ** 2).sum()))


def same(a: Path, b: Path) -> dict:
    """Compare the files of the two runs."""
    lines = [[json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()] for one in (a, b)]
    steps = [[line["step"] for line in rows if "loss" in line] for rows in lines]
    losses = [{line["step"]: line["loss"] for line in rows if "loss" in line} for rows in lines]
    facts = [json.loads((one / "result.json").read_text()) for one in (a, b)]
    weights = [(one / "tuned" / "tuned.safetensors").read_bytes() for one in (a, b)]
    return {
        "steps logged": [len(one) for one in steps],
        "steps missing or twice": [
            len(set(range(1, max(one) + 1)) ^ set(one)) + len(one) - len(set(one)) for one in steps
        ],
        "losses that differ": sum(losses[0].get(step) != loss for step, loss in losses[1].items()),
        "tuned weights equal": weights[0] == weights[1],
        "scores equal": facts[0]["metrics"] == facts[1]["metrics"],
    }


def draw(runs: dict[str, Run], path: Path) -> None:
    """Draw memory and open files against step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    shown = ((3, "MB resident", 1e6), (4, "open files", 1))
    for ax, (column, label, unit) in zip(figure.subplots(2, 1, sharex=True), shown, strict=True):
        for (name, run), color in zip(runs.items(), ("#0072B2", "#D55E00"), strict=True):
            rows = np.array(run.samples)
            for start in np.unique(rows[:, 2]):
                part = rows[(rows[:, 2] == start) & (rows[:, 1] > 0)]
                ax.plot(
                    part[:, 1],
                    part[:, column] / unit,
                    color=color,
                    linewidth=0.9,
                    label=name if start == 1 and column == 3 else None,
                )
        ax.set_ylabel(label)
        ax.set_ylim(0)
        ax.grid(alpha=0.3)
    ax.set_xlabel("step")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=1.0, help="between checkpoints")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    rng, cores = np.random.default_rng(args.seed), sorted(os.sched_getaffinity(0))
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    halves = set(cores[: len(cores) // 2] or cores), set(cores[len(cores) // 2 :])
    runs = {
        "left alone": Run(home / "alone", args.steps, args.seconds, halves[0]),
        f"killed {args.kills} times": Run(home / "killed", args.steps, args.seconds, halves[1]),
    }
    alone, killed = runs.values()
    # at any time: during steps, saves, or the start
    at, began = sorted(rng.uniform(0, args.steps, args.kills).tolist()), time.perf_counter()
    print(f"in {home}; kills near steps {', '.join(f'{one:.0f}' for one in at)}", flush=True)
    while not all([run.done() for run in runs.values()]):
        time.sleep(1.0)
        for run in runs.values():
            if run.process.poll() is None:
                run.sample(began)
        if at and killed.step() >= at[0]:
            at.pop(0)
            time.sleep(rng.uniform(0, 2))
            if killed.process.poll() is None:
                killed.kill()
                if rng.uniform() < 0.2:  # and once more during the start
                    time.sleep(rng.uniform(0, 8))
                    killed.kill()
    seconds = time.perf_counter() - began
    rows = np.array(alone.samples)
    rows = rows[(rows[:, 1] > args.steps / 10) & (rows[:, 1] < args.steps)]  # training only, not the scoring after it
    least, most = rows.min(0).astype(int).tolist(), rows.max(0).astype(int).tolist()
    memory, opened = slope(rows[:, 1], rows[:, 3]), slope(rows[:, 1], rows[:, 4])
    found = {
        "command": shlex.join(["python", "benchmarks/soak.py", *(argv or sys.argv[1:])]),
        "machine": host.machine(), "versions": host.versions(), "seconds": seconds,
        "steps": args.steps, "checkpoint_seconds": args.seconds, "starts": killed.starts, "kills": killed.starts - 1,
        "steps done again after a kill": killed.repeated(), **same(alone.workdir, killed.workdir),
        "memory: bytes per step, standard error": memory, "MB at the end": float(rows[-1, 3] / 1e6),
        "open files per step, standard error": opened, "open files, least and most": [least[4], most[4]],
        "threads, least and most": [least[5], most[5]],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_json(args.out / "soak.json", found)
    draw(runs, args.out / "soak.png")
    print(json.dumps(found, indent=1))
    good = found["tuned weights equal"] and found["scores equal"] and not found["losses that differ"]
    return int(not (good and found["steps missing or twice"] == [0, 0]))


if __name__ == "__main__":
    sys.exit(main())
