"""What a study tries: axes of any keys, rates beyond an edge, random draws, a short search; runs are replaced here."""

import dataclasses
import json
import math

import pytest
from fake_runs import html_of, quiet
from PIL import Image

from configs.studies import folder, tiny
from jaxpeft.runtime import files
from jaxpeft.study import config as studies
from jaxpeft.study import cost, execute, grid, report, search
from jaxpeft.study.grid import Cell
from jaxpeft.study.state import read

CELL = Cell("vqa_stated", "lora_head", 8, 256)


def config_of(**changes):
    """A study of one setting, two methods, two seeds and the rates 1 and 3 times the middle."""
    c = tiny.get_config("steps=40,small=true")
    c.update(changes)
    return c


def rates(ran, cell=CELL, seed=0):
    """The rates of a cell's runs with a seed, in the order of execution."""
    start = f"{cell}-s{seed}-lr"
    return [float(name.removeprefix(start).removesuffix("-search")) for name in ran if name.startswith(start)]


# Axes


def test_every_variant_is_crossed_with_every_combination_of_axes():
    c = studies.study(
        "x", "", ("vqa_stated",), {"head": studies.CONTROLS["head"]}, (), (64,),
        axes={"optim.weight_decay": (0.0, 0.05), "data.types": (("color",), ("color", "shape"))},
    )  # fmt: skip
    found = [str(cell) for cell in grid.cells(c)]
    assert found == [
        f"vqa_stated-types={types}-weight_decay={decay}-head-n64"
        for types in ("color", "color+shape") for decay in ("0", "0.05")
    ]  # fmt: skip
    run = grid.Run(grid.cells(c)[3], 0, 0.003, c).config
    assert (run.optim.weight_decay, tuple(run.data.types), run.method.name) == (0.05, ("color", "shape"), "head")
    assert run.name == "vqa_stated-types=color+shape-weight_decay=0.05-head-n64-s0-lr0.003"


def test_an_axis_is_in_rows_and_in_the_report(fake, tmp_path):
    c = config_of(axes={"optim": {"weight_decay": (0.0, 0.05)}})
    rows = execute.run(c, tmp_path, log=quiet)
    assert len(rows) == 2 * 15 and {tuple(row["axes"].items()) for row in rows} == {
        (("optim.weight_decay", 0.0),), (("optim.weight_decay", 0.05),),
    }  # fmt: skip
    assert "weight_decay=0.05-lora_head" in html_of(tmp_path)


def drawn(rates: tuple, draws: int = 3) -> dict:
    return {"draws": draws, "seed": 0, "ranges": {"optim": {"lr": rates}}}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"axes": {"optim": {"wait_decay": (1.0,)}}}, r"has optim.wait_decay, but .* \(did you mean 'optim.weight_"),
        ({"axes": {"optim": {"weight_decay": 0.1}}}, "axes.optim.weight_decay is 0.1; it must be a tuple of values"),
        ({"axes": {"optim": {"weight_decay": ("a",)}}}, "axes has optim.weight_decay='a', which is not of the type of 0.0"),
        ({"axes": {"optim": {"weight_decay": (0.1, 0.1)}}}, "two of its values have the same name"),
        ({"axes": {"optim": {"lr": (0.1,)}}}, "axes has optim.lr, which the grid sets; use config.learning_rates"),
        ({"axes": {"method": {"dropout": (0.1,)}}}, "are set in config.variants.NAME.fields"),
        ({"extend": -1}, "extend is -1; it must be the number of rates to add"),
        ({"extend": 2, "learning_rates": (1.0,)}, "extend needs a grid of at least two learning_rates"),
        ({"extend": 2, "random": drawn((0.1, 1.0))}, "extend needs a grid of at least two learning_rates"),
        ({"search_steps": 0.0}, "search_steps is 0.0; it must be a share of the steps"),
        ({"search_steps": 1.5}, "search_steps is 1.5; it must be a share of the steps"),
        ({"random": {"draws": 3, "seed": 0, "ranges": {}}}, "random.ranges must have optim.lr"),
        ({"random": {"draws": 3, "seed": 0, "ranges": {"optim": {"lr": (0.0, 1.0, "log")}}}}, "low must be above 0"),
        ({"random": {"draws": 3, "seed": 0, "ranges": {"optim": {"lr": (0.1, 1.0), "x": (0.1, 1.0)}}}}, "has optim.x, but"),
        ({"random": drawn((0.1, 1.0), draws=0)}, "random.draws is 0; it must be a number above 0"),
        ({"random": drawn((0.1,))}, r"optim.lr is \(0.1,\); expected \(low, high\) or \(low, high, 'log'\)"),
        ({"random": drawn((0.1, 1.0, "lin"))}, r"optim.lr is \(0.1, 1.0, 'lin'\); expected \(low, high\)"),
        ({"random": drawn((1.0, 0.1))}, r"optim.lr is \(1.0, 0.1\); expected \(low, high\)"),
        ({"random": drawn((1.0, 1.001))}, "optim.lr is too narrow for 3 rates of three digits"),
        ({"measure": "nats"}, "measure is 'nats'; choose one of main, nll"),
        ({"steps": (1, 2, 3)}, r"steps is \(1, 2, 3\); it must have a number for each of n_images"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_is_said_before_anything_is_written(tmp_path, change, said):
    c = config_of()
    with c.unlocked():
        for key, value in change.items():
            c[key] = value
    with pytest.raises(ValueError, match=said):
        execute.run(c, tmp_path / "study", log=quiet)
    assert not (tmp_path / "study").exists()


def test_a_key_that_a_variant_sets_is_checked_too(tmp_path):
    c = config_of()
    c.variants.lora_head.config = {"optim": {"weight_decay": 0.05}}
    grid.check_config(c)
    assert grid.Run(CELL, 0, 0.003, c).config.optim.weight_decay == 0.05
    c.variants.lora_head.config = {"optim": {"wait_decay": 0.05}}
    with pytest.raises(ValueError, match=r"config\.variants\.lora_head\.config has optim\.wait_decay, but"):
        grid.check_config(c)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("eval.splits", ("test",), r"points\.vqa\.eval\.splits is \('test',\); it must hold 'val'"),
        ("eval.splits", ("val",), r"points\.vqa\.eval\.splits is \('val',\); it must hold 'test'"),
        ("stop.split", "test", r"points\.vqa\.stop\.split is 'test'.* chosen on test images; set it to 'val'"),
    ],
)
def test_splits_that_a_report_cannot_be_made_of_are_refused(key, value, said):
    """The split that chooses and the test split are scored, and the likelihood of test images is not left to validation."""
    c = config_of()
    c.points.vqa.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=said):
        grid.check_config(c)


# The search


def test_rates_are_added_beyond_an_edge_until_the_best_is_inside(fake, tmp_path):
    fake.best = 0.003 * 81  # the middle 0.003 and 3 times as much are tried at first
    execute.run(config_of(extend=6), tmp_path, log=quiet)
    assert rates(fake) == [0.003, 0.009, 0.027, 0.081, 0.243, 0.729] and rates(fake, seed=1) == [0.243]
    fake.clear()
    fake.best = 0.0001
    execute.run(config_of(extend=2), tmp_path / "limit", log=quiet)
    assert rates(fake) == [0.003, 0.009, 0.001, 0.000333] and rates(fake, seed=1) == [0.000333]  # the limit


def test_an_extended_search_goes_on_after_a_stop(fake, tmp_path):
    c, fake.best, known = config_of(extend=6), 0.003 * 81, set()
    for stop_at in (1, 3, 9, 20):
        fake.stop_at = stop_at
        with pytest.raises(KeyboardInterrupt):
            execute.run(c, tmp_path, log=quiet)
        known |= {run.id for run in read(c, tmp_path).runs}
    fake.stop_at, said = None, []
    execute.run(c, tmp_path, log=said.append)
    assert len(fake) == len(set(fake)) == 5 * (6 + 1)
    assert known <= set(fake)  # another worker would not have begun anything else: a search cut off decides nothing
    assert rates(fake) == [0.003, 0.009, 0.027, 0.081, 0.243, 0.729]
    assert "35 runs; 35 done, 0 to do" in said[-1]


def test_a_rate_that_fails_beyond_an_edge_ends_the_search(fake, tmp_path):
    fake.best, fake.fails = 1.0, lambda c: c.optim.lr > 0.01
    rows = execute.run(config_of(extend=6), tmp_path, log=quiet)
    assert {row["lr"] for row in rows if row["status"] == "failed"} == {0.027}
    assert len(rows) == len({row["id"] for row in rows}) == 5 * 4  # it is tried in no other round
    assert rates(fake) == [0.003, 0.009, *3 * [0.027]] and rates(fake, seed=1) == [0.009]


def test_draws_are_the_same_every_time_and_inside_their_ranges():
    random = {"draws": 20, "seed": 3, "ranges": {"optim": {"lr": (1 / 9, 9.0, "log"), "weight_decay": (0.0, 0.1)}}}
    c = config_of(random=random | {"ranges": random["ranges"] | {"stop": {"patience": (1, 4)}}})
    found = search.trials(c, 0.003)
    assert found == search.trials(c, 0.003) and len(found) == 20
    assert all(0.003 / 9 <= lr <= 0.027 for lr in found) and min(found) < 0.001 < 0.009 < max(found)
    assert all(0 <= keys["optim.weight_decay"] <= 0.1 for keys in found.values())
    assert {keys["stop.patience"] for keys in found.values()} == {1, 2, 3, 4}
    halved = search.trials(c, 0.0015)
    assert list(halved.values()) == list(found.values())  # of another cell
    c.random.seed = 4
    assert search.trials(c, 0.003) != found


def test_the_best_draw_gets_the_other_seeds(fake, tmp_path):
    ranges = {"optim": {"lr": (1 / 9, 9.0, "log"), "weight_decay": (0.0, 0.1)}}
    c = config_of(random={"draws": 4, "seed": 0, "ranges": ranges})
    rows = [row for row in execute.run(c, tmp_path, log=quiet) if row["id"].startswith(f"{CELL}-")]
    first, second = [row for row in rows if row["seed"] == 0], [row for row in rows if row["seed"] == 1]
    best = min(first, key=lambda row: abs(math.log(row["lr"] / 0.003)))
    assert len(first) == 4 and [(row["lr"], row["drawn"]) for row in second] == [(best["lr"], best["drawn"])]
    assert len({row["drawn"]["optim.weight_decay"] for row in first}) == 4
    point = json.loads((tmp_path / "points" / best["id"] / "config.json").read_text())
    assert point["optim"]["weight_decay"] == best["drawn"]["optim.weight_decay"]


def test_a_short_search_is_apart_and_every_seed_is_trained_in_full(fake, tmp_path):
    c = config_of(search_steps=0.25)
    rows = execute.run(c, tmp_path, log=quiet)
    searched = files.read_jsonl(tmp_path / "search.jsonl")
    assert len(rows) == 5 * 2 and len(searched) == 5 * 2 and {row["timing"]["steps"] for row in searched} == {10}
    assert {row["timing"]["steps"] for row in rows} == {40} and all(row["id"].endswith("-search") for row in searched)
    assert all(list(row["metrics"]) == ["val"] for row in searched)  # no test image is seen
    assert rates(fake) == [0.003, 0.009, 0.003] and rates(fake, seed=1) == [0.003]
    assert "20 runs; 20 done" in execute.state.plan(c, read(c, tmp_path))
    c.points.vqa.epochs, c.points.vqa.eval.forgetting = 8.0, True
    head = next(cell for cell in grid.cells(c) if cell.variant == "head")
    short, whole = (grid.Run(head, 0, 0.003, c, short=one).config for one in (True, False))
    assert [(one.epochs, one.eval.base, one.eval.forgetting) for one in (short, whole)] == [
        (2.0, False, False),
        (8.0, True, True),
    ]
    assert "20 runs" in report.write(tmp_path)  # with those of the search


def test_by_nats_the_search_needs_no_texts(fake, tmp_path):
    """Validation says 0.003 is best, by either measure; the main metric on test images says 0.009."""
    c = config_of(search_steps=0.5, measure="nll")
    execute.run(c, tmp_path, log=quiet)
    searched = files.read_jsonl(tmp_path / "search.jsonl")
    assert {tuple(row["metrics"]) for row in searched} == {()} and rates(fake, seed=1) == [0.003]
    c.points.vqa.optim.schedule = "cosine"
    with pytest.raises(
        ValueError, match=r"measure is 'nll', so every run must validate on 'val'; set points\.vqa\.optim"
    ):
        grid.check(c)


def test_a_dry_run_says_how_many_rates_may_be_added(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_flops_per_second", lambda: 1e11)
    monkeypatch.setattr(cost, "_traced", lambda c: (1e9, 0, 1000))
    said = cost.dry_run(config_of(extend=3, search_steps=0.25), tmp_path)
    assert "2 + 2 short" in said and "20 runs left" in said and "at most 15 more of the search" in said
    assert "seconds" not in said and not list(tmp_path.iterdir())


# One's own images


@pytest.mark.slow
def test_a_study_of_ones_own_folder_has_the_protocol_of_new_studies(fake, tmp_path):
    (tmp_path / "pics").mkdir()
    names = [f"{i}.png" for i in range(30)]
    for i, name in enumerate(names):
        Image.new("RGB", (20, 20), (8 * i, 0, 0)).save(tmp_path / "pics" / name)
    lines = ["image,caption", *(f"{name},a red square" for name in names)]
    (tmp_path / "pics" / "captions.csv").write_text("\n".join(lines))
    start = f"root={tmp_path / 'pics'},annotations=captions.csv,seeds=2"
    c = folder.get_config(f"{start},images=8+16,steps=40")
    c.points.captioning.data.data_dir = str(tmp_path / "copies")
    execute.run(c, tmp_path / "study", log=quiet)
    searched, rows = (files.read_jsonl(tmp_path / "study" / f"{name}.jsonl") for name in ("search", "results"))
    assert {(row["setting"], row["timing"]["steps"]) for row in rows} == {("my_captions", 40)} and len(rows) == 8 * 2
    assert {row["timing"]["steps"] for row in searched} == {10} and all(list(row["metrics"]) == [] for row in searched)
    assert {row["lr"] for row in rows} == {0.002, 0.003, 0.00333}  # .0033, the smallest rate of prefix, is the best
    assert len(searched) == 8 * 5 + 3  # so one more is tried in each of its cells
    assert "no setting declares" in report.write(tmp_path / "study")
    page = (tmp_path / "study" / "report" / "index.html").read_text()
    assert "paper" not in page and "What to use: on my_captions with 16 images" in page
    assert "the last 75 % of the steps lower the validation loss by 0 nats" in page
    c.n_images = (8, 1600)
    with pytest.raises(ValueError, match="n_images includes 1600, but the training split of setting 'my_captions' has"):
        grid.check(c)
    for arg, said in (
        ("", "requires root"),
        (f"{start},task=draw", "task is 'draw'"),
        (f"{start},images=8-16", "give numbers of images"),
    ):
        with pytest.raises(ValueError, match=said):
            folder.get_config(arg)


# What else a cell may have


def test_steps_follow_the_number_of_images_and_rates_the_size():
    c = config_of(steps=(30, 70))
    c.variants.lora_head.lr_size = 2
    found = {(cell.size, cell.n_images): grid.learning_rates(c, cell)[0] for cell in grid.cells(c) if cell.size}
    assert found == {(2, 256): 0.003, (8, 64): 0.0015, (8, 256): 0.0015}
    assert [grid.Run(dataclasses.replace(CELL, n_images=n), 0, 0.003, c).config.steps for n in (64, 256)] == [30, 70]


def test_a_setting_has_a_base_for_each_seed(fake, tmp_path, monkeypatch):
    c = config_of()
    c.settings.vqa_stated.base = str(tmp_path / "base{seed}")
    with pytest.raises(ValueError, match="base0"):
        grid.check(c)
    monkeypatch.setattr(grid, "check", quiet)
    monkeypatch.setattr(grid, "_solved", lambda *_: 8)
    rows = execute.run(c, tmp_path / "study", log=quiet)
    bases = {
        (row["seed"], files.read_json(tmp_path / "study" / "points" / row["id"] / "config.json")["base"])
        for row in rows
    }
    assert bases == {(seed, str(tmp_path / f"base{seed}")) for seed in (0, 1)}
    head = next(cell for cell in grid.cells(c) if cell.variant == "head")
    assert [grid.Run(head, seed, 0.003, c).config.eval.base for seed in (0, 1)] == [True, True]
    del c.settings.vqa_stated.base
    assert [grid.Run(head, seed, 0.003, c).config.eval.base for seed in (0, 1)] == [True, False]
