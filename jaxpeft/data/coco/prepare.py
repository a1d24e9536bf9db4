"""jaxpeft prepare coco_captions|vqav2 --root DIRECTORY [--visual-genome] [--workers N]

Reads the official files below DIRECTORY, compares their sizes with the published ones, decodes every image once, and writes
what `data.name = 'coco_captions'` and `'vqav2'` read. Nothing is downloaded: missing files are listed with their address.
If it is interrupted, the same command resumes it. Layout of DIRECTORY ('coco/', 'karpathy/', 'vqa/' and 'vg/' may be omitted):

    coco/train2014/*.jpg coco/val2014/*.jpg coco/test2015/*.jpg (for VQA's test questions)
    karpathy/dataset_coco.json
    vqa/v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json
    vqa/v2_mscoco_{train2014,val2014}_annotations.json
    vg/VG_100K/*.jpg vg/VG_100K_2/*.jpg vg/image_data.json vg/question_answers.json
"""

import argparse
import collections
import json
import os
import time
from pathlib import Path

import tensorflow_datasets as tfds

from jaxpeft.data import coco
from jaxpeft.data.base import progress_bars

_COCO, _VQA = "images.cocodataset.org/zips", "s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
_VG = "homes.cs.washington.edu/~ranjay/visualgenome/api.html (version 1.2)"
_KARPATHY = "cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
# path below the root -> where the file or directory comes from
SOURCES = {
    "coco/train2014": f"{_COCO}/train2014.zip, 13 GB",
    "coco/val2014": f"{_COCO}/val2014.zip, 6 GB",
    "coco/test2015": f"{_COCO}/test2015.zip, 12 GB",
    "karpathy/dataset_coco.json": _KARPATHY,
    "vqa/v2_OpenEnded_mscoco_train2014_questions.json": f"{_VQA}/v2_Questions_Train_mscoco.zip",
    "vqa/v2_OpenEnded_mscoco_val2014_questions.json": f"{_VQA}/v2_Questions_Val_mscoco.zip",
    "vqa/v2_OpenEnded_mscoco_test2015_questions.json": f"{_VQA}/v2_Questions_Test_mscoco.zip",
    "vqa/v2_OpenEnded_mscoco_test-dev2015_questions.json": f"{_VQA}/v2_Questions_Test_mscoco.zip",
    "vqa/v2_mscoco_train2014_annotations.json": f"{_VQA}/v2_Annotations_Train_mscoco.zip",
    "vqa/v2_mscoco_val2014_annotations.json": f"{_VQA}/v2_Annotations_Val_mscoco.zip",
    "vg/VG_100K": f"{_VG}, part 1, 9 GB",
    "vg/VG_100K_2": f"{_VG}, part 2, 5 GB",
    "vg/image_data.json": _VG,
    "vg/question_answers.json": _VG,
}
# the published sizes: images, captioned images or questions, per split
SIZES = {
    "train2014": {"pictures": 82_783},
    "val2014": {"pictures": 40_504},
    "test2015": {"pictures": 81_434},
    "coco_captions": {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000},
    "vqav2": {"train": 443_757, "val": 214_354, "test": 447_793},
    "vg": {"pictures": 108_077},
}


def prepare(name: str, root, out=None, *, visual_genome=False, test=True, workers=None, check_sizes=True,
            on_error="raise", log=print) -> Path:  # fmt: skip
    """Prepare 'coco_captions' or 'vqav2' from the files below `root` into `out` (default coco.HOME); returns `out`.

    `test`: for vqav2, include the questions without answers. `check_sizes=False` accepts any number of images and questions.
    `on_error='skip'` leaves out images that cannot be decoded. Raises a ValueError that lists everything missing, or different
    from the published sizes, before anything is written.
    """
    root, out = Path(root).expanduser(), Path(out or coco.HOME).expanduser()
    if name not in ("coco_captions", "vqav2"):
        raise ValueError(f"unknown data set {name!r}; choose coco_captions or vqav2")
    if not root.is_dir():
        raise ValueError(f"--root {root} is not a directory")
    questions = name == "vqav2"
    folders = ["train2014", "val2014", *(["test2015"] if questions and test else [])]
    needed = [f"coco/{folder}" for folder in folders]
    if questions:
        pieces = ["train2014", "val2014", *(["test2015", "test-dev2015"] if test else [])]
        needed += [f"vqa/v2_OpenEnded_mscoco_{piece}_questions.json" for piece in pieces]
        needed += [f"vqa/v2_mscoco_{piece}_annotations.json" for piece in ("train2014", "val2014")]
        needed += [key for key in SOURCES if key.startswith("vg/") and visual_genome]
    else:
        needed.append("karpathy/dataset_coco.json")
    found = {key: place for key in SOURCES if (place := _find(root, key))}
    if missing := [key for key in needed if key not in found]:
        rows = "\n".join(f"    {key:<54} {SOURCES[key]}" for key in missing)
        raise ValueError(f"files not found below {root}; get them from:\n{rows}")

    texts = {}
    karpathy = _karpathy(found["karpathy/dataset_coco.json"]) if "karpathy/dataset_coco.json" in found else {}
    if questions:
        texts["vqav2"] = _vqa(found, karpathy, test)
        if not karpathy:
            log("karpathy/dataset_coco.json not found: only data.protocol='official' will be available")
        if visual_genome:
            texts["vg_qa"] = {"train": _visual_genome(found)}
    else:
        texts["coco_captions"] = {split: [row for row in karpathy.values() if row["split"] == split]
                                  for split in coco.KARPATHY}  # fmt: skip
    images = {folder: {"pictures": _jpegs(found[f"coco/{folder}"])} for folder in folders}
    if visual_genome and questions:
        images["vg"] = {"pictures": [row for key in ("vg/VG_100K", "vg/VG_100K_2") for row in _jpegs(found[key])]}
    everything = images | texts
    if check_sizes:
        _check_sizes(everything)
    for kind, splits in texts.items():  # a text without its image means a wrong or incomplete directory
        _check_images(kind, splits, images, on_error)

    for kind, splits in everything.items():
        _write(kind, {split: rows for split, rows in splits.items() if rows}, root, out, workers, on_error, log)
    return out


def _write(kind: str, splits: dict, root: Path, out: Path, workers, on_error: str, log) -> None:
    """Write one data set of TFDS below `out`. Raises ValueError where another one has its place, or `splits` is empty."""
    if not splits:
        raise ValueError(f"{kind}: the files below {root} hold no rows of it")
    builder = (coco.PICTURES | coco.TEXTS)[kind](splits, workers, on_error, log, data_dir=str(out))
    began = time.perf_counter()
    if Path(builder.data_dir, "dataset_info.json").exists():
        if tfds.builder_from_directory(builder.data_dir).info.metadata["digest"] != builder.digest():
            raise ValueError(
                f"{builder.data_dir} was prepared from other files than those below {root}: delete it, or give another --out"
            )
        log(f"{kind}: already prepared")
        return
    progress_bars()
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    sizes = ", ".join(f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items())
    left_out = builder.info.metadata["left_out"]
    log(f"{kind}: {sizes} rows in {time.perf_counter() - began:.0f} s" + f", {left_out} left out" * bool(left_out))


def _find(root: Path, key: str) -> Path | None:
    """The file or directory `key`, in its subdirectory or directly below the root; None where it is in neither."""
    for place in (root / key, root / Path(key).name):
        if place.exists():
            return place.resolve()


def _jpegs(directory: Path) -> list[dict]:
    """A row per image, in the order of their names; the id is the number at the end of the name."""
    names = sorted(entry.name for entry in os.scandir(directory) if entry.name.lower().endswith((".jpg", ".jpeg")))
    rows = []
    for name in names:
        digits = Path(name).stem.rsplit("_", 1)[-1]
        if digits.isdecimal():
            rows.append({"image_id": str(int(digits)), "file": str(directory / name)})
    return rows


def _read(path: Path, key: str | None):
    """The list in `path` (under `key`). Raises ValueError for an invalid file."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: invalid JSON, {error}; download the file again") from error
    data = data.get(key) if key and isinstance(data, dict) else data
    if not isinstance(data, list) or not all(isinstance(one, dict) for one in data):
        raise ValueError(
            f"{path}: expected a list of objects{f' under {key!r}' if key else ''}; is it the official file?"
        )
    return data


def _field(path: Path, entry: dict, *keys):
    for key in keys:
        if key not in entry:
            raise ValueError(f"{path}: an entry has no {key!r}: {str(entry)[:80]}; is it the official file?")
    return [entry[key] for key in keys]


def _karpathy(path: Path) -> dict[str, dict]:
    """{image id: row} of every image."""
    rows = {}
    for image in _read(path, "images"):
        image_id, split, sentences, folder = _field(path, image, "cocoid", "split", "sentences", "filepath")
        if split not in coco.KARPATHY:
            raise ValueError(f"{path}: image {image_id} has split {split!r}; allowed: {', '.join(coco.KARPATHY)}")
        captions = [_field(path, one, "raw")[0].strip() for one in sentences]
        rows[str(image_id)] = {"image_id": str(image_id), "split": split, "part": folder, "captions": captions}
    return rows


def _vqa(found, karpathy, test) -> dict[str, list[dict]]:
    splits = {}
    for split, piece in coco.VQA_PARTS.items():
        if split.startswith("test") and not test:
            continue
        named = "test-dev2015" if split == "test_dev" else piece
        path = found[f"vqa/v2_OpenEnded_mscoco_{named}_questions.json"]
        asked = collections.defaultdict(list)
        answers = {}
        if not split.startswith("test"):
            said = found[f"vqa/v2_mscoco_{piece}_annotations.json"]
            for one in _read(said, "annotations"):
                key, replies = _field(said, one, "question_id", "answers")
                answers[key] = [_field(said, reply, "answer")[0] for reply in replies], one.get("answer_type", "")
        for one in _read(path, "questions"):
            key, image_id, question = _field(path, one, "question_id", "image_id", "question")
            if answers and key not in answers:
                raise ValueError(f"{path}: question {key} has no annotation; both files must be of the same release")
            replies, kind = answers.get(key, ([], ""))
            asked[str(image_id)].append(
                {"question_id": str(key), "question": question.strip(), "answers": replies, "type": kind}
            )
        splits[split] = [
            {"image_id": i, "part": karpathy.get(i, {}).get("split", ""), "questions": some}
            for i, some in asked.items()
        ]
    return splits


def _visual_genome(found) -> list[dict]:
    path, data = found["vg/question_answers.json"], found["vg/image_data.json"]
    coco_ids = {}
    for image in _read(data, None):
        (key,) = _field(data, image, "image_id" if "image_id" in image else "id")
        coco_ids[str(key)] = str(image["coco_id"]) if image.get("coco_id") else ""
    rows = []
    for image in _read(path, None):
        key, pairs = _field(path, image, "image_id" if "image_id" in image else "id", "qas")
        image_id = str(key)
        questions = []
        for pair in pairs:
            key, question, answer = _field(path, pair, "qa_id", "question", "answer")
            if question.strip() and answer.strip():
                answer = answer.strip().rstrip(".").lower()  # as VQA's answers: lower case, no full stop
                questions.append(
                    {"question_id": str(key), "question": question.strip(), "answers": [answer], "type": "vg"}
                )
        if questions:
            rows.append({"image_id": image_id, "part": coco_ids.get(image_id, ""), "questions": questions})
    return rows


def _check_sizes(everything) -> None:
    wrong = []
    for kind, splits in everything.items():
        for split, expected in SIZES.get(kind, {}).items():
            if split in splits:
                rows = splits[split]
                count = sum(len(row["questions"]) for row in rows) if kind == "vqav2" else len(rows)
                if count != expected:
                    what = "questions" if kind == "vqav2" else "images"
                    where = kind if split == "pictures" else f"{kind} {split}"
                    wrong.append(f"    {where}: found {count:,} {what}, expected {expected:,}")
    if wrong:
        raise ValueError(
            "the files differ from the published data sets:\n"
            + "\n".join(wrong)
            + "\nAdd what is missing, or accept any size with --any-size"
        )


def _check_images(kind, splits, images, on_error) -> None:
    there = {folder: {row["image_id"] for row in some["pictures"]} for folder, some in images.items()}
    missing = []
    for split, rows in splits.items():
        for row in rows:
            folder = {"vg_qa": "vg", "vqav2": coco.VQA_PARTS.get(split)}.get(kind) or row["part"]
            if row["image_id"] not in there.get(folder, ()):
                missing.append(f"    {kind} {split}: id {row['image_id']} is not in {folder}")
    if missing and on_error != "skip":
        raise ValueError(
            f"the images of {len(missing)} texts were not found:\n"
            + "\n".join(missing[:5])
            + "\n    ..." * (len(missing) > 5)
            + "\nAdd the images, or leave out these texts with --on-error skip"
        )


def main(argv=None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="jaxpeft prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("name", choices=("coco_captions", "vqav2"))
    parser.add_argument("--root", required=True, help="the directory with the official files")
    parser.add_argument("--out", help=f"where to write, default {coco.HOME}")
    parser.add_argument("--visual-genome", action="store_true", help="for vqav2: add Visual Genome's questions")
    parser.add_argument("--no-test", action="store_true", help="for vqav2: leave out the questions without answers")
    parser.add_argument("--workers", type=int, help="number of processes, default one per core")
    parser.add_argument("--any-size", action="store_true", help="accept sizes that differ from the published ones")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="for undecodable images")
    args = parser.parse_args(argv)
    out = prepare(
        args.name, args.root, args.out, visual_genome=args.visual_genome, test=not args.no_test, workers=args.workers,
        check_sizes=not args.any_size, on_error=args.on_error, log=lambda text: print(text, flush=True),
    )  # fmt: skip
    print(f"to use it: --config.data.name={args.name} --config.data.data_dir={out}")
