"""The grid, who works on what, and what is run again; points are trained in test_train.py and replaced here."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_runs import html_of, quiet
from PIL import Image

from configs.studies import scenes_full, tiny
from jaxpeft.data import base, pipeline, scenes
from jaxpeft.models import loading
from jaxpeft.runtime import files, locks, registry
from jaxpeft.runtime.locks import Lease
from jaxpeft.study import cases, claims, cost, execute, grid, progress, report, reruns
from jaxpeft.study import config as studies
from jaxpeft.study.grid import Cell
from jaxpeft.study.report import figures, page
from jaxpeft.study.report.rows import as_csv
from jaxpeft.study.state import State, read
from jaxpeft.training import checkpoint, results, setup


@pytest.fixture
def config():
    c = tiny.get_config("steps=3")
    c.settings.captions_human.lr_scale = 1.0  # the same rates for both settings
    return c


def test_the_grid_is_both_axes_through_the_middle(config):
    cells = grid.cells(config)
    of_lora = [(c.size, c.n_images) for c in cells if c.setting == "vqa_stated" and c.variant == "lora_head"]
    assert of_lora == [(8, 64), (2, 256), (8, 256)]
    assert len(cells) == len(set(cells)) == 2 * (3 + 3 + 2)
    config.cross = True
    assert len(grid.cells(config)) == 2 * (4 + 4 + 2)


def test_every_cell_has_the_same_number_of_rates_and_ids_are_stable(config):
    named = grid.runs(config, {})
    assert len({run.id for run in named}) == len(named) == 2 * len(grid.cells(config))
    assert named[0].id == "captions_human-head-n64-s0-lr0.003"
    assert all(len(grid.learning_rates(config, cell)) == 2 for cell in grid.cells(config))


def test_a_run_is_a_config_that_main_runs_alone(config):
    run = grid.Run(Cell("vqa_stated", "lora_head", 8, 64), 1, 0.003, config)
    c = run.config
    assert (c.method.name, c.method.rank, c.head, c.optim.lr) == ("lora", 8, "transform", 0.003)
    assert (c.seed, c.data.subset_seed, c.data.n_images, tuple(c.data.types)) == (
        1,
        1,
        64,
        ("color", "shape", "position"),
    )
    assert c.name == run.id and c.optim.schedule == "plateau"


def test_a_study_of_other_data_measures_no_forgetting(config):
    """The recipe for scenes does; a setting, or a whole study, may have other data."""
    config.settings.captions_human.data = {"name": "coco_captions"}
    found = {cell.setting: grid.Run(cell, 0, 0.003, config).config for cell in grid.cells(config)}
    assert {name: (c.data.name, c.eval.forgetting) for name, c in found.items()} == {
        "captions_human": ("coco_captions", False),
        "vqa_stated": ("scenes", True),
    }
    for c in found.values():
        setup.check_config(c)


@pytest.mark.slow
def test_sizes_are_solved_for_the_budget_and_prompt_is_capped():
    c = studies.study("x", "", ("vqa_stated",), studies.variants("none", prompts=()), (2000, 20_000, 10**6), (64,))
    sizes = {variant: [cell.size for cell in grid.cells(c) if cell.variant == variant] for variant in c.variants}
    assert all(sizes[variant] == sorted(set(sizes[variant])) for variant in sizes)
    assert len(sizes["lora"]) == 3 and len(sizes["prompt"]) < 3


def test_more_pictures_than_there_are_is_said_before_anything_is_written(config, tmp_path):
    config.n_images = (64, 1000)
    with pytest.raises(
        ValueError, match=r"n_images includes 1000, but the training split of setting 'captions_human' has 256"
    ):
        execute.run(config, tmp_path / "study", workers=1)
    assert not (tmp_path / "study").exists()


def test_a_level_scales_the_rates_of_every_arm(config):
    config.settings.captions_human.lr_scale = 2.0
    config.settings.vqa_stated.lr_scale = 0.5
    found = {
        cell.setting: grid.learning_rates(config, cell) for cell in grid.cells(config) if cell.variant == "lora_head"
    }
    assert found == {"captions_human": [0.006, 0.018], "vqa_stated": [0.0015, 0.0045]}
    assert "lr_scale" not in grid.Run(grid.cells(config)[0], 0, 0.006, config).config


def test_the_rate_is_chosen_on_validation_and_never_on_test(config, fake, tmp_path):
    execute.run(config, tmp_path, log=quiet)
    later = [name for name in fake if "-s1-" in name]
    assert len(later) == len(grid.cells(config))
    # by test scores it would be .009 and .09
    assert {name.rsplit("lr", 1)[1] for name in later if "prefix" not in name} == {"0.003"}
    assert {name.rsplit("lr", 1)[1] for name in later if "prefix" in name} == {"0.03"}
    assert grid.best_learning_rate([(0.09, 0.7), (0.03, 0.7), (0.01, 0.1)]) == 0.03  # of equal ones the smaller one


def test_subsets_of_a_seed_nest_and_are_the_same_for_every_method(config):
    split = scenes.load({"n_train": 300}, ["train"])["train"]
    ids = {}
    for variant, size in (("lora_head", 8), ("prefix_head", 16)):
        for n in (64, 256):
            c = grid.Run(Cell("vqa_stated", variant, size, n), 1, 0.01, config).config.data
            taken, _ = pipeline.subset(split, seed=c.subset_seed, n_images=c.n_images)
            ids[variant, n] = [row["image_id"] for row in taken.rows]
    assert ids["lora_head", 64] == ids["prefix_head", 64] == ids["lora_head", 256][:64]


def test_nothing_that_is_done_runs_again(config, fake, tmp_path):
    rows = execute.run(config, tmp_path, log=quiet)
    assert len(rows) == len(fake) == grid.n_runs(config)
    said = []
    assert execute.run(config, tmp_path, log=said.append) == rows
    assert len(fake) == grid.n_runs(config) and "48 done, 0 to do" in said[0]


@pytest.mark.slow
def test_a_changed_config_runs_again_only_what_it_touches(config, fake, tmp_path):
    execute.run(config, tmp_path, log=quiet)
    before, said = len(fake), []
    config.points.vqa.optim.weight_decay = 0.1
    execute.run(config, tmp_path, log=said.append)
    again = fake[before:]
    assert again and all(name.startswith("vqa") for name in again) and len(again) == before / 2
    assert "out of date, will run again: vqa_stated-head-n256-s0-lr0.003 (optim.weight_decay)" in said[0]
    assert len(list((tmp_path / "stale").iterdir())) == before / 2  # kept, not deleted


@pytest.mark.slow
def test_a_run_given_up_or_cut_off_is_done_anew_when_its_config_changes(config, fake, tmp_path):
    """Its checkpoints belong to another run, and its failures too."""
    fake.fails = lambda c: c.name == "vqa_stated-head-n64-s0-lr0.009" and c.optim.weight_decay != 0.1
    execute.run(config, tmp_path, log=quiet)
    cut_off = tmp_path / "points" / "vqa_stated-head-n64-s0-lr0.003"
    (cut_off / "result.json").unlink()
    (cut_off / "checkpoint").touch()
    config.points.vqa.optim.weight_decay = 0.1
    rows = execute.run(config, tmp_path, log=quiet)
    assert len(rows) == grid.n_runs(config) and all(row["status"] == "done" for row in rows)
    assert not (cut_off / "checkpoint").exists() and not list((tmp_path / "failures").iterdir())


def test_a_run_that_was_cut_off_starts_afresh_with_other_data(config, fake, tmp_path, monkeypatch):
    """Its checkpoint is of the data before: no try to resume it can succeed."""
    cut_off, said = grid.runs(config, {})[0].id, []
    (tmp_path / "points" / cut_off / "checkpoints").mkdir(parents=True)

    def run(config, workdir, log=print, features_in=None):
        if (Path(workdir) / "checkpoints").exists():
            stored, now = ({"data": {"train": digest}} for digest in ("before", "after"))
            checkpoint.check_manifest("checkpoint 1", stored, now, False, quiet)
        return fake.run(config, workdir)

    monkeypatch.setattr(execute.training_run, "run", run)
    rows = execute.run(config, tmp_path, log=said.append)
    assert all(row["status"] == "done" for row in rows) and fake.count(cut_off) == 1
    (line,) = (line for line in said if "starts afresh" in line)
    assert line.startswith(cut_off) and "data/train: stored before, now after" in line
    assert not (tmp_path / "failures").exists()
    (aside,) = (tmp_path / "stale").iterdir()
    assert aside.name.startswith(cut_off) and (aside / "checkpoints").exists()


def test_old_names_in_the_config_of_a_finished_run_are_no_difference(config, fake, tmp_path):
    """Those of version 0.1. Whatever else differs is another config."""
    execute.run(config, tmp_path, log=quiet)
    before = len(fake)
    path = tmp_path / "points" / "vqa_stated-head-n64-s0-lr0.003" / "config.json"
    old = json.loads(path.read_text())
    old["optim"]["decay"] = old["optim"].pop("weight_decay")
    old["model"]["remat"] = "none"  # the default of 0.2
    del old["model"]["attention"]
    files.write_json(path, old)
    execute.run(config, tmp_path, log=quiet)
    assert len(fake) == before
    files.write_json(path, old | {"batch_size": 1})
    execute.run(config, tmp_path, log=quiet)
    assert fake[before:] == ["vqa_stated-head-n64-s0-lr0.003"]


@pytest.mark.parametrize("old, new", [("arms", "variants"), ("levels", "settings"), ("rates", "learning_rates")])
def test_an_old_name_in_a_config_is_an_error_that_names_the_new_one(config, tmp_path, old, new):
    config[old] = config[new]
    with pytest.raises(ValueError, match=rf"config\.{old} of a study is now config\.{new}"):
        execute.run(config, tmp_path)
    del config[old]
    config.variants.head.levels = ("vqa_stated",)
    with pytest.raises(ValueError, match=r"config\.variants\.head\.levels is now config\.variants\.head\.settings"):
        grid.cells(config)


# ---------------------------------------------------------------- the code that made a run


def test_the_code_is_the_package_without_what_numbers_do_not_depend_on(tmp_path, monkeypatch):
    for name in ("tree.py", "methods/lora.py", "study/grid.py", "apps/demo.py", "configs/point.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(results, "PACKAGE", tmp_path)
    assert set(results._package_code()) == {"tree.py", "methods/lora.py"}
    before = results._package_code()
    (tmp_path / "methods/lora.py").write_text("other")
    assert [name for name, digest in results._package_code().items() if digest != before[name]] == ["methods/lora.py"]
    real = Path(results.__file__).parents[1]
    monkeypatch.setattr(results, "PACKAGE", real)
    assert (
        results._package_code()["training/run.py"]
        == hashlib.sha256((real / "training/run.py").read_bytes()).hexdigest()
    )


def test_the_code_has_the_modules_of_imports_as_they_were_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "digests", {})
    path, codes = tmp_path / "a_method_of_mine.py", [results.code()]
    for text in ("x = 1\n", "x = 2\n"):
        path.write_text(text)
        registry.load([str(path)])
        codes.append(results.code())
    assert codes[0] != codes[1] == codes[2]  # the second text is not what this process runs
    registry.digests.clear()
    del sys.modules[path.stem]
    registry.load([str(path)])
    assert results.code() not in codes


@pytest.mark.slow
def test_other_code_alone_does_nothing_again_and_is_said(config, fake, tmp_path, monkeypatch):
    execute.run(config, tmp_path, log=quiet)
    before, said, old = len(fake), [], results.code()
    monkeypatch.setattr(results, "code", lambda: "edited")
    rows = execute.run(config, tmp_path, log=said.append)
    assert len(fake) == before and {row["code"] for row in rows} == {old}
    assert (
        "48 of 48 finished runs were made by other code" in said[0]
        and "--rerun='captions_human-head-n256-*'" in said[0]
    )
    assert "48 runs" in report.write(tmp_path)  # all of one code


@pytest.mark.slow
def test_rerun_does_what_matches_again_once_for_each_code(config, fake, tmp_path, monkeypatch):
    execute.run(config, tmp_path, log=quiet)
    before, pattern = len(fake), "vqa_stated-head-n64-*"
    again = [f"vqa_stated-head-n64-s{end}" for end in ("0-lr0.003", "0-lr0.009", "1-lr0.003")]
    said = []
    execute.run(config, tmp_path, log=said.append, rerun=pattern)
    assert fake[before:] == again and "3 runs are executed again" in said[0]
    assert sorted(path.name.rsplit(".", 1)[0] for path in (tmp_path / "stale").iterdir()) == again
    execute.run(config, tmp_path, log=said.append, rerun=pattern)  # the same command again
    execute.run(config, tmp_path, log=said.append)
    assert fake[before:] == again and any(one.startswith("3 already were; to repeat them") for one in said)
    monkeypatch.setattr(results, "code", lambda: "edited")
    execute.run(config, tmp_path, log=quiet, rerun=pattern)
    assert fake[before:] == again * 2


@pytest.mark.slow
def test_rerun_goes_on_after_a_stop_and_in_workers_that_were_not_told(config, fake, tmp_path):
    execute.run(config, tmp_path, log=quiet)
    before = len(fake)
    fake.stop_at = before + 5
    with pytest.raises(KeyboardInterrupt):
        execute.run(config, tmp_path, log=quiet, rerun="vqa_stated-*")
    fake.stop_at = None
    execute.attempt(read(config, tmp_path).todo[0], tmp_path, quiet)  # a worker, which ends
    assert len(fake) == before + 6
    execute.run(config, tmp_path, log=quiet, rerun="vqa_stated-*")
    execute.work(config, tmp_path, log=quiet)
    assert sorted(fake[before:]) == sorted(name for name in fake[:before] if name.startswith("vqa_stated-"))


def test_images_for_the_report_are_of_the_splits_that_the_runs_load(config, tmp_path, monkeypatch):
    """A folder without files for validation holds another test split where only that one is asked for."""
    load, asked = execute.data.load, []
    monkeypatch.setattr(execute.data, "load", lambda c, splits: asked.append(splits) or load(c, splits))
    execute.keep_images(config, tmp_path, n=1)
    assert asked and all(set(splits) == {"train", "val", "test"} for splits in asked)
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == len(config.settings)


def test_launchers_that_finish_together_keep_the_images_once(config, tmp_path, monkeypatch):
    """The first one is drawing when the second one, which has begun later, has finished."""
    load, n_loaded = execute.data.load, []

    def interrupted(c, splits):
        n_loaded.append(splits)
        if len(n_loaded) == 1:
            execute.keep_images(config, tmp_path, n=2)
        return load(c, splits)

    monkeypatch.setattr(execute.data, "load", interrupted)
    execute.keep_images(config, tmp_path, n=2)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(config.settings)
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 2 * len(config.settings)


def test_images_for_the_report_are_small_and_those_of_the_data(config, tmp_path, monkeypatch):
    """A photo of 1,000 x 600 pixels and a small one; then other images under the same ids."""
    load = execute.data.load

    def photos(colour, source):
        images = [np.full(shape, colour, np.uint8) for shape in ((600, 1000, 3), (40, 30, 3))]
        rows = [{"image_id": str(i)} for i in range(2)]
        return lambda *_: {"test": base.Split("test", images, rows, source=source)}

    def kept(setting):
        shown = {}
        for path in (tmp_path / "pictures" / setting).glob("*.png"):
            with Image.open(path) as image:
                shown[path.stem] = image.size, image.getpixel((0, 0))[0]
        return shown

    monkeypatch.setattr(execute.data, "load", photos(1, "one"))
    execute.keep_images(config, tmp_path)
    assert kept("vqa_stated") == {"0": ((512, 307), 1), "1": ((30, 40), 1)}
    monkeypatch.setattr(execute.data, "load", photos(2, "one"))
    execute.keep_images(config, tmp_path)  # the same data, so nothing is written
    monkeypatch.setattr(execute.data, "load", photos(3, "other"))
    execute.keep_images(config, tmp_path, renew=False)
    assert kept("vqa_stated")["1"] == ((30, 40), 1)
    execute.keep_images(config, tmp_path)
    assert kept("vqa_stated")["1"] == ((30, 40), 3)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(config.settings)
    monkeypatch.setattr(execute.data, "load", load)
    shown = []
    for seed in (0, 1):
        for point in config.points.values():
            point.data.seed = seed
        execute.keep_images(config, tmp_path, n=1)
        shown.append({path.name: path.read_bytes() for path in (tmp_path / "pictures" / "vqa_stated").glob("*.png")})
    assert shown[0].keys() == shown[1].keys() and shown[0] != shown[1]


def test_scores_of_cases_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Another launcher of the study may be reading the file, or writing it too."""
    cases.write(tmp_path, [], {"test"})
    before = (tmp_path / "cases.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cases.np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        cases.write(tmp_path, [], {"test"})
    assert [path.name for path in tmp_path.iterdir()] == ["cases.npz"]
    assert (tmp_path / "cases.npz").read_bytes() == before


def test_of_two_launchers_that_ask_at_once_one_is_heard(config, fake, tmp_path, monkeypatch):
    """The other one asks, and its first run is done again, between the look of the one and its own request."""
    execute.run(config, tmp_path, log=quiet)
    before, found, real = len(fake), read(config, tmp_path), reruns.state.set_aside

    def slow(*args):
        monkeypatch.setattr(reruns.state, "set_aside", real)
        reruns.ask(tmp_path, "vqa_stated-*", found, quiet)
        execute.attempt(read(config, tmp_path).todo[0], tmp_path, quiet)
        real(*args)

    monkeypatch.setattr(reruns.state, "set_aside", slow)
    reruns.ask(tmp_path, "vqa_stated-*", found, quiet)
    assert len(fake) == before + 1
    execute.run(config, tmp_path, log=quiet, rerun="vqa_stated-*")
    assert sorted(fake[before:]) == sorted(name for name in fake[:before] if name.startswith("vqa_stated-"))


def test_rerun_gives_up_runs_another_chance_and_refuses_what_matches_nothing(config, fake, tmp_path):
    bad, said = "vqa_stated-head-n64-s0-lr0.009", []
    fake.fails = lambda c: c.name == bad
    execute.run(config, tmp_path, log=said.append)
    assert f"given up after 3 tries: {bad}" in said[-1]
    fake.fails = lambda c: False
    with pytest.raises(
        ValueError, match=r"--rerun=vqa_started\* matches no run of this study; an example of an id is captions_human-"
    ):
        execute.run(config, tmp_path, log=quiet, rerun="vqa_started*")
    rows = execute.run(config, tmp_path, log=quiet, rerun=bad)
    assert fake[-1] == bad and all(row["status"] == "done" for row in rows)


@pytest.mark.slow
def test_runs_of_one_cell_by_different_code_are_not_compared_unless_asked(config, fake, tmp_path, monkeypatch):
    execute.run(config, tmp_path, log=quiet)
    old = results.code()
    monkeypatch.setattr(results, "code", lambda: "edited")
    execute.run(config, tmp_path, log=quiet, rerun="vqa_stated-head-n64-s0-lr0.003")
    with pytest.raises(ValueError) as caught:
        report.write(tmp_path)
    said = str(caught.value)
    assert f"vqa_stated-head-n64-s0-lr0.009, vqa_stated-head-n64-s1-lr0.003 by {old}" in said
    assert "vqa_stated-head-n64-s0-lr0.003 by edited" in said and "--mixed_code" in said and "n256" not in said
    assert not (tmp_path / "report").exists()
    report.write(tmp_path, mixed_code=True)
    assert "made by different code" in (tmp_path / "report" / "index.html").read_text()
    pattern = re.search(r"--rerun='(.*?)'", said)[1]  # the fix that it names
    execute.run(config, tmp_path, log=quiet, rerun=pattern)
    assert "made by different code" not in html_of(tmp_path)


@pytest.mark.slow
def test_a_failed_run_is_tried_three_times_and_stops_no_other(config, fake, tmp_path):
    bad, said = "vqa_stated-head-n64-s0-lr0.009", []
    fake.fails = lambda c: c.name == bad
    rows = execute.run(config, tmp_path, log=said.append)
    assert fake.count(bad) == 3
    assert [row["error"] for row in rows if row["status"] == "failed"] == ["FloatingPointError: loss is nan"]
    assert sum(row["status"] == "done" for row in rows) == grid.n_runs(config) - 1
    assert f"given up after 3 tries: {bad}" in said[-1]
    assert f"{bad}</td>" in html_of(tmp_path)


def test_a_stop_is_not_a_failure(config, fake, tmp_path):
    fake.stop_at = 0
    with pytest.raises(KeyboardInterrupt):
        execute.run(config, tmp_path, log=quiet)
    assert not (tmp_path / "failures").exists() and not list((tmp_path / "claims").iterdir())


@pytest.mark.slow
def test_a_dry_run_needs_no_weights_and_counts_every_cell(tmp_path, monkeypatch):
    """manifest and vocabulary are enough to plan; counts are those of the methods, whatever the picture size."""
    for name in ("manifest.json", "vocab.txt"):
        (tmp_path / name).write_bytes((loading.ASSETS / "tiny" / name).read_bytes())
    monkeypatch.setattr(cost, "_flops_per_second", lambda: 1e11)
    planned = []
    for where in (str(tmp_path), "tiny"):
        config = tiny.get_config("steps=3,small=true")
        for one in config.points.values():
            one.base = where
        planned.append(cost.dry_run(config, tmp_path / "none"))
    assert planned[0] == planned[1]
    assert "15 runs left" in planned[0]
    config.points.vqa.base = str(tmp_path)
    with pytest.raises(ValueError, match="no weights; expected one of model.safetensors"):  # before a run of it begins
        execute.run(config, tmp_path / "none", log=quiet)
    assert all(str(cell) in planned[0] for cell in grid.cells(config))
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


def test_a_study_that_is_started_again_knows_how_long_runs_take(config, fake, tmp_path):
    fake.stop_at, said = 10, []
    with pytest.raises(KeyboardInterrupt):
        execute.run(config, tmp_path, log=quiet)
    fake.stop_at = None
    execute.run(config, tmp_path, log=said.append)
    assert ends(said)[0] == "10 of 48 runs done, ETA about 0:01:16"


def test_what_other_workers_finish_is_in_every_workers_count(config, fake, tmp_path):
    """Two workers that both looked when nothing was done, and a third one that looks now."""
    state, said = read(config, tmp_path), []
    for run in state.todo[:3]:
        assert execute.attempt(run, tmp_path, said.append, state)
    execute.attempt(state.todo[3], tmp_path, said.append)
    assert [line.split(" runs done")[0] for line in ends(said)] == ["1 of 48", "2 of 48", "3 of 48", "4 of 48"]


def test_the_rest_is_shared_by_the_workers_that_live(config, fake, tmp_path):
    state, said = read(config, tmp_path), []
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


def test_a_run_is_expected_to_take_what_those_most_like_it_took(config):
    """A large variant late in the grid is not taken for a small one as soon as any of its kind is finished."""
    took = {
        Cell("a", "lora", 2, 64): 10.0,
        Cell("a", "lora", 2, 256): 30.0,
        Cell("a", "full", 0, 64): 100.0,
        Cell("b", "lora", 2, 64): 1000.0,
    }
    run = [grid.Run(cell, 0, 1.0, config) for cell in took]
    finished = {one.id: {"timing": {"total_s": took[one.cell]}} for one in run}
    measured = progress._measured(State(finished, {}, {}, run))
    expected = {
        Cell("a", "lora", 2, 64): 10.0,  # its cell
        Cell("a", "lora", 2, 512): 20.0,  # its size: between 10 and 30
        Cell("a", "lora", 8, 64): 20.0,  # its variant
        Cell("a", "prefix", 4, 64): 30.0,  # its setting: the middle of 10, 30 and 100
        Cell("c", "lora", 2, 64): 65.0,  # any: between 30 and 100
    }
    assert {cell: progress._expected(cell, measured) for cell in expected} == expected


def test_runs_given_up_are_said_and_leave_nothing_to_wait_for(config, fake, tmp_path):
    """Both rates of a cell fail: its other seed has no rate, and never runs."""
    fake.fails = lambda c: c.name.startswith("captions_human-head-n64")
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
    code = f"import pathlib, jaxpeft.runtime.locks as x; assert x.Lease(pathlib.Path({str(tmp_path)!r}), 'a').take()"
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


RACE = """
import multiprocessing, pathlib, sys
from jaxpeft.runtime.locks import Lease

context = multiprocessing.get_context("fork")  # of a process that has imported all and started no thread
together = context.Barrier(4)

def race():
    together.wait()
    claim = Lease(pathlib.Path(sys.argv[1]), "a")
    if claim.take():
        print("won", flush=True)
    together.wait()  # who has it lives until all have tried

racers = [context.Process(target=race) for _ in range(4)]
for racer in racers:
    racer.start()
for racer in racers:
    racer.join()
"""


@pytest.mark.slow
def test_of_many_who_see_a_stale_claim_one_gets_it(tmp_path):
    (tmp_path / "a").write_text(
        json.dumps({"host": Lease(tmp_path, "x")._me["host"], "pid": 2**22 + 1, "started": "1"})
    )
    done = subprocess.run([sys.executable, "-c", RACE, tmp_path], check=True, capture_output=True, text=True)
    assert done.stdout == "won\n", done.stderr


# ---------------------------------------------------------------- the report


@pytest.fixture
def done(config, fake, tmp_path):
    config.note = "a <note>"
    execute.run(config, tmp_path, log=quiet)
    return tmp_path


def test_methods_keep_their_order_and_marks(done):
    found = report.read(done)
    head, lora = (figures.style(found, variant) for variant in ("head", "lora_head"))
    assert "markerfacecolor" not in lora and "markerfacecolor" not in head
    found.config["variants"]["lora"] = found.config["variants"]["lora_head"] | {"head": "none"}
    assert figures.style(found, "lora") == lora | {"markerfacecolor": "white"}
    drawn = figures.score_data(report.read(done))
    assert list(drawn.panels) == ["captions_human", "vqa_stated"]
    names = [name.removesuffix("_head") for name in drawn.variants]
    assert names == sorted(names, key=list(figures.STYLE).index) and len(names) > 1


@pytest.mark.slow
def test_the_report_reads_files_only_and_is_one_page(done, monkeypatch):
    monkeypatch.setattr(grid, "Run", None)
    page = html_of(done)
    assert "48 runs done" in page and "<img" in page
    assert "http" not in page.replace("http-equiv", "") and 'src="data:image/png;base64,' in page
    assert "a &lt;note&gt;" in page and "width=device-width" in page
    drawn = {path.stem for path in (done / "report").glob("*.png")}
    assert drawn == figures.FIGURES.keys()
    table = (done / "report" / "results.csv").read_text().splitlines()
    assert len(table) == 49 and table[0].startswith("id,setting,task,variant")


def test_no_results_is_said(tmp_path):
    with pytest.raises(ValueError, match="has no results.jsonl; run the study first"):
        report.write(tmp_path)


OLD = {"settings": "levels", "variants": "arms", "learning_rates": "rates", "setting": "level", "variant": "arm"}


@pytest.mark.slow
def test_a_study_of_version_0_1_is_reported_as_today(done):
    """Old names, and no code in its results."""
    report.write(done)
    made = {path.name: path.read_bytes() for path in (done / "report").iterdir()}
    about = json.loads((done / "study.json").read_text())
    about["config"]["variants"] = {
        name: {OLD.get(key, key): x for key, x in one.items()} for name, one in about["config"]["variants"].items()
    }
    about["config"] = {OLD.get(key, key): value for key, value in about["config"].items()}
    files.write_json(done / "study.json", about)
    lines = files.read_jsonl(done / "results.jsonl")
    old = [{OLD.get(key, key): value for key, value in row.items() if key != "code"} for row in lines]
    files.write_jsonl(done / "results.jsonl", old)
    report.write(done)
    assert {path.name: path.read_bytes() for path in (done / "report").iterdir()} == made
    old[0]["code"] = "new"
    files.write_jsonl(done / "results.jsonl", old)
    with pytest.raises(
        ValueError, match=f"{old[0]['id']} by new; .* by version 0.1|by version 0.1.* {old[0]['id']} by new"
    ):
        report.read(done)


@pytest.mark.slow
def test_the_640_runs_of_version_0_1_give_the_same_table(tmp_path):
    """results/scenes_full: every row, and with it every choice of a learning rate. The report needs no predictions."""
    kept = Path(__file__).parents[1] / "results" / "scenes_full"
    (tmp_path / "results.jsonl").symlink_to(kept / "results.jsonl")
    config = setup.as_json(scenes_full.get_config())
    config = {OLD.get(key, key): value for key, value in config.items()}
    files.write_json(tmp_path / "study.json", {"config": config})
    study = report.read(tmp_path)
    (_, *rows), (_, *expected) = as_csv(study.rows).splitlines(), (kept / "results.csv").read_text().splitlines()
    assert len(rows) == 640 and rows == expected
    line = report.write(tmp_path)
    assert "640 runs; claims: 1 flat; 1 negative; 9 not tested; 5 positive; 5 undecided" in line
    page = (tmp_path / "report" / "index.html").read_text()
    table = page[page.index("<h2>Claims") : page.index("<h2>Score against")]
    assert table.count("<tr>") == 22 and table.count("<details>") == 22  # the cells of each line, and how to read it
    assert "captions_web (consistent): blind 0.308, ceiling 3.608, the study&#x27;s best cell." in table
    assert "12 lines were tested" in table and "these differ from 0: C1 on captions_human (+26.6); C1 on" in table
    assert "differs from the other seeds by +0.07 standard deviations" in table and "Warning" not in table
    assert "lora_head 16 at 64, 256, 1024, 4096, 16384 images; parallel_adapter_head 64 at" in table
    assert '<b class="not-tested">not tested</b>' in table and '<b class="positive">positive</b>' in table
    answer = page[: page.index("<h2>The best runs")]
    assert (
        "on captions_web with 16,384 images, the frozen base (test cider_d 3.579): the best method, lora_head 16,"
        in answer
    )
    assert (
        "on captions_human with 16,384 images, full (test cider_d 6.605, frozen base 0.563, tied with none of 31"
        in answer
    )
    assert "in 80 of 128 cells the best learning rate is the smallest or the largest" in answer
    assert "72 of 384 chosen runs reached the cap" in answer and "Validation curves" not in page
    kept = json.loads((tmp_path / "report" / "claims.json").read_text())
    assert len(kept["verdicts"]) == 21 and kept["margins"] == {"data": 2, "size": 2, "method": 2, "departure": 2}


def test_scores_of_seed_0_that_are_too_good_are_a_warning(done):
    study = report.read(done)
    better = [dataclasses.replace(one, score=one.score + 0.1 * (one.seed == 0)) for one in study.results]
    many = [
        dataclasses.replace(one, seed=seed, score=one.score + 0.01 * seed)
        for one in better for seed in (one.seed, 2) if seed == one.seed or one.seed
    ]  # fmt: skip
    assert "Warning: seed 0" in page._selection(claims.selection(many))
    assert "Too few seeds" in page._selection(claims.selection(study.results))


def test_sizes_are_solved_for_the_fields_of_a_variant():
    """Half of the linears take twice the rank for the same budget."""
    solved = lambda **fields: grid._solved("tiny", "captioning", "lora", json.dumps(fields), 20_000)  # noqa: E731
    both, query = solved(), solved(targets="^text_.*attention/query$")
    assert abs(query - 2 * both) <= 1 and both > 4
