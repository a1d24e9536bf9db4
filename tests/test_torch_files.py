"""Files written by torch are read exactly, and nothing in them is run."""

import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxpeft.runtime.torch_files import load_mapped

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILE = GOLDEN / "torch_tiny.pth"


def rewritten(tmp_path, change):
    """A copy of the golden file whose records went through change(name without its root, bytes)."""
    path = tmp_path / "changed.pth"
    with zipfile.ZipFile(FILE) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name.split("/", 1)[1], old.read(name)))
    return path


def replaced(record, old, new):
    def change(name, data):
        assert name != record or old in data
        return data.replace(old, new, 1) if name == record else data

    return change


def test_every_layout_is_read_exactly():
    loaded, expected = load_mapped(FILE)[0], np.load(GOLDEN / "torch_tiny.npz")
    assert loaded["epoch"] == 3
    tensors = loaded["model"]
    assert set(tensors) == set(expected.files) and len(tensors) == 15
    for name, x in tensors.items():
        assert x.shape == expected[name].shape, name
        assert x.dtype == (ml_dtypes.bfloat16 if name == "bfloat16" else expected[name].dtype), name
        np.testing.assert_array_equal(x.astype(expected[name].dtype), expected[name], err_msg=name)


def test_tensors_that_share_a_storage_share_memory_and_cannot_be_written():
    tensors = load_mapped(FILE)[0]["model"]
    assert np.shares_memory(tensors["float32"], tensors["shared"])
    assert np.shares_memory(tensors["float32"], tensors["transposed"])
    with pytest.raises(ValueError, match="read-only"):
        tensors["shared"][0] = 1.0


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_calls_something_else_is_refused_before_it_runs(tmp_path, nested):
    marker = tmp_path / "ran"
    evil = Call(os.system, f"touch {marker}")
    path = tmp_path / "evil.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"model": {"weight": evil}} if nested else evil, protocol=2))
    with pytest.raises(ValueError, match=r"evil\.pth: the pickle refers to \w+\.system"):
        load_mapped(path)
    assert not marker.exists()


@pytest.mark.parametrize("function", [eval, getattr, np.array, pickle.loads, pathlib.Path])
def test_builtins_and_libraries_are_refused_too(tmp_path, function):
    path = tmp_path / "other.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Call(function, "1"), protocol=2))
    with pytest.raises(ValueError, match="no code was executed"):
        load_mapped(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("data.pkl", b"K\x05K\x06\x86", b"K\x07K\x06\x86"), "ends at 42, beyond its 30 stored elements"),
        (replaced("data.pkl", b"QK\x00K\x05K\x06", b"QK\x01K\x05K\x06"), "ends at 31, beyond its 30 stored elements"),
        (replaced("data.pkl", b"K\x06K\x01\x86", b"K\x07K\x01\x86"), "ends at 34, beyond its 30 stored elements"),
        (replaced("data.pkl", b"QK\x00K\x05K\x06", b"QJ\xff\xff\xff\xffK\x05K\x06"), "offset -1"),
        (replaced("data.pkl", b"K\x1e", b"K\x1f"), r"has 120 bytes, expected 31 x 4"),
        (lambda name, data: data[:-4] if name == "data/0" else data, r"has 116 bytes, expected 30 x 4"),
        (lambda name, data: b"big" if name == "byteorder" else data, "big-endian"),
        (lambda name, data: data[:-9] if name == "data.pkl" else data, "damaged"),
        (lambda name, data: b"" if name == "data.pkl" else data, "damaged"),
    ],
)
def test_tensors_outside_their_storage_and_damaged_records_raise(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"changed\.pth: .*{message}"):
        load_mapped(rewritten(tmp_path, change))


def test_an_unchanged_copy_still_loads(tmp_path):
    assert len(load_mapped(rewritten(tmp_path, lambda _, data: data))[0]["model"]) == 15


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (FILE.read_bytes()[:3000], "truncated"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
        (b"hello, world", "not a torch file"),
        (b"", "not a torch file"),
    ],
)
def test_files_that_are_not_zip_archives_say_what_they_are(tmp_path, data, message):
    path = tmp_path / "file.bin"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"file\.bin: .*{message}"):
        load_mapped(path)


def test_the_top_must_be_a_dictionary(tmp_path):
    path = tmp_path / "list.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match="holds a list"):
        load_mapped(path)


def test_a_changed_byte_of_a_tensor_is_found(tmp_path):
    """The archive has a checksum of every record; a mapped file is checked against it too."""
    data = bytearray(FILE.read_bytes())
    with zipfile.ZipFile(FILE) as archive:
        info = next(one for one in archive.infolist() if one.filename.endswith("data/0"))
    data[info.header_offset + 30 + len(info.filename) + 70 + info.file_size // 2] ^= 1
    path = tmp_path / "changed.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"changed\.pth: (damaged torch file: record|the pickle|damaged)"):
        load_mapped(path)
