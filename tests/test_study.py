"""The grid, who works on what, and what is run again; points are trained in test_train.py and replaced here."""

import ast
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs.studies import tiny
from jaxpeft.data import pipeline, scenes
from jaxpeft.models import loading
from jaxpeft.runtime import files, locks
from jaxpeft.runtime.locks import Lease
from jaxpeft.study import config as base
from jaxpeft.study import execute, report
from jaxpeft.study.execute import Cell

SCORES = {"val": {0.003: 0.5, 0.009: 0.6, 0.03: 0.7, 0.09: 0.7}, "test": {0.003: 0.9, 0.009: 0.1, 0.03: 0.3, 0.09: 0.2}}


@pytest.fixture
def config():
    c = tiny.get_config("steps=3")
    c.levels.captions_human.lr_scale = 1.0  # the same rates for both levels: SCORES tells which is best
    return c


def fake_point(config, workdir, log=print, features_in=None):
    """A finished run of which the score depends on the rate alone, in the files that a real one leaves."""
    task, metric = config.task, {"vqa": "accuracy", "captioning": "cider_d"}[config.task]
    scores = {
        split: {
            "tuned": {metric: SCORES[split][config.optim.lr], "nll": 1.0},
            "n": 4,
            "blind": {"majority": {metric: 0.0}},
        }
        for split in ("val", "test")
    }
    if config.eval.base:
        scores["test"]["base"] = {metric: 0.05}
    rng = np.random.default_rng(config.seed)
    rows = [
        {
            "split": "test",
            "image_id": f"scenes-test-{i}",
            "references": ["a"],
            "tuned": "<b>",
            f"tuned_{metric}": rng.random(),
        }
        for i in range(4)
    ]
    files.write_jsonl(Path(workdir) / "predictions.jsonl", rows)
    timing = {"steps": 3, "stopped": "plateau", "step_s": 0.1, "compile_s": 1.0, "train_s": 0.3, "total_s": 2.0}
    result = {"main_metric": metric, "metrics": scores, "timing": timing, "status": "done", "task": task}
    result |= {"counts": {"tuned": 10 * (config.size + 1), "stored": 10 * (config.size + 1), "total": 1000}}
    result |= {"forgetting": {"base": 0.5, "tuned": 0.7, "n": 4}, "lr": config.optim.lr}
    result |= {"machine": {"device": "a"}, "versions": {"jax": "b"}, "digests": {"base": "c"}}
    files.write_json(Path(workdir) / "result.json", result)
    return result


@pytest.fixture
def fake(monkeypatch):
    ran = []

    def run(config, workdir, log=print, features_in=None):
        ran.append(config.name)
        return fake_point(config, workdir)

    monkeypatch.setattr(execute.training_run, "run", run)
    monkeypatch.setattr(execute, "keep_pictures", lambda *_: None)
    return ran


def quiet(*_):
    pass


def test_the_grid_is_both_axes_through_the_middle(config):
    cells = execute.cells(config)
    of_lora = [(c.size, c.n_images) for c in cells if c.level == "vqa_stated" and c.arm == "lora_head"]
    assert of_lora == [(8, 64), (2, 256), (8, 256)]
    assert len(cells) == len(set(cells)) == 2 * (3 + 3 + 2)
    config.cross = True
    assert len(execute.cells(config)) == 2 * (4 + 4 + 2)


def test_every_cell_has_the_same_number_of_rates_and_ids_are_stable(config):
    named = execute.runs(config, {})
    assert len({run.id for run in named}) == len(named) == 2 * len(execute.cells(config))
    assert named[0].id == "captions_human-head-n64-s0-lr0.003"
    assert all(len(execute.rates(config, cell)) == 2 for cell in execute.cells(config))


def test_a_run_is_a_config_that_main_runs_alone(config):
    run = execute.Run(Cell("vqa_stated", "lora_head", 8, 64), 1, 0.003, config)
    c = run.config
    assert (c.method.name, c.method.rank, c.head, c.optim.lr) == ("lora", 8, "transform", 0.003)
    assert (c.seed, c.data.subset_seed, c.data.n_images, tuple(c.data.types)) == (
        1,
        1,
        64,
        ("color", "shape", "position"),
    )
    assert c.name == run.id and c.optim.schedule == "plateau"


def test_sizes_are_solved_for_the_budget_and_prompt_is_capped():
    c = base.study("x", "", ("vqa_stated",), base.arms("none", prompts=()), (2000, 20_000, 10**6), (64,))
    sizes = {arm: [cell.size for cell in execute.cells(c) if cell.arm == arm] for arm in c.arms}
    assert all(sizes[arm] == sorted(set(sizes[arm])) for arm in sizes)
    assert len(sizes["lora"]) == 3 and len(sizes["prompt"]) < 3


def test_more_pictures_than_there_are_is_said_before_anything_is_written(config, tmp_path):
    config.n_images = (64, 1000)
    with pytest.raises(
        ValueError, match=r"n_images has 1000, but the training split of level 'captions_human' has 256"
    ):
        execute.run(config, tmp_path / "study", workers=1)
    assert not (tmp_path / "study").exists()


def test_a_level_scales_the_rates_of_every_arm(config):
    config.levels.captions_human.lr_scale = 2.0
    config.levels.vqa_stated.lr_scale = 0.5
    found = {cell.level: execute.rates(config, cell) for cell in execute.cells(config) if cell.arm == "lora_head"}
    assert found == {"captions_human": [0.006, 0.018], "vqa_stated": [0.0015, 0.0045]}
    assert "lr_scale" not in execute.Run(execute.cells(config)[0], 0, 0.006, config).config


def test_the_rate_is_chosen_on_validation_and_never_on_test(config, fake, tmp_path):
    execute.run(config, tmp_path, log=quiet)
    later = [name for name in fake if "-s1-" in name]
    assert len(later) == len(execute.cells(config))
    # by test scores it would be .003 and .03; .03 and .09 are equal on validation: the smaller one
    assert {name.rsplit("lr", 1)[1] for name in later if "prefix" not in name} == {"0.009"}
    assert {name.rsplit("lr", 1)[1] for name in later if "prefix" in name} == {"0.03"}


def test_subsets_of_a_seed_nest_and_are_the_same_for_every_method(config):
    split = scenes.load({"n_train": 300}, ["train"])["train"]
    ids = {}
    for arm, size in (("lora_head", 8), ("prefix_head", 16)):
        for n in (64, 256):
            c = execute.Run(Cell("vqa_stated", arm, size, n), 1, 0.01, config).config.data
            taken, _ = pipeline.subset(split, seed=c.subset_seed, n_images=c.n_images)
            ids[arm, n] = [row["image_id"] for row in taken.rows]
    assert ids["lora_head", 64] == ids["prefix_head", 64] == ids["lora_head", 256][:64]


def test_nothing_that_is_done_runs_again(config, fake, tmp_path):
    rows = execute.run(config, tmp_path, log=quiet)
    assert len(rows) == len(fake) == execute.n_runs(config)
    said = []
    assert execute.run(config, tmp_path, log=said.append) == rows
    assert len(fake) == execute.n_runs(config) and "48 done, 0 to do" in said[0]


def test_a_changed_config_runs_again_only_what_it_touches(config, fake, tmp_path):
    execute.run(config, tmp_path, log=quiet)
    before, said = len(fake), []
    config.points.vqa.optim.weight_decay = 0.1
    execute.run(config, tmp_path, log=said.append)
    again = fake[before:]
    assert again and all(name.startswith("vqa") for name in again) and len(again) == before / 2
    assert "out of date, runs again: vqa_stated-head-n256-s0-lr0.003 (config)" in said[0]
    assert len(list((tmp_path / "stale").iterdir())) == before / 2  # kept, not deleted


def test_a_changed_method_runs_again_only_its_points(config, fake, tmp_path, monkeypatch):
    execute.run(config, tmp_path, log=quiet)
    before, source = len(fake), execute.source()
    monkeypatch.setattr(execute, "source", lambda: source | {"methods/prefix.py": "new"})
    execute.run(config, tmp_path, log=quiet)
    assert fake[before:] and all("prefix" in name for name in fake[before:])


def test_a_process_with_other_code_than_the_newest_start_stops(config, fake, tmp_path, monkeypatch):
    """Two that differ would set each other's results aside for ever; one with the same code, for what it does, goes on."""
    real = execute.training_run.run

    def edited(*args, **kwargs):
        if len(fake) == 3:  # somebody starts the study again, with an edited method
            files.write_json(tmp_path / "source.json", execute.source() | {"methods/prefix.py": "new"})
        return real(*args, **kwargs)

    monkeypatch.setattr(execute.training_run, "run", edited)
    with pytest.raises(
        ValueError, match=r"^methods/prefix\.py changed after this study.* start the same command again"
    ):
        execute.run(config, tmp_path, log=quiet)
    done = list(fake)
    assert 3 < len(done) < execute.n_runs(config) and not any("prefix" in name for name in done[4:])
    assert not list((tmp_path / "claims").glob("[!.]*"))
    rows = execute.run(config, tmp_path, log=quiet)  # a new start is the newest
    assert all(row["status"] == "done" for row in rows) and len(fake) == len(set(fake))


def test_every_file_that_a_point_does_not_import_is_known_to_be_apart():
    """Else a change in the demo, say, would run whole studies again."""
    names = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): name for name in execute.source()}
    reached, todo = set(), ["point"]
    while todo:
        module = todo.pop()
        if module in reached or module not in names:
            continue
        reached.add(module)
        for node in ast.walk(ast.parse((execute.PACKAGE / names[module]).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxpeft":
                inside = node.module.removeprefix("jaxpeft").removeprefix(".")
                todo += [inside, *(f"{inside}.{one.name}".removeprefix(".") for one in node.names)]
    apart = {module for module, name in names.items() if name.startswith(execute.APART)}
    assert {"train", "hub", "models.blip", "tree"} <= reached - apart
    assert set(names) - reached - apart == {"models"} - reached


def test_comments_and_docstrings_are_not_code(tmp_path):
    versions = (
        "def f(x):\n    return x + 1\n",
        '"""About."""\n\n\ndef f(x):  # why\n    """Docs."""\n    return x + 1\n',
        "def f(x):\n    return x + 2\n",
    )
    digests = []
    for i, text in enumerate(versions):
        path = tmp_path / f"{i}.py"
        path.write_text(text)
        digests.append(execute._code_of(path))
    assert digests[2] not in digests[:2]
    assert digests[0] == digests[1]


def test_a_failed_run_is_tried_three_times_and_stops_no_other(config, fake, tmp_path, monkeypatch):
    works = execute.training_run.run

    def fails(config, workdir, log=print, features_in=None):
        if config.name.startswith("vqa_stated-head-n64-s0-lr0.003"):
            fake.append(config.name)
            raise FloatingPointError("loss is nan")
        return works(config, workdir)

    monkeypatch.setattr(execute.training_run, "run", fails)
    said = []
    rows = execute.run(config, tmp_path, log=said.append)
    bad = "vqa_stated-head-n64-s0-lr0.003"
    assert fake.count(bad) == 3
    assert [row["error"] for row in rows if row["status"] == "failed"] == ["FloatingPointError: loss is nan"]
    assert sum(row["status"] == "done" for row in rows) == execute.n_runs(config) - 1
    assert f"given up after 3 tries: {bad}" in said[-1]
    assert f"{bad}</td>" in (report.write(tmp_path) and (tmp_path / "report" / "index.html").read_text())


def test_a_stop_is_not_a_failure(config, fake, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(execute.training_run, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        execute.run(config, tmp_path, log=quiet)
    assert not (tmp_path / "failures").exists() and not list((tmp_path / "claims").iterdir())


def test_a_dry_run_needs_no_weights_and_counts_every_cell(tmp_path, monkeypatch):
    """manifest and vocabulary are enough to plan; counts are those of the methods, whatever the picture size."""
    for name in ("manifest.json", "vocab.txt"):
        (tmp_path / name).write_bytes((loading.ASSETS / "tiny" / name).read_bytes())
    monkeypatch.setattr(execute, "_flops_per_second", lambda: 1e11)
    planned = []
    for where in (str(tmp_path), "tiny"):
        config = tiny.get_config("steps=3,small=true")
        for one in config.points.values():
            one.base = where
        planned.append(execute.dry_run(config, tmp_path / "none"))
    assert planned[0] == planned[1]
    assert "15 runs left" in planned[0]
    config.points.vqa.base = str(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors is missing"):  # before a run of it begins
        execute.run(config, tmp_path / "none", log=quiet)
    assert all(str(cell) in planned[0] for cell in execute.cells(config))
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------- how far it is


def ends(said: list[str]) -> list[str]:
    """What lines say of the whole study."""
    return [line.rsplit("; ", 1)[-1] for line in said if " runs done" in line]


def test_every_finished_run_says_how_many_are_done_and_what_is_left(config, fake, tmp_path):
    said = []
    execute.run(config, tmp_path, log=said.append)
    expected = ["0 of 48 runs done, ETA unknown"]
    for i in range(1, 48):  # each run says that it took two seconds
        expected.append(f"{i} of 48 runs done, ETA about 0:{2 * (48 - i) // 60:02d}:{2 * (48 - i) % 60:02d}")
    assert ends(said) == [*expected, "48 of 48 runs done, none left"]
    assert [line.split(":")[0] for line in said if ": test cider_d " in line or ": test accuracy " in line] == fake


def test_runs_of_an_earlier_start_are_counted_and_not_timed(config, fake, tmp_path, monkeypatch):
    """The first ten took 1,000 seconds each, on a slower machine as it were, and the study was stopped."""
    quick = execute.training_run.run

    def slow(config, workdir, log=print, features_in=None):
        if len(fake) == 10:
            raise KeyboardInterrupt
        result = quick(config, workdir)
        result["timing"]["total_s"] = 1000.0
        files.write_json(Path(workdir) / "result.json", result)
        an_hour_ago = time.time() - 3600
        os.utime(Path(workdir) / "result.json", (an_hour_ago, an_hour_ago))
        return result

    monkeypatch.setattr(execute.training_run, "run", slow)
    with pytest.raises(KeyboardInterrupt):
        execute.run(config, tmp_path, log=quiet)
    monkeypatch.setattr(execute.training_run, "run", quick)
    said = []
    execute.run(config, tmp_path, log=said.append)
    assert ends(said)[:2] == ["10 of 48 runs done, ETA unknown", "11 of 48 runs done, ETA about 0:01:14"]


def test_what_other_workers_finish_is_in_every_workers_count(config, fake, tmp_path):
    """Two workers that both looked when nothing was done, and a third one that looks now."""
    state, said = execute.read(config, tmp_path), []
    for run in state.todo[:3]:
        assert execute.attempt(run, tmp_path, said.append, state)
    execute.attempt(state.todo[3], tmp_path, said.append)
    assert [line.split(" runs done")[0] for line in ends(said)] == ["1 of 48", "2 of 48", "3 of 48", "4 of 48"]


def test_of_two_workers_that_end_at_once_one_is_the_first(config, fake, tmp_path, monkeypatch):
    """Another worker's result is there, and newer, before this one looks."""
    works, state, said = execute.training_run.run, execute.read(config, tmp_path), []
    mine, other = state.todo[:2]

    def run(config, workdir, log=print, features_in=None):
        where = tmp_path / "points" / other.id
        where.mkdir(parents=True)
        files.write_json(where / "depends_on.json", execute.depends_on(other.config))
        fake_point(other.config, where)
        soon = time.time() + 5
        os.utime(where / "result.json", (soon, soon))
        return works(config, workdir)

    monkeypatch.setattr(execute.training_run, "run", run)
    execute.attempt(mine, tmp_path, said.append, state)
    assert ends(said) == ["1 of 48 runs done, ETA about 0:01:34"]
    state = execute.read(config, tmp_path)
    found = execute.progress(config, tmp_path, execute.as_of(other, tmp_path, state))
    assert found == "2 of 48 runs done, ETA about 0:01:32"


def test_the_rest_is_shared_by_the_workers_that_live(config, fake, tmp_path):
    state, said = execute.read(config, tmp_path), []
    first, second, third, *_ = state.todo
    execute.attempt(first, tmp_path, said.append)
    others = [Lease(tmp_path / "claims", "another"), Lease(tmp_path / "claims", "one more")]
    assert all(other.take() for other in others)
    dead = {"host": Lease(tmp_path, "x")._me["host"], "pid": 2**22 + 1, "started": "1"}
    (tmp_path / "claims" / "of a killed worker").write_text(json.dumps(dead))
    execute.attempt(second, tmp_path, said.append)
    for other in others:
        other.release()
    execute.attempt(third, tmp_path, said.append)
    # 47 runs of two seconds by one worker, 46 by three, 45 by one
    assert [line.split("ETA ")[1] for line in ends(said)] == ["about 0:01:34", "about 0:00:31", "about 0:01:30"]


def test_no_number_of_workers_makes_the_last_run_shorter(config, fake, tmp_path):
    state = execute.read(config, tmp_path)
    execute.attempt(state.todo[0], tmp_path, quiet)
    state = execute.read(config, tmp_path)
    state.runs = [state.runs[0], next(run for run in state.runs if run.seed == 0 and run.id not in state.finished)]
    config.seeds = 1
    others = [Lease(tmp_path / "claims", f"other {i}") for i in range(3)]
    assert all(other.take() for other in others)
    assert execute.seconds_left(config, tmp_path, state) == 2.0
    for other in others:
        other.release()


def test_a_run_is_expected_to_take_what_those_most_like_it_took(config, tmp_path):
    """A large arm late in the grid is not taken for a small one as soon as any of its kind is finished."""
    took = {
        Cell("a", "lora", 2, 64): 10.0,
        Cell("a", "lora", 2, 256): 30.0,
        Cell("a", "full", 0, 64): 100.0,
        Cell("b", "lora", 2, 64): 1000.0,
    }
    run = [execute.Run(cell, 0, 1.0, config) for cell in took]
    finished = {
        one.id: {"timing": {"total_s": took[one.cell], "steps": 0, "step_s": 0.0, "train_s": 0.0}} for one in run
    }
    for one in run:
        (tmp_path / "points" / one.id).mkdir(parents=True)
        (tmp_path / "points" / one.id / "result.json").touch()
    measured = execute._measured(tmp_path, execute.State(finished, {}, {}, run))
    expected = {
        Cell("a", "lora", 2, 64): 10.0,  # its cell
        Cell("a", "lora", 2, 512): 20.0,  # its size: between 10 and 30
        Cell("a", "lora", 8, 64): 20.0,  # its arm
        Cell("a", "prefix", 4, 64): 30.0,  # its level: the middle of 10, 30 and 100
        Cell("c", "lora", 2, 64): 65.0,  # any: between 30 and 100
    }
    assert {cell: execute._expected(cell, measured) for cell in expected} == expected


def test_the_steps_before_an_interruption_count_in_what_a_run_takes():
    whole = {"total_s": 30.0, "steps": 100, "step_s": 0.2, "train_s": 22.0}  # 20 s of steps, and 2 s of validation
    assert execute._seconds(whole) == 30.0
    tail = {"total_s": 12.0, "steps": 100, "step_s": 0.2, "train_s": 4.0}  # the same run, its last 20 steps
    assert execute._seconds(tail) == 28.0


def test_runs_given_up_are_said_and_leave_nothing_to_wait_for(config, fake, tmp_path, monkeypatch):
    """Both rates of a cell fail: its other seed has no rate, and never runs."""
    works = execute.training_run.run

    def fails(config, workdir, log=print, features_in=None):
        if config.name.startswith("captions_human-head-n64"):
            raise FloatingPointError("loss is nan")
        return works(config, workdir)

    monkeypatch.setattr(execute.training_run, "run", fails)
    said = []
    execute.run(config, tmp_path, log=said.append)
    found = ends(said)
    # two rates, three tries each, are the first six lines after the start
    assert found[1] == "0 of 48 runs done, ETA unknown" and "FloatingPointError" in said[2]
    assert found[6] == "0 of 48 runs done, 2 given up, ETA unknown"
    assert found[7] == "1 of 48 runs done, 2 given up, ETA about 0:01:28"  # 48 less the cell's three less this one
    assert found[-1] == "45 of 48 runs done, 2 given up, none left"


# ---------------------------------------------------------------- claims on runs


def test_a_claim_is_held_by_one(tmp_path):
    first, second = Lease(tmp_path, "a"), Lease(tmp_path, "a")
    assert first.take() and not second.take() and Lease(tmp_path, "b").take()
    assert second.owner()["pid"] == os.getpid()
    first.release()
    assert second.take()
    second.release()


def test_a_claim_of_a_dead_process_is_free(tmp_path):
    code = (
        f"from jaxpeft.locks import Claim; from pathlib import Path; assert Claim(Path({str(tmp_path)!r}), 'a').take()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "a").exists() and Lease(tmp_path, "a").owner() is None
    taken = Lease(tmp_path, "a")
    assert taken.take() and not Lease(tmp_path, "a").take()
    taken.release()


def test_a_claim_of_another_host_is_free_once_it_is_no_longer_touched(tmp_path, monkeypatch):
    (tmp_path / "a").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1"}))
    assert not Lease(tmp_path, "a").take()
    monkeypatch.setattr(locks, "STALE", 0.2)
    time.sleep(0.4)
    taken = Lease(tmp_path, "a")
    assert taken.take()
    taken.release()


def _race(directory, start, won):
    start.wait()
    claim = Lease(Path(directory), "a")
    if claim.take():
        won.put(os.getpid())
        time.sleep(1.0)


def test_of_many_who_see_a_stale_claim_one_gets_it(tmp_path):
    (tmp_path / "a").write_text(
        json.dumps({"host": Lease(tmp_path, "x")._me["host"], "pid": 2**22 + 1, "started": "1"})
    )
    context = multiprocessing.get_context("spawn")
    start, won = context.Event(), context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), start, won)) for _ in range(4)]
    for racer in racers:
        racer.start()
    start.set()
    for racer in racers:
        racer.join()
    assert won.get(timeout=5) and won.empty()


# ---------------------------------------------------------------- the report


@pytest.fixture
def done(config, fake, tmp_path):
    config.note = "a <note>"
    execute.run(config, tmp_path, log=quiet)
    return tmp_path


def test_long_tables_are_folded_and_methods_keep_their_order_and_marks(done):
    short, long = (report._table(["a"], [[i] for i in range(n)]) for n in (report.LONG, report.LONG + 1))
    assert "<details>" not in short and f"<summary>{report.LONG + 1} rows</summary>" in long
    found = report.read(done)
    head, lora = (report.style(found, arm) for arm in ("head", "lora_head"))
    assert "markerfacecolor" not in lora and "markerfacecolor" not in head
    found.settings["config"]["arms"]["lora"] = found.settings["config"]["arms"]["lora_head"] | {"head": "none"}
    assert report.style(found, "lora") == lora | {"markerfacecolor": "white"}
    (legend,) = report.figure_axis(report.read(done), "data").legends
    names = [text.get_text().removesuffix("_head") for text in legend.get_texts()]
    assert names == sorted(names, key=list(report.STYLE).index) and len(names) > 1


def test_the_report_reads_files_only_and_is_one_page(done, monkeypatch):
    monkeypatch.setattr(execute, "Run", None)
    line = report.write(done)
    page = (done / "report" / "index.html").read_text()
    assert "48 runs" in line and "<img" in page
    assert "http" not in page.replace("http-equiv", "") and 'src="data:image/png;base64,' in page
    assert "a &lt;note&gt;" in page and "width=device-width" in page
    assert {path.name for path in (done / "report").glob("*.png")} == {f"{name}.png" for name in report.FIGURES}
    table = (done / "report" / "results.csv").read_text().splitlines()
    assert len(table) == 49 and table[0].startswith("id,level,task,arm")


def test_the_consistency_of_a_level_is_the_share_the_base_has(done):
    rows = report.consistency(report.read(done))
    assert [row["level"] for row in rows] == ["captions_human", "vqa_stated"]
    assert all(row["frozen base"] == 0.05 and row["best tuned"] == 0.3 for row in rows)
    np.testing.assert_allclose([row["consistency"] for row in rows], 0.05 / 0.3)


def test_rates_at_the_edge_of_the_search_are_listed(done):
    edges = report._edges(report.read(done))
    assert {edge[2] for edge in edges if "prefix" not in edge[0]} == {"largest"}
    assert {edge[2] for edge in edges if "prefix" in edge[0]} == {"smallest"}


def test_the_front_is_what_nothing_beats():
    points = [(1, 0.5), (2, 0.4), (3, 0.7), (3, 0.6), (4, 0.7), (0.5, 0.1)]
    assert report.pareto(points) == [(0.5, 0.1), (1, 0.5), (3, 0.7)]


def test_no_results_is_said(tmp_path):
    with pytest.raises(ValueError, match="has no results.jsonl; run the study first"):
        report.write(tmp_path)
