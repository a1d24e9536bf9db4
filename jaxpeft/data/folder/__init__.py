"""Your own data: a directory of images and an annotation file -> {split: Split}.

    load({"root": "photos", "annotations": "captions.csv"}, ["train", "val"])
    load({"root": "photos"}, ["train", "val"])  # metadata.csv or .jsonl files, or .txt files beside the images

The accepted formats are those of formats.ACCEPTED.  All problems of the data are collected and raised as one ValueError before
anything is written; what is no error but worth knowing is a remark of the report.  The prepared copy (TFDS, array_record, no
TensorFlow) holds the bytes of each image once and unchanged, in a directory named by a digest of texts, images and options.
It is reused as long as these stay the same.

Hidden files and directories are ignored, also those that macOS puts into archives (._* and __MACOSX).  A name with
backslashes, or in another Unicode form than the file's, finds its file; an exact match has precedence.

Config keys (attributes or a mapping; other keys are ignored):
  root           the directory of images
  annotations    a path (below root, or else relative to the working directory), or {split: path}; a split is train, val, test
                 or one of these with a suffix after '_', such as test_style.  Without it, root and the directories below it
                 are searched for metadata.csv and metadata.jsonl, and else for text files named like the images.  Where all
                 images are in train/, val/ and test/, these are the splits
  questions      the same for the question files of VQA v2
  on_error       'raise', or 'skip': leave out what is wrong and count it in the report
  val_fraction, test_fraction, seed
                 how images are divided where the annotations name no split: by a hash of (seed, image id), so an image
                 stays in its split when others are added; of three or more images, each split gets at least one.
                 Where annotations name splits but not val, and val is needed, val is val_fraction of train
  data_dir       the directory of prepared copies, default ~/.cache/jaxpeft/folder; it may be deleted at any time
  jpeg_edge      decode a JPEG at 1/2, 1/4 or 1/8 of its size if its shorter side stays at least this long; default None, at
                 its own size.  The prepared copy is the same
"""

import collections
import difflib
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from jaxpeft.data.base import jpeg_edge_of
from jaxpeft.data.folder.files import Files, normal
from jaxpeft.data.folder.formats import ACCEPTED, SPLITS, Problems, caption_file, records, split_name
from jaxpeft.inputs import images

_DEFAULTS = {"root": None, "annotations": None, "questions": None, "on_error": "raise", "val_fraction": 0.1,
             "test_fraction": 0.1, "seed": 0, "data_dir": None, "jpeg_edge": None}  # fmt: skip
_DIRECTORIES = SPLITS | {"training": "train", "testing": "test"}


def load(config, splits):
    """Load {name: Split} for the names in `splits`. Raises a ValueError that lists all problems of the data.

    The `report` of each split is that of the whole directory: {kind of problem: count of what on_error='skip' left out, ...,
    'examples': [...], 'remarks': [a line for each kind of remark]}.
    """
    from jaxpeft.data.folder import prepared  # imports TFDS, which takes a quarter of a second

    options = _options(config)
    rows, problems = parse(options["annotations"], options["root"], options["questions"])
    assign_splits(rows, problems, options["val_fraction"], options["test_fraction"], options["seed"], splits)
    builder = prepared.prepare(rows, problems, options)
    found = {name: info.num_examples for name, info in builder.info.splits.items()}
    if missing := [name for name in splits if name not in found]:
        raise ValueError(
            f"no images in the splits {missing}; found {found}; allowed: train, val, test, and names such as test_style. "
            "Splits come from the annotations or, where these name none, from val_fraction, test_fraction and seed; without "
            "annotations=, from directories named train, val and test if these hold all images"
        )
    return {name: prepared.open_split(builder, name, jpeg_edge_of(options)) for name in splits}


def _options(config):
    config = dict(config.items()) if hasattr(config, "items") else dict(vars(config))
    for key in config.keys() - _DEFAULTS.keys():
        if close := difflib.get_close_matches(key, _DEFAULTS, cutoff=0.85):
            raise ValueError(f"unknown config key {key!r}: did you mean {close[0]!r}? Allowed: {', '.join(_DEFAULTS)}")
    options = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    if not options["root"]:
        raise ValueError("root is missing; set root=DIRECTORY_OF_IMAGES")
    if options["questions"] and not options["annotations"]:
        raise ValueError("questions is given but annotations is missing; VQA v2 has two files, give both")
    if options["on_error"] not in ("raise", "skip"):
        raise ValueError(f"on_error is {options['on_error']!r}; allowed: 'raise', 'skip'")
    val, test = options["val_fraction"], options["test_fraction"]
    if val < 0 or test < 0 or val + test >= 1:
        raise ValueError(f"val_fraction {val} and test_fraction {test} must be at least 0, and their sum below 1")
    jpeg_edge_of(options)
    return options


# Annotations and the names of files -> rows


def parse(annotations, root, questions=None):
    """Parse files into (rows, problems), a row per image: {image_id, file, split, captions, questions, where}.

    No image is decoded. Paths are given as in the config.  `split` is '' where the annotations name none.  Raises ValueError
    only where an annotation file or the root is missing; anything else wrong is in `problems` and not in the rows.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"root {str(root)!r} is not a directory; give the directory that holds the images")
    problems, files, rows = Problems(), Files(root), {}
    sources = _sources(annotations, questions, root) if annotations else _found(files, problems)
    for source in sources:
        ids, question_ids = {}, set()  # ids are unique within a file: exporters start every file at 1
        for record in _records(source, files, problems):
            directory = source.directory if record["beside"] or not annotations else ""
            if file := files.find(record, problems, directory):
                _merge(record, file, source.split, rows, ids, question_ids, problems)
    if not annotations:
        _say_what_was_not_used(sources, rows, files, problems)
    found = [row for row in rows.values() if row["captions"] or row["questions"]]
    if not annotations:
        _splits_of_directories(found, problems)
    _tell_apart(found)
    return found, problems


def _tell_apart(rows) -> None:
    """Make ids unique where several files form one split: where an id repeats, the later image is named by its file, and the
    later question by its image and its own id."""
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


class Source(NamedTuple):
    """The origin of records: one annotation file (VQA v2: two), or the text files beside images."""

    split: str | None
    path: Path | None = None
    asked: Path | None = None
    directory: str = ""  # of the file, below root: image names are relative to it, unless they are relative to root
    texts: dict[str, list[str]] | None = None  # {text file: its images}


def _records(source, files, problems):
    if source.texts is None:
        yield from records(source.path, source.asked, problems, files.root)
        return
    for name, pictures in source.texts.items():
        read = [image for image in pictures if images.is_read(image)]
        for image in pictures:
            if image not in read:
                problems.note("unsupported image", f"{name}: {image}: {images.why_unread(image)}")
        if read:
            yield from caption_file(files.root / name, name, read, problems)


def _sources(annotations, questions, root):
    """The sources that the config names. Raises ValueError where a file does not exist."""

    def by_split(value):
        return dict(value.items()) if hasattr(value, "items") else {None: value}

    def existing(path):
        path = Path(path).expanduser()
        for candidate in (root / path, path):
            if candidate.is_file():
                return candidate
        raise ValueError(f"annotation file {str(path)!r} not found in {str(root)!r}, nor in the working directory")

    files, asked = by_split(annotations), by_split(questions)
    if unknown := [name for name in files if name is not None and split_name(name) is None]:
        raise ValueError(f"annotations has unknown splits {unknown}; allowed: {', '.join(SPLITS)}, and e.g. test_style")
    if questions is not None and files.keys() != asked.keys():
        raise ValueError(f"questions has the splits {list(asked)}, annotations {list(files)}; they must be the same")

    def source(name):
        path = existing(files[name])
        below = os.path.relpath(path.absolute().parent, root.absolute()).replace(os.sep, "/")
        directory = "" if below == "." or below.split("/")[0] == os.pardir else below
        return Source(name, path, existing(asked[name]) if questions else None, directory)

    return [source(name) for name in files]


def _found(files, problems):
    """The sources below root where the config names none: metadata files, or else text files beside images.

    Raises ValueError where there are neither.
    """
    metadata = [name for name in files.names if name.lower().rsplit("/")[-1] in ("metadata.csv", "metadata.jsonl")]
    if not metadata:
        texts, others = _texts(files)
        if not texts:
            raise ValueError(_nothing_found(files, others))
        for name in others:
            problems.remark("text without an image", name)
        return [Source(None, texts=texts)]
    for directory, count in collections.Counter(os.path.dirname(name) for name in metadata).items():
        if count > 1:
            names = [name for name in metadata if os.path.dirname(name) == directory]
            problems.note("two annotations", f"{' and '.join(names)} are in one directory", fatal=True)
    splits = [_split_of_directory(name) for name in metadata]
    splits = splits if all(splits) and set(splits) != {"train"} else [None] * len(metadata)
    return [
        Source(split, files.root / name, directory=os.path.dirname(name))
        for split, name in zip(splits, metadata, strict=True)
    ]


def _texts(files):
    """({text file: the images in the same directory that have its name}, text files without such an image)."""
    pictures: dict[str, list[str]] = {}
    for name in files.all() + files.unread():
        pictures.setdefault(normal(os.path.splitext(name)[0]), []).append(name)
    texts, others = {}, []
    for name in files.names:
        stem, end = os.path.splitext(name)
        if end.lower() == ".txt":
            beside = pictures.get(normal(stem), [])
            read = [image for image in beside if images.is_read(image)]
            if beside:
                texts[name] = read or beside  # cat.jpg was made from the cat.heic next to it, which is left out
            else:
                others.append(name)
    return texts, others


def _nothing_found(files, texts):
    tables = [name for name in files.names if name.lower().endswith((".csv", ".tsv", ".json", ".jsonl"))]
    found = f"images: {len(files.all())}, files in unsupported image formats: {len(files.unread())}"
    found += f", .txt files with other names: {len(texts)} (such as {texts[0]})" if texts else ", .txt files: 0"
    found += f"; did you mean annotations={tables[0]}?" if tables else ""
    return (
        f"no texts found for the images in {str(files.root)!r}: annotations=FILE is not given, and neither metadata.csv, nor "
        f"metadata.jsonl, nor .txt files named like images (cat.txt beside cat.jpg) are in it or below it. Found {found}"
        f"\n{ACCEPTED}"
    )


def _say_what_was_not_used(sources, rows, files, problems):
    """Report images without a text, and text files beside images that metadata files describe."""
    if texts := sources[0].texts:
        described = {image for pictures in texts.values() for image in pictures}
        stems = {os.path.splitext(image)[0] for image in described}
        for image in files.all():
            if image not in described:
                stem = os.path.splitext(os.path.basename(image))[0]
                problems.note("image without text", f"{image}: no {stem}.txt next to it")
        for image in files.unread():
            if image not in described and os.path.splitext(image)[0] not in stems:
                problems.remark("image not used", f"{image}: {images.why_unread(image)}")
        return
    for image in files.all() + files.unread():
        if image not in rows:
            problems.remark("image not used", image)
    for name, pictures in _texts(files)[0].items():
        if unknown := [image for image in pictures if image not in rows]:
            problems.note("two annotations", f"{name} is beside {unknown[0]}, which is in no metadata file")
        else:
            problems.remark("text not read", name)


def _split_of_directory(name):
    """The split that the first directory of a path stands for, or None."""
    first, below, _ = name.partition("/")
    return _DIRECTORIES.get(first.lower()) or split_name(first) if below else None


def _splits_of_directories(rows, problems):
    """Fill row['split'] in place where nothing else names splits and all images are in directories named as splits.

    Where directories for train and for another split hold only some of the images, the others get no split, which is an error
    later: a hash would mix test images into train.
    """
    if any(row["split"] for row in rows):
        return
    splits = [_split_of_directory(row["file"]) for row in rows]
    kinds = {split.split("_")[0] for split in splits if split}
    if kinds == {"train"} and all(splits):  # nothing is held out, so a hash divides the images, as without directories
        return
    if all(splits) or ("train" in kinds and len(kinds) > 1):
        for row, split in zip(rows, splits, strict=True):
            row["split"] = split or ""
    elif kinds:
        names = sorted({row["file"].split("/")[0] for row, split in zip(rows, splits, strict=True) if split})
        problems.remark("directories", ", ".join(names))


def _merge(record, file, split, rows, ids, question_ids, problems):
    """Add a record to the row of its file."""
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
        problems.note("duplicate id", f"{where}: image id {image_id!r}, compare {at}")
    else:
        if row is None:
            row = {"image_id": image_id, "file": file, "split": name, "captions": [], "questions": [], "where": where}
            rows[file] = row
        row["captions"] += record["captions"]
        if record["question"]:
            _add_question(record["question"], row, where, question_ids, problems)


def _add_question(question, row, where, question_ids, problems):
    """Add a question to a row. Without ids, a repeated question of an image adds answers; with ids, it is an error."""
    asked = row["questions"]
    if not question["question_id"]:
        if same := [q for q in asked if q["question"] == question["question"]]:
            same[0]["answers"] += question["answers"]
            return
        question = question | {"question_id": f"{row['image_id']}-{len(asked)}"}
    if question["question_id"] in question_ids:
        problems.note("duplicate id", f"{where}: question_id {question['question_id']} occurs twice")
        return
    question_ids.add(question["question_id"])
    asked.append(question)


def assign_splits(rows, problems, val_fraction=0.1, test_fraction=0.1, seed=0, asked=()):
    """Fill row['split'] in place by hash where no row has a split; where only some have one, the others are removed.

    Where rows have splits but none is val, and `asked` includes val, part of train becomes val.
    """
    if not any(row["split"] for row in rows):
        for row in rows:
            row["split"] = split_of(row["image_id"], val_fraction, test_fraction, seed)
        shares = {"test": test_fraction, "val": val_fraction, "train": 1 - val_fraction - test_fraction}
        _fill_empty(rows, problems, [name for name, share in shares.items() if share > 0], seed)
        return
    for row in rows:
        if not row["split"]:
            problems.note("split", f"{row['where']}: {row['file']} has no split, but other images have one")
    rows[:] = [row for row in rows if row["split"]]
    if "val" in asked and val_fraction > 0 and all(row["split"] != "val" for row in rows):
        _val_of_train(rows, problems, val_fraction, seed)


def split_of(image_id, val_fraction, test_fraction, seed):
    """'train', 'val' or 'test': a pure function of its arguments, the same on every machine."""
    place = _place(image_id, seed)
    return "test" if place < test_fraction else "val" if place < test_fraction + val_fraction else "train"


def _place(image_id, seed):
    digest = hashlib.sha256(f"{seed}/{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _in_order(rows, split, seed):
    """The rows of a split, sorted by hash: test comes before val, and val before train."""
    mine = [row for row in rows if row["split"] == split]
    return sorted(mine, key=lambda row: (_place(row["image_id"], seed), row["image_id"]))


def _fill_empty(rows, problems, names, seed):
    """Give each empty split of `names` the nearest row of train (or of the largest split, if train has at most one)."""
    if len(rows) < 3:
        return
    for name in names:
        counts = collections.Counter(row["split"] for row in rows)
        if name not in counts:
            giver = "train" if counts["train"] > 1 else max(names, key=lambda other: counts[other])
            after = ("test", "val", "train").index(giver) > ("test", "val", "train").index(name)
            row = _in_order(rows, giver, seed)[0 if after else -1]
            row["split"] = name
            problems.remark("split", f"{name} got {row['file']} of {giver}")


def _val_of_train(rows, problems, val_fraction, seed):
    """Move the first `val_fraction` of train, sorted by hash, to val: at least one image, and never all."""
    train = _in_order(rows, "train", seed)
    n = sum(_place(row["image_id"], seed) < val_fraction for row in train)
    n = min(max(n, 1), len(train) - 1)
    for row in train[: max(n, 0)]:
        row["split"] = "val"
    if n > 0:
        problems.remark("split", f"val got {n} of {len(train)} images of train, because the annotations name no val")
