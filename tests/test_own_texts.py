"""Runs on one's own pictures, texts as people write them: what is right scores right, cuts and ceilings are said first."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import config_of

import jaxpeft as jp
from configs import folder, point
from configs.studies import folder as folder_study
from jaxpeft import config as defaults
from jaxpeft import data, tasks
from jaxpeft.study import grid
from jaxpeft.training import preflight, results, setup

COLOURS = {"Red": (220, 30, 30), "Blue T-shirt": (30, 30, 220), "Caf\u00e9 3.5": (30, 180, 30)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Plain pictures in three colours, with answers and captions that no uncased vocabulary can write as they are."""
    path = tmp_path_factory.mktemp("own")
    rows = []
    for i in range(36):
        name = list(COLOURS)[i % 3]
        Image.fromarray(np.full((40, 50, 3), COLOURS[name], np.uint8)).save(path / f"{i}.png")
        rows.append((f"{i}.png", "What is THIS?", name))
    asked = [("image", "question", "answer")]
    tables = {
        "qa": asked + rows,
        "train": asked + rows[:24],
        "test": asked + rows[24:],
        "captions": [("image", "caption"), *((row[0], f"A well-known thing: {row[2]}!") for row in rows)],
    }
    for file, lines in tables.items():
        with (path / f"{file}.csv").open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows(lines)
    return path


def config(root, base, tmp_path, task="vqa", **changes):
    """A short run that memorises three colours."""
    file = {"vqa": "qa", "captioning": "captions"}[task]
    c = folder.get_config(f"root={root},annotations={file}.csv,task={task},base={base},steps=40")
    c.data.data_dir, c.data.val_fraction, c.data.test_fraction = str(tmp_path / "copy"), 0.0, 0.3
    c.optim.lr, c.batch_size, c.eval.batch_size, c.eval.base = 5e-3, 16, 8, False
    c.optim.schedule = "cosine"  # all steps and no validation
    c.eval.gallery = False
    c.update_from_flattened_dict(changes)
    return c


def before_training(said):
    return said[: next(i for i, line in enumerate(said) if "compiled" in line)]


@pytest.mark.slow
def test_a_right_answer_of_own_data_scores_one(root, tmp_path):
    """Generated, and chosen from a list; the second run has the state of the first and does not train."""
    said = {"generate": [], "rank": []}
    for inference, lines in said.items():
        c = config(root, "tiny", tmp_path, **{"task_options.inference": inference})
        result = jp.run(c, tmp_path / "run", lines.append, accept_changes=inference == "rank")
        check_right_answers(result, tmp_path / "run")
    assert any("perfect writer 1.000 (0 of" in line for line in before_training(said["generate"]))
    assert "resumed from step 40" in said["rank"]


def check_right_answers(result, workdir):
    test = result["metrics"]["test"]
    assert test["tuned"]["nll"] < 0.2 and test["tuned"]["accuracy"] == 1.0 and test["tuned"]["variant"] == "basic"
    assert test["perfect_writer"]["accuracy"] == 1.0 and test["perfect_writer"]["out_of_reach"] == 0
    # 'caf\u00e9 3.5' is four words: with [SEP] five
    assert result["task_options"]["max_new_tokens"] == 5 and result["texts"]["train"]["max_new_tokens"]["cut"] == 0
    table = results.table(result)
    assert (
        table.splitlines()[1].split() == ["accuracy", "nll"] and "perfect writer" in table
    )  # no column without a heading
    _, _, _, task = jp.load_run(workdir)
    assert (task.max_new_tokens, task.max_question) == (5, result["task_options"]["max_question"])


@pytest.mark.slow
def test_captions_of_own_data_reach_ten(root, tmp_path):
    result = jp.run(config(root, "tiny", tmp_path, "captioning"), tmp_path / "run", lambda _: None)
    test = result["metrics"]["test"]
    assert test["perfect_writer"]["cider_d"] == pytest.approx(10) and test["perfect_writer"]["out_of_reach"] == 0
    assert test["tuned"]["cider_d"] == pytest.approx(10) and test["tuned"]["tokenizer"] == "basic"


@pytest.fixture(scope="module")
def hindered(root, base, tmp_path_factory):
    """(result, what was said, directory) of a run of one step whose limits and vocabulary are too small."""
    changes = {
        "model.extend_vocabulary": False,
        "steps": 1,
        "task_options.max_new_tokens": 3,
        "task_options.max_question": 4,
    }
    home, said = tmp_path_factory.mktemp("hindered"), []
    return jp.run(config(root, base, home, **changes), home / "run", said.append), said, home / "run"


@pytest.mark.slow
def test_a_low_ceiling_and_cuts_are_said_before_training(hindered):
    result, said, _ = hindered
    writer, first = result["metrics"]["test"]["perfect_writer"], before_training(said)
    assert 0 < writer["out_of_reach"] <= writer["truths"] and writer["accuracy"] < writer["unhindered"] == 1
    assert any("warning: test: the right texts as this base can write them have" in x and "becomes" in x for x in first)
    assert any(
        "warning: train: " in x and "task_options.max_new_tokens=3 and are cut; the longest has 5" in x for x in first
    )
    assert result["texts"]["test"]["max_question"]["cut"] > 0 and result["model"]["unknown_words"] > 0


def counted(c):
    """(training images, rows to score by split), as a run finds them before it trains."""
    task = tasks.build(c.task, **c.task_options)
    splits, _ = setup.load_splits(c, task, lambda _: None)
    n_rows, template = {}, task.template(setup.abstract_model(c))
    for name in c.eval.splits:
        cases = task.eval_examples(splits[name], template)
        tasks.check_ids(cases, task.id_key, name)
        n_rows[name] = len(cases.rows)
    return len(splits["train"].rows), n_rows


def test_a_file_for_each_split(root, base, tmp_path):
    c = folder.get_config(f"root={root},train=train.csv,test=test.csv,task=vqa,base={base},steps=1")
    c.data.data_dir = str(tmp_path / "copy")
    assert counted(c) == (22, {"test": 12})  # two of train are for validation
    c.optim.schedule = "cosine"
    assert counted(c) == (24, {"test": 12})  # no validation, so all train
    for arg, message in (
        (f"root={root},test=test.csv", "files for test but none for train"),
        (f"root={root},annotations=qa.csv,train=train.csv", "give either annotations=FILE or one file per split"),
    ):
        with pytest.raises(ValueError, match=message):
            folder.get_config(arg)


def test_two_files_of_one_split_may_both_begin_at_one(root, base, tmp_path):
    """COCO files for val and validation, which are one split: both have images 1, 2, ..."""
    files = {}
    for name, first in (("train", 0), ("val", 12), ("validation", 24)):
        images = [{"id": i + 1, "file_name": f"{first + i}.png"} for i in range(12)]
        said = [{"id": i + 1, "image_id": i + 1, "caption": f"thing {i % 3}"} for i in range(12)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"images": images, "annotations": said}))
        files[name] = str(tmp_path / f"{name}.json")
    c = folder.get_config(f"root={root},annotations=x,base={base},steps=1")
    c.data.annotations, c.data.data_dir, c.eval.splits = files, str(tmp_path / "copy"), ("val",)
    assert counted(c) == (12, {"val": 24})


def test_ids_that_repeat_are_said_before_training(base, tmp_path, monkeypatch):
    load = data.load

    def twice(*args):
        splits = load(*args)
        first, second, *rest = splits["test"].rows
        rows = [first, second | {"questions": first["questions"]}, *rest]
        return splits | {"test": dataclasses.replace(splits["test"], rows=rows)}

    monkeypatch.setattr(data, "load", twice)
    said = []
    with pytest.raises(ValueError, match="split 'test': question_id .* occurs twice"):
        jp.run(config_of(base), tmp_path, said.append)
    assert not any("compiled" in line for line in said)


@pytest.mark.parametrize(
    "make", [lambda: folder.get_config("root=x,annotations=y"), lambda: point.get_config("task=vqa")]
)
def test_every_option_of_a_task_can_be_set_on_the_command_line(make):
    c = make()
    limit = {"captioning": "max_tokens", "vqa": "max_question"}[c.task]
    assert {"smoothing", "max_new_tokens", "min_length", "variant", limit} <= set(c.task_options)
    with pytest.raises(ValueError, match="unknown task 'ocr'"):
        defaults.task_options("ocr")


@pytest.mark.slow
def test_a_run_of_version_0_1_is_loaded_with_the_limits_it_had(hindered, tmp_path):
    shutil.copytree(hindered[2], tmp_path / "run")
    result, written = tmp_path / "run" / "result.json", json.loads((tmp_path / "run" / "config.json").read_text())
    value = json.loads(result.read_text())
    del value["task_options"]
    result.write_text(json.dumps(value))
    (tmp_path / "run" / "config.json").write_text(json.dumps(written | {"task_options": {}}))
    model, variables, _, task = jp.load_run(tmp_path / "run")
    assert (task.max_new_tokens, task.max_question, task.variant) == (9, 35, "official2021")
    assert len(jp.generate(model, variables, [np.zeros((9, 9, 3), np.uint8)], "what is this", task=task)) == 1


TEXTS = ["a", "word " * 2000, "from $5 \\frac{ to $6", "\u4e00\u53ea\u732b \U0001f600 \u0939\u093f", "x" * 300]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(40, 50, 3), (300, 9, 3), (1, 1, 3)])
def test_galleries_of_any_number_and_text_do_not_warn(tmp_path, n, shape):
    lines = list(zip(("Q", "truth", "before", "after", "more"), TEXTS, strict=True))
    results.gallery(
        tmp_path / "g.png", [{"image": np.zeros(shape, np.uint8), "lines": lines[: i + 1]} for i in range(n)]
    )
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.width < 2000 and picture.height < 2000


def test_preparing_data_writes_no_control_characters_into_a_log(root, base, tmp_path, capfd):
    setup.load_splits(config(root, base, tmp_path), tasks.build("vqa"), print)
    out, err = capfd.readouterr()
    assert "\x1b" not in out + err and "Generating" not in err and "Shuffling" not in err


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Images of which every third has a caption, and the others a question; test images have both."""
    path, lines = tmp_path_factory.mktemp("mixed"), []
    for i in range(15):
        Image.fromarray(np.full((20, 20, 3), 10 * i, np.uint8)).save(path / f"{i}.png")
        row = {"image": f"{i}.png", "split": "train" if i < 12 else "test"}
        if i >= 12 or i % 3 == 0:
            row["caption"] = f"thing {i}"
        if i >= 12 or i % 3:
            row |= {"question": "what is it", "answer": f"thing {i}"}
        lines.append(json.dumps(row))
    (path / "data.jsonl").write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("task, described", [("captioning", {0, 3, 6, 9}), ("vqa", {1, 2, 4, 5, 7, 8, 10, 11})])
def test_every_image_of_a_subset_has_texts_of_the_task(mixed, base, tmp_path, task, described):
    """`n_images` and `fraction` counted images that the task cannot train on."""
    c = folder.get_config(f"root={mixed},annotations=data.jsonl,task={task},base={base},steps=2,size=2")
    c.data.data_dir, c.optim.schedule, c.eval.base = str(tmp_path), "cosine", False
    built, said = tasks.build(task), []

    def ids(split):
        return {int(row["image_id"].split(".")[0]) for row in split.rows}

    assert ids(setup.load_splits(c, built, said.append)[0]["train"]) == described
    assert said == [f"train: {12 - len(described)} images without {'captions' if task == 'captioning' else 'questions'} "
                    "are left out"]  # fmt: skip
    c.data.n_images = 3
    splits, (whole, chosen) = setup.load_splits(c, built, said.append)
    assert len(splits["train"].rows) == 3 and ids(splits["train"]) <= described
    assert [whole.rows[i] for i in chosen] == list(splits["train"].rows)
    assert ids(preflight.training_texts(c)) == ids(splits["train"])
    c.data.n_images = None
    c.data.fraction = 0.5
    assert len(setup.load_splits(c, built, said.append)[0]["train"].rows) == len(described) // 2

    class Own(type(built)):
        def examples(self, split, template):
            raise NotImplementedError

    assert len(setup.with_texts(c, Own(), splits["train"]).rows) == 3
    assert (
        len(setup.load_splits(c, Own(), said.append)[0]["train"].rows) == 6
    )  # half of all: it may read something else


def test_a_study_counts_images_with_texts_of_the_task(mixed, base, tmp_path):
    c = folder_study.get_config(f"root={mixed},annotations=data.jsonl,base={base},images=2+5,steps=2")
    c.points.captioning.data.data_dir = str(tmp_path)
    with pytest.raises(ValueError, match="n_images includes 5, but the training split .* has 3 images with texts"):
        grid.check(c)  # one of the four is for validation
    c.n_images = (2, 3)
    grid.check(c)
