"""The report of made-up studies: what it says first, its tables in a browser, and two studies in one page."""

import json
import re
import shlex
import shutil
import subprocess
from html import escape
from types import SimpleNamespace

import numpy as np
import pytest
from fake_runs import html_of
from scipy import stats

from configs.studies import tiny
from jaxpeft import cli
from jaxpeft.runtime import files
from jaxpeft.study import execute, grid, report
from jaxpeft.study.report import answers, compare, figures, folded, markup, page
from jaxpeft.training import setup

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SIZES = {"lora": (2, 4, 8), "prefix": (4, 8, 16)}
DEVIATIONS = (0.0, 0.01, -0.01)  # of the scores of three seeds


def config_of(declare=None, seeds=3, rates=(1.0, 3.0)):
    """Two methods and the head alone on one's own captions, with 64 and 256 images."""
    c = tiny.get_config(f"steps=3,seeds={seeds}")
    c.name, c.hypothesis, c.note, c.learning_rates = "mine", "", "", rates
    c.settings = {"photos": {"task": "captioning"} | ({} if declare is None else {"consistent": declare})}
    for name in ("lora", "prefix"):
        c.variants[f"{name}_head"].sizes = SIZES[name]
    return c


def write(directory, score, config=None, base=0.2, blind=0.1, code="a", ahead=lambda run: 0.05, **more):
    """A study's files with test scores score(run), validation scores that are ahead(run) of them, and the smallest rate chosen
    everywhere."""
    config = config or config_of()
    rows = []
    for cell in grid.cells(config):
        rates = grid.learning_rates(config, cell)
        for run in [grid.Run(cell, 0, lr, config) for lr in rates] + [
            grid.Run(cell, seed, rates[0], config) for seed in range(1, config.seeds)
        ]:
            test = score(run) - 0.1 * rates.index(run.lr)
            scores = {
                name: {"n": 8, "blind": {"one": {"cider_d": blind}}, "tuned": {"cider_d": x, "nll": 1.0}}
                for name, x in (("val", test + ahead(run)), ("test", test))
            }
            if base is not None and run.seed == 0:
                scores["test"]["base"] = {"cider_d": base}
            rows.append({
                "setting": cell.setting, "variant": cell.variant, "size": cell.size, "n_images": cell.n_images, "id": run.id,
                "seed": run.seed, "lr": run.lr, "status": "done", "main_metric": "cider_d", "metrics": scores, "code": code,
                "counts": {"tuned": 9, "stored": 7 + 300 * cell.size, "total": 1000},
                "timing": {"steps": 3, "stopped": "plateau", "step_s": 0.1, "compile_s": 1.0, "total_s": 2.0}, **more,
            })  # fmt: skip
    directory.mkdir(exist_ok=True)
    files.write_jsonl(directory / "results.jsonl", rows)
    command = "main.py --config=mine.py --workdir='my runs'"
    files.write_json(directory / "study.json", {"config": setup.as_json(config), "command": command})
    return report.read(directory)


def close(run):
    """LoRA and prefix are close, the head is far below; twice the images bring .05, twice LoRA's rank .02."""
    start = {"lora_head": 0.5, "prefix_head": 0.497, "head": 0.2}[run.cell.variant]
    rank = 0.02 * np.log2(run.cell.size / 2) if run.cell.variant == "lora_head" else 0.0
    sign = -1 if run.cell.variant == "prefix_head" else 1
    return start + rank + 0.05 * np.log2(run.cell.n_images / 64) + sign * DEVIATIONS[run.seed]


# What it says first


def test_the_best_on_validation_is_used_and_ties_are_by_interval(tmp_path):
    prefers = lambda run: 0.1 if (run.cell.variant, run.cell.n_images) == ("prefix_head", 64) else 0.05  # noqa: E731
    study = write(tmp_path, close, ahead=prefers)
    few, many = answers.choices(study, "photos")
    assert few.cell == ("prefix_head", 8, 64) and many.cell == ("lora_head", 8, 256)
    scores = {cell: [one.score for one in runs.values()] for cell, runs in report.claims.cells(study.results).items()}
    for one in (few, many):
        expected = []
        for cell, other in scores.items():
            if cell[2] == one.cell[2] and cell != one.cell:
                less = np.subtract(scores[one.cell], other)
                low = less.mean() - stats.t.ppf(0.975, 2) * less.std(ddof=1) / np.sqrt(3)
                expected += [cell] if low <= 0 else []
        assert one.tied == expected and one.n_others == len([cell for cell in scores if cell[2] == one.cell[2]]) - 1
    assert few.tied == [("lora_head", 4, 64)]
    np.testing.assert_allclose((few.score, few.over_base.value), (0.497, 0.297))


def test_one_seed_has_no_ties_and_no_intervals(tmp_path):
    study = write(tmp_path, close, config_of(seeds=1))
    chosen = answers.choices(study, "photos")
    assert [one.tied for one in chosen] == [None, None] and isinstance(chosen[0].over_base, float)
    use, more, trust = answers.sentences(study, {"photos": chosen})
    assert "one seed, so ties are not known" in use and "(one seed)" in more and "1 seed;" in trust
    assert "not known: too few seeds" in html_of(tmp_path)


def test_where_nothing_beats_the_frozen_base_it_is_what_to_use(tmp_path):
    study = write(tmp_path, close, base=0.66)
    chosen = answers.choices(study, "photos")
    assert [one.gains for one in chosen] == [False, False]  # .64 with 256 images
    use = answers.sentences(study, {"photos": chosen})[0]
    assert "the frozen base (test cider_d 0.660)" in use and "is not shown to be better by 3 seeds" in use
    assert answers.choices(write(tmp_path, close, base=0.55), "photos")[1].gains


def test_slopes_and_what_a_whole_axis_brings(tmp_path):
    found = {axis: answers.slopes(write(tmp_path, close).results, axis) for axis in ("data", "size")}
    assert list(found["data"]) == ["head", "lora_head", "prefix_head"]
    assert list(found["size"]) == ["lora_head", "prefix_head"]
    slopes = [[by_seed[seed] for seed in range(3)] for by_seed, _ in found["data"].values()]
    np.testing.assert_allclose(slopes, np.full((3, 3), 0.05), atol=1e-12)
    np.testing.assert_allclose([*found["size"]["lora_head"][0].values()], 0.02)
    whole = answers.pooled(found["size"], {"lora_head", "prefix_head"}, whole=True)
    np.testing.assert_allclose(whole.value, (0.04 + 0.0) / 2)  # two doublings of the rank


def fails(row):
    """The row of a run that was given up."""
    keys = ("id", "setting", "variant", "size", "n_images", "seed", "lr")
    return {key: row[key] for key in keys} | {"status": "failed", "error": "loss is nan"}


def without(directory, *lost):
    """A study some of whose runs failed."""
    rows = files.read_jsonl(directory / "results.jsonl")
    files.write_jsonl(directory / "results.jsonl", [fails(row) if row["id"] in lost else row for row in rows])
    return report.read(directory)


def test_slopes_are_averaged_over_variants_of_the_same_seed(tmp_path):
    """A doubling of the size brings .1 more with each next seed, in both methods."""
    study = write(tmp_path, lambda run: 0.1 * run.seed * np.log2(max(run.cell.size, 1)), config_of(seeds=4))
    results = [one for one in study.results if (*one.cell, one.seed) != ("lora_head", 2, 256, 1)]
    found = answers.slopes(results, "size")
    assert [[*by_seed] for by_seed, _ in found.values()] == [[0, 2, 3], [0, 1, 2, 3]]
    one, expected = answers.pooled(found, set(found)), answers.mean([0.0, 0.2, 0.3])
    np.testing.assert_allclose((one.value, one.low, one.high), (expected.value, expected.low, expected.high))


def test_a_line_whose_cells_share_no_seed_is_left_out(tmp_path):
    """Of two seeds: the rates are from a search apart, so that the first too can fail."""
    write(tmp_path, close, config_of(declare=False, seeds=2, rates=(1.0,)), validation={"kept": 1.0})
    lost = (("lora_head", 2, 256, 0), ("lora_head", 8, 256, 1))
    study = split(tmp_path, lambda row: (row["variant"], row["size"], row["n_images"], row["seed"]) not in lost)
    assert answers.slopes(study.results, "size").keys() == {"prefix_head"}
    assert html_of(tmp_path).count("the cells have no seed in common") > 1


def test_where_the_best_rates_stand(tmp_path):
    def places(score):
        found = answers.rate_places(write(tmp_path, score, config_of(rates=(0.3, 1.0, 3.0))))
        assert all(one["setting"] == "photos" and one["tried"] == {3} for one in found)
        return {one["variant"]: (one["smallest"], one["inside"], one["largest"]) for one in found}

    assert places(close) == {"head": (2, 0, 0), "lora_head": (4, 0, 0), "prefix_head": (4, 0, 0)}
    assert [edge for *_, edge in folded.edges(report.read(tmp_path))] == 10 * ["smallest"]
    lower = places(lambda run: close(run) - (run.lr < 2e-3))  # all rates of prefix are above that
    assert lower == {"head": (0, 2, 0), "lora_head": (0, 4, 0), "prefix_head": (4, 0, 0)}
    assert not answers.rate_places(write(tmp_path, close, config_of(rates=(1.0,))))


def split(directory, kept, failed=lambda row: False):
    """Make the runs with seed 0 those of a search with fewer steps, and keep the rows kept(row) as the runs after it."""
    rows = files.read_jsonl(directory / "results.jsonl")
    searched = [row | {"id": f"{row['id']}-search"} for row in rows if row["seed"] == 0]
    files.write_jsonl(directory / "search.jsonl", [fails(row) if failed(row) else row for row in searched])
    files.write_jsonl(directory / "results.jsonl", [row for row in rows if kept(row)])
    return report.read(directory)


@pytest.mark.parametrize("apart", [False, True])
def test_a_rate_whose_run_failed_was_tried(apart, tmp_path):
    """The middle rate is the best and the largest diverged: the best is not at the edge, as the search knows."""
    c = config_of(seeds=1, rates=(0.3, 1.0, 3.0))
    place = lambda row: round(row["lr"] / c.variants[row["variant"]].lr, 1)  # noqa: E731
    smallest_is_worst = lambda run: close(run) - (place({"lr": run.lr, "variant": run.cell.variant}) == 0.3)  # noqa: E731
    study = write(tmp_path, smallest_is_worst, c, validation={"kept": 1.0})
    if apart:
        study = split(tmp_path, lambda row: place(row) == 1.0, lambda row: place(row) == 3.0)
    else:
        study = without(tmp_path, *(row["id"] for row in study.rows if place(row) == 3.0))
    assert {place(row) for row in study.rows if row["chosen"]} == {1.0} and folded.edges(study) == []
    found = {one["variant"]: one for one in answers.rate_places(study)}
    assert {name: one["inside"] for name, one in found.items()} == {"head": 2, "lora_head": 4, "prefix_head": 4}
    assert all((one["smallest"], one["largest"], one["tried"]) == (0, 0, {3}) for one in found.values())
    html = html_of(tmp_path)
    assert f"{30 if apart else 20} runs done, 10 failed" in html and html.count("loss is nan") == 10


def test_a_cell_whose_whole_search_failed_is_in_the_report(tmp_path):
    """It has no row in results.jsonl."""
    write(tmp_path, close, config_of(rates=(1.0,)), validation={"kept": 1.0})
    lost = lambda row: (row["variant"], row["n_images"]) == ("head", 64)  # noqa: E731
    study = split(tmp_path, lambda row: not lost(row), lost)
    assert len(study.rows) == 9 * 3 and len(study.searched) == 10
    assert "36 runs; claims" in report.write(tmp_path)
    html = (tmp_path / "report" / "index.html").read_text()
    assert "36 runs done, 1 failed, 0.02 hours" in html and "Failures" in html  # of 2 seconds each
    assert re.search("photos-head-n64-s0-lr[^<]*-search</td>.*?loss is nan", html)


def test_a_study_whose_whole_search_failed_is_reported(tmp_path):
    write(tmp_path, close, config_of(declare=False, rates=(1.0,)))
    study = split(tmp_path, lambda row: False, lambda row: True)
    assert (study.rows, study.results, folded.edges(study)) == ([], [], [])
    assert "0 runs done, 10 failed" in html_of(tmp_path)


def test_a_shorter_search_in_nats_chooses_the_rates(tmp_path):
    """The runs of the search lie apart, and their likelihood prefers the middle rate, their scores the smallest."""
    c = config_of(declare=False, rates=(0.3, 1.0, 3.0))
    c.measure, c.search_steps = "nll", 0.25
    write(tmp_path, close, c, validation={"kept": 1.0})
    searched, final = [], []
    for row in files.read_jsonl(tmp_path / "results.jsonl"):
        factor = row["lr"] / c.variants[row["variant"]].lr
        row["validation"] = {"kept": abs(np.log(factor)) + 0.02 * (row["variant"] == "lora_head"), "kept_step": 1}
        # a search in nats scores no texts
        searched += [row | {"metrics": {}, "id": f"{row['id']}-search"}] if row["seed"] == 0 else []
        if round(factor, 1) == (1.0 if row["seed"] == 0 else 0.3):
            kept = row["validation"]["kept"] - 0.01 - 0.03 * (row["variant"] == "head" and row["n_images"] == 64)
            final.append(row | {"lr": c.variants[row["variant"]].lr, "validation": {"kept": kept, "kept_step": 1}})
    files.write_jsonl(tmp_path / "results.jsonl", final)
    files.write_jsonl(tmp_path / "search.jsonl", searched)
    study = report.read(tmp_path)
    assert all(row["chosen"] for row in study.rows) and len(study.results) == 30
    assert [one["inside"] for one in answers.rate_places(study)] == [4, 4, 2]
    expected = {"head": (0.025, 0.04), "lora_head": (0.01, 0.01), "prefix_head": (0.01, 0.01)}
    for one in answers.budget(study):  # what the rest of the steps brings
        np.testing.assert_allclose((one["mean"], one["largest"]), expected[one["variant"]])
    html = html_of(tmp_path)
    assert "<h2>Claims in nats per token" in html and (tmp_path / "report" / "claims_nll.json").exists()
    assert "the last 75 % of the steps lower the validation loss by 0.013 nats per token on average and by 0.04" in html
    assert html.count("No claim could be tested") == 2 and "What more steps bring" in html


def test_in_nats_the_best_cell_is_the_most_likely_one(tmp_path):
    """The head alone has the worst scores and the best likelihood."""
    c = config_of()
    c.measure = "nll"
    write(tmp_path, close, c, validation={"kept": 1.0})
    rows = files.read_jsonl(tmp_path / "results.jsonl")
    for row in rows:
        row["validation"]["kept"] += (row["variant"] != "head") + row["lr"]
        row["metrics"]["test"]["tuned"]["nll"] = 0.7 if row["variant"] == "head" else 0.9
    files.write_jsonl(tmp_path / "results.jsonl", rows)
    study = report.read(tmp_path)
    found = answers.choices(study, "photos")
    assert [one.cell[0] for one in found] == ["head", "head"]
    assert [one.tied for one in found] == [[], []]  # all others have .2 nats more with every seed, and better scores
    html = html_of(tmp_path)
    assert '<td data-label="test nats per token">0.700</td>' in html and "validation images by nats per token" in html
    c.measure = "main"
    write(tmp_path, close, c)
    assert answers.choices(report.read(tmp_path), "photos")[1].cell[0] == "lora_head"
    assert "<th>test nats per token</th>" not in html_of(tmp_path).split("<h2>More")[0]


def test_scores_on_other_splits_are_in_the_table_and_in_the_csv(tmp_path):
    write(tmp_path, close)
    assert "test_comp" not in html_of(tmp_path)
    rows = files.read_jsonl(tmp_path / "results.jsonl")
    for row in rows:
        row["metrics"]["test_comp"] = {"n": 8, "blind": {}, "tuned": {"cider_d": 0.4321, "nll": 1.0}}
    files.write_jsonl(tmp_path / "results.jsonl", rows)
    assert 'data-label="test_comp score" data-v="0.4321">0.4321</td>' in html_of(tmp_path)
    header, first, *_ = (tmp_path / "report" / "results.csv").read_text().splitlines()
    assert header.endswith(",error,test_comp") and first.endswith(",0.4321")


def test_a_base_for_each_seed_is_what_its_runs_are_compared_with(tmp_path):
    study = write(tmp_path, close)
    for row in study.rows:
        row["base"] = 0.2 + DEVIATIONS[row["seed"]]
    (few, _) = answers.choices(study, "photos")
    assert few.cell[0] == "lora_head"  # its scores deviate as the bases do
    np.testing.assert_allclose((few.over_base.low, few.over_base.high), (0.32, 0.32), atol=1e-9)


def test_a_command_repeats_the_best_run_and_another_uses_it(tmp_path):
    study = write(tmp_path, close)
    (tmp_path / "points" / "photos-lora_head8-n256-s1-lr0.003").mkdir(parents=True)
    html = page._runs(study, {"photos": answers.choices(study, "photos")})
    assert 'href="../points/photos-lora_head8-n256-s1-lr0.003/"' in html
    repeat, use = re.search("<code>(.*?)<br>(.*?)</code>", html.replace("&#x27;", "'")).groups()
    words = shlex.split(repeat)
    assert words == [
        "python",
        "main.py",
        "--config=mine.py",
        "--workdir=my runs",
        "--rerun=photos-lora_head8-n256-s1-lr0.003",
    ]
    assert cli._parser().parse_known_args(["study", *words[2:]])[1] == []
    assert shlex.split(use)[2] == "--workdir=my runs/points/photos-lora_head8-n256-s1-lr0.003"


# The page


def test_a_page_of_ones_own_pictures_has_answers_and_no_paper(tmp_path):
    write(tmp_path, close)
    html = html_of(tmp_path)
    assert "paper" not in html.lower() and "with pre-training" not in html.split("<h2>More")[0]
    titles = re.findall("<h2>(.*?)</h2>", html)
    assert titles == ["The best runs", "Score against training images", "What twice as much brings",
                      "Where the best learning rate stands among those tried", "More"]  # fmt: skip
    assert html.index("What to use: on photos with 256 images, lora_head 8") < html.index("<table")
    assert "No claim was judged on photos" in html and "settings.NAME.consistent = True" in html


def test_a_page_with_claims_draws_them_and_lists_their_cells_behind_a_click(tmp_path):
    """Of two methods, which are no test: every line says what it lacks."""
    c = config_of(declare=False)
    c.settings.photos.ceiling = 7.3
    write(tmp_path, close, c)
    section = re.search("<section><h2>Claims.*?</section>", html_of(tmp_path), re.DOTALL)[0]
    assert "the paper predicts" in section and section.count("<circle") >= 2
    assert 'data-label="effect"' in section and "&lt;svg" not in section  # a phone shows the name beside each value
    assert "<summary>No claim could be tested." in section and "lines were tested" not in section  # with two methods
    details, *_ = re.findall("<details><summary>2 methods, 3 seeds</summary>(.*?)</details>", section, re.DOTALL)
    assert "lora_head 2, 4, 8 at 256 images" in details and "2, 4, 8 at 256" not in section.replace(details, "")
    found = files.read_json(tmp_path / "report" / "claims.json")
    assert all(one["verdict"] == "not tested" and one["note"] for one in found["verdicts"])
    assert found["scales"][0]["ceiling"] == 7.3 and "ceiling 7.300, declared" in section


@pytest.mark.parametrize("name", ["train/новая кошка.jpg", "снимок" * 20 + ".jpg"])
def test_a_picture_with_any_name_is_kept_and_shown(name, tmp_path, monkeypatch):
    """A path, and a name that is longer than a file's can be once it is quoted."""
    study = write(tmp_path, close)
    split = SimpleNamespace(rows=[{"image_id": name}], images=[np.zeros((4, 4, 3), np.uint8)], source="")
    monkeypatch.setattr(execute.data, "load", lambda c, splits: {"test": split})
    execute.keep_images(config_of(), tmp_path)
    line = {"split": "test", "image_id": name, "references": ["a cat"], "tuned": "a dog"}
    for row in study.rows:
        point = tmp_path / "points" / row["id"]
        point.mkdir(parents=True)
        files.write_jsonl(point / "predictions.jsonl", [line, line | {"image_id": "another"}])
    assert folded.gallery(study).count("<img") == 1


def test_runs_that_were_removed_have_no_texts_in_the_gallery(tmp_path):
    study, name = write(tmp_path, close), files.name_for("one.jpg")
    picture = tmp_path / "pictures" / "photos" / f"{name}.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"")
    assert folded.gallery(study) == ""
    kept = next(row for row in study.rows if row["chosen"] and (row["variant"], row["n_images"]) == ("head", 256))
    point = tmp_path / "points" / kept["id"]
    point.mkdir(parents=True)
    line = {"split": "test", "image_id": "one.jpg", "references": ["a cat"], "tuned": "a dog"}
    files.write_jsonl(point / "predictions.jsonl", [line])
    ((_, said),) = folded._written(study, "photos", {name: picture})
    assert said == {"head": "a dog"} and folded.gallery(study).count("<img") == 1


@pytest.mark.parametrize(
    "seed, change, said",
    [
        (1, {}, ""),  # each seed has a training subset and a base of its own
        (1, {"code": "b"}, "b"),
        (1, {"test": "changed"}, "test data changed"),
        (0, {"train": "changed"}, "train data changed"),
        (0, {"base": "changed"}, "base changed"),
    ],
)
def test_runs_of_one_cell_are_made_by_one_code_of_one_base_and_one_data_set(seed, change, said, tmp_path):
    """One run of a cell differs from the others in one thing."""
    write(tmp_path, close)
    rows = files.read_jsonl(tmp_path / "results.jsonl")
    other = [row for row in rows if (row["variant"], row["n_images"], row["seed"]) == ("head", 64, seed)][-1]
    for row in rows:
        made = {"code": "a", "base": f"b{row['seed']}", "train": f"t{row['seed']}", "test": "t"}
        made |= change if row is other else {}
        row["digests"] = {"base": made["base"], "data": {name: made[name] for name in ("train", "test")}}
        row["code"] = made["code"]
    files.write_jsonl(tmp_path / "results.jsonl", rows)
    if change:
        with pytest.raises(ValueError, match=f"{re.escape(other['id'])} by {said}"):
            report.read(tmp_path)
    cells = [str(cell) for cell in report.read(tmp_path, mixed_code=True).mixed]
    assert cells == (["photos-head-n64"] if change else [])


@pytest.mark.parametrize("where", ["result", "file"])
def test_validation_curves_come_from_the_results_or_from_the_runs(where, tmp_path):
    curve = [[0, 3.0], [1, 2.0], [2, 2.5]]
    more = {"validation": {"curve": curve, "kept_step": 1}} if where == "result" else {}
    study = write(tmp_path, close, **more)
    if where == "file":
        assert figures.curves(study) is None
        for row in study.rows:
            (tmp_path / "points" / row["id"]).mkdir(parents=True)
            lines = [{"step": step, "validation_loss": loss} for step, loss in curve] + [{"step": 1, "loss": 9.0}]
            files.write_jsonl(tmp_path / "points" / row["id"] / "metrics.jsonl", lines)
    assert study.curve(study.rows[0]) == [(0, 3.0), (1, 2.0), (2, 2.5)]
    drawn = figures.curves(study)
    assert list(drawn.panels) == ["photos"] and set(drawn.variants) == {"lora_head", "prefix_head", "head"}


def test_scores_below_the_best_guess_without_images_are_reported(tmp_path):
    """There are no points then: nothing is between the guess and the best cell."""
    study = write(tmp_path, close, config_of(declare=False), blind=0.9)
    html = html_of(tmp_path)
    assert study.scales == [] and "<h2>Claims" not in html and "<h2>What twice" not in html
    assert "no better than the best guess without images, 0.900" in html and "<h2>Score against training images" in html


def test_a_drawn_interval_is_where_its_numbers_are():
    ends = (-10.0, 10.0)
    svg = markup.interval(answers.Estimate(5.0, 2.5, 20.0, 0.01), ends, margin=2.0)
    assert f'cx="{0.75 * markup.WIDTH}"' in svg and f"M{0.625 * markup.WIDTH} " in svg  # of the way from -10 to 10
    assert f'<rect x="{0.4 * markup.WIDTH}" width="{0.2 * markup.WIDTH}"' in svg  # the margin
    assert svg.count("<path") == 3 and svg.count("L") == 2  # zero, the line, and an arrow: 20 is not on the axis
    assert "+5.0 (2.5 to 20.0)" in svg
    assert markup.estimate(answers.Estimate(-0.01, -28.0, 27.0, 1.0), "+") == "+0 (-28 to 27)"


# In a browser

SCRIPT = """{
const table = [...document.querySelectorAll("table.cards")].find(table => table.tHead.textContent.includes("validation score")
  && table.tHead.textContent.includes("stored"));
const names = [...table.tHead.rows[0].cells].map(head => head.textContent);
const column = name => [...table.tBodies[0].rows].filter(row => !row.hidden).map(row =>
  row.cells[names.indexOf(name)].textContent);
const click = name => table.tHead.rows[0].cells[names.indexOf(name)].querySelector("button").click();
const said = {plain: column("images")};
click("stored"); said.down = column("stored");
click("stored"); said.up = column("stored");
click("variant"); said.variants = column("variant");
const input = table.closest("details").querySelector("input[type=search]");
const filter = text => { input.value = text; input.dispatchEvent(new Event("input")); };
filter("images>=256 LORA"); said.filtered = [column("images"), column("variant")];
said.count = input.nextSibling.textContent;
filter("test>0.6"); said.above = column("test score");
filter("");
document.querySelectorAll("details").forEach(one => { one.open = true; });
said.width = [document.documentElement.scrollWidth, window.innerWidth];
const pre = document.createElement("pre"); pre.id = "said"; pre.textContent = JSON.stringify(said);
window.parent.document.body.append(pre);
}"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_tables_are_sorted_by_number_and_filtered_in_a_browser(width, tmp_path):
    study = write(tmp_path / "study", close)
    text = html_of(tmp_path / "study").replace("</body>", f"<script>{SCRIPT}</script></body>")
    path = tmp_path / "page.html"
    # in a frame: the narrowest window that a headless Chromium opens is 500 wide
    path.write_text(f'<!doctype html><iframe width="{width}" height="900" srcdoc="{escape(text)}"></iframe>')
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chromium'}",
               "--window-size=1400,1000", "--dump-dom", path.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    said = json.loads(re.search('<pre id="said">(.*?)</pre>', dom, re.DOTALL)[1].replace("&gt;", ">"))
    stored = [7 + 300 * size for _, size, _ in report.claims.cells(study.results)]
    assert said["down"] == [f"{n:,}" for n in sorted(stored, reverse=True)] and said["up"] == said["down"][::-1]
    assert said["variants"] == sorted(said["variants"]) and len(said["variants"]) == len(stored)
    assert said["filtered"] == [["256"] * 3, ["lora_head"] * 3] and said["count"] == f"3 of {len(stored)} rows"
    assert sorted(map(float, said["above"])) == pytest.approx([0.62, 0.64])
    assert said["width"][0] <= said["width"][1] == width  # nothing is wider than the window


# Two studies


def better(run):
    """Prefix gains .1 and the head loses .1, in a second study."""
    return close(run) + {"prefix_head": 0.1, "head": -0.1}.get(run.cell.variant, 0.0)


def test_two_studies_are_compared_cell_by_cell(tmp_path, capsys):
    write(tmp_path / "a", close, config_of(declare=False))
    changed = config_of(declare=False)
    changed.points.captioning.batch_size = 7
    write(tmp_path / "b", better, changed, code="b")
    out = tmp_path / "new" / "comparison.html"
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)])
    assert not end.value.code
    assert "10 cells in both: 4 B is better; 2 A is better; 4 tied" in capsys.readouterr().out
    html = out.read_text()
    assert "made by different code" in html and "points.captioning.batch_size" in html and "<h2>Claims" in html
    assert re.findall("<h2>(.*?)</h2>", html)[-1] == "What differs between the two configs"
    assert "mean over cells: +0.0200 (0.0200 to 0.0200) cider_d on photos" in html  # (4 * .1 - 2 * .1) / 10
    assert "http" not in html


def test_studies_without_a_common_cell_are_an_error(tmp_path):
    write(tmp_path / "a", close)
    other = config_of()
    other.settings = {"drawings": {"task": "captioning"}}
    write(tmp_path / "b", close, other)
    with pytest.raises(ValueError, match="have no finished cell of the same setting"):
        compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "page.html")])
