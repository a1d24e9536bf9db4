"""Captioning: an image in, a sentence out. BLIP's recipe (Li et al. 2022, section 5.2).

A text begins with the prompt or, in a prefix-LM, follows it; the prompt is not scored. The loss is the mean over caption
tokens. Every reference caption is a training example. Scores: CIDEr-D, BLEU-1..4 and ROUGE-L over all references.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from jaxpeft import metrics
from jaxpeft.data.base import Examples, Split
from jaxpeft.inputs.processor import Template
from jaxpeft.inputs.tokenizer import clean_caption
from jaxpeft.metrics import coco_java
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.tasks.base import Task, teacher_forced

# how captions are tokenised for scoring: 'basic' for your own data, in any language; 'coco' as for published COCO numbers
VARIANTS = {"basic": metrics.plain_words, "coco": metrics.tokenize}
MOST_COUNTED = 500_000  # training images whose captions the blind baselines are chosen from


@dataclasses.dataclass(frozen=True)
class Captioning(Task):
    prompt: str | None = None  # the beginning of every caption; None: the model's own prompt
    max_tokens: int = 0  # of a training caption, including prompt and end token; longer ones are cut; 0: the longest
    max_words: int = 0  # of a training caption; longer ones are cut; 0: no limit
    max_new_tokens: int = 0  # of a generated caption, after the prompt; 0: those of the longest caption
    variant: str = "basic"  # a key of VARIANTS
    java: bool = False  # for variant 'coco': PTB tokens and METEOR by Java, where it is installed
    name: ClassVar[str] = "captioning"
    main_metric: ClassVar[str] = "cider_d"
    id_key: ClassVar[str] = "image_id"
    answer_key: ClassVar[str] = "caption"
    limits: ClassVar[dict[str, int]] = {"max_tokens": 40, "max_new_tokens": 36}
    limited_texts: ClassVar[dict[str, str]] = {
        "max_tokens": "captions",
        "max_new_tokens": "captions",
        "max_words": "captions",
    }
    only_written: ClassVar[tuple[str, ...]] = ("max_new_tokens",)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"task_options.variant is {self.variant!r}; choose one of {', '.join(VARIANTS)}")
        if self.java and self.variant != "coco":
            raise ValueError("task_options.java requires task_options.variant='coco'; set both")

    def template(self, model: VisionLanguageModel) -> Template:
        return model.processor.template(self.kind, prompt=self.prompt, max_words=self.max_words)

    def texts(self, split: Split, template: Template) -> Iterator[str]:
        yield template.start_text
        yield from map(template.clean_text, _captions(split))

    def lengths(self, split: Split, template: Template) -> dict[str, np.ndarray]:
        lengths = (
            (len(template.target(text)[0]), len(clean_caption(text, 10**6).split())) for text in _captions(split)
        )
        n_tokens, n_words = np.fromiter(lengths, np.dtype((np.int64, 2))).T
        return {"max_tokens": n_tokens, "max_new_tokens": n_tokens - len(template.start), "max_words": n_words}

    def least(self, template: Template) -> dict[str, int]:
        return {"max_tokens": len(template.start) + 1, "max_new_tokens": 1}

    def examples(self, split: Split, template: Template) -> Examples:
        n_captions = np.fromiter((len(row["captions"]) for row in split.rows), np.int32)
        index = np.repeat(np.arange(len(n_captions), dtype=np.int32), n_captions)
        if not len(index):
            raise ValueError(f"split {split.name!r} has no captions; the captioning task needs at least one")
        ids = ([template.target(text, self.max_tokens)[0]] for text in _captions(split))
        arrays = teacher_forced(ids, itertools.repeat([1.0], len(index)), template)
        return Examples(arrays | _framed(index, template), split.images, [])

    def case_ids(self, split: Split) -> list[str]:
        return [row["image_id"] for row in split.rows for _ in row["captions"]]

    def eval_examples(self, split: Split, template: Template) -> Examples:
        indices = [i for i, row in enumerate(split.rows) if row["captions"]]
        read = str if self.variant == "basic" else (lambda text: clean_caption(text, 10**6))
        rows = [
            {"image_id": split.rows[i]["image_id"], "references": [read(t) for t in split.rows[i]["captions"]]}
            for i in indices
        ]
        return Examples(_framed(indices, template), split.images, rows)

    def truths(self, row: dict) -> list[str]:
        return row["references"]

    def form(self, text: str) -> str:
        return VARIANTS[self.variant](text)

    def score(self, rows: list[dict], predictions: list[str]) -> dict:
        """The metrics of a whole split; CIDEr-D's document frequencies are those of the references in `rows`."""
        ours = {row["image_id"]: text for row, text in zip(rows, predictions, strict=True)}
        truths = {row["image_id"]: row["references"] for row in rows}
        if self.java:
            return coco_java.captions_report(ours, truths)
        said = {"tokenizer": "basic"} if self.variant == "basic" else {}
        return metrics.captions_report(ours, truths, VARIANTS[self.variant]) | said

    def per_example(self, rows: list[dict], predictions: list[str]) -> np.ndarray:
        read = VARIANTS[self.variant]
        ours = {row["image_id"]: read(text) for row, text in zip(rows, predictions, strict=True)}
        return metrics.cider_d(ours, {row["image_id"]: list(map(read, row["references"])) for row in rows})[1]

    def guesses(self, train: Split, rows: list[dict]) -> dict[str, list[str]]:
        """The same training caption for every image: the most frequent one, and the one with the best score.

        The latter is the best of 20 captions, the ten most frequent and ten others, on 100 training images. Of more than
        MOST_COUNTED training images, as many are looked at.
        """
        seen = train.rows if len(train.rows) <= MOST_COUNTED else _spread(train.rows, MOST_COUNTED)
        texts = (clean_caption(text, self.max_words or 10**6) for row in seen for text in row["captions"])
        counts = collections.Counter(texts)
        often = sorted(counts, key=lambda text: (-counts[text], text))
        described = [row for row in seen if row["captions"]]
        tried = often[:10] + _spread(often[10:], 10)
        known = [{"image_id": str(i), "references": row["captions"]} for i, row in enumerate(_spread(described, 100))]
        best = max(tried, key=lambda text: self.per_example(known, [text] * len(known)).mean())
        return {"constant_caption": [often[0]] * len(rows), "best_caption": [best] * len(rows)}


def _captions(split: Split) -> Iterator[str]:
    return (text for row in split.rows for text in row["captions"])


def _framed(indices: Sequence[int] | np.ndarray, template: Template) -> dict[str, np.ndarray]:
    """The arrays 'image_index' and, where the template has a prompt without a question, 'prompt'."""
    arrays, prompt = {"image_index": np.array(indices, np.int32)}, template.prompt("")[0]
    if prompt:
        arrays["prompt"] = np.tile(np.array(prompt, np.int32), (len(indices), 1))
    return arrays


def _spread(items: Sequence, n: int) -> list:
    """At most `n` items, evenly spread."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(n, len(items))).astype(int))]
