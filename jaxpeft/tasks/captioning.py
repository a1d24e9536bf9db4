"""Captioning: a picture in, a sentence out. BLIP's recipe (Li et al. 2022, section 5.2).

The decoder reads [DEC] a picture of <caption> [SEP]; the prompt is given and not scored. The loss is the mean over
caption tokens. One training example per reference caption. Scores: CIDEr-D, BLEU-1..4, ROUGE-L over all references.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from jaxpeft import java, metrics
from jaxpeft.data import Examples
from jaxpeft.datasets import Split
from jaxpeft.tasks.base import Task, teacher_forced
from jaxpeft.text import Tokenizer, clean_caption


@dataclasses.dataclass(frozen=True)
class Captioning(Task):
    prompt: str = "a picture of"
    max_tokens: int = 40  # of a training caption, prompt and specials included; longer ones are cut
    max_words: int = 50
    length: int = 40  # decoding: most tokens written, prompt included
    min_length: int = 5
    java: bool = False  # score as published numbers are: PTB tokens and METEOR through Java, where it is installed
    name: ClassVar[str] = "captioning"
    main_metric: ClassVar[str] = "cider_d"

    def prompt_ids(self, tokenizer: Tokenizer) -> list[int]:
        """[DEC] and the prompt's words."""
        return [tokenizer.bos_id, *tokenizer.encode(self.prompt, self.max_tokens)[1:-1]]

    def texts(self, split: Split) -> list[str]:
        return [self.prompt, *(clean_caption(text, self.max_words) for row in split.rows for text in row["captions"])]

    def examples(self, split: Split, tokenizer: Tokenizer) -> Examples:
        prompt = self.prompt_ids(tokenizer)
        pairs = [(i, text) for i, row in enumerate(split.rows) for text in row["captions"]]
        if not pairs:
            raise ValueError(f"split {split.name!r} has no captions; the captioning task needs some")
        room = self.max_tokens - len(prompt) + 1
        ids = [[prompt + tokenizer.encode(clean_caption(text, self.max_words), room)[1:]] for _, text in pairs]
        arrays = teacher_forced(ids, [[1.0]] * len(ids), len(prompt), tokenizer.pad_id)
        arrays["image_index"] = np.array([i for i, _ in pairs], np.int32)
        return Examples(arrays, split.images, [{"image_id": split.rows[i]["image_id"]} for i, _ in pairs])

    def cases(self, split: Split, tokenizer: Tokenizer) -> Examples:
        indices = [i for i, row in enumerate(split.rows) if row["captions"]]
        rows = [
            {
                "image_id": split.rows[i]["image_id"],
                "references": [clean_caption(t, 10**6) for t in split.rows[i]["captions"]],
            }
            for i in indices
        ]
        return Examples({"image_index": np.array(indices, np.int32)}, split.images, rows)

    def score(self, rows: list[dict], predictions: list[str]) -> dict:
        """Metrics of a whole split: CIDEr-D's document frequencies come from the references given here."""
        ours = {row["image_id"]: text for row, text in zip(rows, predictions, strict=True)}
        report = java.captions_report if self.java else metrics.captions_report
        return report(ours, {row["image_id"]: row["references"] for row in rows})

    def upload(self, rows: list[dict], predictions: list[str]) -> list[dict] | None:
        """COCO's result format: [{'image_id': int, 'caption': str}]."""
        if not all(row["image_id"].isdecimal() for row in rows):
            return None
        return [
            {"image_id": int(row["image_id"]), "caption": text} for row, text in zip(rows, predictions, strict=True)
        ]

    def each(self, rows: list[dict], predictions: list[str]) -> np.ndarray:
        ours = {row["image_id"]: metrics.tokenize(text) for row, text in zip(rows, predictions, strict=True)}
        return metrics.cider_d(ours, {row["image_id"]: list(map(metrics.tokenize, row["references"])) for row in rows})[
            1
        ]

    def blind(self, train: Split, rows: list[dict]) -> dict:
        """What needs no picture: the most frequent training caption for every image."""
        from jaxpeft.data import most_common

        constant = most_common(clean_caption(text, self.max_words) for row in train.rows for text in row["captions"])
        return {"constant_caption": self.score(rows, [constant] * len(rows))}
