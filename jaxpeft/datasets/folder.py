"""People's own data: a directory of images and an annotation file -> {split: Split}.

    load({"root": "photos", "annotations": "captions.csv"}, ["train", "val"])

The dialects are those of folder_formats.ACCEPTED.  Everything wrong with the data is collected and raised as one
ValueError before anything is written.  The prepared copy (TFDS, array_record, no TensorFlow) holds the bytes of each
image once and unchanged, in a directory named by a digest of annotations, images and options; while those stay the same
it is used again.

Config keys (attributes or a mapping; keys of other purposes are ignored):
  root           the directory of images
  annotations    a path (below root, or else from the working directory), or {split: path}; a split is train, val, test
                 or one of them with more after '_', as test_style
  questions      the same for the questions of VQA v2
  on_error       'raise', or 'skip': leave out what is wrong and say in the report how much that was
  val_fraction, test_fraction, seed
                 how images are divided when the annotations name no split: by a hash of (seed, image id), so an image
                 stays where it is when others are added
  data_dir       where prepared copies live, default ~/.cache/jaxpeft/folder; may be deleted at any time
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from jaxpeft import images
from jaxpeft.datasets import Split, progress_bars
from jaxpeft.datasets.folder_formats import SPLITS, Problems, records, split_name

_DEFAULTS = {"root": None, "annotations": None, "questions": None, "on_error": "raise", "val_fraction": 0.1,
             "test_fraction": 0.1, "seed": 0, "data_dir": None}  # fmt: skip
_VERSION = "2"  # part of the digest: raise it when parsing or the stored form changes


def load(config, splits):
    """{name: Split} for the names in `splits`; raises ValueError listing everything wrong with the data.

    Each split's `report` says what on_error='skip' left out of the whole directory.
    """
    found, report = load_with_report(config, splits)
    return {name: dataclasses.replace(split, report=report) for name, split in found.items()}


def load_with_report(config, splits):
    """-> ({name: Split}, report); report is {kind of problem: count, ..., 'examples': [...]}, for the result file."""
    options = _options(config)
    rows, problems = parse(options["annotations"], options["root"], options["questions"])
    assign_splits(rows, problems, options["val_fraction"], options["test_fraction"], options["seed"])
    builder = _prepare(rows, problems, options)
    found = {name: info.num_examples for name, info in builder.info.splits.items()}
    if missing := [name for name in splits if name not in found]:
        raise ValueError(
            f"no image is in the splits {missing}; found are {found}, allowed train, val, test and as test_style. "
            "Name splits in the annotations, or change val_fraction, test_fraction or seed"
        )
    return {name: _open(builder, name) for name in splits}, dict(builder.info.metadata)


def _options(config):
    config = dict(config.items()) if hasattr(config, "items") else dict(vars(config))
    for key in config.keys() - _DEFAULTS.keys():
        if close := difflib.get_close_matches(key, _DEFAULTS, cutoff=0.85):
            raise ValueError(f"config key {key!r}: did you mean {close[0]!r}?  Known are {', '.join(_DEFAULTS)}")
    options = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    for key in ("root", "annotations"):
        if not options[key]:
            raise ValueError(f"{key} is missing; needed are root=DIRECTORY_OF_IMAGES and annotations=FILE")
    if options["on_error"] not in ("raise", "skip"):
        raise ValueError(f"on_error is {options['on_error']!r}; allowed: 'raise', 'skip'")
    val, test = options["val_fraction"], options["test_fraction"]
    if val < 0 or test < 0 or val + test >= 1:
        raise ValueError(f"val_fraction {val} and test_fraction {test} must be at least 0 and their sum below 1")
    return options


# Annotations and the names of files -> rows


def parse(annotations, root, questions=None):
    """Files -> (rows, problems), a row per image: {image_id, file, split, captions, questions, where}; decodes nothing.

    Paths are given as in the config.  `split` is '' where the annotations name none.  Raises ValueError only when
    an annotation file or the root is missing; all else is in `problems` and not in the rows.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"root {str(root)!r} is not a directory; give the directory that holds the images")
    problems, files, rows = Problems(), Files(root), {}
    for split, path, asked in _sources(annotations, questions, root):
        ids, question_ids = {}, set()  # ids are unique within a file: exporters start every file at 1
        for record in records(path, asked, problems):
            if file := files.find(record, problems):
                _merge(record, file, split, rows, ids, question_ids, problems)
    found = [row for row in rows.values() if row["captions"] or row["questions"]]
    _tell_apart(found)
    return found, problems


def _tell_apart(rows) -> None:
    """Ids of several files that one split is made of: where one repeats, the later image is called by its file, and the later
    question by its image and its own id."""
    taken = {"image_id": set(), "question_id": set()}

    def own(key, split, value, other):
        name, n = value, 1
        while (split, name) in taken[key]:
            name, n = other if n == 1 else f"{other}-{n}", n + 1
        taken[key].add((split, name))
        return name

    for row in rows:
        row["image_id"] = own("image_id", row["split"], row["image_id"], row["file"])
        for q in row["questions"]:
            other = f"{row['image_id']}-{q['question_id']}"
            q["question_id"] = own("question_id", row["split"], q["question_id"], other)


def _sources(annotations, questions, root):
    """[(split or None, annotation file, questions file or None)], all existing."""

    def by_split(value):
        return dict(value.items()) if hasattr(value, "items") else {None: value}

    def existing(path):
        path = Path(path).expanduser()
        for candidate in (root / path, path):
            if candidate.is_file():
                return candidate
        raise ValueError(f"no annotation file {str(path)!r}, neither in {str(root)!r} nor in the working directory")

    files, asked = by_split(annotations), by_split(questions)
    if unknown := [name for name in files if name is not None and split_name(name) is None]:
        raise ValueError(f"annotations has the split names {unknown}; allowed: {', '.join(SPLITS)}, and as test_style")
    if questions is not None and files.keys() != asked.keys():
        raise ValueError(f"questions has the splits {list(asked)} but annotations {list(files)}; give the same in both")
    return [(name, existing(files[name]), existing(asked[name]) if questions else None) for name in files]


def _merge(record, file, split, rows, ids, question_ids, problems):
    """Adds a record to the row of its file."""
    where, named = record["where"], {split_name(str(name)) for name in (split, record["split"]) if name}
    if len(named) > 1 or None in named:
        problems.note("split", f"{where}: split {record['split']!r}" + (f" in the file of {split!r}" if split else ""))
        return
    name = named.pop() if named else ""
    row = rows.get(file)
    image_id = record["image_id"] or (row["image_id"] if row else file)
    if row and row["split"] != name:
        problems.note("two splits", f"{where}: {file} is in {name!r} and {row['split']!r}, see {row['where']}")
    elif (row and row["image_id"] != image_id) or ids.setdefault(image_id, file) != file:
        at = f"{file} and {ids[image_id]}" if ids.get(image_id, file) != file else f"{row['image_id']!r} of {file}"
        problems.note("duplicate id", f"{where}: image id {image_id!r} beside {at}")
    else:
        if row is None:
            row = {"image_id": image_id, "file": file, "split": name, "captions": [], "questions": [], "where": where}
            rows[file] = row
        row["captions"] += record["captions"]
        if record["question"]:
            _add_question(record["question"], row, where, question_ids, problems)


def _add_question(question, row, where, question_ids, problems):
    """Without ids, rows that repeat a question of an image bring more answers to it; with ids, they are a mistake."""
    asked = row["questions"]
    if not question["question_id"]:
        if same := [q for q in asked if q["question"] == question["question"]]:
            same[0]["answers"] += question["answers"]
            return
        question = question | {"question_id": f"{row['image_id']}-{len(asked)}"}
    if question["question_id"] in question_ids:
        problems.note("duplicate id", f"{where}: question_id {question['question_id']} was given before")
        return
    question_ids.add(question["question_id"])
    asked.append(question)


class Files:
    """The image files below a directory, found by path, by a name unique there, or by the id that ends a name.

    A path must not leave the directory by '..' or from '/'; links in it are the owner's choice and are followed.
    """

    def __init__(self, root):
        self.root, self._found, self._indexed = Path(root), {}, None

    def all(self):
        """Every image file, as a path relative to the root, in order."""
        return sorted(path for paths in self._index[0].values() for path in paths)

    def unread(self):
        """Pictures of kinds that are not read, such as .svg, as paths relative to the root, in order."""
        return sorted(self._index[2])

    def find(self, record, problems):
        """The record's file as a path relative to the root, or None after a note (one per image, not per record)."""
        key = (record["image"], None if record["image"] else record["image_id"], record["hint"])
        if key not in self._found:
            self._found[key] = self._find(*key, record["where"], problems)
        return self._found[key]

    def _find(self, name, image_id, hint, where, problems):
        if name:
            absolute = os.path.isabs(name)
            path = os.path.relpath(name, self.root.absolute()) if absolute else os.path.normpath(name)
            if path.split(os.sep)[0] == os.pardir:
                return problems.note("outside the directory", f"{where}: {name}")
            if os.path.isfile(self.root / path):
                return path.replace(os.sep, "/")
            found = self._index[0].get(name, [])  # no match for a name with a directory: that one was exact
        else:
            key = str(int(image_id)) if image_id and image_id.isdecimal() else image_id
            found = self._index[1].get(key, [])
            found = [path for path in found if len(found) > 1 and hint and hint in path] or found
        if len(found) == 1:
            return found[0]
        what = f"{where}: {name or f'image id {image_id!r}'}"
        if found:
            return problems.note("ambiguous image", f"{what} is {' and '.join(found[:2])}")
        return problems.note("missing image", what)

    @property
    def _index(self):
        """({file name: paths}, {end of the stem: paths}, paths of pictures that are not read): COCO_val2014_000000000042.jpg
        ends in '42'."""
        if self._indexed is None:
            names, ends, unread, seen = {}, {}, [], set()
            for directory, below, files in os.walk(self.root, followlinks=True):
                real = os.path.realpath(directory)
                below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
                files = [] if real in seen else sorted(files)  # links may form a circle
                seen.add(real)
                for name in files:
                    stem, suffix = os.path.splitext(name)
                    path = os.path.relpath(os.path.join(directory, name), self.root).replace(os.sep, "/")
                    if images.is_unread(name):
                        unread.append(path)
                    elif suffix.lower() in images.endings():
                        names.setdefault(name, []).append(path)
                        for end in _ends(stem):
                            ends.setdefault(end, []).append(path)
            self._indexed = names, ends, unread
        return self._indexed


def _ends(stem):
    ends = {stem[match.start() :] for match in re.finditer(r"(?<![^\W_])[^\W_]", stem)} | {stem}
    if digits := re.search(r"[0-9]+$", stem):
        ends.add(str(int(digits[0])))
    return ends


def assign_splits(rows, problems, val_fraction=0.1, test_fraction=0.1, seed=0):
    """Fills row['split'] in place by hash where no row has one; where only some have one, the others are removed."""
    if any(row["split"] for row in rows):
        for row in rows:
            if not row["split"]:
                problems.note("split", f"{row['where']}: {row['file']} has no split, but other images have")
        rows[:] = [row for row in rows if row["split"]]
        return
    for row in rows:
        row["split"] = split_of(row["image_id"], val_fraction, test_fraction, seed)


def split_of(image_id, val_fraction, test_fraction, seed):
    """'train', 'val' or 'test', a pure function of its arguments on any machine."""
    digest = hashlib.sha256(f"{seed}/{image_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test_fraction else "val" if place < test_fraction + val_fraction else "train"


# Rows -> the prepared copy


def check_images(rows, root, problems, workers=None):
    """The rows whose image decodes; each image is decoded once, in threads (Pillow releases the interpreter's lock)."""

    def error_of(row):
        try:
            images.decode(Path(root) / row["file"], name=row["file"])
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        errors = list(pool.map(error_of, rows))
    for row, error in zip(rows, errors, strict=True):
        if error:
            problems.note("corrupt image", f"{row['where']}: {error}")
    return [row for row, error in zip(rows, errors, strict=True) if not error]


def _digest(rows, options):
    """Names, sizes and times stand for the images: hashing the pixels of a large directory would take minutes."""
    root, parts = Path(options["root"]).expanduser(), [_VERSION]
    parts += [str(options[key]) for key in ("on_error", "val_fraction", "test_fraction", "seed")]
    for split, *paths in _sources(options["annotations"], options["questions"], root):
        parts += [str(split)] + [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path]
    for row in rows:
        stat = os.stat(root / row["file"])
        parts.append(f"{row['file']} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _prepare(rows, problems, options):
    """The builder of the prepared copy, made now unless it is there.

    TFDS writes into 'incomplete.*' beside the final directory and renames at the end, so a copy that exists is whole.
    """
    root = Path(options["root"]).expanduser()
    home = Path(options["data_dir"] or "~/.cache/jaxpeft/folder").expanduser() / _digest(rows, options)
    builder = FolderData(data_dir=home, file_format="array_record")
    if _ready(builder) and not problems.fatal and (options["on_error"] == "skip" or not problems.counts):
        return builder
    rows = check_images(rows, root, problems)
    if problems.fatal or not rows or (problems.counts and options["on_error"] == "raise"):
        if problems.fatal or not rows:
            what, fix = "a file cannot be read" if problems.fatal else "no image is left", ""
        else:
            what, fix = "some rows are wrong", "\nRepair them, or set on_error='skip' to leave them out and count them."
        raise ValueError(f"data of {str(root)!r}: {what}; nothing was written.\n{problems}{fix}")
    builder = FolderData(rows, root, problems.report(), data_dir=home, file_format="array_record")
    progress_bars()
    try:
        # no question to the public bucket here either, see Info
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception:  # another process may have finished the same copy first: its rename won
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
        """Does not ask a public bucket about private data, as TFDS would for each new data set."""


class FolderData(tfds.core.GeneratorBasedBuilder):
    """One example per image.  TFDS needs TensorFlow to nest sequences, so a question's answers are one JSON text."""

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
        names = dict.fromkeys(row["split"] for row in self._rows)  # only these: TFDS refuses empty splits
        return {name: self._generate_examples(name) for name in names}

    def _generate_examples(self, split):
        for i, row in enumerate(row for row in self._rows if row["split"] == split):
            questions = [q | {"answers": json.dumps(q["answers"], ensure_ascii=False)} for q in row["questions"]]
            image = (self._root / row["file"]).read_bytes()
            yield i, {"image": image, "image_id": row["image_id"], "captions": row["captions"], "questions": questions}


# The prepared copy -> Split


def _open(builder, split):
    info = builder.info.splits[split]
    stored, expected = len(ArrayRecordDataSource([str(path) for path in info.filepaths])), info.num_examples
    if stored != expected:  # counted in the files: the length of TFDS's data source comes from info itself
        raise ValueError(f"{stored} of {expected} images of {split}: delete {builder.data_dir} and run again")
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    assert len(source) == expected
    rows = [stored_row(source[i]) for i in range(expected)]
    images = StoredImages(source, [row["image_id"] for row in rows])
    return Split(split, images, rows, source=str(builder.data_dir))  # named by a digest of pictures and options


def stored_row(example) -> dict:
    """A row as it was given. TFDS returns bytes for text, and a dict of lists for a list of dicts."""
    asked = {key: [value.decode() for value in values] for key, values in example["questions"].items()}
    questions = [dict(zip(asked, values, strict=True)) for values in zip(*asked.values(), strict=True)]
    return {
        "image_id": example["image_id"].decode(),
        "captions": [caption.decode() for caption in example["captions"]],
        "questions": [question | {"answers": json.loads(question["answers"])} for question in questions],
    }


@dataclasses.dataclass(frozen=True)
class StoredImages(Sequence):
    """images[i] reads and decodes image i, upright RGB uint8 image_YXC; thread-safe, and picklable for workers."""

    source: Any
    names: list[str]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # IndexError and negative indices as in a list
        return images.decode(self.source[i]["image"], name=f"of id {self.names[i]}")
