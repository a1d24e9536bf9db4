"""How strong the suite is: small faults are put into the code, and the tests must notice.

    python tests/mutations.py --out results/mutations.json [--n 60] [--seed COMMIT] [--workers 2] [--seconds 300] [--only 3 17]

A mutation is an operator exchanged, a constant changed or a statement dropped, drawn over methods/, adapt/, models/ and
training/ with the seed of the parent commit. First the whole suite runs once with a probe at each of them, which says the tests
that reach it, also from programs that they start. Then each mutation is applied to a copy of the checkout, where the tests
that reach it run, the shortest first, until one fails or they have taken `--seconds` (as measured without the mutation). A
survivor may be killed by a test that was left out. Programs that the fault does not touch come from one compilation cache.
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
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("methods", "adapt", "models", "training")
BINARY = {"Add": "-", "Sub": "+", "Mult": "/", "Div": "*", "FloorDiv": "*", "Mod": "*", "Pow": "*", "MatMult": "*"}
BINARY |= {"BitOr": "&", "BitAnd": "|"}
COMPARED = {"Eq": "!=", "NotEq": "==", "Lt": "<=", "LtE": "<", "Gt": ">=", "GtE": ">", "Is": "is not", "IsNot": "is"}
COMPARED |= {"In": "not in", "NotIn": "in"}
PROBE = """import os
seen = set()
def mark(number):
    line = f"{number} {os.environ.get('PYTEST_CURRENT_TEST', 'import').rsplit(' (', 1)[0]}"
    if line not in seen:
        seen.add(line)
        with open(f"{os.environ['REACHED']}/{os.getpid()}", "a") as file:
            file.write(line + "\\n")
"""


class Source:
    """A file's text with its syntax tree, and where a node is in its bytes."""

    def __init__(self, path: Path):
        self.bytes = path.read_bytes()
        self.tree, self.starts = ast.parse(self.bytes), [0]
        for line in self.bytes.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def at(self, node) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset


def candidates(path: Path) -> list[dict]:
    """Every mutation of a file: kind, line, first and last position of what is replaced, and by what."""
    source, found = Source(path), []

    def add(kind: str, node, new: str) -> None:
        name = str(path.relative_to(ROOT))
        found.append({"kind": kind, "file": name, "line": node.lineno, "at": source.at(node), "new": new})

    notes = set()  # annotations, and what is in them: they compute nothing
    for node in ast.walk(source.tree):
        for one in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            notes |= set(map(id, ast.walk(one))) if one is not None else set()
    for node in ast.walk(source.tree):
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
    """n mutations, as many of each kind."""
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


def with_probes(path: Path, places: dict[int, tuple[int, int]]) -> str:
    """The source with a probe before the innermost statement around each place."""
    source, before = Source(path), {}
    for number, (first, last) in places.items():
        inner = None
        for node in ast.walk(source.tree):  # outer nodes come first
            for statement in (one for part in ("body", "orelse", "finalbody") for one in listed(node, part)):
                begins, ends = source.at(statement)
                inner = statement if begins <= first and last <= ends else inner
        before.setdefault(id(inner), []).append(ast.parse(f"__import__('reached').mark({number})").body[0])
    for node in list(ast.walk(source.tree)):
        for part in ("body", "orelse", "finalbody"):
            if statements := listed(node, part):
                setattr(node, part, [new for one in statements for new in (*before.get(id(one), ()), one)])
    source.tree.body += before.get(id(None), [])  # decorators of a module
    return ast.unparse(ast.fix_missing_locations(source.tree))


def listed(node, part: str) -> list:
    found = getattr(node, part, None)  # a lambda's body is no list
    return found if isinstance(found, list) else []


def reached(some: list[dict], copy: Path, workers: int) -> dict[int, list[tuple[str, float]]]:
    """The tests that come to each mutation's statement and pass, with their seconds, the shortest first."""
    for name in {one["file"] for one in some}:
        places = {number: one["at"] for number, one in enumerate(some) if one["file"] == name}
        (copy / name).write_text(with_probes(copy / name, places), encoding="utf-8")
    (copy / "reached.py").write_text(PROBE, encoding="utf-8")
    with tempfile.TemporaryDirectory() as work:
        said = pytest(copy, "-n", str(workers), f"--junitxml={work}/tests.xml", REACHED=work)
        print(said.splitlines()[-1], flush=True)
        seconds = {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(case.get("time", 0))
            for case in ET.parse(f"{work}/tests.xml").iter("testcase")
            if all(child.tag not in ("failure", "error", "skipped") for child in case)
        }
        lines = {line for path in Path(work).glob("[0-9]*") for line in path.read_text().splitlines()}
    names = {number: set() for number in range(len(some))}
    for line in lines:
        number, name = line.split(" ", 1)
        names[int(number)] |= {name} & set(seconds)
    for number in {int(line.split()[0]) for line in lines}:
        names[number] = names[number] or set(seconds)  # reached by imports only, such as a default
    return {
        number: sorted(((name, seconds[name]) for name in some), key=lambda pair: pair[1])
        for number, some in names.items()
    }


def pytest(copy: Path, *arguments: str, timeout: float | None = None, **env: str) -> str:
    """What pytest says in a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    env = os.environ | {"PYTHONPATH": str(copy)} | env
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=timeout).stdout


def tried(one: dict, copy: Path, tests: list[tuple[str, float]], limit: float) -> dict:
    """The mutation with what its tests said: killed by which test, or nothing."""
    path, began, names, total = copy / one["file"], time.perf_counter(), [], 0.0
    for name, seconds in tests:
        total += seconds
        if names and total > limit:
            break
        names.append(name)
    source = path.read_bytes()
    first, last = one["at"]
    path.write_bytes(source[:first] + one["new"].encode() + source[last:])
    killer = None
    try:
        if names:
            (copy / "names.txt").write_text("\n".join(names), encoding="utf-8")
            said = pytest(copy, "-x", "@names.txt", timeout=4 * limit + 300).splitlines()
            summary = said[-1] if said else ""  # nothing is said where the tests cannot be imported
            if " passed" not in summary or " failed" in summary or " error" in summary:
                killer = next((line for line in said if line.startswith(("FAILED", "ERROR"))), "pytest did not start")
                killer = killer.split(" - ")[0]
    except subprocess.TimeoutExpired:
        killer = "timeout"
    finally:
        path.write_bytes(source)
    return {key: one[key] for key in ("kind", "file", "line")} | {
        "old": source[first:last].decode(),
        "new": one["new"],
        "killed_by": killer,
        "tests": f"{len(names)} of {len(tests)} that reach it",
        "seconds": round(time.perf_counter() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--seed", help="default: the parent of HEAD")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300, help="of tests for a mutation")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutations")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    git = ["git", "rev-parse", "HEAD~1"]
    seed = args.seed or subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    some = drawn(args.n, seed)
    facts = {"command": " ".join(["python", *sys.argv]), "seed": seed, "killed": 0, "of": 0, "mutations": {}}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.workers) as pool:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "programs"))
        copies = [Path(work) / f"copy{i}" for i in range(args.workers + 1)]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "*.egg-info"))
        tests = reached(some, copies.pop(), args.workers)

        def one(number: int) -> None:
            copy = copies.pop()
            try:
                row = tried(some[number], copy, tests[number], args.seconds)
            finally:
                copies.append(copy)
            print(number, json.dumps(row), flush=True)
            facts["mutations"][number] = row
            facts["of"], facts["killed"] = facts["of"] + 1, facts["killed"] + (row["killed_by"] is not None)
            args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

        list(pool.map(one, args.only if args.only is not None else range(len(some))))
    print(f"{facts['killed']} of {facts['of']} killed")


if __name__ == "__main__":
    main()
