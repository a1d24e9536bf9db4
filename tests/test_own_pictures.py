"""The default run on one's own pictures: as long as validation falls, the best step kept, and only what pictures teach."""

import csv
import json

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import jaxpeft as jp
from configs import folder
from jaxpeft import tasks
from jaxpeft.data import base, pipeline
from jaxpeft.training import evaluate, results, score, setup

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30), "yellow": (230, 220, 20)}


def write(path, name, rows):
    with (path / name).open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("image", "caption"), *rows])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """80 plain pictures in four colours that are named, and the same captions dealt out anew."""
    path = tmp_path_factory.mktemp("own")
    rng, rows = np.random.default_rng(0), []
    for i in range(80):
        name = list(COLOURS)[i % 4]
        shade = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, 3), 0, 255)
        Image.fromarray(np.full((40, 50, 3), shade, np.uint8)).save(path / f"{i}.png")
        rows.append((f"{i}.png", f"this is a {name} card"))
    write(path, "captions.csv", rows)
    texts = rng.permutation([text for _, text in rows])
    write(path, "shuffled.csv", [(image, text) for (image, _), text in zip(rows, texts, strict=True)])
    return path


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """annotations -> (result, what was said, directory), of the documented command, but shorter."""
    home, found = tmp_path_factory.mktemp("runs"), {}
    for name in ("captions", "shuffled"):
        c, said = folder.get_config(f"root={root},annotations={name}.csv,steps=40"), []
        c.eval.gallery, c.stop.every = False, 4
        c.data.data_dir, c.data.val_fraction = str(home / "copies"), 0.3  # enough for a test of whether pictures matter
        with tiny.optimized():
            found[name] = jp.run(c, home / name, said.append), said, home / name
    return found


@pytest.mark.slow
def test_the_best_step_is_kept_and_beats_what_looks_at_no_picture(runs):
    result, said, workdir = runs["captions"]
    kept = result["validation"]
    curve = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = {row["step"]: row["validation_loss"] for row in curve if "validation_loss" in row}
    assert curve[0] == kept["first"] and kept["kept_step"] == kept["best_step"] == min(curve, key=curve.get) > 0
    assert kept["kept"] < kept["first"] and kept["kept"] <= kept["last"] == curve[kept["last_step"]]
    test = result["metrics"]["test"]
    nll = evals_of(workdir, "val")
    np.testing.assert_allclose(nll, kept["kept"], rtol=1e-5)  # what is stored is the step that was kept
    above = test["intervals"]
    assert set(above) == {"tuned", "tuned - blind", "tuned - text_only", "tuned - base"}
    for mean, low, high in above.values():
        assert low <= mean <= high
    assert above["tuned - blind"][1] > 0 and above["tuned - text_only"][1] > 0  # the whole interval is above
    np.testing.assert_allclose(above["tuned"][0], test["tuned"]["cider_d"], atol=1e-5)
    table = results.table(result)
    assert f"at step {kept['kept_step']:,} (kept" in table and "95 % intervals over images: tuned" in table
    assert "tuned, no picture" in table and "nats more likely with its own image than with another" in table
    assert any(line.startswith("warning: test has") and "too few" in line for line in said)


def evals_of(workdir, split):
    """Nats per token of what a run stored, on a split of its data."""
    from jaxpeft.data import folder as own

    c = json.loads((workdir / "config.json").read_text())["data"]
    model, variables, _, task = jp.load_run(workdir)
    keys = ("root", "annotations", "data_dir", "val_fraction")
    found = own.load({key: c[key] for key in keys}, ["train", "val", "test"])[split]
    examples = task.examples(found, task.template(model))
    pictures = pipeline.Resized.of(found.images, model)
    return evaluate.nll(model, variables, task, base.Examples(examples.arrays, pictures, examples.rows), batch_size=8)


@pytest.mark.slow
def test_where_pictures_teach_nothing_step_0_is_kept(runs):
    result, said, workdir = runs["shuffled"]
    kept = result["validation"]
    assert kept["kept_step"] == 0 and kept["kept"] == kept["first"]
    assert kept["best"] < kept["first"] and kept["best_step"] > 0  # the texts were learned, and are not enough
    assert kept["images"]["least"] <= 0
    (line,) = [line for line in said if line.startswith("step 0, the state before training, is kept: ")]
    assert "it cannot be shown on" in line and "learned the texts, not what the images show" in line
    assert "--config.stop.images_must_matter=False --accept_changes keeps step" in line
    test = result["metrics"]["test"]
    assert test["tuned"]["nll"] == test["base"]["nll"] and test["tuned"]["cider_d"] == test["base"]["cider_d"]
    table = results.table(result)
    assert "at step 0 (kept)" in table and f"at step {kept['best_step']:,}" in table
    assert result["timing"]["kept_step"] == 0
    np.testing.assert_allclose(evals_of(workdir, "val"), kept["first"], rtol=1e-5)


def test_steps_follow_from_the_pictures_and_are_never_too_few(root):
    c = folder.get_config(f"root={root},annotations=captions.csv")
    for n, steps, every in ((1, 100, 2), (64, 100, 2), (1000, 938, 23), (100_000, 93_750, 2344)):
        plan = setup.scheduled(c, n)
        assert (plan.steps, plan.stop.every) == (steps, every) and c.steps == c.stop.every == 0
    c.steps, c.stop.every = 7, 3  # what is set is set
    assert (setup.scheduled(c, 10).steps, setup.scheduled(c, 10).stop.every) == (7, 3)
    c.steps = 0
    c.epochs = 0.0
    with pytest.raises(ValueError, match="steps is 0 and epochs is 0.0; one of the two must be above 0"):
        setup.scheduled(c, 10)


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 4, 12])
def test_a_handful_of_pictures_trains_and_is_scored(root, base, tmp_path, n):
    write(root, f"few{n}.csv", [(f"{i}.png", f"a {list(COLOURS)[i % 4]} card") for i in range(n)])
    c = folder.get_config(f"root={root},annotations=few{n}.csv,base={base},steps=4")
    c.data.data_dir, c.eval.gallery = str(tmp_path / "copy"), False
    said = []
    result = jp.run(c, tmp_path / "run", said.append)
    assert result["metrics"]["test"]["n"] >= 1 and result["validation"]["first"] > 0
    if n == 3:  # too few to tell whether pictures matter
        assert result["validation"]["images"] is None


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_batches_of_any_size(size):
    """Also of one example, and of more than there are: each pass shows every example once."""
    some = examples(5)
    stream = pipeline.batches(some, size, seed=3)
    rows = np.concatenate([next(stream)["tokens"] for _ in range(-(-20 // size))])
    for one_pass in (rows[:10], rows[10:20]):
        assert sorted(map(bytes, one_pass)) == sorted(map(bytes, some.arrays["tokens"]))


# ---------------------------------------------------------------- what the verdicts rest on


TASK = tasks.build("captioning")


def examples(n, per_picture=2):
    """Captions of n random pictures."""
    rng = np.random.default_rng(0)
    batch = tiny.batch(n * per_picture)
    size = tiny.CONFIG["image_size"]
    images = rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8)
    arrays = {name: batch[name] for name in ("tokens", "targets", "weights")}
    index = np.repeat(np.arange(n), per_picture).astype(np.int32)
    return base.Examples(arrays | {"image_index": index}, images, [{}] * len(index))


def test_a_model_that_looks_at_no_picture_gains_nothing_from_its_own():
    model, params = tiny.model(False), tiny.params(False)
    blind = jax.tree.map(lambda x: x, params)
    for name in ("key", "value"):
        blind["text_decoder"]["blocks"]["cross_attention"][name] = jax.tree.map(
            np.zeros_like, params["text_decoder"]["blocks"]["cross_attention"][name]
        )
    found = evaluate.worth_of_images(model, {"params": blind}, TASK, examples(6), batch_size=4)
    assert found == {"gain": 0.0, "least": 0.0, "n": 6}
    seeing = evaluate.worth_of_images(model, {"params": params}, TASK, examples(6), batch_size=4)
    assert seeing["gain"] != 0 and seeing["least"] < seeing["gain"] and seeing["n"] == 6
    assert evaluate.worth_of_images(model, {"params": params}, TASK, examples(4), batch_size=4) is None


def test_the_gain_is_that_of_every_swap_with_another_picture(monkeypatch):
    """Against the plain double loop, with a likelihood that is known for each pair of text and picture."""
    n, per = 7, 3
    cost = np.random.default_rng(1).normal(size=(n * per, n))

    def nlls(model, variables, task, some, **options):
        index = some.arrays["image_index"]
        return np.stack([cost[np.arange(n * per), index], np.ones(n * per)], axis=1)

    monkeypatch.setattr(evaluate, "nlls", nlls)
    found = evaluate.worth_of_images(None, None, TASK, examples(n, per), swaps=n - 1)
    own = np.arange(n * per) // per
    gains = [
        [np.mean(np.delete(cost[i], own[i])) - cost[i, own[i]] for i in range(n * per) if own[i] == p] for p in range(n)
    ]
    per_picture = np.array([np.mean(one) for one in gains])
    np.testing.assert_allclose(found["gain"], per_picture.mean(), atol=1e-12)
    spread = per_picture.std(ddof=1) / np.sqrt(n)
    np.testing.assert_allclose(found["least"], per_picture.mean() - 1.9431802805 * spread, rtol=1e-8)  # t of 6, 95 %


def test_nothing_is_found_where_there_is_nothing_more_often_than_one_in_twenty(monkeypatch):
    """The lower bound is above zero in 5 of 100 sets in which pictures and texts have nothing to do with each other."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        cost = rng.normal(size=(20, 20))

        def nlls(model, variables, task, some, cost=cost, **options):
            return np.stack([cost[np.arange(20), some.arrays["image_index"]], np.ones(20)], axis=1)

        monkeypatch.setattr(evaluate, "nlls", nlls)
        hits += evaluate.worth_of_images(None, None, TASK, examples(20, 1))["least"] > 0
    assert 0.02 < hits / 400 < 0.08


def test_intervals_draw_whole_pictures():
    rows = [{"image_id": str(i // 10), "tuned_x": float(i // 10), "base_x": 1.0} for i in range(100)]
    found = evaluate.intervals(rows, "x", "tuned", ["base"])
    mean, low, high = found["tuned"]
    assert mean == 4.5 and found["tuned - base"][0] == mean - 1
    np.testing.assert_allclose(found["tuned - base"][1:], [low - 1, high - 1])
    # ten pictures, alike within: the interval is that of ten values, sqrt(10) times as wide as that of a hundred
    width = 2 * 1.96 * np.std(np.arange(10)) / np.sqrt(10)
    assert 0.8 * width < high - low < 1.1 * width
    same = [row | {"tuned_x": 2.0} for row in rows]
    assert evaluate.intervals(same, "x", "tuned", [])["tuned"] == [2.0, 2.0, 2.0]


@pytest.mark.slow
def test_the_best_step_can_be_kept_all_the_same(root, base, tmp_path, losses):
    """What the message about step 0 advises: the same command with one setting changed trains nothing again."""
    c = folder.get_config(f"root={root},annotations=shuffled.csv,base={base},steps=4")
    c.data.data_dir, c.stop.every, c.batch_size, c.eval.batch_size = str(tmp_path / "copy"), 1, 8, 8
    c.eval.gallery = False
    losses += [4.0, 3.0, 2.0, 3.0, 3.0]
    first = jp.run(c, tmp_path / "run", lambda *_: None)
    assert (first["validation"]["kept_step"], first["validation"]["best_step"]) == (0, 2)
    c.stop.images_must_matter = False
    with pytest.raises(ValueError, match="stop/images_must_matter: True -> False"):
        jp.run(c, tmp_path / "run", lambda *_: None)
    c.data.root = "nowhere"
    with pytest.raises(ValueError, match="is not a directory"):
        jp.run(c, tmp_path / "run", lambda *_: None, accept_changes=True)
    assert (tmp_path / "run" / "result.json").exists()  # what was there stays until the new run can begin
    c.data.root = str(root)
    again = jp.run(c, tmp_path / "run", lambda *_: None, accept_changes=True)
    assert again["validation"]["kept_step"] == again["timing"]["kept_step"] == 2 and not losses
    assert again["metrics"]["test"]["tuned"]["nll"] != first["metrics"]["test"]["tuned"]["nll"]
    assert json.loads((tmp_path / "run" / "result_before.json").read_text())["validation"]["kept_step"] == 0


@pytest.fixture
def losses(monkeypatch):
    """Validation losses, given one by one; and pictures that do not matter."""
    given = []
    monkeypatch.setattr(score, "validation", lambda *_: lambda tuned: given.pop(0))
    monkeypatch.setattr(evaluate, "worth_of_images", lambda *_, **__: {"gain": 0.1, "least": -0.1, "n": 30})
    return given


@pytest.mark.parametrize(
    ("gain", "least", "n", "kept"),
    [(0.5, 0.1, 30, True), (0.5, -0.1, 30, False), (0.5, -0.1, 19, True), (-0.1, -0.5, 19, False)],
)
def test_few_validation_pictures_decide_by_their_mean(gain, least, n, kept):
    c = folder.get_config("root=x")
    said = score.why_step_0(c, {"images": {"gain": gain, "least": least, "n": n}, "best_step": 5})
    assert (said == "") == kept
    assert score.why_step_0(c, {"images": None, "best_step": 5}) == ""
    assert "was never lower" in score.why_step_0(c, {"images": None, "best_step": 0})


def test_validation_is_read_from_lines_that_a_full_disk_cut(tmp_path):
    timing = {"kept_step": 4, "validation_loss": 1.5, "stopped": "cap", "steps": 6}
    assert results.validation(tmp_path, "val", timing, None)["first"] is None
    rows = ({"step": 2, "validation_loss": 3.0}, {"step": 4, "loss": 9.0}, {"step": 4, "validation_loss": 1.25})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "valid')
    said = results.validation(tmp_path, "val", timing, None)
    assert (said["first_step"], said["first"], said["best"], said["last_step"]) == (2, 3.0, 1.25, 4)
    assert results._validation(said) == ["val: nll 3.000 at step 2, 1.250 at step 4 (kept, last)"]
