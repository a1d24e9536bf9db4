"""The driver of benchmarks/gpu.py, which starts nothing that it has no time for."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def drive(*arguments):
    command = [sys.executable, "benchmarks/gpu.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_without_time_every_section_says_so(tmp_path):
    out = tmp_path / "gpu.json"
    done = drive("--tiny", "--seconds", 0, "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["found"]
    assert list(found)[:2] == ["ceilings", "ours blip lora"] and len(found) == 18
    assert all(one == {"failed": "not run: out of time"} for one in found.values())
    assert "0 of 18 sections have a result\nnot run: out of time: ceilings, " in done.stdout


def test_sections_are_chosen_by_name(tmp_path):
    out = tmp_path / "gpu.json"
    drive("--sections", "loader, peer blip full", "--seconds", 0, "--out", out)
    assert list(json.loads(out.read_text())["found"]) == ["peer blip full", "loader"]  # in the order of importance
    bad = drive("--sections", "loader,lora", "--out", out)
    assert bad.returncode == 2 and "no section lora; choose from ceilings, " in bad.stderr
