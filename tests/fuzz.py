"""Damaged and hostile files against every reader of what strangers make: nothing but ValueError may come of them.

    python tests/fuzz.py --inputs 100000 --out results/fuzz.json

Files made by the reference libraries (torch, transformers, PEFT, Pillow) are changed at random: bits, bytes, lengths, pieces
cut, repeated and swapped; in JSON also keys and values. For each input a reader returns or raises ValueError. Anything else,
more than SECONDS for one input, or memory that grows by more than MEMORY counts as a failure and is kept in --keep.
`tests/test_fuzz.py` runs the first of the same inputs. Inputs depend on (reader, number) alone.
"""

import argparse
import collections
import copy
import dataclasses
import io
import json
import logging
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from jaxpeft.training import finished

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import tiny

from jaxpeft import methods
from jaxpeft.adapt import sites
from jaxpeft.data import folder
from jaxpeft.inputs import images
from jaxpeft.interchange import import_peft, load_tuned, save_tuned
from jaxpeft.models import blip_convert, loading
from jaxpeft.models.blip_tokens import BlipTokenizer
from jaxpeft.runtime.files import read_safetensors
from jaxpeft.runtime.torch_files import load_mapped

GOLDEN = Path(__file__).with_name("golden")
SECONDS, MEMORY = 5.0, 1 << 30


# ---------------------------------------------------------------- changes


NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
VALUES = (
    None, True, False, 0, -1, 1, 1e308, float("nan"), 2**31, 2**63, 10**30, "", "x", "a" * 5000, "../../etc/passwd", "\ud800",
    "(a+)+$", "[", [], {}, [[]], [None], {"": {}}, [1, 2, 3], {"name": "LoRA"}, "\x00",
)  # fmt: skip


def changed_bytes(data: bytes, rng) -> bytes:
    """One to eight changes of a file's bytes."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        n = len(data)
        if not n:
            break
        at, length = int(rng.integers(n)), int(min(n, 2 ** rng.integers(0, 12)))
        match rng.integers(9):
            case 0:
                data[at] ^= 1 << rng.integers(8)
            case 1:
                data[at] = int(rng.integers(256))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = rng.bytes(min(length, n - at))
            case 5:
                other = int(rng.integers(n))
                data[at : at + length] = data[other : other + length]
            case 6:
                form = "<>"[rng.integers(2)] + "BHIQ"[size := int(rng.integers(4))]
                number = NUMBERS[rng.integers(len(NUMBERS))] % 2 ** (8 << size)
                data[at : at + struct.calcsize(form)] = struct.pack(form, number)
            case 7:
                del data[at:]
            case 8:
                data[at : at + length] = bytes(min(length, n - at))
    return bytes(data)


def changed_json(value, rng):
    """A JSON value with one to four of its places replaced, removed, renamed, repeated or nested."""
    value = json.loads(json.dumps(value))
    for _ in range(int(rng.integers(1, 5))):
        places = list(_places(value))
        if not places:
            return _drawn(rng)
        inside, key = places[rng.integers(len(places))]
        match rng.integers(6):
            case 0 | 1:
                inside[key] = _drawn(rng)
            case 2:
                del inside[key]
            case 3:
                other, name = places[rng.integers(len(places))]
                if name in other if isinstance(other, dict) else name < len(other):
                    inside[key] = json.loads(json.dumps(other[name]))
            case 4 if isinstance(inside, dict):
                inside[["x", "", str(key).upper(), "__class__", "a" * 300][rng.integers(5)]] = inside.pop(key)
            case 5 if isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
                inside[key] = float(inside[key]) if rng.integers(2) else NUMBERS[rng.integers(len(NUMBERS))]
    return value


def _drawn(rng):
    return copy.deepcopy(VALUES[rng.integers(len(VALUES))])


def _places(value):
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def changed_settings(text: bytes, rng) -> bytes:
    """A JSON file, mostly with changed values, else with changed bytes or without end."""
    kind = rng.integers(10)
    if kind == 0:
        return changed_bytes(text, rng)
    if kind == 1:
        return (b"[", b'{"a":', b'{"model":[')[rng.integers(3)] * int(10 ** rng.integers(1, 6))
    try:
        value = json.loads(text)
    except ValueError:  # a vocabulary may begin with [PAD]
        return changed_bytes(text, rng)
    return json.dumps(changed_json(value, rng)).encode()


def changed_tensors(data: bytes, rng) -> bytes:
    """A safetensors file with a changed header of the right length, or changed bytes."""
    if rng.integers(3) == 0:
        return changed_bytes(data, rng)
    (n,) = struct.unpack("<Q", data[:8])
    header = json.dumps(changed_json(json.loads(data[8 : 8 + n]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + n :]


def changed_archive(data: bytes, rng) -> bytes:
    """A torch file whose records were changed and packed again, or changed bytes."""
    if rng.integers(3) == 0:
        return changed_bytes(data, rng)
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng.integers(8) == 0 else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", kind) as new:
        for name in old.namelist():
            record = old.read(name)
            if name.endswith("data.pkl") and rng.integers(4) or rng.integers(20) == 0:
                record = changed_bytes(record, rng)
            new.writestr(name, record)
    return out.getvalue()


# ---------------------------------------------------------------- readers


@dataclasses.dataclass
class Reader:
    """`read(directory)` reads a directory in which one of `seeds` lies with a file changed by `change`."""

    seeds: list[dict[str, bytes]]  # files of a good input
    change: Callable[[bytes, np.random.Generator], bytes]
    read: Callable[[Path], object]
    share: float  # of all inputs
    only: str = ""  # the file that is changed, else any


def _file(path) -> bytes:
    return Path(path).read_bytes()


def _directory(path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in sorted(Path(path).iterdir()) if one.is_file()}


def _pictures() -> list[dict[str, bytes]]:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8))
    deep = Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    made = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000", "PCX"):
        options = {"exif": exif} if kind == "JPEG" else {}
        for mode in ("RGB", "P", "L", "RGBA", "CMYK", "I;16"):
            out = io.BytesIO()
            try:
                one = deep if mode == "I;16" else picture.convert(mode)
                one.save(out, kind, **options)
            except (OSError, ValueError, KeyError):  # this kind lacks this mode
                continue
            made.append({"picture": out.getvalue()})
    return made


def _annotations() -> list[dict[str, bytes]]:
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": "a red circle"},
            {"id": 2, "image_id": 2, "caption": "two"},
        ],
    }
    karpathy = {
        "images": [
            {"filename": "a.png", "filepath": "", "cocoid": 1, "split": "train", "sentences": [{"raw": "a", "tokens": ["a"]}]}
        ],
        "dataset": "coco",
    }  # fmt: skip
    rows = [
        {"image": "a.png", "caption": ["a red circle", "one"], "image_id": "a"},
        {"image": "b.png", "question": "how many", "answer": ["2", "two"], "question_id": 7},
    ]
    table = 'image,caption,split\na.png,a red circle,train\nb.png,"two, of them",val\n'
    lines = "\n".join(json.dumps(row) for row in rows)
    hugging_face = 'file_name;text;caption_2\nsub\\a.png;a red circle;\nb.png;two;"two; of them"\n'
    several = '{"file_name": "a.png", "text_1": "a red circle", "text_2": null, "text_3": ["one", "two"]}\n'
    pictures = {"a.png": b"", "b.png": b"", "sub/a.png": b""}
    files = [json.dumps(coco), json.dumps(karpathy), json.dumps(rows), lines, table, hugging_face, several]
    return [pictures | {"annotations": text.encode()} for text in files]


_RESULT = (
    b'{"model": {"new_words": [], "new_rows": true, "report": {"revision": null}}, "imports": ["evil", "evil.py"]}'
)


def readers(home: Path) -> dict[str, Reader]:
    """Every reader with its good inputs, which are seen to be read."""
    model, params = tiny.model(), tiny.params()
    chosen = (*methods.build("lora"), *methods.build("prefix"))
    variables = sites.attach(model, params, chosen, jax.random.key(0))
    tuned = _directory(save_tuned(model, variables, home / "tuned"))
    adapters = [_directory(path) for path in sorted((GOLDEN / "peft").iterdir())]
    captioner = loading.load(GOLDEN / "blip_caption_tiny")
    blip = [_directory(GOLDEN / name) for name in ("blip_caption_tiny", "blip_vqa_tiny", "blip_bin_tiny")]
    tensors = [{"t.safetensors": _file(path)} for path in sorted(GOLDEN.glob("*/*.safetensors"))[:3]]
    tensors += [{"t.safetensors": tuned["tuned.safetensors"]}]
    ours = loading.save(home / "ours", tiny.model(False), tiny.params(False), aliases={})
    vocabulary = {"vocab.txt": "\n".join(tiny.TOKENIZER.vocabulary).encode()}
    tokenizer = {"tokenizer.json": tiny.TOKENIZER.library.to_str().encode()}
    writer, weights = loading.load(ours)
    one = methods.build("lora")
    save_tuned(writer, sites.attach(writer, weights, one, jax.random.key(0)), home / "run" / "tuned")
    run = {f"tuned/{name}": data for name, data in _directory(home / "run" / "tuned").items()}
    settings = {"task": "captioning", "task_options": {}, "base": str(ours), "init": "base", "seed": 0}
    settings["model"] = {"image_size": None, "dtype": "float32", "remat": "none", "dropout": 0.0}
    run |= {"config.json": json.dumps(settings).encode(), "result.json": _RESULT}
    return {
        "torch file": Reader(
            [{"t.pth": _file(GOLDEN / "torch_tiny.pth")}], changed_archive, lambda d: load_mapped(d / "t.pth"), 0.18
        ),
        "safetensors": Reader(tensors, changed_tensors, lambda d: read_safetensors(d / "t.safetensors"), 0.18),
        "picture": Reader(_pictures(), changed_bytes, lambda d: images.decode(d / "picture"), 0.28),
        "annotations": Reader(_annotations(), changed_settings, _parsed, 0.16, "annotations"),
        "tokenizer.json": Reader([tokenizer], changed_settings, BlipTokenizer.from_file, 0.05),
        "vocab.txt": Reader([vocabulary], changed_bytes, BlipTokenizer.from_file, 0.05),
        "BLIP config.json": Reader(
            blip, changed_settings, lambda d: blip_convert.CONVERTER.read_config(d, None), 0.05, "config.json"
        ),
        "BLIP directory": Reader(blip, _by_content, lambda d: loading.read(d), 0.01),
        "our checkpoint": Reader([_directory(ours)], _by_content, lambda d: loading.read(d), 0.01),
        "our tuned tree": Reader([tuned], _by_content, lambda d: load_tuned(model, params, d), 0.015),
        "PEFT adapter": Reader(adapters, _by_content, lambda d: import_peft(*captioner, d), 0.01),
        "run directory": Reader([run], _by_content, finished.load_run, 0.005),
    }  # fmt: skip


def _parsed(directory: Path):
    """Annotations as a run reads them: rows, or what is wrong with them; the same as captions beside a picture, too."""
    shutil.copyfile(directory / "annotations", directory / "a.txt")
    folder.parse(None, directory)
    rows, problems = folder.parse(str(directory / "annotations"), directory)
    if problems.counts:
        raise ValueError(str(problems))
    return rows


def _by_content(data: bytes, rng) -> bytes:
    if data[:1] in (b"{", b"["):
        return changed_settings(data, rng)
    if data[:2] == b"PK":
        return changed_archive(data, rng)
    return changed_tensors(data, rng) if data[8:9] == b"{" else changed_bytes(data, rng)


# ---------------------------------------------------------------- running


@dataclasses.dataclass
class Outcome:
    """What became of the inputs of one reader."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list = dataclasses.field(default_factory=list)


def run(name: str, reader: Reader, numbers, home: Path, keep: Path | None = None) -> Outcome:
    """The inputs with these numbers through one reader."""
    outcome = Outcome()
    for number in numbers:
        _one(name, reader, number, home, keep, outcome)
    return outcome


def _one(name, reader, number, home, keep, outcome):
    rng = np.random.default_rng([number, *name.encode()])
    files = dict(reader.seeds[rng.integers(len(reader.seeds))])
    names = [reader.only] if reader.only else sorted(files)
    which = names[rng.integers(len(names))]
    directory = home / "input"
    shutil.rmtree(directory, ignore_errors=True)
    files[which] = reader.change(files[which], rng)
    _written(directory, files)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    failure = None
    try:
        reader.read(directory)
        outcome.read += 1
    except ValueError:
        outcome.refused += 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        failure = f"{type(error).__name__}: {error!s:.200}\n{traceback.format_exc(limit=-4)}"
    seconds = time.perf_counter() - began
    outcome.inputs += 1
    outcome.slowest = max(outcome.slowest, seconds)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if seconds > SECONDS:
        failure = failure or f"took {seconds:.1f} s"
    if grown > MEMORY:
        failure = failure or f"memory grew by {grown / 1e6:.0f} MB"
    if failure:
        outcome.failures.append({"number": number, "file": which, "failure": failure})
        if keep:
            kept = keep / f"{name.replace(' ', '_')}-{number}"
            _written(kept, files)


def _written(directory: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


def main(argv=None) -> int:
    """The command line -> exit status: 1 where an input failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--only", help="one reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="where failing inputs go")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # Pillow says what it repairs
    logging.disable()
    rows = collections.OrderedDict()
    with tempfile.TemporaryDirectory() as home:
        for name, reader in readers(Path(home)).items():
            if args.only not in (None, name):
                continue
            began, n = time.perf_counter(), round(args.inputs * reader.share)
            outcome = run(name, reader, range(args.first, args.first + n), Path(home), args.keep)
            rows[name] = dataclasses.asdict(outcome) | {"seconds": time.perf_counter() - began}
            print(
                f"{name:18s} {outcome.inputs:7,} inputs: {outcome.read:6,} read, {outcome.refused:6,} refused, "
                f"{len(outcome.failures)} failed; slowest {outcome.slowest:.2f} s; {rows[name]['seconds']:.0f} s",
                flush=True,
            )
            for one in outcome.failures[:5]:
                print("   ", one["number"], one["file"], one["failure"].replace("\n", "\n      "), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = sum(row["inputs"] for row in rows.values())
    print(f"{total:,} inputs, {sum(len(row['failures']) for row in rows.values())} failed; peak {peak / 1e6:.0f} MB")
    if args.out:
        found = {"command": " ".join(["python", "tests/fuzz.py", *(argv or sys.argv[1:])]), "peak_mb": peak / 1e6}
        args.out.write_text(
            json.dumps(found | {"inputs": total, "readers": rows, "cores": os.cpu_count()}, indent=1) + "\n"
        )
    return int(any(row["failures"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
