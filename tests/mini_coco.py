"""Draws a small COCO, VQA v2 and Visual Genome in the official layout: `python tests/mini_coco.py DIRECTORY [PICTURES]`.

Pictures and texts are those of `scenes`; files, names, keys and the mixture of splits are those of the originals: training
pictures in train2014, restval, val and test in val2014, questions of test2015 without answers, a test-dev part of them,
answers of ten people who do not all agree, and Visual Genome's pictures, one of which is also COCO's.
"""

import json
import sys
from pathlib import Path

from PIL import Image

from jaxpeft.data import scenes
from jaxpeft.data.scenes.texts import record

_TOP = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}


def draw(directory, n: int = 24) -> Path:
    """`n` pictures in train2014, half as many in val2014, test2015 and Visual Genome; ids as in COCO, not in order."""
    root = Path(directory)
    images, karpathy = {}, []
    for folder, split, count in (("train2014", "train", n), ("val2014", "val", n // 2), ("test2015", "test", n // 2)):
        pictures = scenes.Images(split, count)
        for i in range(count):
            image_id = 9 + 131 * i + {"train2014": 0, "val2014": 1, "test2015": 2}[folder]
            said = record(split, i)
            images[folder, image_id] = said
            place = root / "coco" / folder / f"COCO_{folder}_{image_id:012d}.jpg"
            _jpeg(place, pictures[i], i)
            if folder != "test2015":
                part = "train" if folder == "train2014" else ("restval", "val", "test")[i % 3]
                sentences = [{"raw": text, "tokens": text.split(), "imgid": i, "sentid": 7 * i + k}
                             for k, text in enumerate(said["captions"])]  # fmt: skip
                karpathy.append(
                    {"filepath": folder, "filename": place.name, "cocoid": image_id, "imgid": len(karpathy), "split": part,
                     "sentids": [one["sentid"] for one in sentences], "sentences": sentences}
                )  # fmt: skip
    _json(root / "karpathy/dataset_coco.json", {"dataset": "coco", "images": karpathy})

    asked = {"train2014": [], "val2014": [], "test2015": []}
    answered = {"train2014": [], "val2014": []}
    for (folder, image_id), said in images.items():
        for k, q in enumerate(said["questions"][:3]):
            key = image_id * 1000 + k
            asked[folder].append({"image_id": image_id, "question": q["question"], "question_id": key})
            if folder in answered:
                other = ("yes", "no", "2")[(image_id + k) % 3]
                people = [q["answers"][0]] * (10 - k) + [other] * k
                answered[folder].append(
                    {"question_id": key, "image_id": image_id, "question_type": q["type"],
                     "answer_type": "number" if people[0].isdigit() else "yes/no" if people[0] in ("yes", "no") else "other",
                     "multiple_choice_answer": people[0],
                     "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": 1 + j}
                                 for j, text in enumerate(people)]}
                )  # fmt: skip
    for folder, questions in asked.items():
        _json(root / f"vqa/v2_OpenEnded_mscoco_{folder}_questions.json",
              _TOP | {"data_subtype": folder, "questions": questions})  # fmt: skip
    _json(root / "vqa/v2_OpenEnded_mscoco_test-dev2015_questions.json",
          _TOP | {"data_subtype": "test-dev2015", "questions": asked["test2015"][::2]})  # fmt: skip
    for folder, annotations in answered.items():
        _json(root / f"vqa/v2_mscoco_{folder}_annotations.json",
              _TOP | {"data_subtype": folder, "annotations": annotations})  # fmt: skip

    pictures, facts, pairs = scenes.Images("train", n + n // 2), [], []
    of_val = {row["cocoid"]: row["split"] for row in karpathy}
    shared = next(image_id for image_id, split in of_val.items() if split == "val")
    for i in range(n // 2):
        _jpeg(root / "vg" / ("VG_100K", "VG_100K_2")[i % 2] / f"{i + 1}.jpg", pictures[n + i], i)
        facts.append({"image_id": i + 1, "width": 64, "height": 64, "coco_id": shared if i == 0 else None,
                      "flickr_id": None, "url": ""})  # fmt: skip
        pairs.append({"id": i + 1, "qas": [
            {"a_objects": [], "q_objects": [], "image_id": i + 1, "qa_id": 100 * i + k, "question": q["question"] + "?",
             "answer": q["answers"][0].capitalize() + "."} for k, q in enumerate(record("train", n + i)["questions"][:2])
        ]})  # fmt: skip
    _json(root / "vg/image_data.json", facts)
    _json(root / "vg/question_answers.json", pairs)
    return root


def _jpeg(path, image_YXC, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_YXC).resize((96 + 8 * (i % 3), 88)).save(path, quality=95)


def _json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    print(draw(sys.argv[1], *map(int, sys.argv[2:])))
