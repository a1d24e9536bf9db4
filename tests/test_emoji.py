import hashlib
import importlib.util
import io
import json
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from configs import real_pictures
from jaxpeft import images
from jaxpeft.datasets import emoji, emoji_words, folder
from jaxpeft.text import Tokenizer, clean_caption, split_words

N = 60  # concepts: every third an animal
STYLES = list(emoji.PACKAGES)
CODES = [f"{0x1F400 + i:x}" + ("-fe0f" if i == 7 else "") for i in range(N)]


def word(i):
    """A name of its own in letters, with what needs care: an apostrophe, a hyphen, an accent."""
    return {0: "woman\u2019s zero-hat", 1: "Pi\u00f1ata one"}.get(i, f"thing {chr(97 + i // 26)}{chr(97 + i % 26)}")


def record(i, **changes):
    animal = i % 3 == 0
    return {
        "unified": CODES[i].upper(), "short_names": ["short_" + chr(97 + i % 26)],
        "category": "Animals & Nature" if animal else "Objects",
        "subcategory": "animal-mammal" if animal else "light & video",
    } | changes  # fmt: skip


def picture(i, style):
    """A colour per concept, a little different in each style; the Google one with a transparent corner."""
    rng = np.random.default_rng(i)
    image = np.tile(rng.integers(20, 230, 3) + 3 * STYLES.index(style), (64, 64, 1)).astype(np.uint8)
    alpha = np.full((64, 64, 1), 255, np.uint8)
    alpha[:8, :8] = 0 if style == "google" else 255
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([image, alpha], -1)).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The five packages with the layout of the real ones; "SVG" members are PNG, the fake rasteriser passes them on."""
    work = tmp_path_factory.mktemp("work")
    records = [record(i) for i in range(N)] + [
        record(0, unified="1F600", category="Flags"), record(0, unified="1F601", category="People & Body"),
        record(0, unified="1F602"), record(0, unified="1F603"),  # one lacks a picture, one has no words
    ]  # fmt: skip
    codes = [*CODES, "1f600", "1f601", "1f602", "1f603"]
    words = {chr(int(code[:5], 16)): {"tts": [word(i)], "default": [word(i), "key", "x", "10:30", "more words"]}
             for i, code in enumerate(codes) if code != "1f603"}  # fmt: skip
    words[chr(int(CODES[4][:5], 16))]["default"].append("animal")  # as "teddy bear": nobody is asked
    cldr = {"annotations": {"annotations": words}}
    pack(
        work / "cldr-annotations-full-48.2.0.tgz",
        {"package/annotations/en/annotations.json": json.dumps(cldr).encode()},
    )
    for style, (name, version, at) in emoji.PACKAGES.items():
        members = {"package/LICENSE": b"", "package/emoji.json": json.dumps(records).encode()}
        for i, code in enumerate(codes):
            if style == "openmoji":
                code = code.replace("-fe0f", "")
            if (style, code) != ("fluent", "1f602"):
                members[at.format(lower=code, upper=code.upper())] = picture(i, style)
        pack(work / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz", members)
    return work


@pytest.fixture(autouse=True)
def plain_rasteriser(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: name == "resvg_py" or real(name))
    monkeypatch.setattr(emoji, "rasterise", lambda svg: svg)
    monkeypatch.setattr(emoji.subprocess, "run", lambda *_, **__: pytest.fail("a test must not fetch"))


@pytest.fixture(scope="module")
def made(work, tmp_path_factory):
    """(directory, manifest); made once, tests only read it."""
    out = tmp_path_factory.mktemp("made") / "emoji"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji.importlib.util, "find_spec", lambda name: True)
        patch.setattr(emoji, "rasterise", lambda svg: svg)
        return out, emoji.build(out, work, log=lambda _: None)


def rows_of(out, split):
    lines = (out / "annotations" / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def pictures_of(out, split):
    return {row["image"] for row in rows_of(out, split)}


def codes_of(out, split):
    return {image.split("/")[1] for image in pictures_of(out, split)}


def digest(out):
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return [(str(path.relative_to(out)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


# words


def test_plain_text_survives_the_tokenizer():
    said = [
        "woman\u2019s zero-hat",
        "Pi\u00f1ata!",
        "sky & weather",
        "o\u2019clock",
        "T-Rex",
        "pool 8 ball",
        "x-ray: 9",
    ]
    plain = [emoji_words.plain(text) for text in said]
    assert plain == ["woman's zero hat", "pinata", "sky and weather", "o'clock", "t rex", "pool 8 ball", "x ray 9"]
    tokenizer = Tokenizer.from_words([])
    extended, _ = tokenizer.extended(w for text in plain for w in split_words(text))  # as hub.extend_vocabulary does
    for text in plain:
        assert extended.decode(extended.encode(text)) == text == clean_caption(text)


def test_captions_follow_from_the_words():
    records = [
        {
            "unified": "1F41D",
            "short_names": ["bee", "honeybee"],
            "category": "Animals & Nature",
            "subcategory": "animal-bug",
        },
        {"unified": "1F564", "short_names": ["clock930"], "category": "Travel & Places", "subcategory": "time"},
    ]
    words = {
        "\U0001f41d": {"tts": ["honeybee"], "default": ["animal", "bee", "honeybee", "c", "insect", "sky", "zoo"]},
        "\U0001f564": {"tts": ["nine-thirty"], "default": ["30", "9:30", "clock", "nine-thirty"]},
    }
    bee, clock = emoji_words.concepts(records, words)
    assert bee.captions == (
        "honeybee", "bee", "a drawing of a honeybee", "honeybee animal bee insect sky", "animal bug honeybee",
    )  # fmt: skip
    assert (bee.code, bee.kind, bee.animal) == ("1f41d", "animals and nature", True)
    assert clock.captions == ("nine thirty", "a drawing of a nine thirty", "nine thirty clock", "time nine thirty")
    assert clock.animal is False


def test_the_animal_question_is_not_asked_where_it_is_unfair():
    def one(name, subcategory, *keywords):
        records = [{"unified": "1F400", "short_names": ["rat"], "category": "X", "subcategory": "animal-mammal"},
                   {"unified": "1F401", "short_names": ["x"], "category": "X", "subcategory": subcategory}]  # fmt: skip
        words = {
            "\U0001f400": {"tts": ["rat"], "default": []},
            "\U0001f401": {"tts": [name], "default": list(keywords)},
        }
        return emoji_words.concepts(records, words)[1].animal

    assert one("dog", "animal-mammal") is True and one("car", "transport") is False
    assert one("paw prints", "animal-mammal") is None
    unfair = [one("rat trap", "tool"), one("toy", "game", "rat"), one("cat", "face", "animal")]
    assert unfair == [None, None, None]


# the directory


def test_what_is_kept_and_what_is_dropped(made):
    out, manifest = made
    assert manifest["concepts"] == N  # neither Flags nor People & Body, nor what lacks a style or words
    for style in STYLES:
        assert {path.stem for path in (out / style).iterdir()} == set(CODES)
    assert manifest["recipe"]["packages"]["@lobehub/fluent-emoji-flat"] == "1.1.0"
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert sorted(path.name for path in out.parent.iterdir()) == ["emoji"]  # no temporary left


def test_pictures_are_composited_on_white(made):
    image = Image.open(made[0] / "google" / f"{CODES[3]}.png")
    assert (image.mode, image.size) == ("RGB", (64, 64))
    pixels = np.asarray(image)
    assert (pixels[:8, :8] == 255).all()
    np.testing.assert_array_equal(pixels[20, 20], images.decode(picture(3, "google"))[20, 20])


def test_splits_leak_nothing(made):
    out, manifest = made
    pictures = {split: pictures_of(out, split) for split in emoji.SPLITS}
    assert {split: counts["pictures"] for split, counts in manifest["splits"].items()} == {
        "train": 2 * 48 - 4, "val": 4, "test_style": 48, "test_style_hard": 48, "test_concept": 24,
    }  # fmt: skip
    assert sum(map(len, pictures.values())) == len(set.union(*pictures.values()))  # a picture is in one split
    trained = codes_of(out, "train")
    assert trained == codes_of(out, "test_style") == codes_of(out, "test_style_hard") and len(trained) == 48
    assert codes_of(out, "val") < trained  # the other style's picture of the concept is in train
    assert not codes_of(out, "test_concept") & trained and len(codes_of(out, "test_concept")) == 12
    styles = {split: {image.split("/")[0] for image in pictures[split]} for split in pictures}
    assert styles == {"train": {"google", "twitter"}, "val": {"google", "twitter"}, "test_style": {"fluent"},
                      "test_style_hard": {"openmoji"}, "test_concept": {"google", "twitter"}}  # fmt: skip
    unseen = {row["answer"] for row in rows_of(out, "test_concept") if row.get("type") == "name"}
    taught = {text for split in ("train", "val") for row in rows_of(out, split) for text in row.get("caption", ())}
    assert len(unseen) == 12 and not any(name in text for name in unseen for text in taught)


@pytest.mark.parametrize("split", emoji.SPLITS)
def test_questions_and_captions_of_a_split(made, split):
    rows = rows_of(made[0], split)
    of_type = {kind: [row for row in rows if row.get("type") == kind] for kind in (None, "name", "kind", "animal")}
    n = len(pictures_of(made[0], split))
    assert [len(of_type[kind]) for kind in (None, "name", "kind")] == [n, n, n]
    answers = [row["answer"] for row in of_type["animal"]]
    assert answers.count("yes") == answers.count("no") == len(answers) / 2 > 0
    kinds = {row["image"]: row["answer"] for row in of_type["kind"]}
    assert set(kinds.values()) <= {"animals and nature", "objects"}
    assert all((row["answer"] == "yes") == (kinds[row["image"]] == "animals and nature") for row in of_type["animal"])
    assert not any(CODES[4] in row["image"] for row in of_type["animal"])
    name = {row["image"]: row["answer"] for row in of_type["name"]}
    for row in of_type[None]:
        short, said = row["caption"].pop(1), row["caption"]
        assert short.startswith("short ") and len(said) == 4
        assert said[0] == name[row["image"]] and all(said[0] in text for text in said)


def test_the_loader_and_the_config_read_it(made, tmp_path):
    config = real_pictures.get_config(f"task=captioning,root={made[0]}")
    config.data.data_dir = str(tmp_path)
    splits = folder.load(config.data.lock(), ["train", *config.eval.splits])
    assert {name: len(split.rows) for name, split in splits.items()} == {
        "train": 92, "test_style": 48, "test_style_hard": 48, "test_concept": 24,
    }  # fmt: skip
    split = splits["test_style"]
    row = split.rows[0]
    name = {"question": "what is this?", "answers": [row["captions"][0]], "type": "name"}
    assert row["image_id"].startswith("fluent/")
    assert row["questions"][0] == name | {"question_id": row["image_id"] + "-0"}
    assert split.images[0].shape == (64, 64, 3)
    assert not any(split.report.values())  # nothing was left out
    with pytest.raises(ValueError, match="unknown config argument 'rot'"):
        real_pictures.get_config("rot=x")


def test_attribution_names_every_licence(made):
    text = (made[0] / "ATTRIBUTION.md").read_text()
    for style, licence in zip(STYLES, ("Apache-2.0", "CC BY 4.0", "MIT", "CC BY-SA 4.0"), strict=True):
        assert any(line.startswith(f"| {style}/ |") and licence in line for line in text.splitlines())
    assert "Unicode-3.0" in text and "composited on white" in text


def test_the_same_again_and_another_seed(made, work, tmp_path):
    again = emoji.build(tmp_path / "again", work, log=lambda _: None)
    assert again == made[1]
    assert [row for row in digest(tmp_path / "again")] == [row for row in digest(made[0]) if row[0] != "floors.json"]
    other = emoji.build(tmp_path / "other", work, seed=1, log=lambda _: None)
    assert other["digest"] != again["digest"]
    assert codes_of(tmp_path / "other", "test_concept") != codes_of(made[0], "test_concept")


def test_a_finished_directory_is_used_again_and_another_one_is_refused(made, tmp_path):
    def no_fetch(*_):
        pytest.fail("nothing should be fetched")

    assert emoji.build(made[0], tmp_path, fetch=no_fetch) == made[1]
    with pytest.raises(ValueError, match="'seed': 0.*not.*'seed': 1.*--out"):
        emoji.build(made[0], tmp_path, seed=1, fetch=no_fetch)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="holds no emoji data"):
        emoji.build(tmp_path, tmp_path, fetch=no_fetch)
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_an_interrupted_build_leaves_nothing(work, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(emoji.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            emoji.build(tmp_path / "out", work, log=lambda _: None)
    assert list(tmp_path.iterdir()) == []
    assert emoji.build(tmp_path / "out", work, log=lambda _: None)["concepts"] == N


# packages


def test_npm_is_asked_for_one_version_and_only_once(tmp_path, monkeypatch):
    asked = []

    def npm(command, **_):
        asked.append(command)
        pack(f"{command[-1]}/whatever.tgz", {"package/a": b"1"})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(emoji.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(emoji.subprocess, "run", npm)
    path = emoji.npm_pack("@scope/name", "1.2.3", tmp_path / "work")
    assert (
        path == emoji.npm_pack("@scope/name", "1.2.3", tmp_path / "work") == tmp_path / "work" / "scope-name-1.2.3.tgz"
    )
    assert len(asked) == 1 and asked[0][:3] == ["/bin/npm", "pack", "@scope/name@1.2.3"]
    assert not any("registry" in part for part in asked[0])
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert emoji.read_members(path, ["package/a", "package/b"]) == {"package/a": b"1"}


def test_what_is_missing_is_named(work, tmp_path, monkeypatch, capsys):
    out, empty = tmp_path / "out", tmp_path / "empty"
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="npm, which fetches emoji-datasource-google@16.0.0, is missing.*Node.js"):
        emoji.build(out, empty)
    monkeypatch.setattr(emoji.shutil, "which", lambda name: name)
    failed = subprocess.CompletedProcess([], 1, "", "npm error 404 Not Found")
    monkeypatch.setattr(emoji.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="fetch emoji-datasource-google@16.0.0 by `npm pack emoji.*404 Not Found"):
        emoji.build(out, empty)
    assert list(empty.iterdir()) == []
    (empty / "emoji-datasource-google-16.0.0.tgz").write_bytes((work / "openmoji-17.0.0.tgz").read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot read the package .*google-16.0.0.tgz.*delete it"):
        emoji.read_members(empty / "emoji-datasource-google-16.0.0.tgz", ["package/emoji.json"])
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"error: resvg-py is not installed.*jaxpeft\[emoji\]"):
        emoji.main(["--out", str(out), "--work", str(work)])
    assert not out.exists()


def test_svg_is_drawn_on_white(monkeypatch):
    pytest.importorskip("resvg_py", reason="the extra 'emoji' is not installed")
    monkeypatch.undo()
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="4" height="8" fill="#f00"/></svg>'
    image = images.decode(emoji.to_png(svg, "a.svg", svg=True))
    assert image.shape == (64, 64, 3)
    assert (image[:, :31] == [255, 0, 0]).all() and (image[:, 33:] == 255).all()


# floors


def flat(path, colour):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(path)


def test_floors_of_a_hand_made_case(tmp_path):
    (tmp_path / "annotations").mkdir()

    def split(name, *pictures):
        """(colour, name, kind, animal) each"""
        lines = []
        for i, (colour, *answers) in enumerate(pictures):
            image = {"image": f"{name}/{i}.png"}
            flat(tmp_path / image["image"], colour)
            lines.append(image | {"caption": [answers[0] + " here", "a " + answers[0]]})
            kinds = zip(("name", "kind", "animal"), answers, strict=True)
            lines += [image | {"question": k + "?", "answer": a, "type": k} for k, a in kinds if a]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "annotations" / f"{name}.jsonl").write_text(text)

    split("train", ((250, 0, 0), "apple", "food", "no"), ((0, 250, 0), "frog", "beast", "yes"),
          ((0, 0, 250), "sea", "place", None), ((0, 200, 0), "newt", "beast", "yes"))  # fmt: skip
    # the third is nearest to the sea, of which nobody asked whether it is an animal: then the apple is
    others = [((240, 0, 0), "apple", "food", "no"), ((0, 249, 0), "newt", "beast", "yes"),
              ((90, 0, 200), "whale", "beast", "yes"), ((10, 0, 240), "sea", "place", None)]  # fmt: skip
    for name in emoji.SPLITS[1:]:
        split(name, *others)
    report = emoji.floors(tmp_path)["test_style"]
    assert json.loads((tmp_path / "floors.json").read_text())["test_style"] == report
    assert report["name"] == {"majority": 0.25, "n": 4, "nearest_64": 0.5, "nearest_16": 0.5}
    assert report["kind"] == {"majority": 0.5, "n": 4, "nearest_64": 0.75, "nearest_16": 0.75}
    assert report["animal"] == {"majority": 2 / 3, "n": 3, "nearest_64": 2 / 3, "nearest_16": 2 / 3}
    # own_name repeats a reference: all words are right but the second reference has another one
    captions = {label: one["rouge_l"] for label, one in report["captions"].items()}
    assert captions["own_name"] == 1.0 and captions["nearest_64"] == pytest.approx((1 + 0.5 + 0.5 + 1) / 4)
    assert not list(tmp_path.glob(".floors*"))
