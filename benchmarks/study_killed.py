"""A study killed at random times and resumed by two launchers at once, compared with an undisturbed one.

    python benchmarks/study_killed.py --out results/study_killed.json

Launcher and workers are killed with SIGKILL, `--kills` times, each after a random number of seconds; then two launchers resume
the study together, with one core each. Checks that every run is done, that no result that existed at a kill was made again,
and that report and results equal those of the undisturbed study in everything except seconds. Every process has one core,
because sums with another number of threads differ in their last bits.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reference import facts, use_threads, write_json

ROOT = Path(__file__).parents[1]
SECONDS = ("step_s", "compile_s", "total_s")


def launch(config: str, workdir: Path, workers: int, cores: set[int] | None = None, log=None):
    """Start a study in a process group of its own."""
    command = [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", f"--workers={workers}"]

    def prepare():
        os.setsid()
        if cores:
            os.sched_setaffinity(0, cores)

    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, preexec_fn=prepare)


def finished(workdir: Path) -> dict[str, int]:
    """id -> the inode of its result, which changes if the result is written again."""
    return {path.parent.name: path.stat().st_ino for path in workdir.glob("points/*/result.json")}


def table(workdir: Path) -> list[dict]:
    rows = csv.DictReader((workdir / "report" / "results.csv").open())
    return [{key: value for key, value in row.items() if key not in SECONDS} for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/studies/tiny.py:steps=20")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=45.0, help="seconds until a kill")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    use_threads(2)
    rng, cores = random.Random(args.seed), sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        calm, killed = Path(directory) / "calm", Path(directory) / "killed"
        with (Path(directory) / "log.txt").open("w") as log:
            began = time.perf_counter()
            if launch(args.config, calm, len(cores), log=log).wait() != 0:
                raise SystemExit((Path(directory) / "log.txt").read_text()[-3000:])
            calm_s = time.perf_counter() - began

            kills, remade = [], set()
            for _ in range(args.kills):
                process, before = launch(args.config, killed, len(cores), log=log), finished(killed)
                time.sleep(rng.uniform(5, args.longest))
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                after = finished(killed)
                remade |= {name for name in before if after.get(name) != before[name]}
                kills.append({"finished_before": len(before), "finished_after": len(after)})
            before = finished(killed)
            both = [launch(args.config, killed, 1, {core}, log) for core in cores[:2]]
            codes = [process.wait() for process in both]
        after = finished(killed)
        remade |= {name for name in before if after.get(name) != before[name]}
        claims = [json.loads((d / "report" / "claims.json").read_text()) for d in (calm, killed)]
        checks = {
            "both launchers end well": codes == [0, 0],
            "every run is done": set(finished(calm)) == set(after),
            "no result was made again": not remade,
            "no claim is left": not list((killed / "claims").iterdir()),
            "results are equal": table(calm) == table(killed),
            "verdicts are equal": claims[0] == claims[1],
        }
        print("\n".join(f"{name}: {ok}" for name, ok in checks.items()), f"\n{len(after)} runs; kills: {kills}")
        write_json(args.out, {**facts(), "runs": len(after), "undisturbed_s": calm_s, "kills": kills, "checks": checks})
        if not all(checks.values()):
            raise SystemExit("not equal")


if __name__ == "__main__":
    main()
