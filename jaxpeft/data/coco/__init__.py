"""COCO captions in Karpathy's splits, VQA v2 and Visual Genome's questions: official files on disk -> {split: Split}.

    jaxpeft prepare coco_captions --root data      once; lists missing files and where to get them
    c.data.name = "coco_captions"                  then; `vqav2` works the same way

Images are stored once, one data set per original folder, with texts beside them, so that both tasks share 19 GB. Splits and
sizes are those of the publications: Karpathy and Fei-Fei 2015 (arXiv:1412.2306) for captions, Goyal et al. 2017
(arXiv:1612.00837) for questions.

Config keys (others are ignored):
  data_dir      the --out of `prepare`, default ~/.cache/jaxpeft/coco
  protocol      for vqav2: 'karpathy' (default): train, val and test have the images of Karpathy's caption splits, all with
                answers, so no server is needed; 'official': train is `train_parts`, val is val2014; test_dev and test
                (which includes test-std) have no answers and are for the server
  train_parts   for protocol 'official': ('train',), or ('train', 'val') as in BLIP, in which case there is no val
  visual_genome for vqav2: add Visual Genome's questions to the training split, except those on images in the protocol's val
                and test splits
  visual_genome_weight  of each of these questions: 0.2 (default) as in BLIP, 0.5 in mPLUG
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from jaxpeft.data.base import Split, jpeg_edge_of, source_of
from jaxpeft.data.coco.prepared import Prepared
from jaxpeft.data.folder.prepared import stored_row
from jaxpeft.data.mapped import rows_of
from jaxpeft.inputs import images

HOME = "~/.cache/jaxpeft/coco"
VG_WEIGHT = 0.2
KARPATHY = ("train", "restval", "val", "test")
VQA_PARTS = {"train": "train2014", "val": "val2014", "test": "test2015", "test_dev": "test2015"}


class CocoTrain2014(Prepared):
    """Images, in one split 'pictures'. One data set per folder, so that a second task adds only the folders it needs."""

    WITH_IMAGE = True


class CocoVal2014(CocoTrain2014):
    """Like CocoTrain2014."""


class CocoTest2015(CocoTrain2014):
    """Like CocoTrain2014."""


class VisualGenome(CocoTrain2014):
    """Like CocoTrain2014."""


class CocoCaptions(Prepared):
    """Captions: splits train, restval, val, test; `part` is the folder that the image is from."""


class Vqav2(Prepared):
    """Questions, a row per image: splits train, val, test, test_dev; `part` is Karpathy's split, or empty."""


class VgQa(Prepared):
    """Questions of Visual Genome, a row per image: split train; `part` is the COCO id of the image, or empty."""


PICTURES = {"train2014": CocoTrain2014, "val2014": CocoVal2014, "test2015": CocoTest2015, "vg": VisualGenome}
TEXTS = {"coco_captions": CocoCaptions, "vqav2": Vqav2, "vg_qa": VgQa}


def load(config, splits: Sequence[str]) -> dict[str, Split]:
    """Load {name: Split}. Raises ValueError where a split is unknown or was not prepared."""
    home = Path(config.get("data_dir") or HOME).expanduser()
    pictures = _Pictures(home, jpeg_edge_of(config))
    return (_vqa if config.name == "vqav2" else _captions)(config, splits, home, pictures)


def _captions(config, splits, home, pictures):
    parts = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
    _known(splits, parts, "coco_captions")
    texts = _open(home, TEXTS["coco_captions"])
    return {
        name: _split(name, ((row["part"], row) for part in parts[name] for row in _rows(texts, part)), pictures)
        for name in splits
    }


def _vqa(config, splits, home, pictures):
    protocol = config.get("protocol", "karpathy")
    if protocol not in ("karpathy", "official"):
        raise ValueError(f"data.protocol is {protocol!r}; choose 'karpathy' or 'official'")
    train_parts = tuple(config.get("train_parts", ("train",)))
    parts = {"train": train_parts, "val": ("val",), "test": ("test",), "test_dev": ("test_dev",)}
    if protocol == "karpathy":
        parts = {name: ("train", "val") for name in ("train", "val", "test")}
    elif "val" in train_parts:
        del parts["val"]
    if not set(train_parts) <= {"train", "val"} or not train_parts:
        raise ValueError(f"data.train_parts is {train_parts}; choose from 'train' and 'val'")
    _known(splits, parts, f"vqav2 in protocol {protocol!r} with train_parts {train_parts}")
    texts = _open(home, TEXTS["vqav2"])
    stored = {part: list(_rows(texts, part)) for part in {part for name in splits for part in parts[name]}}
    found = {}
    for name in splits:
        rows = [(VQA_PARTS[part], row) for part in parts[name] for row in stored[part]]
        if protocol == "karpathy":
            if any(not row["part"] for _, row in rows):
                raise ValueError(
                    "vqav2 was prepared without Karpathy's splits: add karpathy/dataset_coco.json and prepare it again, "
                    "or set data.protocol='official'"
                )
            wanted = ("train", "restval") if name == "train" else (name,)
            rows = [(folder, row) for folder, row in rows if row["part"] in wanted]
        found[name] = rows
    if config.get("visual_genome", False) and "train" in splits:
        if protocol == "karpathy":
            held_out = {row["image_id"] for rows in stored.values() for row in rows if row["part"] in ("val", "test")}
        else:
            held_out = set() if "val" in train_parts else {row["image_id"] for row in _rows(texts, "val")}
        more = [row for row in _rows(_open(home, TEXTS["vg_qa"]), "train") if row["part"] not in held_out]
        weight = config.get("visual_genome_weight", VG_WEIGHT)
        found["train"] += [("vg", _weighted(row, weight)) for row in more]
    return {name: _split(name, rows, pictures) for name, rows in found.items()}


def _weighted(row, weight):
    """A row of Visual Genome, weighted, with ids that differ from COCO's."""
    questions = [q | {"question_id": f"vg{q['question_id']}", "weight": weight} for q in row["questions"]]
    return row | {"image_id": f"vg{row['image_id']}", "questions": questions}


def _known(splits, parts, what):
    if unknown := [name for name in splits if name not in parts]:
        raise ValueError(f"unknown splits {unknown} of {what}; allowed: {', '.join(parts)}")


def _open(home: Path, builder):
    directory = home / builder.name / "1.0.0"
    if not (directory / "dataset_info.json").exists():
        what = (
            "vqav2 --visual-genome"
            if builder in (VisualGenome, VgQa)
            else "vqav2"
            if builder in (Vqav2, CocoTest2015)
            else "coco_captions"
        )
        raise ValueError(
            f"{directory} holds no prepared data set: run\n    jaxpeft prepare {what} --root DIRECTORY "
            f"--out {home}\nwith the official files below DIRECTORY; it lists missing files and where to get them"
        )
    return tfds.builder_from_directory(str(directory))


def _source(builder, split):
    if split not in builder.info.splits:
        raise ValueError(
            f"{builder.data_path} has no split {split!r}: add the files of that split and prepare it again"
        )
    decoders = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
    return builder.as_data_source(split, decoders=decoders)


def _rows(builder, split):
    source = _source(builder, split)
    for i in range(len(source)):
        example = source[i]
        yield stored_row(example) | {"part": example["part"].decode()}


class _Pictures:
    """The place of each image, (data source, index), by its folder and id."""

    def __init__(self, home, jpeg_edge):
        self._home, self.jpeg_edge, self._places = home, jpeg_edge, {}

    def place(self, folder, image_id):
        if folder not in self._places:
            builder = _open(self._home, PICTURES[folder])
            source, ids = _source(builder, "pictures"), builder.info.metadata["ids"]["pictures"]
            stored = len(ArrayRecordDataSource([str(path) for path in builder.info.splits["pictures"].filepaths]))
            if len(ids) != stored:  # counted in the files
                raise ValueError(
                    f"{builder.data_path} has {stored} of {len(ids)} images: delete it and prepare it again"
                )
            self._places[folder] = {one: (source, i) for i, one in enumerate(ids)}
        return self._places[folder].get(image_id)


def _split(name, rows, pictures: _Pictures) -> Split:
    """The split of `rows`, pairs (folder, row). Rows whose image was left out in preparation are left out and counted."""
    places = []

    def found():
        for folder, row in rows:
            places.append(pictures.place(folder, row["image_id"].removeprefix("vg")))
            if places[-1] is not None:
                yield {key: row[key] for key in ("image_id", "captions", "questions")}

    kept = rows_of(found())
    if not kept:
        raise ValueError(f"split {name!r}: none of its {len(places)} images was prepared")
    report = {"without a picture": len(places) - len(kept)} if len(kept) < len(places) else {}
    joined = _Joined([place for place in places if place is not None], pictures.jpeg_edge)
    return Split(name, joined, kept, report, source_of("coco", pictures.jpeg_edge))


class _Joined(Sequence):
    """Images at [(data source, index), ...], decoded on access."""

    def __init__(self, places: list[tuple[Any, int]], jpeg_edge: int):
        self.places, self.jpeg_edge = places, jpeg_edge

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        return np.array(self.opened(i))

    def opened(self, i):
        source, index = self.places[i]
        example = source[index]
        return images.opened(example["image"], f"of id {example['image_id'].decode()}", self.jpeg_edge)
