"""Large data sets on disk -> TFDS directories (array_record, no TensorFlow), with several processes and resumable.

A data set is a list of rows per split; a row is {'image_id', 'captions', 'questions'} and, where images are stored,
'file'. Rows are cut into shards of fixed length. Each shard is written by one process into `.parts`, named by a digest of its
content, and renamed when it is complete. So an interrupted preparation resumes with the missing shards, and a shard whose
files changed is written again. When all shards are complete, they are moved into the TFDS directory together.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import time
import uuid
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, splits, writer

from jaxpeft.data.folder.prepared import Info
from jaxpeft.inputs import images
from jaxpeft.runtime import host

_VERSION = "1"  # part of the digests: increase it when the stored form changes
SHARD_ROWS = 512  # the images of one shard are in memory together: about 100 MB of COCO


def features(with_image: bool):
    """The stored form of a row. TFDS needs TensorFlow to nest sequences, so a question's answers are one JSON string."""
    text = tfds.features.Text()
    questions = {key: text for key in ("question_id", "question", "answers", "type")}
    stored = {"image_id": text, "part": text, "captions": tfds.features.Sequence(text),
              "questions": tfds.features.Sequence(questions)}  # fmt: skip
    return tfds.features.FeaturesDict(stored | ({"image": tfds.features.Image()} if with_image else {}))


def encode(row: dict) -> dict:
    """A row as TFDS stores it. `part` is the part of the data set that the image is from."""
    questions = [q | {"answers": json.dumps(q["answers"], ensure_ascii=False)} for q in row.get("questions", ())]
    return {"image_id": row["image_id"], "part": row.get("part", ""), "captions": row.get("captions", []),
            "questions": questions}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shard:
    """The rows that one process writes at a time."""

    split: str
    rows: list[dict]
    with_image: bool

    def digest(self) -> str:
        """The digest of texts and of the names, sizes and times of image files; the directory's place does not matter."""
        rows = [row | {"file": os.path.basename(row["file"])} if "file" in row else row for row in self.rows]
        parts = [_VERSION, self.split, rows]
        for row in self.rows if self.with_image else ():
            try:
                stat = os.stat(row["file"])
                parts.append([stat.st_size, stat.st_mtime_ns])
            except OSError:
                parts.append(None)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def write_shard(shard: Shard, path: Path, skip: bool) -> dict:
    """Write `path` and, next to it, PATH.json = {'rows', 'bytes', 'ids', 'bad'}, which is returned.

    `bad` lists the images that are missing or cannot be decoded; if there are any, nothing is written unless `skip`.
    """
    bad, good = [], []

    def examples():
        for i, row in enumerate(shard.rows):
            example = encode(row)
            if shard.with_image:
                try:
                    example["image"] = Path(row["file"]).read_bytes()
                    images.decode(example["image"], name=row["file"])
                except FileNotFoundError:
                    bad.append(f"{row['file']}: missing")
                    continue
                except (OSError, ValueError) as error:
                    bad.append(str(error))
                    continue
            good.append(row["image_id"])
            yield i, example

    stored = features(shard.with_image)
    serializer = example_serializer.ExampleSerializer(stored.get_serialized_info())
    shard_writer = writer.ShardWriter(stored, serializer, writer.ExampleWriter(tfds.core.FileFormat.ARRAY_RECORD))
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    shard_writer.write(examples(), temporary)
    facts = {"rows": len(good), "bytes": os.path.getsize(temporary), "ids": good, "bad": bad}
    if bad and not skip:
        temporary.unlink()
        return facts
    os.replace(temporary, path)
    temporary.write_text(json.dumps(facts))
    os.replace(temporary, path.with_name(path.name + ".json"))  # last: a shard without it is incomplete
    return facts


class Prepared(tfds.core.ShardBasedBuilder):
    """A TFDS builder over rows. Subclasses say whether images are stored; `tfds.builder_from_directory` reads it."""

    VERSION = tfds.core.Version("1.0.0")
    WITH_IMAGE = False

    def __init__(self, rows, workers=None, on_error="raise", log=print, **kwargs):
        """`rows`: {split: [row]}, with absolute paths as 'file'; `workers`: number of processes, by default one per core."""
        self._workers, self._skip, self._log = workers or host.cores(), on_error == "skip", log
        self._shards = {
            split: [Shard(split, some[i : i + SHARD_ROWS], self.WITH_IMAGE) for i in range(0, len(some), SHARD_ROWS)]
            for split, some in rows.items()
        }
        super().__init__(file_format="array_record", **kwargs)

    def digest(self) -> str:
        """The digest of everything that the data set contains."""
        parts = {split: [shard.digest() for shard in some] for split, some in self._shards.items()}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def _info(self):
        metadata = tfds.core.MetadataDict()
        return Info(builder=self, features=features(self.WITH_IMAGE), metadata=metadata, disable_shuffling=True)

    def _log_download_bytes(self):
        """Nothing is downloaded; `log` reports the progress."""

    def _log_download_done(self):
        pass

    def _shard_iterators_per_split(self, dl_manager):
        raise NotImplementedError("`_download_and_prepare` writes the shards itself, in several processes")

    def _download_and_prepare(self, dl_manager, download_config=None):
        parts = Path(self._data_dir_root, f".parts-{self.name}")
        parts.mkdir(parents=True, exist_ok=True)
        shards = {
            split: {parts / f"{split}-{shard.digest()}": shard for shard in some}
            for split, some in self._shards.items()
        }
        done = self._write({path: shard for some in shards.values() for path, shard in some.items()})
        bad = [message for facts in done.values() for message in facts["bad"]]
        if bad and not self._skip:
            raise ValueError(
                f"{len(bad)} images cannot be read; the data set is not finished, shards written so far are kept for a retry:\n"
                + "\n".join(f"    {message}" for message in bad[:5])
                + ("\n    ..." if len(bad) > 5 else "")
                + "\nReplace the files, or leave out these images with --on-error skip."
            )
        infos = []
        for split, some in shards.items():
            template = self._get_filename_template(split_name=split)
            for i, path in enumerate(some):
                os.replace(path, template.sharded_filepath(shard_index=i, num_shards=len(some)))
            lengths, size = [done[path]["rows"] for path in some], sum(done[path]["bytes"] for path in some)
            infos.append(splits.SplitInfo(split, lengths, size, template))
        self.info.set_splits(splits.SplitDict(infos))
        ids = {split: [one for path in some for one in done[path]["ids"]] for split, some in shards.items()}
        self.info.metadata.update(digest=self.digest(), ids=ids, left_out=len(bad), left_out_first=bad[:5])
        shutil.rmtree(parts)
        for left_over in Path(self._data_dir).parent.glob("incomplete.*"):  # of interrupted preparations
            if left_over != Path(self.data_dir):
                shutil.rmtree(left_over, ignore_errors=True)

    def _write(self, jobs: dict[Path, Shard]) -> dict[Path, dict]:
        done = {path: _finished(path) for path in jobs}
        left = {path: shard for path, shard in jobs.items() if done[path] is None}
        if len(left) < len(jobs):
            self._log(f"{self.name}: {len(jobs) - len(left)} of {len(jobs)} shards are already written")
        to_do, rows, began, said = sum(len(shard.rows) for shard in left.values()), 0, time.perf_counter(), 0.0
        for path, facts in _each(left, min(self._workers, len(left)), self._skip):
            done[path], rows, now = facts, rows + len(left[path].rows), time.perf_counter()
            if now - said > 5 or rows == to_do:
                said, rate = now, rows / (now - began)
                self._log(
                    f"{self.name}: {rows:,} of {to_do:,} rows, {rate:,.0f} rows/s, {(to_do - rows) / rate:.0f} s left"
                )
        return done


def _each(jobs: dict[Path, Shard], workers: int, skip: bool):
    """(path, facts) of every shard as it is written. Processes are spawned: forking one that has JAX's threads can hang."""
    if workers <= 1:
        for path, shard in jobs.items():
            yield path, write_shard(shard, path, skip)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(write_shard, shard, path, skip): path for path, shard in jobs.items()}
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:  # otherwise leaving the block would wait for all queued shards
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _finished(path: Path) -> dict | None:
    """What `write_shard` returned for a shard, or None where it is missing or incomplete."""
    try:
        return json.loads(path.with_name(path.name + ".json").read_text()) if path.exists() else None
    except (OSError, ValueError):
        return None
