"""The first of the inputs of fuzz.py, and those that once were more than a ValueError."""

import json
import pickle
import struct
import zipfile

import fuzz
import pytest
import tiny
from PIL import Image

from jaxpeft.inputs import images
from jaxpeft.models import loading
from jaxpeft.models.blip import BlipConfig
from jaxpeft.models.blip_tokens import BlipTokenizer
from jaxpeft.runtime import files
from jaxpeft.runtime.torch_files import load_mapped

INPUTS = 4_000


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def readers(home):
    return fuzz.readers(home)


NAMES = ("torch file", "safetensors", "picture", "annotations", "tokenizer.json", "vocab.txt", "BLIP config.json",
         "BLIP directory", "our checkpoint", "our tuned tree", "PEFT adapter", "run directory")  # fmt: skip


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
        (b"\x80\x02}r\xff\xff\xff\x7f.", "memo index"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00abc.", "damaged"),  # a text of 2**40 bytes
        (b"\x80\x02(" * 3, "damaged"),
    ],
)
def test_a_pickle_cannot_ask_for_memory(tmp_path, program, message):
    with pytest.raises(ValueError, match=message):
        load_mapped(torch_file(tmp_path / "t.pth", program))


def test_a_compressed_record_is_refused_before_it_is_unpacked(tmp_path):
    path = torch_file(
        tmp_path / "bomb.pth", pickle.dumps({}, protocol=2), zipfile.ZIP_DEFLATED, **{"0": bytes(1 << 24)}
    )
    assert path.stat().st_size < 1 << 16
    with pytest.raises(ValueError, match="compressed"):
        load_mapped(path)


def test_settings_are_bounded_in_size_and_depth(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        files.read_json(path)
    path.write_text(json.dumps({"a": "b" * 100}))
    with pytest.raises(ValueError, match="more than the limit of 50"):
        files.read_json(path, most=50)


@pytest.mark.parametrize("name", ["../w.bin", "/etc/passwd", "..", "", "a/b", "a\\b", 3, "x\0"])
def test_files_beside_a_file_stay_beside_it(tmp_path, name):
    with pytest.raises(ValueError, match="invalid reference to a file"):
        files.beside(tmp_path, name)
    assert files.beside(tmp_path, "model-00001-of-00002.safetensors").parent == tmp_path


def test_links_are_followed(tmp_path):
    """A directory of links is how people and Hugging Face's cache share weights: NAME -> ../../blobs/DIGEST."""
    source = fuzz.GOLDEN / "blip_caption_tiny"
    (tmp_path / "a").mkdir()
    for path in source.iterdir():
        (tmp_path / "a" / path.name).symlink_to(path.resolve())
    assert loading.read(tmp_path / "a")[2]["digest"] == loading.read(source)[2]["digest"]


def test_an_index_cannot_name_a_file_elsewhere(tmp_path):
    config = (fuzz.GOLDEN / "blip_caption_tiny" / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    with pytest.raises(ValueError, match="invalid reference to a file"):
        loading.read(tmp_path)


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
    with pytest.raises(ValueError, match="the limit for a vocabulary"):
        BlipTokenizer.from_file(tmp_path)
