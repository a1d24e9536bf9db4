"""The prepared copy of a directory of images: TFDS and array_record, without TensorFlow."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from jaxpeft.data.base import Split, progress_bars, source_of
from jaxpeft.data.mapped import rows_of
from jaxpeft.inputs import images

_VERSION = "3"  # part of the digest: increase it when parsing or the stored form changes


def check_images(rows, root, problems, workers=None):
    """The rows whose image can be decoded; each image is decoded once, in threads (Pillow releases the GIL)."""

    def looked_at(row):
        """(kind of problem or None, message or None) of a row."""
        try:
            return None, images.decode_and_remark(Path(root) / row["file"], name=row["file"])[1]
        except images.Unsupported as error:
            return "unsupported image", str(error)
        except (ValueError, OSError) as error:
            return "corrupt image", str(error)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        seen = list(pool.map(looked_at, rows))
    for row, (kind, message) in zip(rows, seen, strict=True):
        if kind:
            problems.note(kind, f"{row['where']}: {message}")
        elif message:
            problems.remark("16-bit image nearly black", f"{row['file']}: {message}")
    return [row for row, (kind, _) in zip(rows, seen, strict=True) if not kind]


def _digest(rows, problems, options):
    """The digest of the prepared copy. It includes problems and remarks, because the copy stores them.

    Names, sizes and times stand for the images: hashing the pixels of a large directory would take minutes.
    """
    root, parts = Path(options["root"]).expanduser(), [_VERSION, problems.report()]
    parts += [str(options[key]) for key in ("on_error", "val_fraction", "test_fraction", "seed")]
    for row in rows:
        stat = os.stat(root / row["file"])
        parts.append([row, stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def prepare(rows, problems, options):
    """The builder of the prepared copy, which is written first unless it exists.

    TFDS writes into 'incomplete.*' beside the final directory and renames it at the end, so a copy that exists is complete.
    """
    root = Path(options["root"]).expanduser()
    home = Path(options["data_dir"] or "~/.cache/jaxpeft/folder").expanduser() / _digest(rows, problems, options)
    builder = FolderData(data_dir=home, file_format="array_record")
    if _ready(builder) and not problems.fatal and (options["on_error"] == "skip" or not problems.counts):
        return builder
    rows = check_images(rows, root, problems)
    if problems.fatal or not rows or (problems.counts and options["on_error"] == "raise"):
        if problems.fatal or not rows:
            what, fix = "a file cannot be read as it is" if problems.fatal else "no image is left", ""
        else:
            what, fix = "some rows are invalid", "\nFix them, or set on_error='skip' to leave them out and count them."
        raise ValueError(f"data in {str(root)!r}: {what}; nothing was written.\n{problems}{fix}")
    builder = FolderData(rows, root, problems.report(), data_dir=home, file_format="array_record")
    progress_bars()
    try:
        # do not query the public bucket here either, see Info
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception:  # another process may have finished the same copy first
        builder = FolderData(data_dir=home, file_format="array_record")
        if not _ready(builder):
            raise
    for left in Path(builder.data_dir).parent.glob("incomplete.*"):  # of processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    return builder


def _ready(builder):
    return os.path.exists(os.path.join(builder.data_dir, "dataset_info.json")) and bool(builder.info.splits)


class Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self):
        """Do not query a public bucket about private data, as TFDS would for every new data set."""


class FolderData(tfds.core.GeneratorBasedBuilder):
    """One example per image.  TFDS needs TensorFlow to nest sequences, so a question's answers are one JSON string."""

    VERSION = tfds.core.Version("1.0.0")
    _log_download_bytes = _log_download_done = lambda self: None  # nothing is downloaded

    def __init__(self, rows=(), root=".", report=None, **kwargs):
        self._rows, self._root, self._report = rows, Path(root), report
        super().__init__(**kwargs)

    def _info(self):
        text = tfds.features.Text()
        questions = {"question_id": text, "question": text, "answers": text, "type": text}
        features = {"image": tfds.features.Image(), "image_id": text, "captions": tfds.features.Sequence(text),
                    "questions": tfds.features.Sequence(questions)}  # fmt: skip
        metadata = tfds.core.MetadataDict(self._report or {})
        features = tfds.features.FeaturesDict(features)
        return Info(builder=self, features=features, metadata=metadata, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        names = dict.fromkeys(row["split"] for row in self._rows)  # no empty splits: TFDS rejects them
        return {name: self._generate_examples(name) for name in names}

    def _generate_examples(self, split):
        for i, row in enumerate(row for row in self._rows if row["split"] == split):
            questions = [q | {"answers": json.dumps(q["answers"], ensure_ascii=False)} for q in row["questions"]]
            image = (self._root / row["file"]).read_bytes()
            yield i, {"image": image, "image_id": row["image_id"], "captions": row["captions"], "questions": questions}


def open_split(builder, split, jpeg_edge):
    """A split of the prepared copy. Raises ValueError where its files do not hold as many images as were written."""
    info = builder.info.splits[split]
    stored, expected = len(ArrayRecordDataSource([str(path) for path in info.filepaths])), info.num_examples
    if stored != expected:  # counted in the files: TFDS takes the length of its data source from `info`
        raise ValueError(f"{stored} of {expected} images of split {split!r}: delete {builder.data_dir} and run again")
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    rows = rows_of(stored_row(source[i]) for i in range(expected))
    home = str(builder.data_dir)  # named by a digest of images and options
    pictures = StoredImages(source, rows, jpeg_edge)
    return Split(split, pictures, rows, dict(builder.info.metadata), source=source_of(home, jpeg_edge))


def stored_row(example) -> dict:
    """A row as it was stored. TFDS returns bytes for text, and a dict of lists for a list of dicts."""
    asked = {key: [value.decode() for value in values] for key, values in example["questions"].items()}
    questions = [dict(zip(asked, values, strict=True)) for values in zip(*asked.values(), strict=True)]
    return {
        "image_id": example["image_id"].decode(),
        "captions": [caption.decode() for caption in example["captions"]],
        "questions": [question | {"answers": json.loads(question["answers"])} for question in questions],
    }


@dataclasses.dataclass(frozen=True)
class StoredImages(Sequence):
    """images[i] reads and decodes image i: upright, RGB, uint8 image_YXC. Thread-safe, and picklable for workers."""

    source: Any
    rows: Sequence[dict]
    jpeg_edge: int = 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return np.array(self.opened(index))

    def opened(self, index):
        i = range(len(self))[index]  # IndexError and negative indices as in a list
        return images.opened(self.source[i]["image"], f"of id {self.rows[i]['image_id']}", self.jpeg_edge)
