"""The crossed design: its config, its gates and estimands on made-up results, and a published study that is reported again."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_runs import quiet
from test_search import config_of

from configs.studies import crossed
from jaxpeft.apps import report as command
from jaxpeft.runtime import files
from jaxpeft.study import cases, claims, execute, grid
from jaxpeft.study.claims import Result, Scale
from jaxpeft.study.grid import Cell

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import crossed as benchmark  # noqa: E402

SCALES = [
    Scale("cap_C", "captioning", True, 0.0, 1.0), Scale("cap_Q", "captioning", False, 0.0, 1.0),
    Scale("qa_Q", "vqa", True, 0.0, 1.0), Scale("qa_C", "vqa", False, 0.0, 1.0),
]  # fmt: skip


def test_settings_cross_tasks_and_bases_with_equal_budgets():
    c = crossed.get_config()
    grid.check_config(c)
    runs = {name: grid.Run(Cell(name, "lora_head", 8, 256), 1, 0.002, c).config for name in c.settings}
    assert {name: one.base for name, one in runs.items()} == {
        f"{task}_{base}": f"runs/bases/{base}1/checkpoint" for task in ("cap", "qa") for base in "CQ"
    }
    assert {name for name, about in c.settings.items() if about.consistent} == {"cap_C", "qa_Q"}
    for key in ("steps", "batch_size", "stop", "optim"):
        assert len({str(one[key]) for one in runs.values()}) == 1
    one = runs["qa_C"]
    assert (one.steps, one.stop.patience, one.data.texts, one.method.alpha) == (1500, 0, 2, 16.0)
    assert set(one.eval.splits) == {"val", "test", "test_comp"} and "mlp" in one.method.targets
    assert c.learning_rates[-1] / c.learning_rates[0] == pytest.approx(81) and c.extend > 0 and c.measure == "nll"


def test_parts_are_parts_of_the_whole_and_their_runs_are_equal():
    parts = {name: crossed.get_config(f"part={name}") for name in crossed.PARTS}
    assert set(parts["gates"].variants) < set(parts["lora"].variants) < set(parts["all"].variants)
    cell = Cell("qa_Q", "full_text", 0, 64)
    first, *others = [grid.Run(cell, 0, 0.002, one).config for one in parts.values()]
    assert all(one == first for one in others) and first.eval.base
    with pytest.raises(ValueError, match="part is 'some'; choose one of gates, lora, all"):
        crossed.get_config("part=some")


def made_up(data: dict[str, float], nats: float = 0.0) -> list[Result]:
    """Two methods on four bases; `data`: setting -> the points that the score rises over the axis of images."""
    rng, found = np.random.default_rng(0), []
    for scale in SCALES:
        for method in ("lora", "prefix", "prompt"):
            for n in (64, 256, 1024):
                for seed in range(4):
                    rise = data[scale.setting] * np.log2(n / 64) / 4 / 100 * (1 + (method == "prefix"))
                    score = 0.5 + rise + rng.normal(0, 1e-4)
                    about = (scale.setting, scale.task, f"{method}_head", method, "transform", 8, n, 1000, seed)
                    found.append(Result(*about, score, score, test_nll=1.0 - nats * rise))
    return found


def test_interactions_are_the_crossed_contrast_of_every_method_and_of_all():
    """Data are worth 20 and 12 points more where the base is inconsistent: 16 on average, for prefix twice as much."""
    results = made_up({"cap_C": 5, "cap_Q": 25, "qa_Q": 3, "qa_C": 15}, nats=2.0)
    found = claims.interactions(results, SCALES)
    expected = {"lora_head": 16, "prefix_head": 32, "prompt_head": 16, "all": 64 / 3}
    for name, value in expected.items():
        one = found["data", name]
        np.testing.assert_allclose(one.value, value, atol=0.05)
        assert one.low < value < one.high and one.high - one.low < 0.5
    assert not any(axis == "size" for axis, _ in found)
    in_nats = claims.interactions(*claims.in_nats(results, SCALES))
    np.testing.assert_allclose(in_nats["data", "lora_head"].value, 0.32, atol=1e-6)
    (c7,) = [v for v in claims.judge(results, SCALES) if v.claim == "C7 data"]
    np.testing.assert_allclose((c7.effect, c7.low), (found["data", "all"].value, found["data", "all"].low))


@dataclasses.dataclass
class Made:
    """What `gates` reads of a study."""

    rows: list
    scales: list


def test_gates_are_on_the_base_and_on_what_training_adds():
    base = {"cap_C": 0.7, "cap_Q": 0.1, "qa_Q": 0.95, "qa_C": 0.0}
    rows = [
        {"setting": name, "variant": "full_text", "n_images": n, "chosen": True, "base": base[name], "test": score}
        for name, scores in {"cap_C": (0.7, 0.72), "cap_Q": (0.1, 0.6), "qa_Q": (0.9, 1.0), "qa_C": (0.1, 0.15)}.items()
        for n, score in zip((64, 4096), scores, strict=True)
    ]  # fmt: skip
    found = {(one["setting"], one["what"].split(",")[0]): one["pass"] for one in benchmark.gates(Made(rows, SCALES))}
    assert found == {
        ("cap_C", "frozen base"): True, ("cap_C", "full_text less base"): False, ("cap_Q", "full_text"): True,
        ("qa_Q", "frozen base"): False, ("qa_Q", "full_text less base"): True, ("qa_C", "full_text"): False,
    }  # fmt: skip


# A published study


@pytest.mark.slow
def test_the_report_is_made_again_from_the_published_files_alone(fake, tmp_path, capsys):
    c = config_of(search_steps=0.5, seeds=3, measure="nll")
    c.settings.vqa_stated.consistent = False
    execute.run(c, tmp_path / "study", log=quiet)
    (tmp_path / "copy").mkdir()
    for name in ("study.json", "results.jsonl", "search.jsonl", "cases.npz"):
        shutil.copy(tmp_path / "study" / name, tmp_path / "copy")
    made = []
    for directory in (tmp_path / "study", tmp_path / "copy"):
        command.main([f"--workdir={directory}"])
        made.append({path.name: path.read_bytes() for path in (directory / "report").iterdir()})
    pages = [one.pop("index.html").decode() for one in made]
    best = re.compile("<section><h2>The best runs.*?</section>", re.DOTALL)  # has links to the runs, where they are
    assert "../points/" in pages[0] and "../points/" not in pages[1]
    assert best.sub("", pages[0]) == best.sub("", pages[1])
    assert made[0] == made[1] and {"claims.json", "results.csv"} <= made[0].keys()
    in_nats = json.loads(made[0]["claims_nll.json"])
    assert in_nats["margins"] == claims.MARGINS_NLL and {one["claim"] for one in in_nats["verdicts"]} >= {"C1", "C2"}
    assert "25 runs" in capsys.readouterr().out  # 10 of them of the search
    rows = files.read_jsonl(tmp_path / "copy" / "results.jsonl")
    assert all(row["validation"]["curve"][0] == [0, 2.0] for row in rows)


def test_the_scores_of_every_case_are_published(tmp_path):
    rng = np.random.default_rng(0)
    runs, nats = ["one", "two"], rng.random((2, 4))
    for name, values in zip(runs, nats, strict=True):
        (tmp_path / "points" / name).mkdir(parents=True)
        case = [
            {"question_id": f"q{i}", "tuned_accuracy": i % 2, "tuned_nats": x, "tokens": 2 + i}
            for i, x in enumerate(values)
        ]
        lines = [{"split": split, **one} for split in ("val", "test") for one in case]
        files.write_jsonl(tmp_path / "points" / name / "predictions.jsonl", lines)
    row = {"setting": "s", "status": "done", "task": "vqa", "main_metric": "accuracy"}
    cases.write(tmp_path, [row | {"id": name} for name in runs], {"test"})
    found = np.load(tmp_path / "cases.npz", allow_pickle=False)
    assert {name.split("/")[1] for name in found} == {"runs", "test"} and found["s/runs"].tolist() == runs
    assert found["s/test/cases"].tolist() == ["q0", "q1", "q2", "q3"] and found["s/test/tokens"].tolist() == [
        2,
        3,
        4,
        5,
    ]
    assert found["s/test/accuracy"].tolist() == [[0, 1, 0, 1]] * 2 and found["s/test/nats"].dtype == np.float16
    np.testing.assert_allclose(found["s/test/nats"], nats, atol=1e-3)
