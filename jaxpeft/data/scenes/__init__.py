"""scenes: procedural 64x64 pictures of coloured shapes, with captions and questions made by rule.

`load(config, splits)` gives ready Splits and needs no files; `prepare_tfds` writes the same data as a TFDS data set
(array_record, no TensorFlow) and `load_tfds` reads it back. world.py draws, texts.py speaks.

Splits: pretrain (endless, web captions), train, val, test, and test_comp, where every picture holds one of eight pairs
of shape and colour that no other split shows or names. Captions, questions and answers follow from the scene by rule:
the ten answers to a question are ten copies of the one right answer, no person was asked.

    python -m jaxpeft.data.scenes --n 20000

makes 20,000 training and 2,000 test pictures with all their text in memory, and prints the time and how far the answers
can be guessed without the picture.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

from jaxpeft.data.base import progress_bars
from jaxpeft.data.scenes.texts import (  # noqa: F401  (the public names of the data set in one place)
    ANSWERS,
    TYPES,
    WORDS,
    human_captions,
    image_id,
    questions,
    record,
    text,
    web_captions,
)
from jaxpeft.data.scenes.world import COLORS, HELD_PAIRS, SHAPES, SIZES, Scene, Thing, render, scene  # noqa: F401
from jaxpeft.runtime import host

SPLITS = ("pretrain", "train", "val", "test", "test_comp")
STYLES = ("human", "web")
PARALLEL_FROM = 4000  # rows; below, starting a process costs more than it saves


class Images:
    """Pictures drawn when they are asked for: images[i] is a read-only uint8 image_YXC. `cache` keeps them (12 KB).

    Threads may share it: a picture is a pure function of its index, so at worst one is drawn twice.
    """

    def __init__(self, split, size, seed=0, cache=False):
        self._split, self._size, self._seed = split, size, seed
        self._cache = {} if cache else None

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        index = range(self._size)[index]
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image_YXC = render(scene(self._split, index, self._seed))
        image_YXC.setflags(write=False)
        if self._cache is not None:
            self._cache[index] = image_YXC
        return image_YXC


def load(config, splits):
    """The named splits as dict[str, Split].

    config has these attributes or keys: n_train, n_val, n_test (also the size of test_comp) and n_pretrain, each needed
    only for its split; seed (default 0); cache (default True: keep drawn pictures in memory, those of pretrain never);
    captions ('human', the default, or 'web': five in the style of pre-training, without its prompt); types (the types
    of questions kept; default all). A missing size, an unknown split, style or type raises ValueError.
    """
    from jaxpeft.data.base import Split

    config = _as_dict(config)
    seed, loaded = config.get("seed", 0), {}
    style, types = config.get("captions", "human"), tuple(config.get("types") or TYPES)
    if style not in STYLES:
        raise ValueError(f"data.captions is {style!r}; choose one of {', '.join(STYLES)}")
    if not set(types) <= set(TYPES):
        raise ValueError(f"data.types is {types}; choose from {', '.join(TYPES)}")
    for split in splits:
        size = _size(config, split)
        images = Images(split, size, seed, cache=config.get("cache", True) and split != "pretrain")
        rows = [  # copies: what is kept must not change with what a caller does to a row
            row | {"captions": list(row["captions"]), "questions": [dict(one) for one in row["questions"]]}
            for row in _records(split, size, seed)
        ]
        if style == "web":
            rows = [row | {"captions": plain_web_captions(split, i, 5, seed)} for i, row in enumerate(rows)]
        if set(types) != set(TYPES):
            rows = [row | {"questions": [q for q in row["questions"] if q["type"] in types]} for row in rows]
        loaded[split] = Split(split, images, rows, source=f"scenes seed {seed}")
    return loaded


@functools.lru_cache(maxsize=4)
def _records(split, size, seed):
    """Kept, because a study's process loads the same splits for every point and 16,384 rows take 10 s on a core."""
    return records(split, size, seed)


def plain_web_captions(split, index, n, seed=0):
    """`web_captions` without the words that the captioning task gives as its prompt."""
    return [caption.removeprefix("a picture of ") for caption in web_captions(split, index, n, seed)]


def _as_dict(config):
    return dict(config) if hasattr(config, "keys") else dict(vars(config))


def _size(config, split):
    if split not in SPLITS:
        raise ValueError(f"unknown scenes split {split!r}; use one of {', '.join(SPLITS)}")
    field = "n_test" if split == "test_comp" else f"n_{split}"
    if field not in config:
        raise ValueError(f"the size of scenes split {split!r} is not set; give {field} in the data config")
    return config[field]


def records(split, size, seed=0, workers=None):
    """The rows 0..size-1 of a split. From PARALLEL_FROM rows on, one process per core (at most 8) shares the work;
    the rows are the same either way."""
    if workers is None:
        workers = min(host.cores(), 8) if size >= PARALLEL_FROM else 1
    bounds = np.linspace(0, size, workers + 1).astype(int).tolist()
    spans = list(zip(bounds[:-1], bounds[1:], strict=True))
    with concurrent.futures.ThreadPoolExecutor(max(1, workers - 1)) as pool:
        others = [pool.submit(_records_elsewhere, split, *span, seed) for span in spans[1:]]
        rows = _records_here(split, *spans[0], seed)
        for other in others:
            rows += other.result()
    return rows


def _records_here(split, start, stop, seed):
    return [record(split, index, seed) for index in range(start, stop)]


def _records_elsewhere(split, start, stop, seed):
    """Rows made by a fresh interpreter. Not multiprocessing: its spawned children import the caller's script again, and
    so run it twice unless it is guarded. If the interpreter cannot be started or fails, the rows are made here."""
    code = (
        "import pickle, sys; from jaxpeft.data.scenes.texts import record\n"
        "split, (start, stop, seed) = sys.argv[1], map(int, sys.argv[2:])\n"
        "pickle.dump([record(split, index, seed) for index in range(start, stop)], sys.stdout.buffer)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, split, *map(str, (start, stop, seed))],
            env=environment,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        return pickle.loads(done.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError, pickle.UnpicklingError) as error:
        logging.getLogger(__name__).warning("scenes rows are made in one process, slower: %s", error)
        return _records_here(split, start, stop, seed)


def digest(split, size, seed=0):
    """SHA-256 (hex) of the specs and the text of the first `size` items: what the data says, whatever pillow draws."""
    total = hashlib.sha256()
    for index in range(size):
        spec = [dataclasses.astuple(thing) for thing in scene(split, index, seed).objects]
        total.update(json.dumps([spec, record(split, index, seed)], sort_keys=True).encode())
    return total.hexdigest()


@dataclasses.dataclass
class ScenesConfig(tfds.core.BuilderConfig):
    """Sizes and seed of a prepared data set; the name tells them apart on disk."""

    n_train: int = 16000
    n_val: int = 1000
    n_test: int = 2000
    seed: int = 0


class Scenes(tfds.core.GeneratorBasedBuilder):
    """The downstream splits as a TFDS data set. Give file_format="array_record": the default needs TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [ScenesConfig(name="default")]

    def _info(self):
        words = tfds.features.Text()
        return self.dataset_info_from_configs(
            description="Procedural pictures of coloured shapes with rule-made captions and questions.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
                    "image_id": words,
                    "captions": tfds.features.Sequence(words),
                    # One answer, not ten copies: a list inside a list of dicts is one more thing that needs TensorFlow.
                    "questions": tfds.features.Sequence(
                        {"question_id": words, "question": words, "answer": words, "type": words}
                    ),
                }
            ),
            disable_shuffling=True,
        )  # item i of the data source is scene i

    def _split_generators(self, dl_manager):
        config = dataclasses.asdict(self.builder_config)
        return {split: self._generate_examples(split, _size(config, split)) for split in SPLITS[1:]}

    def _generate_examples(self, split, size):
        seed = self.builder_config.seed
        for index, row in enumerate(records(split, size, seed)):
            png = io.BytesIO()  # bytes, because TFDS needs TensorFlow to encode an array
            Image.fromarray(render(scene(split, index, seed))).save(png, "png", compress_level=1)
            asked = [
                {"answer": one["answers"][0], **{key: one[key] for key in ("question_id", "question", "type")}}
                for one in row["questions"]
            ]
            yield index, {**row, "questions": asked, "image": png.getvalue()}


def prepare_tfds(config, data_dir):
    """Writes train, val, test and test_comp below data_dir (once) and returns the folder for `load_tfds`."""
    sizes = {field: _as_dict(config)[field] for field in ("n_train", "n_val", "n_test")}
    seed = _as_dict(config).get("seed", 0)
    name = "-".join(map(str, ("seed", seed, *sizes.values())))
    builder = Scenes(config=ScenesConfig(name=name, seed=seed, **sizes), data_dir=data_dir, file_format="array_record")
    progress_bars()
    builder.download_and_prepare()
    return str(builder.data_path)


def load_tfds(directory, splits):
    """The named splits of a prepared folder as dict[str, Split], equal to what `load` makes without files."""
    from jaxpeft.data.base import Split

    builder, loaded = tfds.builder_from_directory(directory), {}
    for split in splits:
        if split not in builder.info.splits:
            raise ValueError(f"{directory} has no split {split!r}; it holds {', '.join(builder.info.splits)}")
        expected, files = builder.info.splits[split].num_examples, builder.info.splits[split].filepaths
        found = len(ArrayRecordDataSource([str(file) for file in files]))  # TFDS's len() repeats what its json claims
        if found != expected:
            raise ValueError(
                f"{directory} split {split!r} holds {found} of {expected} examples; delete it and prepare again"
            )
        source = builder.as_data_source(split)
        raw = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        loaded[split] = Split(split, _SourceImages(source), [_row(raw[index]) for index in range(len(raw))])
    return loaded


class _SourceImages:
    def __init__(self, source):
        self._source = source

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self._source[range(len(self))[index]]["image"]


def _row(example):
    """TFDS stores a list of dicts and gives back a dict of lists of bytes; this turns it round again."""
    asked = example["questions"]
    columns = ([value.decode() for value in asked[key]] for key in ("question_id", "question", "answer", "type"))
    return {
        "image_id": example["image_id"].decode(),
        "captions": [caption.decode() for caption in example["captions"]],
        "questions": [
            {"question_id": name, "question": question, "answers": [answer] * 10, "type": kind}
            for name, question, answer, kind in zip(*columns, strict=True)
        ],
    }


def blind_accuracy(train_rows, test_rows):
    """How far answers can be guessed without the picture: {type or 'all': (majority, question only, how many)}.

    majority says the most frequent answer of the type in train_rows; question only, that of the very same question,
    or of the type for a question that train_rows do not have.
    """
    seen = collections.defaultdict(collections.Counter)
    for asked in (asked for row in train_rows for asked in row["questions"]):
        seen[asked["type"]][asked["answers"][0]] += 1
        seen[asked["question"]][asked["answers"][0]] += 1
    best = {key: max(answers, key=answers.get) for key, answers in seen.items()}
    hits = collections.defaultdict(list)
    for asked in (asked for row in test_rows for asked in row["questions"]):
        majority = best.get(asked["type"])
        hit = [guess == asked["answers"][0] for guess in (majority, best.get(asked["question"], majority))]
        hits[asked["type"]].append(hit)
        hits["all"].append(hit)
    return {kind: (*np.mean(hit, axis=0).tolist(), len(hit)) for kind, hit in sorted(hits.items())}


def main():
    """The command of the module docstring."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--n", type=int, default=20000, help="training pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    data = load({"n_train": args.n, "n_test": 2000, "seed": args.seed}, ("train", "test"))
    made = time.perf_counter()
    pixels = sum(image.nbytes for split in data.values() for image in split.images)
    done = time.perf_counter()
    rows = [row for split in data.values() for row in split.rows]
    print(f"{len(rows)} pictures: text {made - start:.1f} s, pixels {done - made:.1f} s ({pixels / 1e6:.0f} MB)")
    print(f"longest caption: {max(len(caption.split()) for row in rows for caption in row['captions'])} words")
    for kind, (majority, memory, number) in blind_accuracy(data["train"].rows, data["test"].rows).items():
        print(f"{kind:9} majority {majority:.3f}  question only {memory:.3f}  ({number} questions)")
