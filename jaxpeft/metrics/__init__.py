"""Caption and VQA metrics: pure functions on strings, equal to the scorers that published tables use.

To add a metric, a function of a prediction and its references, write `METRICS["mine"] = f` in a module of your own (see
jaxpeft/runtime/registry.py).
"""

from collections.abc import Sequence

from jaxpeft.inputs.tokenizer import normal_form
from jaxpeft.metrics.captions import bleu, captions_report, cider_d, plain_words, rouge_l, tokenize
from jaxpeft.metrics.vqa import PUBLISHED_VARIANTS, VQA_VARIANTS, normalize_answer, vqa_accuracy, vqa_report
from jaxpeft.runtime.registry import Registry

__all__ = [
    "METRICS", "PUBLISHED_VARIANTS", "VQA_VARIANTS", "bleu", "captions_report", "cider_d", "exact_match",
    "normalize_answer", "plain_words", "rouge_l", "tokenize", "vqa_accuracy", "vqa_report",
]  # fmt: skip


def exact_match(prediction: str, truths: Sequence[str]) -> float:
    """1.0 where a text equals one of `truths`, ignoring case, accents and the spacing of punctuation; else 0.0."""
    return float(normal_form(prediction) in map(normal_form, truths))


# metrics that a task can report beside its own (task_options.metrics): functions of a prediction and its references; the
# value of a split is the mean
METRICS = Registry("metric", {"exact_match": exact_match})
