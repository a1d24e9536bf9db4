"""The first of the inputs of fuzz.py, and those that once were more than a ValueError."""

import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import fuzz
import pytest
import tiny
from PIL import Image

from jaxpeft.apps import export
from jaxpeft.data import folder
from jaxpeft.data.coco import prepare
from jaxpeft.inputs import images
from jaxpeft.interchange import import_peft
from jaxpeft.models import loading
from jaxpeft.models.blip import BlipConfig
from jaxpeft.models.blip_tokens import BlipTokenizer
from jaxpeft.runtime import files
from jaxpeft.runtime.torch_files import load_pickle
from jaxpeft.tasks.vqa import Vqa

INPUTS = 4_000


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def readers(home):
    return fuzz.readers(home)


NAMES = ("torch file", "safetensors", "picture", "annotations", "tokenizer.json", "vocab.txt", "BLIP config.json",
         "BLIP directory", "our checkpoint", "our tuned tree", "PEFT adapter", "journal", "run directory")  # fmt: skip


def test_no_reader_is_left_out(readers):
    assert set(readers) == set(NAMES)
    assert sum(reader.share for reader in readers.values()) == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it repairs
@pytest.mark.parametrize("name", NAMES)
def test_damaged_and_hostile_files_are_refused(readers, home, name):
    reader = readers[name]
    for seed in reader.seeds:  # unchanged they are read, so a refusal says something
        same = fuzz.Reader([seed], lambda data, rng: data, reader.read, 0.0, reader.only)
        good = fuzz.run(name, same, range(1), home)
        assert good.read == 1
    outcome = fuzz.run(name, reader, range(max(10, round(INPUTS * reader.share))), home)
    assert not outcome.failures, outcome.failures[0]["failure"]
    assert outcome.refused > 0


def test_coverage_guides_inputs_to_new_code_and_a_failure_ends_it(tmp_path):
    """fuzz_coverage.py, in processes of its own as libFuzzer needs them."""
    pytest.importorskip(
        "atheris", reason="needs atheris: pip install -e .[fuzz]; it is there for Linux, Python below 3.14"
    )
    import fuzz_coverage

    found = fuzz_coverage.run("vocab.txt", 400, tmp_path, seed=1)
    assert found["failed"] == 0 and found["inputs"] >= 400 and found["branches"] > found["branches at first"] > 0
    program = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import fuzz_coverage, fuzz
def wrong(directory):
    if b"Q" in (directory / "f").read_bytes():
        raise KeyError("Q")
fuzz.readers = lambda home: {{"x": fuzz.Reader([{{"f": b"abc"}}], fuzz.changed_bytes, wrong, 1.0)}}
fuzz_coverage.one_reader("x", Path({str(tmp_path)!r}), ["-runs=20000", "-seed=1", "-artifact_prefix={tmp_path}/"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode and "KeyError: 'Q'" in done.stdout + done.stderr
    assert any(b"Q" in path.read_bytes()[2:] for path in tmp_path.glob("crash-*"))


def test_a_failure_is_seen(home, monkeypatch):
    """The harness itself: other errors, time and memory count."""

    def wrong(directory):
        raise KeyError("x")

    outcome = fuzz.run("x", fuzz.Reader([{"f": b"1"}], fuzz.changed_bytes, wrong, 1.0), range(3), home)
    assert len(outcome.failures) == 3 and "KeyError" in outcome.failures[0]["failure"]
    fine = fuzz.Reader([{"f": b"1"}], fuzz.changed_bytes, lambda directory: None, 1.0)
    assert not fuzz.run("x", fine, range(3), home).failures
    for name, least, said in (("SECONDS", -1.0, "took"), ("MEMORY", -1, "memory grew")):
        with monkeypatch.context() as patch:
            patch.setattr(fuzz, name, least)
            assert said in fuzz.run("x", fine, range(1), home).failures[0]["failure"]


# ---------------------------------------------------------------- bounds before memory is taken


def torch_file(path, program: bytes, kind=zipfile.ZIP_STORED, **records):
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("a/data.pkl", program)
        for name, data in records.items():
            archive.writestr(f"a/data/{name}", data)
    return path


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02}r\xff\xff\xff\x7f.", "memo place"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00abc.", "damaged"),  # a text of 2**40 bytes
        (b"\x80\x02(" * 3, "damaged"),
    ],
)
def test_a_pickle_cannot_ask_for_memory(tmp_path, program, message):
    with pytest.raises(ValueError, match=message):
        load_pickle(torch_file(tmp_path / "t.pth", program))


def test_a_compressed_record_is_refused_before_it_is_unpacked(tmp_path):
    path = torch_file(
        tmp_path / "bomb.pth", pickle.dumps({}, protocol=2), zipfile.ZIP_DEFLATED, **{"0": bytes(1 << 24)}
    )
    assert path.stat().st_size < 1 << 16
    with pytest.raises(ValueError, match="compressed"):
        load_pickle(path)


def test_settings_are_bounded_in_size_and_depth(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        files.read_json(path)
    path.write_text(json.dumps({"a": "b" * 100}))
    with pytest.raises(ValueError, match="more than the 50"):
        files.read_json(path, most=50)


@pytest.mark.parametrize("name", ["../w.bin", "/etc/passwd", "..", "", "a/b", "a\\b", 3, "x\0"])
def test_files_beside_a_file_stay_beside_it(tmp_path, name):
    with pytest.raises(ValueError, match="plain names"):
        files.beside(tmp_path, name)
    assert files.beside(tmp_path, "model-00001-of-00002.safetensors").parent == tmp_path


def copied(source, directory, link):
    """The files of a directory, with the one named `link` as a link to where it was, outside."""
    directory.mkdir(parents=True)
    for path in source.iterdir():
        if path.name == link:
            (directory / link).symlink_to(path.resolve())
        elif path.is_file() and (link, path.name) != ("pytorch_model.bin", "model.safetensors"):  # which comes first
            shutil.copy(path, directory)
    return directory


@pytest.mark.parametrize(
    ("source", "link", "read"),
    [
        ("blip_caption_tiny", "config.json", loading.read),
        ("blip_caption_tiny", "model.safetensors", loading.read),
        ("blip_bin_tiny", "pytorch_model.bin", loading.read),
        ("peft/*", "adapter_config.json", lambda d: import_peft(*loading.load(fuzz.GOLDEN / "blip_caption_tiny"), d)),
        ("peft/*", "adapter_model.safetensors", lambda d: import_peft(*loading.load(fuzz.GOLDEN / "blip_caption_tiny"), d)),
    ],
)  # fmt: skip
def test_a_link_out_of_a_directory_is_not_followed(tmp_path, source, link, read):
    source = sorted(fuzz.GOLDEN.glob(source))[0]
    directory = copied(source, tmp_path / "a", link)
    with pytest.raises(ValueError, match=rf"{re.escape(link)} is a link to .*, outside of its directory"):
        read(directory)
    (directory / link).unlink()
    shutil.copy(source / link, directory / "elsewhere.in.it")
    (directory / link).symlink_to("elsewhere.in.it")
    read(directory)  # a link that stays inside is no harm
    (tmp_path / "named").symlink_to(directory)
    read(tmp_path / "named")  # nor is the name of the directory itself


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    """models--a--b/snapshots/REVISION/NAME -> ../../blobs/DIGEST, as huggingface_hub lays files out."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate((fuzz.GOLDEN / "blip_caption_tiny").iterdir()):
        shutil.copy(path, blobs / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    loading.load(snapshot)
    (tmp_path / "secret").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../secret")
    with pytest.raises(ValueError, match="outside of its directory"):
        loading.load(snapshot)


def test_annotations_and_a_run_cannot_link_elsewhere(tmp_path, home, readers):
    (tmp_path / "a").mkdir()
    (tmp_path / "outside.jsonl").write_text('{"image": "a.png", "caption": "x"}')
    (tmp_path / "a" / "captions.jsonl").symlink_to("../outside.jsonl")
    rows, problems = folder.parse(str(tmp_path / "a" / "captions.jsonl"), tmp_path / "a")
    assert not rows and "outside of its directory" in str(problems)
    (tmp_path / "words").write_text("\n".join(tiny.TOKENIZER.vocabulary))
    (tmp_path / "a" / "vocab.txt").symlink_to("../words")
    with pytest.raises(ValueError, match=r"vocab\.txt is a link"):
        BlipTokenizer.from_file(tmp_path / "a")
    reader = readers["run directory"]
    run = tmp_path / "run"
    for name, data in reader.seeds[0].items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(data)
    reader.read(run)
    for name, reads in (
        ("config.json", reader.read),
        ("result.json", lambda run: export.model_card(run, "out", False, [])),
    ):
        shutil.move(run / name, tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is a link"):
            reads(run)
        (run / name).unlink()
        shutil.move(tmp_path / name, run / name)
    for name in ("answers.json", "coco.json"):
        (tmp_path / name).write_text('["a"]')
        (tmp_path / "a" / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=r"answers\.json is a link"):
        Vqa(inference="rank", answer_list=str(tmp_path / "a" / "answers.json")).candidates(None, None)
    with pytest.raises(ValueError, match=r"coco\.json is a link"):
        prepare._read(tmp_path / "a" / "coco.json", None)
    shutil.move(run / "tuned", tmp_path / "tuned")
    (run / "tuned").symlink_to(tmp_path / "tuned")
    with pytest.raises(ValueError, match="tuned is a link to"):
        reader.read(run)


def test_an_index_cannot_name_a_file_elsewhere(tmp_path):
    config = (fuzz.GOLDEN / "blip_caption_tiny" / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    with pytest.raises(ValueError, match="plain names"):
        loading.read(tmp_path)


@pytest.mark.parametrize(
    "text", ["(a+)+$", "(a|b)*c", "(.*)(.*)(.*)(.*)(.*)x", "a" * 501, "[", 3, None, "(?P<n>a)(?P<n>b)"]
)
def test_patterns_that_could_take_for_ever_or_are_broken_are_refused(text):
    with pytest.raises(ValueError):
        files.pattern(text, "here")
    for good in ("q_proj", r"encoder\.layer\.\d+\.attention", ".*attention.self.query", "layers.[0-9].fc1"):
        assert isinstance(files.pattern(good, "here"), re.Pattern)


@pytest.mark.parametrize(
    "fields", [{"image_size": 10**9, "patch_size": 1}, {"vision_layers": 10**6}, {"text_width": 10**9, "text_heads": 1},
               {"image_size": 4096, "patch_size": 1}, {"text_mlp": "8"}, {"question_encoder": 1}, {"vocab_size": 0}]
)  # fmt: skip
def test_a_config_cannot_ask_for_memory(fields):
    with pytest.raises(ValueError, match="|".join(fields) + "|patches"):
        BlipConfig(**tiny.CONFIG | fields)


def test_safetensors_cannot_name_more_than_there_is(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "t").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        files.read_safetensors(tmp_path / "t")


def test_a_picture_that_starts_a_program_is_refused():
    """Pillow draws EPS by running Ghostscript on the file."""
    assert "EPS" in Image.OPEN and not {"EPS", "PS", "PDF", "WMF"} & set(images._formats())
    with pytest.raises(ValueError, match="cannot identify"):  # not: Ghostscript is missing
        images.decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")


@pytest.mark.filterwarnings("ignore")  # up to twice its limit Pillow only warns
def test_a_picture_bomb_is_refused_before_it_is_unpacked():
    """12,000 x 10,000 pixels of one colour: 360 MB from a file of a few KB."""
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(1 << 20), 9)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 12000, 10000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", rows)
    )
    with pytest.raises(ValueError, match="12000x10000 pixels, more than the limit"):
        images.decode(png + chunk(b"IEND", b""))


def test_a_vocabulary_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_JSON", 100)
    (tmp_path / "vocab.txt").write_text("\n".join(map(str, range(1000))))
    with pytest.raises(ValueError, match="is it a vocabulary"):
        BlipTokenizer.from_file(tmp_path)
