import csv
import io
import json
import os
import pickle
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxpeft import config as defaults
from jaxpeft.data import folder
from jaxpeft.data.folder import formats, prepared
from jaxpeft.inputs import images

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
    problems = formats.Problems()
    for image_id, file in {"frame7": "cam_A_frame7.png", "A_frame7": "cam_A_frame7.png", "9": "b-00009.png",
                           "7": "cam_A_frame7.png",
                           "00009": "b-00009.png", "009": "b-00009.png"}.items():  # fmt: skip
        assert find(formats._record("", None, image_id), problems) == f"shots/{file}"
    assert find(formats._record("", None, "rame7"), problems) is None
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


def test_other_names_of_columns(root):
    """file_name and text, in every dialect with columns; the pictures lie beside the table."""
    files = [name(i)[8:] for i in (1, 2)]
    texts = {
        "m.csv": f"file_name;text\r\n{files[0]};a\r\n{files[1]};b\r\n",
        "m.jsonl": "\n".join(json.dumps({"file_name": f, "text": t}) for f, t in zip(files, "ab", strict=True)),
        "one.jsonl": json.dumps({"file_name": files[0], "text": ["a"]}),
        "m.json": json.dumps([{"file_name": f, "caption": t} for f, t in zip(files, "ab", strict=True)]),
    }
    for file, text in texts.items():
        (root / "val2014" / file).write_bytes(b"\xef\xbb\xbf" + text.encode())
        rows, problems = folder.parse(f"val2014/{file}", root)
        assert problems.counts == {}, file
        assert captions(rows) == dict(list({name(1): ["a"], name(2): ["b"]}.items())[: 1 if "one" in file else 2])


def test_image_begins_at_root_and_file_name_beside_the_table(root):
    for place in ("", "a/", "b/"):
        save(root / f"{place}x.png")
    save(root / "b" / "only.png")
    save(root / "top.png")
    save(root / "a" / "below" / "deep.png")

    def found(column, value):
        table = write(root / "a" / "t.csv", f"{column},caption\n{value},c\n")
        rows, problems = folder.parse(f"a/{table}", root)
        return [row["file"] for row in rows], str(problems)

    assert found("image", "x.png")[0] == ["x.png"]
    assert found("file_name", "x.png")[0] == ["a/x.png"]
    assert found("file_name", "b/x.png")[0] == ["b/x.png"]  # a path with a directory may begin at root
    assert found("file_name", "../b/x.png")[0] == ["b/x.png"]
    assert found("file_name", "deep.png")[0] == ["a/below/deep.png"]
    assert found("image", "only.png")[0] == ["b/only.png"]
    for file in ("only.png", "top.png"):  # another directory's picture is not taken for this one's
        files, said = found("file_name", file)
        assert files == [] and f"a/t.csv line 2: {file} not found in a, the directory of this file" in said
    assert "outside the directory (1)" in found("file_name", "../../x.png")[1]


@pytest.mark.parametrize("first, second", [("image", "file_name"), ("caption", "text"), ("caption_1", "text1")])
def test_two_names_of_one_thing(root, first, second):
    row = dict.fromkeys(["image", first, second], name(1))
    for file, text in (("two.csv", f"{','.join(row)}\n{','.join(row.values())}\n"), ("two.jsonl", json.dumps(row))):
        rows, problems = folder.parse(write(root / file, text), root)
        assert rows == [] and problems.counts == {"two names": 1}
        assert bool(problems.fatal) == file.endswith(".csv")  # a header decides for all rows
        assert f"{file} line 1: {first!r} and {second!r} mean the same" in str(problems)


@pytest.mark.parametrize("column", ["caption_{}", "caption{}", "text_{}", "text{}"])
def test_several_captions_in_columns(root, column):
    order = [1, 10, 2]  # by number, not by column or by letter
    header = ",".join(["file_name", *map(column.format, order)])
    text = f"{header}\n{name(1)},one,ten,two\n{name(2)}, ,ten,\n{name(3)},,,\n"
    rows, problems = folder.parse(write(root / "c.csv", text), root)
    assert captions(rows) == {name(1): ["one", "two", "ten"], name(2): ["ten"]}
    assert problems.counts == {"empty caption": 1} and "c.csv line 4" in str(problems)
    cells = [["one", ["ten", "x"], "two"], [None, "ten", float("nan")], ["", " ", None]]
    lines = [json.dumps({"image": name(i)} | dict(zip(map(column.format, order), row, strict=True)))
             for i, row in zip((1, 2, 3), cells, strict=True)]  # fmt: skip
    rows, problems = folder.parse(write(root / "c.jsonl", "\n".join(lines)), root)
    assert captions(rows) == {name(1): ["one", "two", "ten", "x"], name(2): ["ten"]}
    said = ", ".join(map(column.format, (1, 2, 10)))
    assert problems.counts == {"empty caption": 1} and f"c.jsonl line 3: no text in {said}" in str(problems)


def test_caption_and_numbered_captions_and_unnamed_columns(root):
    text = f",image,caption,caption_2,\n0,{name(1)},a,b,\n1,{name(2)},,b,\n"  # as pandas writes its index
    rows, problems = folder.parse(write(root / "c.csv", text), root)
    assert problems.counts == {} and captions(rows) == {name(1): ["a", "b"], name(2): ["b"]}


# without annotations


def put(root, files):
    """Text files, {path: text}."""
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")


def by_file(rows):
    return {row["file"]: (row["split"], row["captions"]) for row in rows}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_image_folder_with_one_file(root, ending):
    def table(prefix):
        if ending == "csv":
            return f"file_name,text\n{prefix}a.png,first\n{prefix}a.png,second\n{prefix}b/a.png,third\n"
        said = [("a.png", ["first", "second"]), ("b/a.png", "third")]
        return "\n".join(json.dumps({"file_name": prefix + file, "text": text}) for file, text in said)

    for place in ("", "below/"):
        save(root / f"{place}a.png")
        save(root / f"{place}b" / "a.png")
    write(root / f"metadata.{ending}", table("below/"))
    expected = {"below/a.png": ("", ["first", "second"]), "below/b/a.png": ("", ["third"])}
    rows, problems = folder.parse(None, root)
    assert problems.counts == {} and by_file(rows) == expected
    (root / f"metadata.{ending}").rename(root / "below" / f"Metadata.{ending.upper()}")
    write(root / "below" / f"Metadata.{ending.upper()}", table(""))
    rows, problems = folder.parse(None, root)
    assert problems.counts == {} and by_file(rows) == expected
    (remark,) = problems.remarks()
    assert remark.startswith(
        "image not used (6); it has no caption or question: a.png; b/a.png; val2014/"
    ) and remark.endswith("; ...")


def test_image_folder_with_a_file_for_each_split(tmp_path):
    splits = {"Training": "train", "validation": "val", "test": "test"}
    for i, place in enumerate(splits):  # the same names in each
        save(tmp_path / place / "0.jpg", seed=i)
        save(tmp_path / place / "sub" / "1.jpg", seed=i)
    table = "file_name,text,caption_2\n0.jpg,{0},{0}!\nsub\\1.jpg,{0}?,\n"
    for place in ("Training", "validation"):
        write(tmp_path / place / "metadata.csv", table.format(place))
    write(tmp_path / "test" / "metadata.jsonl", '{"file_name": "0.jpg", "text": "test"}')
    rows, problems = folder.parse(None, tmp_path)
    assert by_file(rows) == {f"{place}/0.jpg": (split, [place, place + "!"]) for place, split in splits.items()
                             if split != "test"} | {f"{place}/sub/1.jpg": (split, [place + "?"])
                             for place, split in splits.items() if split != "test"} | {
        "test/0.jpg": ("test", ["test"])}  # fmt: skip
    assert problems.counts == {}
    write(tmp_path / "test" / "metadata.jsonl", '{"image": "0.jpg", "caption": "ours"}')
    assert by_file(folder.parse(None, tmp_path)[0])["test/0.jpg"] == ("test", ["ours"])
    write(tmp_path / "test" / "metadata.jsonl", '{"file_name": "0.jpg", "text": "t", "split": "train"}')
    _, problems = folder.parse(None, tmp_path)
    assert problems.counts == {"split": 1} and "test/metadata.jsonl line 1: split 'train' in the file of 'test'" in str(
        problems
    )


@pytest.mark.parametrize("given, meant", [
    ({}, None), ({"annotations": "c.csv"}, "c.csv"), ({"train": "a", "test": "b"}, {"train": "a", "test": "b"}),
    ({"test": "b"}, "add train=FILE"), ({"annotations": "c.csv", "train": "a"}, "not both"),
])  # fmt: skip
def test_what_a_config_says_of_annotations(given, meant):
    arguments = ConfigDict({"annotations": "", "train": "", "val": "", "test": ""} | given)
    if " " in str(meant) and isinstance(meant, str):
        with pytest.raises(ValueError, match=meant):
            defaults.annotations(arguments)
    else:
        assert defaults.annotations(arguments) == meant


def test_two_metadata_files_in_one_directory(root):
    write(root / "metadata.csv", f"file_name,text\n{name(1)},x\n")
    write(root / "metadata.jsonl", json.dumps({"file_name": name(2), "text": "x"}))
    _, problems = folder.parse(None, root)
    assert problems.fatal and problems.counts == {"two annotations": 1}
    assert "metadata.csv and metadata.jsonl are in one directory" in str(problems)
    assert captions(folder.parse("metadata.csv", root)[0]) == {name(1): ["x"]}


def test_text_files_beside_pictures(tmp_path):
    for file in ("cat.jpg", "Cat 2.PNG", "a/cat.jpg", "a/cat.webp", "plain.gif", "empty.png", "none.png", "two.png"):
        save(tmp_path / file)
    (tmp_path / "cat.txt").write_bytes(b"\xef\xbb\xbf a red cat \r\n\r\n  \r\nanother, \xc3\xa9\r\n")
    (tmp_path / "two.txt").write_bytes(b"old\rmac\r")
    texts = {"a/cat.txt": "below\u2028one line", "empty.txt": " \n\n", "none.txt": "nan"}
    put(tmp_path, texts | {"README.txt": "of cats", "LICENSE.txt": "", "Cat 2.TXT": "upper"})
    rows, problems = folder.parse(None, tmp_path)
    assert captions(rows) == {"cat.jpg": ["a red cat", "another, é"], "Cat 2.PNG": ["upper"], "two.png": ["old", "mac"],
                              "a/cat.jpg": ["below\u2028one line"], "a/cat.webp": ["below\u2028one line"]}  # fmt: skip
    assert all(row["split"] == "" and row["image_id"] == row["file"] for row in rows)
    assert problems.counts == {"image without text": 1, "empty caption": 2} and not problems.fatal
    for said in ("plain.gif: no plain.txt next to it", "empty.txt: the file is empty", "none.txt line 1: 'nan'"):
        assert said in str(problems)
    assert problems.remarks() == [
        "text without an image (2); no image in the same directory has this name, so it was ignored: LICENSE.txt; README.txt"
    ]


def test_text_files_that_hold_no_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MOST_CAPTIONS", 100)
    for stem in ("boxes", "latin", "long", "good"):
        save(tmp_path / f"{stem}.png")
    texts = {"boxes.txt": "0 0.5 0.25 1e-2 .5\n3 0.5 0.25 0.1 0.5", "long.txt": "x" * 101}
    put(tmp_path, texts | {"good.txt": "2 dogs 3 cats 4 5 6 7"})
    (tmp_path / "latin.txt").write_bytes(b"ok\ncaf\xe9\n")
    rows, problems = folder.parse(None, tmp_path)
    assert captions(rows) == {"good.png": ["2 dogs 3 cats 4 5 6 7"]}
    assert problems.counts == {"bad value": 2, "unreadable file": 2} and not problems.fatal
    for said in ("boxes.txt line 2: '3 0.5 0.25 0.1 0.5' is a row of numbers", "latin.txt line 2: not UTF-8 (byte 0xe9)",
                 "long.txt: it has 101 bytes; a file of captions must have at most 100"):  # fmt: skip
        assert said in str(problems)


def test_pictures_of_other_kinds_beside_text_files(tmp_path):
    save(tmp_path / "a.jpg")
    for file in ("a.heic", "b.HEIC", "logo.svg"):
        (tmp_path / file).write_bytes(b"")
    put(tmp_path, {"a.txt": "a", "b.txt": "b"})
    rows, problems = folder.parse(None, tmp_path)
    assert captions(rows) == {"a.jpg": ["a"]} and problems.counts == {"unsupported image": 1}
    assert "b.txt: b.HEIC: HEIC/HEIF images are unsupported; convert them to JPEG or PNG first (a phone" in str(
        problems
    )
    assert problems.remarks() == [
        "image not used (1); it has no caption or question: logo.svg: "
        "SVG images are unsupported; convert them to JPEG or PNG first"
    ]


@pytest.mark.parametrize("kind", ["text files", "one table"])
def test_directories_are_splits_where_all_pictures_lie_in_such(tmp_path, kind):
    train = {"train/a": "train", "train/b": "train", "train/c": "train"}
    places = train | {"Valid/a": "val", "test/x/a": "test", "test_hard/a": "test_hard"}

    def described(*places):
        for place in places:
            save(tmp_path / f"{place}.png")
            if kind == "text files":
                (tmp_path / f"{place}.txt").write_text(place)
        if kind == "one table":
            said = "".join(f"{place}.png,{place}\n" for place in places)
            write(tmp_path / "metadata.csv", "file_name,text\n" + said)
        rows, problems = folder.parse(None, tmp_path)
        folder.assign_splits(rows, problems)
        return {row["file"][:-4]: row["split"] for row in rows}, problems

    rows, problems = described(*train)
    assert problems.counts == {} and all(line.startswith("split (") for line in problems.remarks())
    assert sorted(rows.values()) == ["test", "train", "val"]  # with train alone nothing is held out: a hash does that
    splits, problems = described(*places)
    assert splits == places and problems.counts == {}
    splits, problems = described(*places, "more/a")  # not mixed with the others by a hash
    assert splits == places and problems.counts == {"split": 1} and "more/a.png has no split" in str(problems)


def test_a_directory_that_happens_to_be_named_as_a_split_names_none(tmp_path):
    for place in ("test/a", "cats/a", "dogs/a"):
        save(tmp_path / f"{place}.png")
        (tmp_path / f"{place}.txt").write_text(place)
    rows, problems = folder.parse(None, tmp_path)
    assert [row["split"] for row in rows] == [""] * 3 and problems.counts == {}
    assert problems.remarks()[0].endswith("because not all are in directories named as splits: test")


def test_metadata_before_text_files_where_it_describes_their_pictures(root):
    write(root / "metadata.csv", f"file_name,text\n{name(1)},table\n{name(2)},table\n")
    for i in (1, 2):
        (root / name(i)).with_suffix(".txt").write_text("text")
    put(root, {"README.txt": "x"})
    rows, problems = folder.parse(None, root)
    assert problems.counts == {} and captions(rows) == {name(1): ["table"], name(2): ["table"]}
    assert problems.remarks()[1].startswith("text not read (2); a metadata file describes the same image, and was read")
    (root / name(3)).with_suffix(".txt").write_text("text")  # which of the two is meant?
    rows, problems = folder.parse(None, root)
    assert problems.counts == {"two annotations": 1}
    assert f"{name(3)[:-4]}.txt is beside {name(3)}, which is in no metadata file" in str(problems)


def test_nothing_found_says_what_was_looked_for(root):
    (root / "x.heic").write_bytes(b"")
    put(root, {"notes.txt": "x", "c.csv": "image,caption\n"})
    with pytest.raises(ValueError) as error:
        folder.parse(None, root)
    for said in (
        "annotations=FILE", "metadata.csv", "metadata.jsonl", "cat.txt beside cat.jpg",
        "images: 4, files in unsupported image formats: 1", ".txt files with other names: 1 (such as notes.txt)",
        "did you mean annotations=c.csv?", folder.ACCEPTED,
    ):  # fmt: skip
        assert said in str(error.value), said


def test_what_is_hidden_is_not_looked_at(root, tmp_path):
    """What macOS puts into an archive, and other hidden files."""
    for place in ("", "__MACOSX/", ".cache/", "val2014/__MACOSX/b/"):
        save(root / f"{place}cat.png")
        put(root, {f"{place}cat.txt": "a cat"})
        for file in ("._cat.png", "._cat.txt", "._metadata.csv", ".hidden.heic"):
            (root / place / file).write_bytes(b"\x00\x05\x16\x07")
    for i in (1, 2, 3, 42):
        (root / name(i)).with_suffix(".txt").write_text("x")
    files = folder.Files(root)
    assert files.all() == ["cat.png", *(name(i) for i in (1, 2, 3, 42))] and files.unread() == []
    assert len(files.names) == 10  # each with its text file
    rows, problems = folder.parse(None, root)
    assert problems.counts == {} and problems.remarks() == [] and captions(rows)["cat.png"] == ["a cat"]
    rows, problems = folder.parse(write(root / "c.csv", "image,caption\ncat.png,x\n__MACOSX/cat.png,y\n"), root)
    assert captions(rows) == {"cat.png": ["x"], "__MACOSX/cat.png": ["y"]}  # named exactly


def test_a_copy_is_made_from_what_is_found(tmp_path):
    root = tmp_path / "photos"
    for i in range(12):
        save(root / f"{i}.png", seed=i)
        (root / f"{i}.txt").write_text(f"text {i}")
    put(root, {"README.txt": "x"})
    settings = {"root": str(root), "data_dir": str(tmp_path / "cache")}
    for _ in range(2):  # prepared, and from the prepared copy
        splits = folder.load(ConfigDict(settings | {"annotations": None}), ["train", "val", "test"])
        got = {row["image_id"]: row["captions"] for split in splits.values() for row in split.rows}
        assert got == {f"{i}.png": [f"text {i}"] for i in range(12)}
        assert any(line.startswith("text without an image (1)") for line in splits["test"].report["remarks"])
    put(root, {"LICENSE.txt": "x"})
    assert (
        folder.load(settings, ["train"])["train"]
        .report["remarks"][0]
        .endswith("it was ignored: LICENSE.txt; README.txt")
    )
    before = folder.load(settings, ["train"])["train"].source
    (root / "3.txt").write_text("another text")
    assert folder.load(settings, ["train"])["train"].source != before
    (root / "3.txt").unlink()
    with pytest.raises(ValueError, match="image without text \\(1\\)(.|\n)*3.png: no 3.txt next to it"):
        folder.load(settings, ["train"])


# names of files


NFC, NFD = (unicodedata.normalize(form, "Zoë/é à.png") for form in ("NFC", "NFD"))


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems find both forms themselves")
@pytest.mark.parametrize("there, said", [(NFC, NFD), (NFD, NFC)], ids=["NFC", "NFD"])
def test_names_in_another_unicode_form(root, there, said):
    assert there != said
    save(root / there)
    (root / there).with_suffix(".txt").write_text("x")
    directory, stem = said.split("/")
    mixed = there.split("/")[0] + "/" + stem
    for image in (said, mixed, stem):
        rows, problems = folder.parse(write(root / "c.csv", f"image,caption\n{image},x\n"), root)
        assert problems.counts == {} and captions(rows) == {there: ["x"]}, ascii(image)
    text = (root / there).with_suffix(".txt")
    text.rename(text.with_name(stem[:-4] + ".txt"))
    assert captions(folder.parse(None, root)[0]) == {there: ["x"]}
    save(root / said)  # now both are there, and each is found by its own name
    for image, file in {there: there, said: said, stem: said}.items():
        rows, problems = folder.parse(write(root / "c.csv", f"image,caption\n{image},x\n"), root)
        assert problems.counts == {} and captions(rows) == {file: ["x"]}
    rows, problems = folder.parse(write(root / "c.csv", f"image,caption\n{mixed},x\n"), root)
    assert rows == [] and problems.counts == {"ambiguous image": 1}


def test_backslashes_where_the_path_with_slashes_exists(root):
    save(root / "a" / "b.png")
    save(root / "odd\\name.png")
    save(root / "odd" / "name.png")
    cells = [r"a\b.png", r"odd\name.png", r"a\c.png", r"..\x.png", r"C:\pics\b.png"]
    text = "image,caption\n" + "".join(f"{cell},x\n" for cell in cells)
    rows, problems = folder.parse(write(root / "c.csv", text), root)
    assert list(captions(rows)) == ["a/b.png", "odd\\name.png"] and problems.counts == {"missing image": 3}
    assert r"c.csv line 4: a\c.png" in str(problems)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_a_name_that_is_not_utf_8_is_said(tmp_path):
    save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    rows, problems = folder.parse(None, tmp_path)
    assert rows == [] and problems.counts == {"bad value": 1} and "'caf\\udce9.png' is not UTF-8" in str(problems)


def test_links_to_pictures_are_followed(root, tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "z.png")
    (root / "linked").symlink_to("../elsewhere")
    (root / "z.jpg").symlink_to(name(1))
    put(root, {"z.txt": "x"})
    (tmp_path / "elsewhere" / "deep" / "z.txt").write_text("y")
    (tmp_path / "elsewhere" / "circle").symlink_to(root)
    rows, problems = folder.parse(None, root)
    assert captions(rows) == {"linked/deep/z.png": ["y"], "z.jpg": ["x"]}
    assert problems.counts == {"image without text": 4}


def test_a_root_that_is_a_link_has_files_by_either_path(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    for at in (root, tmp_path / "link"):
        put(root, {"c.csv": f"image,caption\n{at / name(1)},x\n{tmp_path / 'aside.png'},y\n"})
        rows, problems = folder.parse("c.csv", tmp_path / "link")
        assert captions(rows) == {name(1): ["x"]}, str(problems)
        assert problems.counts == {"outside the directory": 1}


@pytest.mark.parametrize("form", [str.lower, str.upper])
def test_pictures_of_every_ending_are_found_and_read(tmp_path, form):
    """By text files beside them, and by a name of which only one is there."""
    root, files = tmp_path / "photos", []
    for end in sorted(images.endings()):
        file = f"{end[1:]}{form(end)}"
        kind = Image.registered_extensions()[end]
        (root / "below").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(0, 16, 16)).save(root / "below" / file, kind)
        (root / "below" / f"{end[1:]}.txt").write_text(end)
        files.append(file)
    assert folder.Files(root).all() == sorted(f"below/{file}" for file in files) and len(files) > 25
    settings = {"root": str(root), "data_dir": str(tmp_path / "cache"), "val_fraction": 0.0, "test_fraction": 0.0}
    split = folder.load(settings, ["train"])["train"]
    assert {row["image_id"]: row["captions"] for row in split.rows} == {
        f"below/{file}": [f".{file.split('.')[0]}"] for file in files
    }
    for row, image in zip(split.rows, split.images, strict=True):
        np.testing.assert_array_equal(image, images.decode(root / row["image_id"]))
    write(root / "c.csv", "image,caption\n" + "".join(f"{file},x\n" for file in files))
    rows, problems = folder.parse("c.csv", root)
    assert problems.counts == {} and len(rows) == len(files)


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
    with pytest.raises(ValueError, match="no images in the splits \\['test'\\]"):  # test_style is no part of test
        folder.load(settings, ["test"])


@pytest.mark.parametrize("split, meant", [
    ("valid", "val"), ("test_b", "test_b"), ("val_2", "val_2"), ("testing", None), ("test_", None), ("valid_b", None),
    ("test_a/b", None),
])  # fmt: skip
def test_split_names(root, split, meant):
    assert formats.split_name(split) == meant
    rows, problems = folder.parse(write(root / "c.csv", f"image,caption,split\n{name(1)},x,{split}\n"), root)
    assert [row["split"] for row in rows] == [meant] * bool(meant)
    assert problems.counts == ({} if meant else {"split": 1})


def test_unrecognised_file_says_what_was_found_and_what_is_accepted(root):
    for content, found in (({"foo": 1, "bar": []}, "['bar', 'foo']"), ([1, 2], "[1, 2]"),
                           ("hello there", "'hello there'"),
                           ({"images": [{"file_name": "x"}]}, "['images']"), ("", "''")):  # fmt: skip
        _, problems = folder.parse(write(root / "odd.dat", content), root)
        assert problems.fatal and found in str(problems)
        for dialect in ("COCO captions", "Karpathy", "a list", "VQA v2", "CSV", "JSONL"):
            assert dialect in str(problems)


def test_broken_json_names_file_line_and_column(root):
    _, problems = folder.parse(write(root / "b.json", '{"images": [],\n  "annotations": [}\n}'), root)
    assert problems.fatal and "b.json line 2 column 19: invalid JSON" in str(problems)
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
    assert problems.fatal and "has a column twice" in str(problems)


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
        assert f"\n{kind} ({count}); {formats.FIXES[kind]}:\n" in message, message
    assert message.count("\n    messy.json row") == sum(min(3, count) for count in counts.values())
    assert "messy.json row 19: cannot decode the image cut.jpg: " in message and "on_error='skip'" in message
    assert not (tmp_path / "cache").exists()


def test_skip_drops_the_bad_rows_and_reports_them_every_time(root, tmp_path):
    annotations, counts = messy(root)
    settings = config(root, tmp_path, annotations, on_error="skip")
    for _ in range(2):  # prepared, and from the prepared copy
        splits = folder.load(settings, ["train", "test"])
        report = splits["train"].report
        assert report == splits["test"].report
        examples = report.pop("examples")
        assert report == counts | {"remarks": []}
        assert len(examples) == sum(min(3, count) for count in counts.values())
        assert [(row["image_id"], row["captions"]) for row in splits["train"].rows] == [
            (name(1), ["good", "kept"]),
            ("ok.png", []),
        ]
        assert [question["question"] for question in splits["train"].rows[1]["questions"]] == ["q"]
        assert [row["captions"] for row in splits["test"].rows] == [["good"]]
    json.dumps(report)


MISSING = ["nan", "NaN", "None", "NONE", "null", " Null ", "<NA>", "<na>"]


@pytest.mark.parametrize("text", MISSING)
def test_what_programs_write_for_a_missing_text_is_refused(root, text):
    table = f"image,caption,question,answer\n{name(1)},{text},,\n{name(2)},,{text},yes\n{name(3)},,q,{text}\n"
    rows, problems = folder.parse(write(root / "c.csv", table), root)
    assert captions(rows) == {name(3): []} and rows[0]["questions"][0]["answers"] == [text.strip()]
    assert problems.counts == {"empty caption": 1, "empty question": 1}
    assert f"c.csv line 2: {text!r}" in str(problems) and f"c.csv line 3: {text!r}" in str(problems)
    coco = {"images": [{"id": 1, "file_name": name(1)}], "annotations": [{"image_id": 1, "caption": text}]}
    _, problems = folder.parse(write(root / "c.json", coco), root)
    assert problems.counts == {"empty caption": 1}
    lines = f"image,caption\n{name(1)},nanny and none of <NA>\n"
    assert folder.parse(write(root / "c.csv", lines), root)[1].counts == {}


@pytest.mark.parametrize("value, shown", [("null", "null"), ("NaN", "nan"), ('""', "''")])
def test_missing_values_of_json(root, value, shown):
    lines = [{"image": name(1), "caption": "?"}, {"image": name(2), "question": "?", "answer": 1},
             {"image": name(3), "question": "q", "answer": ["?", "none"], "image_id": "?", "split": "?"}]  # fmt: skip
    text = "\n".join(map(json.dumps, lines)).replace('"?"', value)
    rows, problems = folder.parse(write(root / "c.jsonl", text), root)
    (row,) = rows
    assert (row["file"], row["image_id"], row["split"]) == (name(3), name(3), "")
    assert row["questions"][0]["answers"] == ["none"]
    assert problems.counts == {"empty caption": 1, "empty question": 1, "empty answer": 1}
    assert f"c.jsonl line 1: {shown}\n" in str(problems) and f"c.jsonl line 2: {shown}\n" in str(problems)


HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(40)


def test_heic_is_told_from_a_damaged_picture(root, tmp_path):
    (root / "sub").mkdir()
    (root / "IMG_1.HEIC").write_bytes(HEIC)
    (root / "sub" / "IMG_2.jpg").write_bytes(HEIC)
    (root / "sub" / "IMG_3.heif").write_bytes(HEIC)
    (root / "cut.jpg").write_bytes((root / name(3)).read_bytes()[:300])
    text = "image,caption\nIMG_1.HEIC,x\nsub/IMG_2.jpg,x\nIMG_3.heif,x\ncut.jpg,x\n" + f"{name(1)},x\n"
    write(root / "c.csv", text)
    with pytest.raises(ValueError) as error:
        folder.load(config(root, tmp_path, "c.csv"), ["train"])
    fix = "HEIC/HEIF images are unsupported; convert them to JPEG or PNG first (a phone can be set to save "
    fix += "'Most Compatible' JPEGs)"
    for line, file in ((2, "IMG_1.HEIC"), (3, "sub/IMG_2.jpg"), (4, "sub/IMG_3.heif")):
        assert f"    c.csv line {line}: cannot decode the image {file}: {fix}\n" in str(error.value)
    assert "\nunsupported image (3); convert the file" in str(error.value) and "\ncorrupt image (1)" in str(error.value)
    report = folder.load(config(root, tmp_path, "c.csv", on_error="skip"), ["train"])["train"].report
    assert report["unsupported image"] == 3 and report["corrupt image"] == 1


def test_dark_16_bit_pictures_are_a_remark_that_stays(root, tmp_path):
    values = {"dark.png": 4095, "edge.tif": 8191, "bright.png": 8192}
    for file, most in values.items():
        Image.fromarray(np.linspace(0, most, 256).astype(np.uint16).reshape(16, 16)).save(root / file)
    save(root / "eight.png")
    write(root / "c.csv", "image,caption\n" + "".join(f"{file},x\n" for file in [*values, "eight.png"]))
    settings = config(root, tmp_path, "c.csv", val_fraction=0.0, test_fraction=0.0)
    for _ in range(2):  # prepared, and from the prepared copy
        split = folder.load(settings, ["train"])["train"]
        assert len(split.rows) == 4 and split.report == {"examples": [], "remarks": [
            "16-bit image nearly black (2); it uses less than an eighth of its range; scale the values to 0..65535 to "
            "make it lighter: dark.png: values up to 4095 of 65535; edge.tif: values up to 8191 of 65535"
        ]}  # fmt: skip


def test_remarks_are_counted_and_never_raise(root, tmp_path):
    problems = formats.Problems(keep=2)
    for i in range(3):
        problems.remark("image not used", f"{i}.png")
    assert problems.counts == {} and problems.report() == {
        "examples": [], "remarks": ["image not used (3); it has no caption or question: 0.png; 1.png; ..."]
    }  # fmt: skip
    assert str(problems) == "remark: image not used (3); it has no caption or question: 0.png; 1.png; ..."


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
    ({"root": "nowhere"}, "not a directory"), ({"annotations": "nowhere.csv"}, "annotation file 'nowhere.csv' not found"),
    ({"annotations": None}, "no texts found for the images"), ({"on_error": "ignore"}, "'raise', 'skip'"),
    ({"val_fraction": 0.6, "test_fraction": 0.4}, "sum below 1"), ({"val_fracton": 0.5}, "did you mean 'val_fraction'"),
    ({"annotations": {"training": "c.csv"}}, "'training'.*allowed: train"),
    ({"questions": {"val": "c.csv"}}, "must be the same"), ({"root": None}, "root is missing"),
    ({"annotations": None, "questions": "c.csv"}, "questions is given but annotations is missing"),
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
    problems = formats.Problems()
    folder.assign_splits(rows, problems)
    assert [(row["file"], row["split"]) for row in rows] == [("a", "test")]
    assert "split (1)" in str(problems) and "w: b has no split" in str(problems)


FRACTIONS = [(0.1, 0.1), (0.0, 0.1), (0.1, 0.0), (0.45, 0.45), (0.0, 0.9), (0.3, 0.01)]


def divided(n, val, test, seed):
    rows = [{"split": "", "file": f"{i}.png", "image_id": f"{i}.png", "where": "w"} for i in range(n)]
    problems = formats.Problems()
    folder.assign_splits(rows, problems, val, test, seed)
    return {row["image_id"]: row["split"] for row in rows}, problems


@pytest.mark.parametrize("val, test", FRACTIONS)
def test_no_split_of_three_pictures_or_more_is_empty(val, test):
    names = {name for name, share in (("val", val), ("test", test), ("train", 1.0)) if share}
    filled = 0
    for seed in range(20):
        for n in range(1, 21):
            splits, problems = divided(n, val, test, seed)
            hashed = {i: folder.split_of(i, val, test, seed) for i in splits}
            moved = [i for i in splits if splits[i] != hashed[i]]
            empty = names - set(hashed.values()) if n > 2 else set()
            assert {splits[i] for i in moved} == empty and len(moved) == len(empty)  # one each, and no other
            assert n < 3 or set(splits.values()) == names
            if empty == {"train"}:  # the last of the largest, as places of train come last
                place = {i: folder._place(i, seed) for i in splits}
                assert place[moved[0]] == max(place[i] for i in splits if hashed[i] == hashed[moved[0]])
            assert problems.counts == {} and sum(problems.remark_counts.values()) == len(moved)
            filled += len(moved)
    assert filled > 0


def test_the_nearest_of_train_fill_empty_splits_and_test_comes_first():
    for seed in range(40):
        splits, _ = divided(8, 0.01, 0.01, seed)
        place = {i: folder._place(i, seed) for i in splits}
        order = sorted(splits, key=place.get)
        if min(place.values()) >= 0.02:
            assert [splits[i] for i in order] == ["test", "val"] + ["train"] * 6
    rows = [{"split": "", "file": i, "image_id": i, "where": "w"} for i in reversed(list(splits))]
    folder.assign_splits(rows, formats.Problems(), 0.01, 0.01, seed)
    assert {row["image_id"]: row["split"] for row in rows} == splits  # in any order of the rows


def named(root, **files):
    """A table for each split, of pictures of these numbers."""
    for split, numbers in files.items():
        for i in numbers:
            save(root / f"{i}.png", seed=i)
        write(root / f"{split}.csv", "image,caption\n" + "".join(f"{i}.png,text {i}\n" for i in numbers))
    return {split: f"{split}.csv" for split in files}


@pytest.mark.parametrize(
    "n, fraction, taken", [(1, 0.1, 0), (2, 0.1, 1), (2, 0.85, 1), (10, 0.1, None), (40, 0.2, None)]
)
def test_val_is_made_of_train_where_none_is_named(root, tmp_path, n, fraction, taken):
    files = named(root, train=range(n), test=range(100, 103))
    settings = config(root, tmp_path, files, val_fraction=fraction)
    plain = folder.load(settings, ["train", "test"])
    assert len(plain["train"].rows) == n and plain["train"].report["remarks"] == []
    if taken == 0:
        with pytest.raises(ValueError, match=r"no images in the splits \['val'\]; found {'train': 1, 'test': 3}"):
            folder.load(settings, ["train", "val"])
        return
    splits = folder.load(settings, ["train", "val", "test"])
    ids = {name: [row["image_id"] for row in split.rows] for name, split in splits.items()}
    assert sorted(ids["train"] + ids["val"]) == sorted(f"{i}.png" for i in range(n)) and len(ids["test"]) == 3
    hashed = {f"{i}.png" for i in range(n) if folder.split_of(f"{i}.png", fraction, 0.0, 0) == "val"}
    assert len(ids["val"]) == taken if taken else set(ids["val"]) == hashed
    assert splits["val"].source != plain["train"].source == folder.load(settings, ["train"])["train"].source
    assert splits["val"].report["remarks"] == [
        f"split (1); so that none is empty: val got {len(ids['val'])} of {n} images of train, because the "
        "annotations name no val"
    ]
    with pytest.raises(ValueError, match=r"no images in the splits \['val'\]"):
        folder.load(settings | {"val_fraction": 0.0}, ["train", "val"])


def test_a_val_that_is_named_is_kept(root, tmp_path):
    files = named(root, train=range(20), val=range(100, 101))
    splits = folder.load(config(root, tmp_path, files, val_fraction=0.5), ["train", "val"])
    assert {name: len(split.rows) for name, split in splits.items()} == {"train": 20, "val": 1}


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
    with pytest.raises(ValueError, match="no images in the splits \\['val'\\]; found {'train': 1}"):
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


def test_jpegs_are_read_at_less_than_their_size(root, tmp_path):
    """The copy is that of the images at their size, but pixels of another size are another source, for tables of stages."""
    Image.fromarray(pixels(7, 80, 100)).save(root / name(42), "JPEG")
    write(root / "a.csv", f"image,caption\n{name(42)},one\n{name(1)},two\n")
    c = config(root, tmp_path, "a.csv", val_fraction=0, test_fraction=0)
    whole, less = folder.load(c, ["train"])["train"], folder.load(c | {"jpeg_edge": 20}, ["train"])["train"]
    assert less.source == f"{whole.source}, jpeg_edge 20"
    shapes = [[one.shape[:2] for one in split.images] for split in (whole, less)]
    assert sorted(shapes[0]) == [(12, 16), (80, 100)] and sorted(shapes[1]) == [(12, 16), (20, 25)]
    assert pickle.loads(pickle.dumps(less.images))[1].shape == less.images[1].shape
    for edge in (0, -1, 2.5, "384", True):
        with pytest.raises(ValueError, match="data.jpeg_edge is .*; expected a number of pixels"):
            folder.load(c | {"jpeg_edge": edge, "data_dir": str(tmp_path / "never")}, ["train"])
    assert not (tmp_path / "never").exists()  # said before images are read


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
    real = prepared.check_images
    monkeypatch.setattr(prepared, "check_images", lambda *a: checked.append(1) or real(*a))

    def checks(**options):
        before = len(checked)
        folder.load(settings | options, ["train"])
        return len(checked) - before

    assert checks() == 1 and checks() == 0
    assert checks(seed=1) == 1 and checks(on_error="skip") == 1 and checks() == 0
    save(root / files[2], seed=99)  # another picture under the same name
    assert checks() == 1
    np.testing.assert_array_equal(folder.load(settings, ["train"])["train"].images[2], pixels(99))
    os.utime(root / files[2], (1, 1))  # as an edit that keeps the size
    assert checks() == 1
    write(root / "c.json", (root / "c.json").read_text().replace("na\\u00efve?", "naive?"))
    assert checks() == 1 and checks() == 0
    write(root / "c.json", (root / "c.json").read_text() + "\n")  # says the same
    save(root / "unrelated.png")
    assert checks() == 0


def test_an_interrupted_preparation_leaves_nothing_that_is_read(root, tmp_path, monkeypatch):
    files, _, settings = stored(root, tmp_path)
    real = prepared.FolderData._generate_examples

    def broken(self, split):
        for i, example in real(self, split):
            if i == 3:
                raise KeyboardInterrupt
            yield i, example

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(prepared.FolderData, "_generate_examples", broken)
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
    real = prepared.FolderData._split_generators

    def together(self, dl_manager):
        both_ready.wait(timeout=30)
        return real(self, dl_manager)

    monkeypatch.setattr(prepared.FolderData, "_split_generators", together)
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
    with pytest.raises(ValueError, match=f"8 of {claimed} images of split 'train': delete"):
        folder.load(settings, ["train"])


def test_other_columns_of_a_metadata_file_are_remarks_and_elsewhere_mistakes(tmp_path):
    """ImageFolder's files hold labels, sizes and licences beside the texts."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,label,licence\na.png,one,3,CC0\n")
    rows, problems = folder.parse(None, tmp_path)
    assert [row["captions"] for row in rows] == [["one"]] and not problems.counts
    (remark,) = [line for line in problems.remarks() if line.startswith("column not read (2)")]
    assert "'label'" in remark and "'licence'" in remark
    (tmp_path / "metadata.csv").rename(tmp_path / "captions.csv")
    rows, problems = folder.parse("captions.csv", tmp_path)
    assert problems.counts == {"unknown key": 2}
