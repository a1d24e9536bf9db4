"""The readers of fuzz.py again, with inputs that libFuzzer keeps where they reach new code of ours (atheris).

    pip install -e '.[fuzz]'; python tests/fuzz_coverage.py --inputs 300000 --out results/fuzz_coverage.json

Every branch of jaxpeft and of safetensors' and Pillow's Python is counted. An input is two bytes, which of the reference files
and which file of it, then that file's content; half of the changes are fuzz.py's, which keep JSON, pickles and archives whole
enough to be read on, and half are libFuzzer's. What is not a ValueError, hangs (SECONDS) or takes MEMORY ends that reader's run
and is kept in --keep. A reader is a process of its own, as libFuzzer never returns.
"""

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["jaxpeft", "safetensors", "PIL"]):
    import fuzz


def one_reader(name: str, home: Path, options: list[str]) -> None:
    """Fuzz this reader until libFuzzer ends the process."""
    reader = fuzz.readers(home)[name]
    files = [[reader.only] if reader.only else sorted(seed) for seed in reader.seeds]
    corpus = home / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(reader.seeds):
        for j, file in enumerate(files[i]):
            (corpus / f"{i}-{j}").write_bytes(bytes([i, j]) + seed[file])

    def chosen(data):
        i = data[0] % len(files) if data else 0
        return i, files[i][(data[1] if len(data) > 1 else 0) % len(files[i])]

    def read(data):
        i, file = chosen(data)
        fuzz._written(home / "input", reader.seeds[i] | {file: data[2:]})
        try:
            reader.read(home / "input")
        except ValueError:
            pass

    def change(data, most, seed):
        rng = np.random.default_rng(seed)
        if len(data) > 2 and rng.integers(2):
            try:
                return data[:2] + reader.change(bytes(data[2:]), rng)[: most - 2]
            except Exception:  # noqa: S110  what it was made from is too broken to be changed as JSON or an archive
                pass
        return data[:2] + atheris.Mutate(data[2:], most - 2)

    (home / "input").mkdir()
    atheris.Setup([sys.argv[0], *options, str(corpus)], read, custom_mutator=change)
    atheris.Fuzz()


def run(name: str, inputs: int, keep: Path, seed: int) -> dict:
    """So many inputs of a reader, in a process of its own -> what libFuzzer counted."""
    most = 2 + max(len(data) for data in seeds_of(name))
    options = [
        f"-runs={inputs}", f"-seed={seed}", f"-timeout={fuzz.SECONDS:.0f}", "-rss_limit_mb=4096", "-print_final_stats=1",
        f"-max_len={2 * most}", f"-artifact_prefix={keep / name.replace(' ', '_')}-",
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, "--reader", name, *options], capture_output=True, text=True)
    said = done.stderr + done.stdout
    covered = [int(n) for n in re.findall(r"cov: (\d+)", said)]
    stats = {key: int(n) for key, n in re.findall(r"stat::(\w+):\s+(\d+)", said)}
    found = {
        "inputs": stats.get("number_of_executed_units", 0), "branches at first": covered[0] if covered else 0,
        "branches": max(covered, default=0), "kept as new": stats.get("new_units_added", 0),
        "peak_mb": stats.get("peak_rss_mb", 0), "seconds": time.perf_counter() - began, "failed": done.returncode,
    }  # fmt: skip
    if done.returncode:
        found["said"] = said[-4000:]
    return found


def seeds_of(name: str) -> list[bytes]:
    """The contents of a reader's reference files."""
    with tempfile.TemporaryDirectory() as home:
        return [data for seed in fuzz.readers(Path(home))[name].seeds for data in seed.values()]


def main(argv=None) -> int:
    """The command line -> exit status: 1 where an input failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=300_000, help="of all readers together, in fuzz.py's shares")
    parser.add_argument("--only", help="one reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-kept"), help="where failing inputs go")
    parser.add_argument("--reader", help=argparse.SUPPRESS)  # the process of one
    args, options = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as home:
        if args.reader:
            warnings.simplefilter("ignore")
            logging.disable()
            one_reader(args.reader, Path(home), options)
        shares = {name: reader.share for name, reader in fuzz.readers(Path(home)).items()}
    args.keep.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, share in shares.items():
        if args.only in (None, name):
            rows[name] = row = run(name, round(args.inputs * share), args.keep, args.seed)
            print(
                f"{name:18s} {row['inputs']:7,} inputs, branches {row['branches at first']:,} -> {row['branches']:,}, "
                f"{row['kept as new']:,} kept; peak {row['peak_mb']} MB, {row['seconds']:.0f} s; "
                f"{'FAILED' if row['failed'] else 'none failed'}",
                flush=True,
            )
            if row["failed"]:
                print(row["said"], flush=True)
    failed = sum(bool(row["failed"]) for row in rows.values())
    total = sum(row["inputs"] for row in rows.values())
    print(f"{total:,} inputs, {failed} readers failed")
    if args.out:
        command = " ".join(["python", "tests/fuzz_coverage.py", *(argv or sys.argv[1:])])
        args.out.write_text(json.dumps({"command": command, "inputs": total, "readers": rows}, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
