"""Visual question answering: an image and a question in, a short answer out. BLIP's recipe (section 5.3).

Loss: the sum over the tokens of each answer, weighted by the share of annotators who gave the answer, summed over answers
and divided by the number of questions. Score: VQA accuracy; `variant` says how texts are compared (metrics.vqa_accuracy).
"""

import array
import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax
import numpy as np

from jaxpeft import metrics
from jaxpeft.data.base import Examples, Split, pad_tokens
from jaxpeft.data.pipeline import most_common
from jaxpeft.inputs.processor import Template
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.tasks.base import Task, teacher_forced
from jaxpeft.tree import Tree


@dataclasses.dataclass(frozen=True)
class Vqa(Task):
    max_question: int = 0  # tokens, including special ones; longer questions are cut at the end; 0: the longest
    max_answers: int = 10  # distinct training answers per question, the most frequent first
    max_new_tokens: int = 0  # of a training or generated answer, including the end token; 0: the longest
    variant: str = "basic"  # 'official2021' or 'legacy' for numbers to compare with published ones of VQA v2
    inference: str = "generate"  # 'rank': the best of a closed list of answers, as for BLIP's VQA v2 results
    answer_list: str = (
        ""  # for 'rank': a JSON file with a list of answers; '' for the `n_answers` most frequent in training
    )
    n_answers: int = 3128
    rank_k: int = 128  # the answers per question whose full loss is computed
    name: ClassVar[str] = "vqa"
    asks: ClassVar[bool] = True
    main_metric: ClassVar[str] = "accuracy"
    id_key: ClassVar[str] = "question_id"
    answer_key: ClassVar[str] = "answer"
    limits: ClassVar[dict[str, int]] = {"max_question": 35, "max_new_tokens": 9}
    limited_texts: ClassVar[dict[str, str]] = {
        "max_question": "questions",
        "max_new_tokens": "answers",
        "max_answers": "lists of answers",
    }

    def texts(self, split: Split, template: Template) -> Iterator[str]:
        for row in split.rows:
            for q in row["questions"]:
                yield template.clean_question(q["question"])
                yield from q["answers"]

    def lengths(self, split: Split, template: Template) -> dict[str, np.ndarray]:
        found = {field: array.array("q") for field in ("max_question", "max_new_tokens", "max_answers")}
        for _, q in _asked(split):
            different = dict.fromkeys(q["answers"])
            found["max_question"].append(len(template.prompt(q["question"])[0]))
            found["max_new_tokens"].extend(len(template.target(one)[0]) - len(template.start) for one in different)
            found["max_answers"].append(len(different))
        return {field: np.array(n, np.int64) for field, n in found.items()}

    def least(self, template: Template) -> dict[str, int]:
        return {"max_question": len(template.prompt("")[0]) + 1, "max_new_tokens": 1}

    def writable(self, text: str, template: Template) -> str:
        """As in the base class, but a ranked answer is taken from the list as it is, except for 'basic'."""
        return text if self.inference == "rank" and self.variant != "basic" else super().writable(text, template)

    def truths(self, row: dict) -> list[str]:
        """The answers, the most frequent first."""
        return [answer for answer, _ in collections.Counter(row["answers"]).most_common()]

    def form(self, text: str) -> str:
        return metrics.normal_form(text) if self.variant == "basic" else metrics.normalize_answer(text)

    def _guess(self, answer: str) -> str:
        """The form of an answer that is counted for blind baselines and answer lists."""
        return self.form(answer) if self.variant == "basic" else answer

    def _questions(self, split: Split, template: Template) -> dict[str, np.ndarray]:
        index = np.fromiter((i for i, _ in _asked(split)), np.int32)
        if not len(index):
            raise ValueError(f"split {split.name!r} has no questions; the vqa task needs at least one")
        ids = (template.prompt(q["question"], self.max_question)[0] for _, q in _asked(split))
        return {"image_index": index, "prompt": pad_tokens(ids, template.pad)}

    def _answers(self, q: dict) -> list[tuple[str, float]]:
        """The different answers to a question, the most frequent first, and their weights."""
        counts = collections.Counter(q["answers"])
        kept = sorted(counts, key=lambda a: (-counts[a], a))[: self.max_answers]
        return [(a, q.get("weight", 1.0) * counts[a] / len(q["answers"])) for a in kept]

    def examples(self, split: Split, template: Template) -> Examples:
        arrays = self._questions(split, template)
        limit = self.max_new_tokens and len(template.start) + self.max_new_tokens
        answers = ([template.target(a, limit)[0] for a, _ in self._answers(q)] for _, q in _asked(split))
        weights = ([weight for _, weight in self._answers(q)] for _, q in _asked(split))
        return Examples(arrays | teacher_forced(answers, weights, template), split.images, [])

    def case_ids(self, split: Split) -> list[str]:
        return [q["question_id"] for _, q in _asked(split)]

    def eval_examples(self, split: Split, template: Template) -> Examples:
        rows = [
            {key: q[key] for key in ("question_id", "question", "type")}
            | {"image_id": split.rows[i]["image_id"], "answers": q["answers"]}
            for i, q in _asked(split)
        ]
        return Examples(self._questions(split, template), split.images, rows)

    def loss(
        self, model: VisionLanguageModel, variables: Tree, batch: Mapping[str, jax.Array], rngs: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """As in the base class, but the count is the number of questions, not of tokens."""
        total, _ = super().loss(model, variables, batch, rngs)
        return total, np.float32(batch["targets"].shape[0])

    def __post_init__(self) -> None:
        if self.inference not in ("generate", "rank"):
            raise ValueError(f"task_options.inference is {self.inference!r}; choose 'generate' or 'rank'")
        if self.variant not in metrics.VQA_VARIANTS:
            raise ValueError(
                f"task_options.variant is {self.variant!r}; choose one of {', '.join(metrics.VQA_VARIANTS)}"
            )

    def candidates(self, train: Split, template: Template) -> list[str] | None:
        """For inference 'rank': the answers of `answer_list`, or the most frequent training answers, ties in alphabetic order.

        An answer is counted once for each question whose most frequent answer it is. Variant 'basic' keeps one of several equal
        answers and leaves out those that the decoder cannot write: it cannot distinguish two unknown words.
        """
        if self.inference != "rank":
            return None
        if self.answer_list:
            try:
                answers = json.loads(pathlib.Path(self.answer_list).read_text("utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"task_options.answer_list {self.answer_list}: {error}; give a JSON list") from error
            if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a for a in answers):
                raise ValueError(f"task_options.answer_list {self.answer_list}: expected a JSON list of strings")
            return self._told_apart(answers, template)
        asked = (q for row in train.rows for q in row["questions"])
        counts = collections.Counter(most_common(map(self._guess, q["answers"])) for q in asked)
        return self._told_apart(sorted(counts, key=lambda a: (-counts[a], a)), template)[: self.n_answers]

    def _told_apart(self, answers: list[str], template: Template) -> list[str]:
        if self.variant != "basic":
            return answers
        first: dict[str, str] = {}
        for answer in answers:
            if self.reachable(answer, template):
                first.setdefault(self.form(answer), answer)
        if not first:
            raise ValueError(
                f"none of the {len(answers)} answers, such as {answers[0]!r}, can be written with this vocabulary"
            )
        return list(first.values())

    def score(self, rows: list[dict], predictions: list[str]) -> dict:
        """{'accuracy', 'by_type', 'n', 'variant'}."""
        report = metrics.vqa_report(
            [row | {"prediction": text} for row, text in zip(rows, predictions, strict=True)], self.variant
        )
        return {"accuracy": report.pop("overall"), **report}

    def per_example(self, rows: list[dict], predictions: list[str]) -> np.ndarray:
        pairs = zip(rows, predictions, strict=True)
        return np.array([metrics.vqa_accuracy(text, row["answers"], self.variant) for row, text in pairs])

    def guesses(self, train: Split, rows: list[dict]) -> dict[str, list[str]]:
        """The most frequent training answer of the question's type, and of the same question."""
        by_type, by_question = collections.defaultdict(list), collections.defaultdict(list)
        for row in train.rows:
            for q in row["questions"]:
                answer = most_common(map(self._guess, q["answers"]))
                by_type[q["type"]].append(answer)
                by_question[q["question"]].append(answer)
        anything = most_common(a for group in by_type.values() for a in group)
        majority = {kind: most_common(group) for kind, group in by_type.items()}
        known = {question: most_common(group) for question, group in by_question.items()}
        of_type = [majority.get(row["type"], anything) for row in rows]
        of_words = [known.get(row["question"], guess) for row, guess in zip(rows, of_type, strict=True)]
        return {"majority": of_type, "question_only": of_words}


def _asked(split: Split) -> Iterator[tuple[int, dict]]:
    """(index of the image, question) of every question."""
    return ((i, q) for i, row in enumerate(split.rows) for q in row["questions"])
