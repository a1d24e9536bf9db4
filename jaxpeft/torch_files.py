"""Read tensors from files that `torch.save` wrote (.bin, .pth, .pt), without torch and without running their code.

Such a file is a zip archive: `data.pkl`, a pickle that describes the tensors, and one `data/<key>` record of raw bytes
for each storage; several tensors may be views of one storage. A pickle can name any function and call it, so the
unpickler here knows only the handful of names that a dictionary of tensors needs and refuses every other.
"""

import collections
import pathlib
import pickle
import zipfile

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
_DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ValueError,
    NotImplementedError,
    OverflowError,
    RecursionError,
)


class Refused(ValueError):
    """The file asks for something that a dictionary of tensors does not need."""


def load_pickle(path) -> dict:
    """The dictionary in a torch file, tensors as read-only numpy arrays (views, where tensors share a storage).

    Nested dictionaries stay nested: official checkpoints are {'model': {name: tensor}}. bfloat16 stays bfloat16.
    Raises ValueError, naming the file, for any other name in the pickle, a damaged file, torch<1.6.
    """
    path = pathlib.Path(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: {_what_instead(path)}")
    try:
        with zipfile.ZipFile(path) as archive:
            result = _Unpickler(archive).load()
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except _DAMAGE as error:
        raise ValueError(f"{path}: damaged torch file ({type(error).__name__}: {error}); fetch it again") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path}: holds a {type(result).__name__}, expected a dictionary of tensors (a state_dict)")
    return result


def _what_instead(path):
    """Why a file is not a torch zip archive."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        return "truncated torch file: the zip directory at its end is missing; fetch it again"
    if start[:1] == b"\x80":
        return (
            "torch's format before 1.6 (a bare pickle), which is not read here; "
            "load and save it again with a current torch, or convert it to safetensors"
        )
    return f"not a torch file (starts with {start!r}); expected the zip archive that torch.save writes"


class _Unpickler(pickle.Unpickler):
    """Unpickles `data.pkl` of an archive with an explicit list of names. Its functions are made anew for every file."""

    def __init__(self, archive: zipfile.ZipFile):
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise Refused(f"holds {len(pickles)} data.pkl records, expected 1; TorchScript files are not checkpoints")
        self.archive, self.root = archive, pickles[0][: -len("data.pkl")]
        self.storages = {}
        self.names = {("collections", "OrderedDict"): collections.OrderedDict}
        self.names |= {("torch", name): (name, dtype) for name, dtype in DTYPES.items()}
        self.names["torch._utils", "_rebuild_tensor_v2"] = lambda *args: _view(*args[:4])
        self.names["torch._utils", "_rebuild_parameter"] = lambda data, *_: data
        byteorder = self.root + "byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise Refused("was written on a big-endian machine; load and save it again with torch")
        super().__init__(archive.open(pickles[0]))

    def find_class(self, module, name):
        if (module, name) not in self.names:
            raise Refused(
                f"the pickle asks for {module}.{name}, which a dictionary of tensors does not need; nothing was run. "
                "If you trust the file, load it with torch and save its state_dict alone"
            )
        return self.names[module, name]

    def persistent_load(self, pid):
        """('storage', storage type, key, device, number of elements) -> flat array."""
        kind, (name, dtype), key, _, size = pid
        if kind != "storage":
            raise Refused(f"unknown record {kind!r}")
        if key not in self.storages:
            raw = self.archive.read(f"{self.root}data/{key}")
            if len(raw) < size * dtype.itemsize:
                raise Refused(f"storage {key} ({name}) has {len(raw)} bytes, expected {size} x {dtype.itemsize}")
            self.storages[key] = raw
        return np.frombuffer(self.storages[key], dtype, count=size)


def _view(storage, offset, shape, stride):
    """The tensor at `offset` of a flat storage, checked to lie inside it."""
    if len(shape) != len(stride) or min((offset, *shape, *stride), default=0) < 0:
        raise Refused(f"impossible tensor: shape {shape}, stride {stride}, offset {offset}")
    end = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    if 0 not in shape and end > len(storage):
        raise Refused(f"tensor {shape} with stride {stride} ends at {end} of a storage of {len(storage)} elements")
    if 0 in shape:
        return np.empty(shape, storage.dtype)
    strides = [step * storage.itemsize for step in stride]
    return as_strided(storage[offset:], tuple(shape), strides, writeable=False)
