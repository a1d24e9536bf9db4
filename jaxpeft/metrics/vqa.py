"""VQA accuracy (Agrawal et al. 2017, arXiv:1612.00837) in the variants in use. Scores are fractions."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from jaxpeft.inputs.tokenizer import normal_form

PUBLISHED_VARIANTS = ("official2021", "legacy")  # of VQA v2
VQA_VARIANTS = ("basic", *PUBLISHED_VARIANTS)
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the published look-behind for a digit has a typo and never matches
_MAX_PERIODS = 32  # the published code passes the value of re.UNICODE as `count`
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {"none": "0"} | {
    word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_CONTRACTIONS = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't couldn't've hadn't've mightn't've shouldn't've wouldn't've
    could've might've must've not've should've they've we've what've where've who've would've you've
    he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd
    he'd've it'd've she'd've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've you'd've
    how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll you'll
    he's how's somebody's someone's that's there's what's when's where's who's why's
    there're they're what're why're you're  ma'am o'clock 'twas 'ow's'at y'all y'all'll y'all'd've
""".split()
# A missing apostrophe is restored, except in "shes", "im" and "ive". One entry of the published table removes an apostrophe.
_REPAIRS = {word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, c in enumerate(word) if c == "'"}
_REPAIRS["somebody'd"] = "somebodyd"


def vqa_accuracy(prediction: str, answers: Sequence[str], variant: str = "official2021") -> float:
    """Mean over leave-one-out sets of min(1, matches among the other answers / 3), arXiv:1612.00837.

    With ten answers, 0, 1, 2, 3, 4+ matches give 0, .3, .6, .9, 1. With n < 4 answers only n - 1 others can match, so their
    number is divided by n - 1; a single answer needs an exact match. So a unanimous answer scores 1 for every n.

    Strings are compared after normalisation:
      basic: both sides in `tokenizer.normal_form`, for any vocabulary and language: for your own data.
    Published numbers of VQA v2 come from two scorers that normalise differently; neither changes unanimous answers:
      official2021: the VQA server's since March 2021. Punctuation, case, number words, articles and contractions of both
        prediction and answers are normalised; with unanimous answers neither is, so "Yes" does not match ten times
        "yes": lower-case the model's output.
      legacy: the older file in mPLUG and ALBEF. The prediction is always normalised, but only punctuation is removed from
        the answers, so an answer "two" or "a dog", or a unanimous "black/white", can never be matched.
    All equal answers count; the published code drops those without an `answer_id` of their own.
    """
    if variant not in VQA_VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(VQA_VARIANTS)}")
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers is {answers!r}; it must be a list of one or more answers")
    if variant == "basic":
        prediction, answers = normal_form(prediction), [normal_form(answer) for answer in answers]
        return _leave_one_out(sum(answer == prediction != "" for answer in answers), len(answers))
    prediction = _strip(prediction)
    if variant == "official2021":
        answers = [_strip(answer) for answer in answers]
        if len(set(answers)) > 1:
            prediction, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    else:
        prediction = normalize_answer(prediction)
        if len(set(answers)) > 1:
            answers = [_drop_punctuation(answer) for answer in answers]
    return _leave_one_out(sum(answer == prediction for answer in answers), len(answers))


def _leave_one_out(count: int, total: int) -> float:
    """The accuracy where `count` of `total` answers match: each answer is left out once, and matches among the others count."""
    if total == 1:
        return float(count)
    enough = min(3, total - 1)
    return (count * min(1, (count - 1) / enough) + (total - count) * min(1, count / enough)) / total


def normalize_answer(text: str) -> str:
    """An answer as the scorer compares it: lower case, number words as digits, contractions repaired, without punctuation and
    articles."""
    words = [_NUMBERS.get(word, word) for word in _drop_punctuation(_strip(text)).lower().split()]
    return " ".join(_REPAIRS.get(word, word) for word in words if word not in _ARTICLES)


def _strip(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def _drop_punctuation(text):
    """Replace a mark by a space, or by nothing if it touches a space anywhere or the text has a comma between digits."""
    everywhere = _DIGIT_COMMA.search(text)
    out = text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if everywhere or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", out, count=_MAX_PERIODS)


def vqa_report(rows: Iterable[Mapping], variant: str = "official2021") -> dict:
    """{'overall', 'by_type': {type: {'accuracy', 'n'}}, 'n', 'variant'}; every row counts once.

    A row has question_id, prediction, answers and type (as in `Split.rows`, plus the prediction). Raises ValueError for no
    rows and for a question_id that occurs twice.
    """
    scores, seen = defaultdict(list), set()
    for row in rows:
        if row["question_id"] in seen:
            raise ValueError(f"question_id {row['question_id']!r} occurs twice; every question is scored once")
        seen.add(row["question_id"])
        scores[row["type"]].append(vqa_accuracy(row["prediction"], row["answers"], variant))
    if not seen:
        raise ValueError("rows is empty; it must have at least one question")
    by_type = {kind: {"accuracy": sum(each) / len(each), "n": len(each)} for kind, each in sorted(scores.items())}
    overall = sum(map(sum, scores.values())) / len(seen)
    return {"overall": overall, "by_type": by_type, "n": len(seen), "variant": variant}
