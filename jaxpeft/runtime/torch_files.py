"""Read tensors from files that `torch.save` wrote (.bin, .pth, .pt), without torch and without running their code.

Such a file is a zip archive: `data.pkl`, a pickle that describes the tensors, and one `data/<key>` record of raw bytes
for each storage; several tensors may be views of one storage. A pickle can name any function and call it, so the
unpickler here allows only the few names that a dictionary of tensors needs and rejects all others.
"""

import collections
import errno
import io
import math
import mmap
import pathlib
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
}
MOST_PICKLE = 64 << 20  # bytes of data.pkl; that of the largest BLIP has 0.2 MB
MOST_EXPANDED = 1 << 20  # elements of a tensor that is larger than its storage, as torch.expand creates


class Refused(ValueError):
    """The file contains something other than a dictionary of tensors."""


def load_mapped(path: str | pathlib.Path) -> tuple[dict[Any, Any], Callable[[], None]]:
    """Read the dictionary in a torch file, tensors as read-only numpy arrays (views, if tensors share a storage), and a
    function that releases the pages read so far; accessing an array again reads them again.

    Nested dictionaries stay nested: official checkpoints are {'model': {name: tensor}}. bfloat16 stays bfloat16. The file is
    memory-mapped: data that is not accessed takes no memory.
    Raises ValueError, naming the file, for any other name in the pickle, a damaged file, or a file from torch < 1.6.
    """
    path = pathlib.Path(path)
    try:
        if not zipfile.is_zipfile(path):
            raise Refused(_what_instead(path))
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            mapped = _Mapped(file)
            result = _Unpickler(archive, mapped).load()
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # zip, pickle and numpy each raise their own types
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a wrong offset in the file
            raise
        raise ValueError(f"{path}: damaged torch file ({type(error).__name__}: {error}); download it again") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path}: holds a {type(result).__name__}, expected a dictionary of tensors (a state_dict)")
    return result, mapped.release


class _Mapped:
    """A memory-mapped file."""

    def __init__(self, file: io.BufferedReader):
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def release(self) -> None:
        """Release the pages that were read."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)

    def record(self, info: zipfile.ZipInfo) -> memoryview:
        """An uncompressed record, verified against its checksum."""
        local = self.map[info.header_offset : info.header_offset + 30]  # ends with the lengths of name and extra field
        start = (
            info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        )
        view = memoryview(self.map)[start : start + info.file_size]
        if local[:4] != b"PK\x03\x04" or len(view) != info.file_size or _crc(view, self.release) != info.CRC:
            raise Refused(f"damaged torch file: record {info.filename} is corrupt; download it again")
        return view


def _crc(view: memoryview, release: Callable[[], None], at_once: int = 16 << 20) -> int:
    """The checksum of a record, read in parts whose pages are released."""
    crc = 0
    for start in range(0, len(view), at_once):
        crc = zlib.crc32(view[start : start + at_once], crc)
        release()
    return crc


def _what_instead(path: pathlib.Path) -> str:
    """Why a file is not a torch zip archive."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        return "truncated torch file: the zip directory at its end is missing; download it again"
    if start[:1] == b"\x80":
        return (
            "the format of torch before 1.6 (a bare pickle) is unsupported; "
            "load and save the file again with a current torch, or convert it to safetensors"
        )
    return f"not a torch file (starts with {start!r}); expected the zip archive that torch.save writes"


class _Unpickler(pickle.Unpickler):
    """Unpickles `data.pkl` of an archive with an explicit list of allowed names, created anew for every file."""

    def __init__(self, archive: zipfile.ZipFile, mapped: _Mapped):
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise Refused(f"holds {len(pickles)} data.pkl records, expected 1; TorchScript files are not checkpoints")
        self.archive, self.mapped, self.root = archive, mapped, pickles[0][: -len("data.pkl")]
        self.storages: dict[str, memoryview] = {}
        self.names: dict[tuple[str, str], Any] = {("collections", "OrderedDict"): collections.OrderedDict}
        self.names |= {("torch", name): (name, dtype) for name, dtype in DTYPES.items()}
        self.names["torch._utils", "_rebuild_tensor_v2"] = lambda *args: _view(*args[:4])
        self.names["torch._utils", "_rebuild_parameter"] = lambda data, *_: data
        byteorder = self.root + "byteorder"
        if byteorder in archive.namelist() and bytes(self._record(byteorder, 16)) != b"little":
            raise Refused("was written on a big-endian machine; load and save it again with torch")
        program = bytes(self._record(pickles[0], MOST_PICKLE))
        _check_sizes(program)
        super().__init__(io.BytesIO(program))

    def _record(self, name: str, most: int | None = None) -> memoryview:
        """A record as stored in the file: torch does not compress, so no record is larger than the file."""
        info = self.archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused(f"record {name} is compressed or encrypted, which torch.save never does")
        if most is not None and info.file_size > most:
            raise Refused(f"record {name} has {info.file_size:,} bytes, more than the limit of {most:,}")
        return self.mapped.record(info)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise Refused(
                f"the pickle refers to {module}.{name}, which a dictionary of tensors does not need; no code was executed. "
                "If you trust the file, load it with torch and save only its state_dict"
            )
        return self.names[module, name]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        """('storage', storage type, key, device, number of elements) -> flat array."""
        kind, (name, dtype), key, _, size = pid
        if kind != "storage":
            raise Refused(f"unknown record {kind!r}")
        if key not in self.storages:
            raw = self._record(f"{self.root}data/{key}")
            if len(raw) < size * dtype.itemsize:
                raise Refused(f"storage {key} ({name}) has {len(raw)} bytes, expected {size} x {dtype.itemsize}")
            self.storages[key] = raw
        return np.frombuffer(self.storages[key], dtype, count=size)


def _check_sizes(program: bytes) -> None:
    """Raise Refused if the pickle declares a string or a memo index beyond its own length: loading would allocate that much
    memory before it fails."""
    for code, argument, _ in pickletools.genops(program):  # rejects strings longer than the remaining data
        if "PUT" in code.name and isinstance(argument, int) and argument > len(program):
            raise Refused(f"the pickle has memo index {argument}, more than its {len(program)} bytes")


def _view(storage: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """The tensor at `offset` of a flat storage. Raises Refused if it is not inside the storage."""
    if len(shape) != len(stride) or min((offset, *shape, *stride), default=0) < 0:
        raise Refused(f"invalid tensor: shape {shape}, stride {stride}, offset {offset}")
    if math.prod(shape) > max(len(storage), MOST_EXPANDED):
        raise Refused(f"tensor {shape} is expanded from {len(storage)} elements; save a contiguous copy of it")
    end = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    if 0 not in shape and end > len(storage):
        raise Refused(f"tensor {shape} with stride {stride} ends at {end}, beyond its {len(storage)} stored elements")
    if 0 in shape:
        return np.empty(shape, storage.dtype)
    strides = [step * storage.itemsize for step in stride]
    return as_strided(storage[offset:], tuple(shape), strides, writeable=False)
