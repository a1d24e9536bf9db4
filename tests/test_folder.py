import csv
import io
import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxpeft import images
from jaxpeft.datasets import folder, folder_formats

VQA_TOP = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}


def pixels(seed, rows=12, columns=16):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), np.uint8)


def save(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path, **options)


def write(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path.name


def config(root, tmp_path, annotations, **options):
    return {"root": str(root), "annotations": annotations, "data_dir": str(tmp_path / "cache"), **options}


@pytest.fixture
def root(tmp_path):
    """Four images, named as COCO does."""
    root = tmp_path / "photos"
    for i in (1, 2, 3, 42):
        save(root / "val2014" / f"COCO_val2014_{i:012}.jpg", seed=i)
    return root


def name(i):
    return f"val2014/COCO_val2014_{i:012}.jpg"


def captions(rows):
    return {row["file"]: row["captions"] for row in rows}


# formats


def test_coco_captions(root):
    data = {
        "info": {"year": 2014}, "licenses": [], "type": "captions",
        "images": [{"id": i, "file_name": name(i)[8:], "width": 16, "height": 12, "coco_url": "", "license": 1}
                   for i in (1, 2)],
        "annotations": [{"id": 10, "image_id": 2, "caption": " A dog.\n"},
                        {"id": 11, "image_id": 1, "caption": "A cat."},
                        {"id": 12, "image_id": 2, "caption": "Ein Höhlenhund 🐶"}],
    }  # fmt: skip
    rows, problems = folder.parse(write(root / "captions.json", data), root)
    assert problems.counts == {}
    assert captions(rows) == {name(2): ["A dog.", "Ein Höhlenhund 🐶"], name(1): ["A cat."]}
    assert [row["image_id"] for row in rows] == ["2", "1"] and all(row["split"] == "" for row in rows)


def test_karpathy_and_restval_is_train(root):
    def image(i, split):
        sentences = [{"raw": f"caption {i}", "tokens": ["caption"], "imgid": 0, "sentid": i}]
        return {"filepath": "val2014", "filename": name(i)[8:], "cocoid": i, "imgid": 0, "split": split, "sentids": [i],
                "sentences": sentences}  # fmt: skip

    splits = {1: "train", 2: "restval", 3: "val", 42: "test"}
    data = {"dataset": "coco", "images": [image(i, split) for i, split in splits.items()]}
    rows, problems = folder.parse(write(root / "dataset.json", data), root)
    assert problems.counts == {}
    assert [(row["image_id"], row["split"]) for row in rows] == [
        ("1", "train"),
        ("2", "train"),
        ("3", "val"),
        ("42", "test"),
    ]
    assert captions(rows)[name(42)] == ["caption 42"]


def test_karpathy_without_coco_ids_as_flickr(root):
    image = {"filename": name(1)[8:], "imgid": 7, "split": "train", "sentids": [0], "sentences": [{"raw": "x"}]}
    rows, problems = folder.parse(write(root / "f.json", {"dataset": "flickr8k", "images": [image]}), root)
    assert problems.counts == {} and (rows[0]["image_id"], rows[0]["file"]) == ("7", name(1))


def test_blip_lists(root):
    data = [
        {"image": name(1), "caption": ["one", "two"]},
        {"image": name(2), "caption": "a", "image_id": "coco_2"},
        {"image": name(2), "caption": "b", "image_id": "coco_2"},
        {"image": name(3), "question": "How many?", "answer": ["2", "2", "two"], "question_id": 5, "dataset": "vqa"},
        {"image": name(42), "question": "Where?", "answer": "home", "dataset": "vg"},
    ]
    rows, problems = folder.parse(write(root / "blip.json", data), root)
    assert problems.counts == {}
    assert captions(rows) == {name(1): ["one", "two"], name(2): ["a", "b"], name(3): [], name(42): []}
    assert [row["image_id"] for row in rows] == [name(1), "coco_2", name(3), name(42)]
    assert rows[2]["questions"] == [
        {"question_id": "5", "question": "How many?", "answers": ["2", "2", "two"], "type": ""}
    ]
    assert rows[3]["questions"][0]["question_id"] == f"{name(42)}-0"


def vqa_files(root, ids=(1, 42)):
    """The names of a questions file and an annotations file with one question for each image id."""
    asked, replies = [], []
    for i in ids:
        answers = [{"answer": f"a{i}", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
        common = {"question_id": 10 * i, "image_id": i}
        kinds = {"question_type": "what", "answer_type": "other", "multiple_choice_answer": f"a{i}"}
        asked.append(common | {"question": f"What is {i}?"})
        replies.append(common | kinds | {"answers": answers})
    questions = write(root / "q.json", VQA_TOP | {"questions": asked})
    return questions, write(root / "a.json", VQA_TOP | {"annotations": replies})


def test_vqa_v2_finds_images_by_id(root):
    save(root / "train2014" / "COCO_train2014_000000000042.jpg")  # the other subtype of the same id
    save(root / "x" / "142.png")  # ends in 42, but is another id
    questions, annotations = vqa_files(root)
    rows, problems = folder.parse(annotations, root, questions)
    assert problems.counts == {}
    assert [(row["file"], row["image_id"]) for row in rows] == [(name(1), "1"), (name(42), "42")]
    assert rows[1]["questions"] == [
        {"question_id": "420", "question": "What is 42?", "answers": ["a42"] * 10, "type": "other"}
    ]


def test_images_by_other_ids(root):
    save(root / "shots" / "cam_A_frame7.png")
    save(root / "shots" / "b-00009.png")
    find = folder.Files(root).find
    problems = folder_formats.Problems()
    for image_id, file in {"frame7": "cam_A_frame7.png", "A_frame7": "cam_A_frame7.png", "9": "b-00009.png",
                           "7": "cam_A_frame7.png",
                           "00009": "b-00009.png", "009": "b-00009.png"}.items():  # fmt: skip
        assert find(folder_formats._record("", None, image_id), problems) == f"shots/{file}"
    assert find(folder_formats._record("", None, "rame7"), problems) is None
    assert problems.counts == {"missing image": 1}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_unicode_quotes_and_any_delimiter(root, delimiter):
    out = io.StringIO()
    table = csv.writer(out, delimiter=delimiter)
    table.writerows([["image", "caption", "split"], [name(1), 'said "hi", left;\tthen', "train"],
                     [name(1), "日本語\n2", "train"],
                     [], [name(2), "é", "validation"]])  # fmt: skip
    (root / "c.csv").write_bytes(out.getvalue().encode("utf-8-sig"))
    rows, problems = folder.parse("c.csv", root)
    assert problems.counts == {}
    assert captions(rows) == {name(1): ['said "hi", left;\tthen', "日本語\n2"], name(2): ["é"]}
    assert [row["split"] for row in rows] == ["train", "val"]


def test_csv_questions(root):
    text = f"""image,question,answer,answers,type,image_id,question_id,caption
{name(1)},How many?,2|3,,number,i1,,
{name(1)},How many?,4,,number,i1,,
{name(1)},Is it?,,yes| yes |no,yes/no,i1,77,
{name(2)},,,,,i2,,only a caption
"""
    rows, problems = folder.parse(write(root / "q.csv", text), root)
    assert problems.counts == {}
    assert rows[0]["questions"] == [
        {"question_id": "i1-0", "question": "How many?", "answers": ["2|3", "4"], "type": "number"},
        {"question_id": "77", "question": "Is it?", "answers": ["yes", "yes", "no"], "type": "yes/no"},
    ]
    assert (rows[1]["captions"], rows[1]["questions"]) == (["only a caption"], [])


@pytest.mark.parametrize("count", [1, 2])
def test_jsonl_told_from_json_even_with_one_line(root, count):
    lines = [{"image": name(i), "question": "How many?", "answer": [2, "two\u2028"]} for i in (1, 2)[:count]]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    rows, problems = folder.parse(write(root / "data.txt", text), root)
    assert problems.counts == {}
    assert [row["questions"][0]["answers"] for row in rows] == [["2", "two"]] * count


def test_annotations_per_split_may_reuse_ids(root):
    for split, i in (("train", 1), ("test", 2)):
        data = {
            "images": [{"id": 1, "file_name": name(i)}],
            "annotations": [{"id": 1, "image_id": 1, "caption": split}],
        }
        write(root / f"{split}.json", data)
    rows, problems = folder.parse({"train": "train.json", "test": "test.json"}, root)
    assert problems.counts == {}
    assert [(row["file"], row["split"], row["image_id"]) for row in rows] == [
        (name(1), "train", "1"),
        (name(2), "test", "1"),
    ]


# problems


def test_splits_may_have_more_after_their_name(root, tmp_path):
    names = {"train": 1, "test_style": 2, "test_style_hard": 3}
    for split, i in names.items():
        write(root / f"{split}.csv", f"image,caption\n{name(i)},{split}\n")
    settings = config(root, tmp_path, {split: f"{split}.csv" for split in names})
    splits = folder.load(settings, list(names))
    assert {name: [row["image_id"] for row in split.rows] for name, split in splits.items()} == {
        split: [name(i)] for split, i in names.items()
    }
    assert list(folder.load(settings, ["test_style"])) == ["test_style"]
    with pytest.raises(ValueError, match="no image is in the splits \\['test'\\]"):  # test_style is no part of test
        folder.load(settings, ["test"])


@pytest.mark.parametrize("split, meant", [
    ("valid", "val"), ("test_b", "test_b"), ("val_2", "val_2"), ("testing", None), ("test_", None), ("valid_b", None),
    ("test_a/b", None),
])  # fmt: skip
def test_split_names(root, split, meant):
    assert folder_formats.split_name(split) == meant
    rows, problems = folder.parse(write(root / "c.csv", f"image,caption,split\n{name(1)},x,{split}\n"), root)
    assert [row["split"] for row in rows] == [meant] * bool(meant)
    assert problems.counts == ({} if meant else {"split": 1})


def test_unrecognised_file_says_what_was_found_and_what_is_accepted(root):
    for content, found in (({"foo": 1, "bar": []}, "['bar', 'foo']"), ([1, 2], "[1, 2]"),
                           ("hello there", "'hello there'"),
                           ({"images": [{"file_name": "x"}]}, "['images']"), ("", "''")):  # fmt: skip
        _, problems = folder.parse(write(root / "odd.dat", content), root)
        assert problems.fatal and found in str(problems)
        for dialect in ("COCO captions", "Karpathy", "BLIP", "VQA v2", "CSV", "JSONL"):
            assert dialect in str(problems)


def test_broken_json_names_file_line_and_column(root):
    _, problems = folder.parse(write(root / "b.json", '{"images": [],\n  "annotations": [}\n}'), root)
    assert problems.fatal and "b.json line 2 column 19: broken JSON" in str(problems)
    text = (
        json.dumps({"image": name(1), "caption": "x"})
        + '\n{"image": oops}\n'
        + json.dumps({"image": name(2), "caption": "y"})
    )
    rows, problems = folder.parse(write(root / "b.jsonl", text), root)
    assert len(rows) == 2 and problems.counts == {"bad row": 1} and "b.jsonl line 2 column 11" in str(problems)


def test_other_encodings_name_the_line(root):
    (root / "l.csv").write_bytes(f"image,caption\n{name(1)},caf\u00e9\n".encode("latin-1"))
    _, problems = folder.parse("l.csv", root)
    assert problems.fatal and "l.csv line 2: not UTF-8 (byte 0xe9)" in str(problems)


def test_coco_inconsistencies(root):
    data = {
        "images": [{"id": 1, "file_name": name(1)}, {"id": 1, "file_name": name(2)}, {"id": 3, "file_name": name(3)}],
        "annotations": [{"id": 5, "image_id": 1, "caption": "x"}, {"id": 5, "image_id": 1, "caption": "y"},
                        {"id": 6, "image_id": 9, "caption": "z"}, {"id": 7, "image_id": 1, "caption": None}],
        "categories": [],
    }  # fmt: skip
    rows, problems = folder.parse(write(root / "c.json", data), root)
    assert captions(rows) == {name(1): ["x"]}
    expected = {"unknown key": 1, "duplicate id": 2, "unmatched id": 1, "missing key": 1, "image without text": 1}
    assert problems.counts == expected


def test_a_bad_answer_leaves_the_good_ones(root):
    line = json.dumps({"image": name(1), "question": "q", "answer": [True, 3, "", "x"]})
    rows, problems = folder.parse(write(root / "a.jsonl", line), root)
    assert rows[0]["questions"][0]["answers"] == ["3", "x"]
    assert problems.counts == {"bad value": 1, "empty answer": 1}


def test_broken_csv(root):
    text = f'image,caption\n{name(1)},fine\n{name(2)},a,b\n{name(2)}\n{name(3)},"open\n'
    rows, problems = folder.parse(write(root / "b.csv", text), root)
    assert len(rows) == 1 and problems.counts == {"bad row": 2, "unreadable file": 1}
    assert "b.csv line 3: 3 cells for 2 columns" in str(problems) and "b.csv line 4: 1 cells" in str(problems)
    _, problems = folder.parse(write(root / "d.csv", "image,caption,caption\n"), root)
    assert problems.fatal and "appears twice" in str(problems)


def test_vqa_files_alone_or_swapped(root):
    questions, annotations = vqa_files(root)
    for arguments in ((annotations, root), (questions, root), (questions, root, annotations)):
        rows, problems = folder.parse(*arguments)
        assert rows == [] and problems.fatal and "annotations" in str(problems)


def test_vqa_inconsistencies(root):
    asked = [{"question_id": 1, "image_id": 1, "question": "q"}, {"question_id": 1, "image_id": 1, "question": "q"},
             {"question_id": 2, "image_id": 1, "question": "q"}, {"question_id": 3, "image_id": 1, "question": "q"},
             {"question_id": 4, "image_id": 1, "question": "q"}]  # fmt: skip
    one = [{"answer": "x"}]
    replies = [{"question_id": 1, "image_id": 1, "answers": one}, {"question_id": 1, "image_id": 1, "answers": one},
               {"question_id": 2, "image_id": 2, "answers": one}, {"question_id": 4, "answers": []},
               {"question_id": 9, "answers": one}]  # fmt: skip
    write(root / "q.json", {"questions": asked})
    rows, problems = folder.parse(write(root / "a.json", {"annotations": replies}), root, "q.json")
    assert [q["question_id"] for q in rows[0]["questions"]] == ["1"]
    assert problems.counts == {"duplicate id": 2, "unmatched id": 3, "empty answer": 1}


def messy(root):
    """A table with every kind of wrong row beside three good ones, and the counts it must give."""
    save(root / "ok.png")
    save(root / "a" / "twin.png")
    save(root / "b" / "twin.png")
    (root / "cut.jpg").write_bytes((root / name(3)).read_bytes()[:300])
    (root / "text.png").write_text("not an image")
    save(root / "c.png")
    rows = [
        {"image": name(1), "caption": "good", "split": "train"},
        {"image": name(2), "caption": "good", "split": "test"},
        {"image": "ok.png", "question": "q", "answer": "a", "question_id": 1, "split": "restval"},
        {"image": name(1), "captoin": "x", "caption": "kept", "split": "train"},  # unknown key; the row stays
        {"image": name(1), "caption": "  ", "split": "train"},
        {"image": name(1), "question": "", "answer": "a", "split": "train"},
        {"image": name(1), "question": "q", "answer": "", "split": "train"},
        {"image": name(1), "question": "q", "split": "train"},
        {"image": "ok.png", "question": "other", "answer": "a", "question_id": 1, "split": "train"},  # duplicate id
        {"image": name(2), "image_id": "other", "caption": "x", "split": "test"},  # a second id for one image
        {"image": "ok.png", "caption": "x", "split": "test"},  # two splits
        {"image": name(42), "caption": "x", "split": "training"},
        {"image": name(42), "caption": "x"},  # no split
        {"image": "gone.jpg", "caption": "x", "split": "train"},
        {"image": "gone.jpg", "caption": "y", "split": "train"},  # missing twice, counted once
        {"image": "../secret.png", "caption": "x", "split": "train"},
        {"image": "/etc/secret.png", "caption": "x", "split": "train"},
        {"image": "a/../../secret.png", "caption": "x", "split": "train"},
        {"image": "twin.png", "caption": "x", "split": "train"},
        {"image": "cut.jpg", "caption": "x", "split": "train"},
        {"image": "text.png", "caption": "x", "split": "train"},
        {"caption": "x", "split": "train"},
        {"image": name(1), "split": "train"},
        {"image": name(1), "caption": 7, "split": "train"},
        {"image": name(1), "caption": "\ud83d", "split": "train"},
        ["image"],
        {"image": " ", "caption": "x", "split": "train"},
        {"image": 5, "caption": "x", "split": "train"},
        {"image": "c.png", "image_id": "ok.png", "caption": "x", "split": "train"},  # the id of another image
        {"image": "a/nothing.png", "caption": "x", "split": "train"},
    ]
    save(root.parent / "secret.png")
    counts = {"unknown key": 1, "empty caption": 1, "empty question": 1, "empty answer": 2, "duplicate id": 3,
              "two splits": 1,
              "split": 2, "missing image": 2, "outside the directory": 3, "ambiguous image": 1, "corrupt image": 2,
              "missing key": 2, "bad value": 5}  # fmt: skip
    return write(root / "messy.json", rows), counts


def test_everything_wrong_is_one_error_before_anything_is_written(root, tmp_path):
    annotations, counts = messy(root)
    with pytest.raises(ValueError) as error:
        folder.load(config(root, tmp_path, annotations), ["train"])
    message = str(error.value)
    for kind, count in counts.items():
        assert f"\n{kind} ({count}); {folder_formats.FIXES[kind]}:\n" in message, message
    assert message.count("\n    messy.json row") == sum(min(3, count) for count in counts.values())
    assert "messy.json row 19: cannot decode the image cut.jpg: " in message and "on_error='skip'" in message
    assert not (tmp_path / "cache").exists()


def test_skip_drops_the_bad_rows_and_reports_them_every_time(root, tmp_path):
    annotations, counts = messy(root)
    settings = config(root, tmp_path, annotations, on_error="skip")
    for _ in range(2):  # prepared, and from the prepared copy
        splits, report = folder.load_with_report(settings, ["train", "test"])
        examples = report.pop("examples")
        assert report == counts
        assert len(examples) == sum(min(3, count) for count in counts.values())
        assert [(row["image_id"], row["captions"]) for row in splits["train"].rows] == [
            (name(1), ["good", "kept"]),
            ("ok.png", []),
        ]
        assert [question["question"] for question in splits["train"].rows[1]["questions"]] == ["q"]
        assert [row["captions"] for row in splits["test"].rows] == [["good"]]
    json.dumps(report)


def test_skip_still_fails_on_an_unreadable_file_and_when_nothing_is_left(root, tmp_path):
    write(root / "empty.csv", "image,caption\ngone.jpg,x\n")
    with pytest.raises(ValueError, match="no image is left(.|\n)*missing image \\(1\\)"):
        folder.load(config(root, tmp_path, "empty.csv", on_error="skip"), ["train"])
    write(root / "good.csv", f"image,caption\n{name(1)},x\n")
    write(root / "broken.json", "[")
    with pytest.raises(ValueError, match="broken.json line 1 column 2"):
        folder.load(config(root, tmp_path, {"train": "good.csv", "test": "broken.json"}, on_error="skip"), ["train"])
    assert not (tmp_path / "cache").exists()


def test_an_image_in_two_split_files_is_a_leak(root):
    for split in ("train", "test"):
        write(root / f"{split}.csv", f"image,caption\n{name(1)},x\n")
    _, problems = folder.parse({"train": "train.csv", "test": "test.csv"}, root)
    assert problems.counts == {"two splits": 1}


@pytest.mark.parametrize("options, message", [
    ({"root": "nowhere"}, "not a directory"), ({"annotations": "nowhere.csv"}, "no annotation file 'nowhere.csv'"),
    ({"annotations": None}, "annotations is missing"), ({"on_error": "ignore"}, "'raise', 'skip'"),
    ({"val_fraction": 0.6, "test_fraction": 0.4}, "sum below 1"), ({"val_fracton": 0.5}, "did you mean 'val_fraction'"),
    ({"annotations": {"training": "c.csv"}}, "'training'.*allowed: train"),
    ({"questions": {"val": "c.csv"}}, "the same in both"),
])  # fmt: skip
def test_wrong_options(root, tmp_path, options, message):
    write(root / "c.csv", f"image,caption\n{name(1)},x\n")
    with pytest.raises(ValueError, match=message):
        folder.load(config(root, tmp_path, "c.csv") | options, ["train"])


# splits


def test_splits_by_hash_are_stable_and_have_the_asked_sizes():
    ids = [f"image {i}" for i in range(4000)]
    splits = {i: folder.split_of(i, 0.1, 0.2, seed=0) for i in ids}
    sizes = {name: sum(split == name for split in splits.values()) for name in ("train", "val", "test")}
    assert abs(sizes["val"] - 400) < 60 and abs(sizes["test"] - 800) < 80
    assert [folder.split_of(i, 0.1, 0.2, 0) for i in "4ac"] == ["val", "train", "test"]
    assert sum(folder.split_of(i, 0.1, 0.2, seed=1) != splits[i] for i in ids) > 1000
    moved = {(splits[i], folder.split_of(i, 0.2, 0.2, 0)) for i in ids if splits[i] != folder.split_of(i, 0.2, 0.2, 0)}
    assert moved == {("train", "val")}  # more validation images leave the test set alone


def test_images_without_a_split_beside_others_are_left_out():
    rows = [
        {"split": split, "file": file, "image_id": file, "where": "w"} for file, split in (("a", "test"), ("b", ""))
    ]
    problems = folder_formats.Problems()
    folder.assign_splits(rows, problems)
    assert [(row["file"], row["split"]) for row in rows] == [("a", "test")]
    assert "split (1)" in str(problems) and "w: b has no split" in str(problems)


def test_adding_images_moves_none(root, tmp_path):
    for i in range(30):
        save(root / f"{i}.png", seed=i)
    where = {}
    for count in (20, 30):
        write(root / "c.csv", "image,caption\n" + "".join(f"{i}.png,text {i}\n" for i in range(count)))
        settings = config(root, tmp_path, "c.csv", val_fraction=0.3, test_fraction=0.3)
        splits = folder.load(settings, ["train", "val", "test"])
        now = {row["image_id"]: name for name, split in splits.items() for row in split.rows}
        assert len(now) == count and {k: now[k] for k in where} == where
        where = now


def test_an_empty_split_is_an_error(root, tmp_path):
    write(root / "c.csv", f"image,caption\n{name(1)},x\n")
    with pytest.raises(ValueError, match="no image is in the splits \\['val'\\]; found are {'train': 1}"):
        folder.load(config(root, tmp_path, "c.csv", val_fraction=0.0, test_fraction=0.0), ["train", "val"])


# the prepared copy


def test_no_public_bucket_is_asked_about_private_data(root, tmp_path, monkeypatch):
    def asked(*arguments):
        raise AssertionError(f"asked for {arguments}")

    for function in ("gcs_dataset_info_files", "is_dataset_on_gcs"):
        monkeypatch.setattr(f"tensorflow_datasets.core.utils.gcs_utils.{function}", asked)
    _, _, settings = stored(root, tmp_path)
    folder.load(settings, ["train"])


def kinds(root):
    """One image of each kind that people have."""
    exif = Image.Exif()
    exif[0x0112] = 6
    colour = Image.fromarray(pixels(7))
    save(root / "turned.jpg", seed=1, exif=exif)
    colour.convert("CMYK").save(root / "cmyk.jpg")
    colour.convert("RGBA").save(root / "alpha.png")
    colour.quantize(16).save(root / "palette.png")
    colour.convert("L").save(root / "grey.png")
    Image.fromarray(pixels(3)[..., 0].astype(np.uint16) * 257).save(root / "sixteen.png")
    colour.save(root / "w.webp", lossless=True)
    colour.save(root / "g.gif")
    return ["turned.jpg", "cmyk.jpg", "alpha.png", "palette.png", "grey.png", "sixteen.png", "w.webp", "g.gif"]


def stored(root, tmp_path, **options):
    files = kinds(root)
    texts = ["naïve", "日本語", '🐈 "q"', "a\nb", "e\u0301", "x" * 5000, "|", "\\"]
    data = [{"image": f, "caption": [t, t], "question": t + "?", "answer": [t, "ja"], "type": "é"}
            for f, t in zip(files, texts, strict=True)]  # fmt: skip
    write(root / "c.json", data)
    settings = config(root, tmp_path, "c.json", val_fraction=0.0, test_fraction=0.0, **options)
    return files, texts, settings


def test_texts_and_pixels_come_back(root, tmp_path):
    files, texts, settings = stored(root, tmp_path)
    split = folder.load(ConfigDict({**settings, "name": "folder", "fraction": 0.5}), ["train"])["train"]
    assert split.name == "train" and len(split.images) == len(split.rows) == len(files)
    for i, (file, text) in enumerate(zip(files, texts, strict=True)):
        question = {"question_id": f"{file}-0", "question": text + "?", "answers": [text, "ja"], "type": "é"}
        assert split.rows[i] == {"image_id": file, "captions": [text, text], "questions": [question]}
        assert split.images.source[i]["image"] == (root / file).read_bytes()
        np.testing.assert_array_equal(split.images[i], images.decode(root / file))
    assert split.images[0].shape == (16, 12, 3)  # turned upright
    np.testing.assert_array_equal(split.images[-2], pixels(7))
    with pytest.raises(IndexError):
        split.images[len(files)]
    assert len(split.images[2:5]) == 3 and len(list(split.images)) == len(files)


def test_images_are_thread_safe_and_picklable(root, tmp_path):
    _, _, settings = stored(root, tmp_path)
    source = folder.load(settings, ["train"])["train"].images
    expected = list(source)
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        for i, image in enumerate(pool.map(lambda i: copy[i % len(copy)], range(400))):
            np.testing.assert_array_equal(image, expected[i % len(expected)])


def test_the_copy_is_used_again_until_something_changes(root, tmp_path, monkeypatch):
    files, _, settings = stored(root, tmp_path)
    checked = []
    monkeypatch.setattr(folder, "check_images", lambda *a, real=folder.check_images: checked.append(1) or real(*a))

    def prepared(**options):
        before = len(checked)
        folder.load(settings | options, ["train"])
        return len(checked) - before

    assert prepared() == 1 and prepared() == 0
    assert prepared(seed=1) == 1 and prepared(on_error="skip") == 1 and prepared() == 0
    save(root / files[2], seed=99)  # another picture under the same name
    assert prepared() == 1
    np.testing.assert_array_equal(folder.load(settings, ["train"])["train"].images[2], pixels(99))
    os.utime(root / files[2], (1, 1))  # as an edit that keeps the size
    assert prepared() == 1
    write(root / "c.json", (root / "c.json").read_text() + "\n")
    assert prepared() == 1 and prepared() == 0
    save(root / "unrelated.png")
    assert prepared() == 0


def test_an_interrupted_preparation_leaves_nothing_that_is_read(root, tmp_path, monkeypatch):
    files, _, settings = stored(root, tmp_path)
    real = folder.FolderData._generate_examples

    def broken(self, split):
        for i, example in real(self, split):
            if i == 3:
                raise KeyboardInterrupt
            yield i, example

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(folder.FolderData, "_generate_examples", broken)
            with pytest.raises(KeyboardInterrupt):
                folder.load(settings, ["train"])
        assert not list((tmp_path / "cache").rglob("*.array_record*")) and not list(
            (tmp_path / "cache").rglob("*.json")
        )
    (home,) = (tmp_path / "cache").glob("*/folder_data")
    killed = home / "incomplete.ABC123_1.0.0"  # what kill -9 leaves
    killed.mkdir()
    (killed / "folder_data-train.array_record-00000-of-00001").write_bytes(b"half")
    assert len(folder.load(settings, ["train"])["train"].rows) == len(files)
    assert [path.name for path in home.iterdir()] == ["1.0.0"]


def test_two_preparations_at_once_both_succeed(root, tmp_path, monkeypatch):
    files, _, settings = stored(root, tmp_path)
    both_ready = threading.Barrier(2)
    real = folder.FolderData._split_generators

    def together(self, dl_manager):
        both_ready.wait(timeout=30)
        return real(self, dl_manager)

    monkeypatch.setattr(folder.FolderData, "_split_generators", together)
    with ThreadPoolExecutor(2) as pool:
        for split in pool.map(lambda _: folder.load(settings, ["train"])["train"], range(2)):
            assert [row["image_id"] for row in split.rows] == files


@pytest.mark.parametrize("claimed", [7, 9])
def test_a_copy_whose_files_do_not_hold_what_it_claims_is_refused(root, tmp_path, claimed):
    _, _, settings = stored(root, tmp_path)
    folder.load(settings, ["train"])
    (info,) = (tmp_path / "cache").rglob("dataset_info.json")
    text = info.read_text()
    assert text.count('"8"') == 1
    info.write_text(text.replace('"8"', f'"{claimed}"'))
    with pytest.raises(ValueError, match=f"8 of {claimed} images of train: delete"):
        folder.load(settings, ["train"])
