"""Checkpoint files <-> parameter trees, by a table that maps tensors to leaves.

A model provides a `Table`; reading, writing, checking and placing on devices are the same for all models.

    tensors = convert.opened(directory)                      names -> tensors that stay in files until they are indexed
    leaves = convert.read(tensors, table, place=...)         leaf by leaf: read it, place it, free it
    tensors = convert.written(leaves, table)                 the inverse

Every tensor of a checkpoint is read, or dropped by a rule with a reason, or listed in an error; every leaf of the table is
filled once. So a checkpoint is never in memory twice, and each of several hosts reads only the parts of its own devices.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from jaxpeft import tree
from jaxpeft.inputs import images
from jaxpeft.runtime import files, torch_files

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
TASKS = ("captioning", "vqa")
ALIGNED = 64  # bytes; XLA on CPU uses arrays that begin at a multiple of it without a copy
ELEMENTS = 1 << 22  # number of elements that are compared at a time


class Tensor(Protocol):
    """A tensor of a checkpoint. numpy arrays satisfy this protocol."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part at a tuple of slices, or the whole tensor at `...`."""


class Converter:
    """How `loading` reads a type of model; `MODELS` (models/base.py) maps model_type to it.

    `task` is 'vqa', 'captioning' or None for that of the checkpoint; an unsupported task is a ValueError.
    """

    kind: Any  # the class of the model
    settings: Any  # the class of its configuration
    resize_mode: str = "bicubic"  # of position embeddings, see `images.resize_positions`
    processor: images.ProcessorKind = images.CLIP
    head: tuple[str, str]  # tensor of the head's vocabulary matrix, and of the word embedding that it may be tied to

    def table(self, config: Any) -> "Table":
        """The rules of a model, and how other names are treated."""
        raise NotImplementedError

    def for_task(self, config: Any, task: str | None, source: str) -> Any:
        """`config` of a jaxpeft checkpoint, without parts that the task does not need."""
        if task not in (None, *TASKS):
            raise ValueError(f"task is {task!r}; {self.kind.__name__} supports {' and '.join(map(repr, TASKS))}")
        return config

    def resize(self, config: Any, image_size: int | None) -> tuple[Any, dict[str, "Change"]]:
        """(config for another image size, changes of leaves by name as they are read)."""
        if image_size in (None, config.image_size):
            return config, {}
        resized, side = dataclasses.replace(config, image_size=image_size), image_size // config.patch_size

        def change(position_PD: np.ndarray) -> np.ndarray:
            n_more = 1 + config.n_patches - len(position_PD)  # `resize_positions` expects the row of a class token
            position_PD = np.concatenate([position_PD[:n_more], position_PD]).astype(np.float32)
            return images.resize_positions(position_PD, side, self.resize_mode)[n_more:]

        return resized, {"vision/position": change}

    def claims(self, path: Path) -> bool:
        """Whether a path without manifest.json and config.json holds this type of model: a bare file of weights, or a directory
        in a format of its own. It then takes the place of the directory below."""
        return False

    def read_config(self, directory: Path, task: str | None) -> tuple[Any, dict[str, Any]]:
        """(configuration in a Hugging Face directory, keys that its file lacks with the defaults used). Weights may be
        missing."""
        raise NotImplementedError

    def stored(self, tensors: "Checkpoint", config: Any, task: str | None) -> tuple[Any, "Table", dict[str, str]]:
        """(configuration with what only the weights tell, the table of the weights, leaf -> the leaf that initializes it)."""
        return config, self.table(config), {}

    def read_directory(
        self, directory: Path, task: str | None, image_size: int | None, place: "Place", dtype: "Dtype"
    ) -> tuple[Any, tree.Tree, dict[str, Any]]:
        """(config, params, report) of a Hugging Face directory. `report`: source, digest, files, 'defaults' of
        `read_config`, and details of the conversion."""
        tensors = opened(directory.parent, (directory.name,)) if directory.is_file() else opened(directory)
        config, defaults = self.read_config(directory, task)
        config, table, copies = self.stored(tensors, config, task)
        resized, changes = self.resize(config, image_size)
        flat = read(tensors, table, tensors.source, place=place, dtype=dtype, changes=changes, copies=copies)
        params = nested(flat)
        report = {"source": directory.name, "files": tensors.files, "defaults": defaults, "digest": tree.digest(params)}
        if copies:
            report["initialised"] = {_group(name): _group(like) for name, like in copies.items()}
        if changes:
            report["resized"] = f"position embedding from {config.image_size} to {image_size} pixels"
        return resized, params, report

    def model(
        self, config: Any, directory: Path | None = None, defaults: Iterable[str] = (), image_size: int | None = None
    ) -> Any:
        """The model, with tokenizer and image settings of the directory. `defaults`: keys missing in the configuration, which
        the tokenizer may provide. `image_size`: the user's choice."""
        if directory is None:
            return self.kind.build(config)
        config = self.with_processor(config, directory, image_size)
        return self.kind.build(*self.with_tokenizer(config, directory, defaults))

    def with_tokenizer(self, config: Any, directory: Path, defaults: Iterable[str]) -> tuple[Any, Any]:
        """(the configuration with the tokenizer's special ids, the tokenizer or None).

        Raises ValueError if configuration and tokenizer contradict each other.
        """
        raise NotImplementedError

    def hf(self, model: Any) -> Any:
        """The form of the model in transformers and PEFT (`HuggingFace` of models/hf.py); None if they do not have it."""
        return None

    def has_own_head(self, tensors: "Checkpoint", config: Any) -> bool:
        """Whether the head's matrix is not the word embedding. Files decide, not config.json, which may say either."""
        head, words = self.head
        renamed = dataclasses.replace(self.table(config), rules=()).renamed(tensors, tensors.source)
        return {head, words} <= renamed.keys() and not equal(renamed[head], renamed[words])

    def with_processor(self, config: Any, directory: Path, image_size: int | None) -> Any:
        """The configuration with the settings of the directory's image processor."""
        said = images.processor_settings(directory, self.processor)
        size = said.pop("image_size", config.image_size)
        if image_size is None and size != config.image_size:
            raise ValueError(
                f"{directory}: the image processor has image size {size} and config.json {config.image_size}; choose one with "
                f"image_size={size} (--config.model.image_size={size}), which resizes the position embedding"
            )
        return dataclasses.replace(config, **said)


def _group(name: str) -> str:
    """The group of a leaf in a report: 'vision/patch', 'text_decoder/blocks/self_attention', ..."""
    return re.match(r"[^/]+/(blocks/)?[^/]+", name)[0]


# ---------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of a checkpoint, or one per layer, and the leaf or leaves that it becomes.

    With `layers`, `name` has '{}' for the layer number, and layers are stacked along a new first axis. `shape` is that of the
    tensor. With several `leaves` it is split along its first axis into equal parts. Then the axes are permuted to `axes`, and
    the result is reshaped to `leaf_shape` (of one layer). `offset` is added to the values, in float32.
    """

    name: str
    leaves: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    leaf_shape: tuple[int, ...] | None = None
    layers: Sequence[int] | None = None
    offset: float = 0.0

    def names(self) -> list[str]:
        """The names of the tensors, in the order of the layers."""
        return [self.name] if self.layers is None else [self.name.format(i) for i in self.layers]

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of the part of one tensor that belongs to one leaf, in the file's layout."""
        first, rest = self.shape[:1], self.shape[1:]
        return tuple(n // len(self.leaves) for n in first) + rest

    @property
    def shape_of_leaf(self) -> tuple[int, ...]:
        """The shape of each leaf, its layers included."""
        one = self.leaf_shape or tuple(self.part[axis] for axis in self.order)
        return one if self.layers is None else (len(self.layers), *one)

    @property
    def order(self) -> tuple[int, ...]:
        """`axes`, or the file's order."""
        return self.axes or tuple(range(len(self.shape)))


@dataclasses.dataclass(frozen=True)
class Table:
    """The rules of a model, and how other names are treated.

    `renames`: (regular expression, replacement) that turn alternative names of tensors into those of the rules.
    `dropped`: (regular expression, reason) of tensors that the model does not need. `tied`: second name of a tensor -> the
    name that is kept; both must hold the same values.
    """

    rules: Sequence[Rule]
    renames: Sequence[tuple[str, str]] = ()
    dropped: Sequence[tuple[str, str]] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for kind, names in (
            ("tensor", [name for rule in self.rules for name in rule.names()]),
            ("leaf", [leaf for rule in self.rules for leaf in rule.leaves]),
        ):
            if twice := [name for name, n in collections.Counter(names).items() if n > 1]:
                raise ValueError(f"the table has two rules for the {kind} {twice[0]}")

    def rename(self, name: str) -> str:
        """The name of the rules for an alternative name."""
        for pattern, new in self.renames:
            name = re.sub(pattern, new, name)
        return name

    def renamed(self, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """The tensors by the names of the rules, without dropped tensors."""
        renamed = {}
        for name, x in tensors.items():
            name = self.rename(name)
            if name in renamed:
                raise ValueError(f"{source}: two keys map to {name}; keep one of them")
            if not any(re.search(pattern, name) for pattern, _ in self.dropped):
                renamed[name] = x
        return renamed

    def accounted(self, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """The tensors of the rules. Raises one ValueError with all unexpected tensors, missing tensors and wrong shapes, and
        one for tied tensors that differ."""
        tensors = self.renamed(tensors, source)
        for second, first in self.tied.items():
            if second in tensors:
                x = tensors.pop(second)
                if not equal(tensors.setdefault(first, x), x):
                    raise ValueError(f"{source}: {second} differs from {first}, but this model ties them")
        expected = {name: np.broadcast_to(np.int8(0), rule.shape) for rule in self.rules for name in rule.names()}
        tree.check_same(
            expected, tensors, f"{source} (unexpected: keys that are not used; missing: parameters without values)"
        )
        return tensors


def rules(
    lines: Iterable[tuple], reference_prefix: str, our_prefix: str, sizes: dict, layers: Sequence[int] = ()
) -> list[Rule]:
    """The rules of (kind, reference name, our path, reference shape); '{}' in a name stands for the number of a layer.

    Kinds: 'leaf', a tensor that is one leaf; 'dense', kernel and bias of a linear or convolution; 'matrix', the kernel alone;
    'norm', scale and bias; 'scale', the scale of a norm without bias; 'scale-1', the same stored as scale - 1; 'qkv', a dense
    whose output is query, key and value. A name that ends in '*' continues with 'weight' or 'bias' without a dot, as torch's
    'in_proj_*'. Sizes of shapes: D width, 3D fused, F MLP, C width of the cross-attention's context,
    P image positions, p patch size, V vocabulary, T text positions.
    """
    sizes = sizes | {"3D": 3 * sizes["D"], "1": 1, "3": 3}
    found = []
    for kind, reference, ours, dims in lines:
        reference, ours = reference_prefix + reference, our_prefix + ours
        shape = tuple(sizes[dim] for dim in dims.split())
        numbers = layers if "{}" in reference else None
        if kind == "leaf":
            found.append(Rule(reference, (ours,), shape, leaf_shape=_without_ones(shape), layers=numbers))
            continue
        reference = reference[:-1] if reference.endswith("*") else f"{reference}."
        parts = [f"{ours}/{part}" for part in ("query", "key", "value")] if kind == "qkv" else [ours]
        if kind in ("norm", "scale", "scale-1"):
            weight, axes = "scale", None
        else:
            weight, axes = "kernel", (2, 3, 1, 0) if len(shape) == 4 else (1, 0)
        leaves, offset = tuple(f"{x}/{weight}" for x in parts), 1.0 if kind == "scale-1" else 0.0
        found.append(Rule(f"{reference}weight", leaves, shape, axes, layers=numbers, offset=offset))
        if kind in ("dense", "norm", "qkv"):
            found.append(Rule(f"{reference}bias", tuple(f"{x}/bias" for x in parts), shape[:1], layers=numbers))
    return found


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape without leading axes of size 1; None if it has none."""
    n_ones = sum(n == 1 for n in shape[:-1])
    return shape[n_ones:] if n_ones else None


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values; compares a few rows at a time, as both may be in files."""
    if tuple(a.shape) != tuple(b.shape):
        return False
    n, step = (a.shape or (1,))[0], max(1, ELEMENTS // max(1, math.prod(a.shape[1:])))
    parts = [slice(i, min(i + step, n)) for i in range(0, n, step)] if a.shape else [...]
    return a is b or all(np.array_equal(a[part], b[part]) for part in parts)


# ---------------------------------------------------------------- leaves

Dtype = str | Callable[[str], Any]  # of all leaves, or of a leaf by name; None: that of the file
Change = Callable[[np.ndarray], np.ndarray]  # applied to a leaf after it is read


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a model, read lazily: indexing reads only the parts of its tensors that the index needs."""

    rule: Rule
    part: int  # index in the rule's leaves
    tensors: Sequence[Tensor]  # one, or one per layer
    dtype: np.dtype
    change: Change | None = None  # applied to the whole leaf

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of `self[...]`."""
        shape = self.rule.shape_of_leaf
        return shape if self.change is None else self.change(np.zeros(shape, np.float32)).shape

    def __getitem__(self, index: Any) -> np.ndarray:
        """The values at `...` or at one slice per axis (of step 1), as an array that the caller owns."""
        if self.change is not None:
            return aligned(self.change(self._read((slice(None),) * len(self.rule.shape_of_leaf)))[index], self.dtype)
        return self._read((slice(None),) * len(self.shape) if index is ... else index)

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        rule, shape = self.rule, self.rule.shape_of_leaf
        bounds = [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]
        out = empty(tuple(stop - start for start, stop in bounds), self.dtype)
        if rule.layers is None:
            self._read_one(self.tensors[0], bounds, out)
        else:
            for to, layer in enumerate(range(*bounds[0])):
                self._read_one(self.tensors[layer], bounds[1:], out[to])
        return out

    def _read_one(self, tensor: Tensor, bounds: list[tuple[int, int]], out: np.ndarray) -> None:
        """Read one tensor's part of the leaf into `out`."""
        rule, axes = self.rule, self.rule.order
        inside = [(0, n) for n in rule.part]
        if rule.leaf_shape is None:
            for axis, bound in zip(axes, bounds, strict=True):
                inside[axis] = bound
        if inside:
            skipped = self.part * rule.part[0]
            inside[0] = tuple(end + skipped for end in inside[0])
        x = tensor[tuple(slice(*bound) for bound in inside)].transpose(axes)
        if rule.leaf_shape is not None:
            x = x.reshape(rule.leaf_shape)[tuple(slice(*bound) for bound in bounds)]
        out[...] = x.astype(np.float32) + np.float32(rule.offset) if rule.offset else x


def leaves(
    tensors: Mapping[str, Tensor],
    table: Table,
    source: str,
    dtype: Dtype | None = None,
    changes: Mapping[str, Change] | None = None,
) -> dict[str, Leaf]:
    """The leaves of a table by name, not read yet; `dtype` None keeps the types of the file. `changes` by leaf.

    Raises ValueError as `Table.accounted` does.
    """
    tensors, found = table.accounted(tensors, source), {}
    for rule in table.rules:
        parts = [tensors[name] for name in rule.names()]
        for i, name in enumerate(rule.leaves):
            kind = dtype(name) if callable(dtype) else dtype
            kind = parts[0].dtype if kind is None else np.dtype(kind)
            found[name] = Leaf(rule, i, parts, kind, (changes or {}).get(name))
    return found


Place = Callable[[str, Leaf], Any]  # name and leaf -> the array that the tree holds


def on_device(_: str, leaf: Leaf) -> jax.Array:
    """A leaf on the first device. On CPU the device uses the array that was read, without a copy."""
    return jax.device_put(leaf[...])


def in_memory(_: str, leaf: Leaf) -> np.ndarray:
    """A leaf as a numpy array."""
    return leaf[...]


def read(
    tensors: Mapping[str, Tensor],
    table: Table,
    source: str,
    *,
    place: Place = on_device,
    dtype: Dtype | None = None,
    changes: Mapping[str, Change] | None = None,
    copies: Mapping[str, str] | None = None,
    wanted: Container[str] | None = None,
) -> dict[str, Any]:
    """Read leaves one at a time and place each with `place`; returns them by name. `copies`: leaf -> another leaf whose array
    it shares. `wanted`: the leaves to read, None for all; the checkpoint must have the others too.

    Raises ValueError as `Table.accounted` does, before anything is read.
    """
    found, copies = leaves(tensors, table, source, dtype, changes), copies or {}
    if wanted is not None:
        copies = {name: like for name, like in copies.items() if name in wanted}
        found = {name: leaf for name, leaf in found.items() if name in wanted or name in copies.values()}
    read = {name: place(name, leaf) for name, leaf in found.items()}
    return read | {name: read[like] for name, like in copies.items()}


def tensors(flat: Mapping[str, Any], table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `read`, one tensor at a time: (its name in the rules, its values) from leaves by name."""
    for rule in table.rules:
        arrays = [np.asarray(flat[leaf]) for leaf in rule.leaves]
        if rule.offset:
            arrays = [x.astype(np.float32) - np.float32(rule.offset) for x in arrays]
        part = tuple(rule.part[axis] for axis in rule.order)
        for i, name in enumerate(rule.names()):
            parts = [x if rule.layers is None else x[i] for x in arrays]
            parts = [x.reshape(part).transpose(np.argsort(rule.order)) for x in parts]
            yield name, np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])


def written(flat: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    """All of `tensors`."""
    return dict(tensors(flat, table))


nested = functools.partial(traverse_util.unflatten_dict, sep="/")  # leaves by 'a/b/c' -> a tree of dictionaries


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that XLA on CPU can use without a copy."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(n_bytes + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def aligned(x: np.ndarray, dtype: Any) -> np.ndarray:
    """A copy of `x` in an array of `empty`."""
    out = empty(x.shape, dtype)
    out[...] = x
    return out


# ---------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored:
    """A tensor of a safetensors file. The file is mapped only while it is read, so that no page of it stays in memory."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        with files.open_safetensors(self.path) as file:
            return file.get_tensor(self.name) if index is ... or not self.shape else file.get_slice(self.name)[index]


class Checkpoint(dict[str, Tensor]):
    """The tensors of one or several files by name; `files` are the names of the opened files."""

    def __init__(self, directory: Path, names: list[str], tensors: dict[str, Tensor]):
        super().__init__(tensors)
        self.files, self.source = names, str(directory / names[0])


def opened(directory: Path, weights: Sequence[str] = WEIGHTS) -> Checkpoint:
    """Open the weights of a directory: the first of `weights` that exists and, for an index, the files that it lists.

    Raises ValueError, naming the file, if one is missing or cannot be read.
    """
    found = [name for name in weights if (directory / name).exists()]
    if not found:
        raise ValueError(f"{directory}: no weights; expected one of {', '.join(weights)}")
    first = found[0]
    if not first.endswith(".index.json"):
        return Checkpoint(directory, [first], _opened(directory / first))
    index = files.read_json(directory / first)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{directory / first}: weight_map is missing")
    shards = {
        name: _opened(files.beside(directory, name)) for name in sorted(set(map(str, index["weight_map"].values())))
    }
    tensors: dict[str, Tensor] = {}
    for name, shard in shards.items():
        if twice := sorted(shard.keys() & tensors.keys()):
            raise ValueError(f"{directory / name}: {twice[0]} is in another file of {first} too; keep one of them")
        tensors |= shard
    for key, name in index["weight_map"].items():
        if key not in shards[name]:
            raise ValueError(f"{directory / name}: tensor {key} not found, although {first} lists it there")
    return Checkpoint(directory, [first, *shards], tensors)


def _opened(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name."""
    if not path.exists():
        raise ValueError(f"{path} is missing, although the index lists it; download it again")
    return dict(_safetensors(path)) if path.suffix == ".safetensors" else _torch(path)


def _safetensors(path: Path) -> Iterator[tuple[str, _Stored]]:
    with files.open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118  no iterator
            part = file.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {name} has the unsupported type {part.get_dtype()}; save it as BF16")
            yield name, _Stored(path, name, tuple(part.get_shape()), np.dtype(DTYPES[part.get_dtype()]))


@dataclasses.dataclass(frozen=True, eq=False)
class _Mapped:
    """A tensor of a memory-mapped torch file; the pages that an access reads are released after it."""

    array: np.ndarray
    release: Callable[[], None]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        part = np.array(self.array[index])
        self.release()
        return part


def _torch(path: Path) -> dict[str, Tensor]:
    tensors, release = torch_files.load_mapped(path)
    tensors = next((tensors[key] for key in ("model", "module") if isinstance(tensors.get(key), dict)), tensors)
    other = [str(key) for key, x in tensors.items() if not isinstance(x, np.ndarray)]
    if other:
        raise ValueError(f"{path}: {', '.join(other[:10])} ({len(other)}) are not tensors; save only the state_dict")
    return {name: _Mapped(x, release) for name, x in tensors.items()}
