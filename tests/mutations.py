"""How strong the suite is: small faults are put into the code, and the tests must notice.

    python tests/mutations.py --out results/mutations.json [--n 60] [--seed COMMIT] [--workers 2] [--only 3 17] [of pytest]

A mutation is an operator exchanged, a constant changed or a statement dropped, drawn over methods/, adapt/, models/ and
training/ with the seed of the parent commit. Each is applied to a copy of the checkout, where `pytest -x` runs the test files
of its folder (`RELATED`), first the fast tests, then the slow ones, until one fails. A survivor may be killed by another file.
Programs that the fault does not touch come from one compilation cache.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("methods", "adapt", "models", "training")
RELATED = {
    "methods": "methods equivalences foreign interchange new_words blip_port optim registry train",
    "adapt": "methods equivalences foreign interchange new_words protocol registry blip_port sharding preflight train",
    "models": "model decode protocol attention vlm vlm_parity mplug mplug_parity blip_parity blip_port convert hub downloads "
    "tasks new_words equivalences export vlm_export use",
    "training": "optim train sharding preflight protocol tasks own_pictures own_texts new_words use main faults study hosts",
}
BINARY = {"Add": "-", "Sub": "+", "Mult": "/", "Div": "*", "FloorDiv": "*", "Mod": "*", "Pow": "*", "MatMult": "*"}
BINARY |= {"BitOr": "&", "BitAnd": "|"}
COMPARED = {"Eq": "!=", "NotEq": "==", "Lt": "<=", "LtE": "<", "Gt": ">=", "GtE": ">", "Is": "is not", "IsNot": "is"}
COMPARED |= {"In": "not in", "NotIn": "in"}


def candidates(path: Path) -> list[dict]:
    """Every mutation of a file: kind, line, first and last position of what is replaced, and by what."""
    source, found = path.read_text(encoding="utf-8"), []
    tree, starts = ast.parse(source), [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def add(kind: str, node, new: str) -> None:
        at = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        found.append({"kind": kind, "file": str(path.relative_to(ROOT)), "line": node.lineno, "at": at, "new": new})

    notes = set()  # annotations, and what is in them: they compute nothing
    for node in ast.walk(tree):
        for one in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            notes |= set(map(id, ast.walk(one))) if one is not None else set()
    for node in ast.walk(tree):
        if id(node) in notes:
            continue
        if isinstance(node, ast.BinOp) and (new := BINARY.get(type(node.op).__name__)):
            add("operator", node, f"({ast.unparse(node.left)}) {new} ({ast.unparse(node.right)})")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and (new := COMPARED.get(type(node.ops[0]).__name__)):
            add("operator", node, f"({ast.unparse(node.left)}) {new} ({ast.unparse(node.comparators[0])})")
        elif isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.And) else " and "
            add("operator", node, f"({word.join(f'({ast.unparse(one)})' for one in node.values)})")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            value = node.value
            add("constant", node, repr(not value if isinstance(value, bool) else value + 1 if value < 2 else value - 1))
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.Raise) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ):
            add("dropped", node, "pass")
    return found


def drawn(n: int, seed: str) -> list[dict]:
    """n mutations, as many of each kind; a statement of a module or class body is a definition and is not dropped."""
    every = [
        one
        for folder in FOLDERS
        for path in sorted((ROOT / "jaxpeft" / folder).rglob("*.py"))
        for one in candidates(path)
    ]
    rng, some = random.Random(seed), []
    for kind in ("operator", "constant", "dropped"):
        some += rng.sample([one for one in every if one["kind"] == kind], n // 3)
    return some


def tried(one: dict, copy: Path, tiers: list[str], arguments: list[str]) -> dict:
    """The mutation with what its tests said: killed by which test, or nothing."""
    path, began = copy / one["file"], time.perf_counter()
    source = path.read_bytes()
    first, last = one["at"]
    changed = source[:first] + one["new"].encode() + source[last:]
    path.write_bytes(changed)
    try:
        ast.parse(changed)
        killer = None
        names = RELATED[Path(one["file"]).parts[1]].split()
        files = [str(path) for name in names for path in (Path("tests") / f"test_{name}.py", Path("tests") / name)]
        files = [path for path in files if (copy / path).exists()]
        for tier in tiers:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", tier, *files, *arguments],
                cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True, timeout=1800,
            )  # fmt: skip
            said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            if done.returncode:
                killer = (said or ["pytest did not start"])[0].split(" - ")[0]
                break
    except subprocess.TimeoutExpired:
        killer = "timeout"
    finally:
        path.write_bytes(source)
    old = source[first:last].decode()
    seconds = round(time.perf_counter() - began)
    return {key: one[key] for key in ("kind", "file", "line", "new")} | {
        "old": old,
        "killed_by": killer,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--seed", help="default: the parent of HEAD")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutations")
    parser.add_argument("--tiers", nargs="*", default=["not slow", "slow"])
    parser.add_argument("--tests", help="a directory in place of this checkout's tests/")
    parser.add_argument("--out", type=Path, required=True)
    args, arguments = parser.parse_known_args()
    arguments = [one for one in arguments if one != "--"]
    git = ["git", "rev-parse", "HEAD~1"]
    seed = args.seed or subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    some = drawn(args.n, seed)
    numbers = args.only if args.only is not None else range(len(some))
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.workers) as pool:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "programs"))
        copies = []
        for i in range(args.workers):
            copy = Path(work) / f"copy{i}"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "*.egg-info"))
            if args.tests:
                shutil.rmtree(copy / "tests")
                shutil.copytree(args.tests, copy / "tests")
            copies.append(copy)

        def one(number: int) -> tuple[int, dict]:
            copy = copies.pop()
            try:
                found = tried(some[number], copy, args.tiers, arguments)
            finally:
                copies.append(copy)
            print(number, json.dumps(found), flush=True)
            return number, found

        found = dict(pool.map(one, numbers))
    killed = sum(row["killed_by"] is not None for row in found.values())
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "seed": seed,
        "killed": killed,
        "of": len(found),
        "mutations": found,
    }
    args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{killed} of {len(found)} killed")


if __name__ == "__main__":
    main()
