"""Caption metrics: CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726, section 4), BLEU (Papineni et al. 2002) and ROUGE-L (Lin
2004) as the COCO evaluation server computes them; `pycocoevalcap` 1.2 is the reference, equal within 1e-9.

`predictions` maps an image id to one caption, `references` maps the same ids to a list of captions. The scorers split
on white space and change nothing else; `captions_report` tokenises first. METEOR and SPICE need Java: `coco_java`.
Scores are fractions, CIDEr-D is in [0, 10]; papers print both times 100.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxpeft.inputs.tokenizer import is_mark, normal_form

N_MAX = 4  # both CIDEr-D and BLEU use 1- to 4-grams

Predictions = Mapping[str, str]
References = Mapping[str, Sequence[str]]


def cider_d(predictions: Predictions, references: References, sigma: float = 6.0) -> tuple[float, np.ndarray]:
    """CIDEr-D of the set, and of every image in the order of `references`.

    With g_n(c) the vector of count * idf over the n-grams of caption c (equation 1), per reference s and n
        10 * exp(-(l(c) - l(s))^2 / (2 sigma^2)) * min(g_n(c), g_n(s)) . g_n(s) / (|g_n(c)| |g_n(s)|)      (equation 4)
    averaged over n = 1..4 and over references. To match published numbers, it follows the reference code in these points:
      * it is called "CIDEr" there and in every COCO table; there is no stemming;
      * l is counted in bigrams, which changes nothing: l(c) - l(s) differs only where one side is empty and scores 0;
      * idf = log(images) - log(max(1, images whose references contain the n-gram)) over the *evaluated* set: the scores of
        a subset differ from those of its split, so score whole splits and store n;
      * with one image every idf is log 1, and every score is 0.
    """
    ids = _check(predictions, references)
    references_ngrams = [[_ngrams(text) for text in references[i]] for i in ids]
    frequency = Counter(
        ngram for group in references_ngrams for ngram in {g for orders in group for order in orders for g in order}
    )
    unseen = math.log(len(ids))
    weight = {ngram: (unseen - math.log(count)) ** 2 for ngram, count in frequency.items()}  # idf^2: both sides have it

    def measure(orders):
        norms = [math.sqrt(sum(c * c * weight.get(g, unseen**2) for g, c in order.items())) for order in orders]
        return orders, norms, sum(orders[0].values())

    def similarity(ours, theirs):
        (orders, norms, length), (orders_ref, norms_ref, length_ref) = ours, theirs
        total = 0.0
        for order, norm, order_ref, norm_ref in zip(orders, norms, orders_ref, norms_ref, strict=True):
            if norm and norm_ref:
                shared = ((min(c, order_ref[g]) * order_ref[g], weight[g]) for g, c in order.items() if g in order_ref)
                total += sum(count * idf2 for count, idf2 in shared) / (norm * norm_ref)
        return total / N_MAX * math.exp(-((length - length_ref) ** 2) / (2 * sigma**2))

    scores = []
    for image_id, group in zip(ids, references_ngrams, strict=True):
        ours = measure(_ngrams(predictions[image_id]))
        scores.append(10 * sum(similarity(ours, measure(orders)) for orders in group) / len(group))
    return float(np.mean(scores)), np.array(scores)


def bleu(predictions: Predictions, references: References) -> tuple[np.ndarray, np.ndarray]:
    """BLEU-1..4 of the set, shape (4,), and of every image, shape (4, images).

    Clipped n-gram precision, geometric mean, brevity penalty exp(1 - r / c) with the reference length r closest to the
    prediction's (the shorter one on a tie). The score of the set pools counts over images; it is not the mean of image scores.
    """
    ids = _check(predictions, references)
    rows = [_bleu_counts(predictions[i], references[i]) for i in ids]
    correct, guess, length, length_ref = (np.array(column) for column in zip(*rows, strict=True))
    corpus = _bleu_score(correct.sum(0), guess.sum(0), length.sum(), length_ref.sum())
    each = [_bleu_score(*row) for row in zip(correct, guess, length, length_ref, strict=True)]
    return corpus, np.array(each).T


def _bleu_counts(prediction, references):
    """(matches per order, n-grams per order, length, length of the closest reference), lengths in words."""
    most = [Counter() for _ in range(N_MAX)]
    for text in references:
        for order, counts in zip(most, _ngrams(text), strict=True):
            order |= counts  # in place, keeps the larger count
    ngrams = _ngrams(prediction)
    correct = [sum((counts & limit).values()) for counts, limit in zip(ngrams, most, strict=True)]
    words = len(prediction.split())
    closest = min((abs(length - words), length) for length in (len(text.split()) for text in references))[1]
    return correct, [max(0, words - n) for n in range(N_MAX)], words, closest


def _bleu_score(correct, guess, length, length_ref):
    tiny, small = 1e-15, 1e-9  # as in the reference code: an empty prediction scores 0, without division by 0
    precision = np.cumprod((correct + tiny) / (guess + small))
    ratio = (length + tiny) / (length_ref + small)
    return precision ** (1 / np.arange(1, N_MAX + 1)) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def rouge_l(predictions: Predictions, references: References, beta: float = 1.2) -> tuple[float, np.ndarray]:
    """ROUGE-L of the set (the mean) and of every image.

    F = (1 + beta^2) P R / (R + beta^2 P) with P and R the longest common subsequence over the length of the prediction
    and of the reference; the best P and the best R over references may come from different ones. The reference code
    splits at each single space, so an empty text is one empty word, and two empty captions score 1.
    """
    ids = _check(predictions, references)
    scores = []
    for image_id in ids:
        words = predictions[image_id].split(" ")
        groups = [text.split(" ") for text in references[image_id]]
        common = [_common_subsequence(words, other) for other in groups]
        precision = max(common) / len(words)
        recall = max(count / len(other) for count, other in zip(common, groups, strict=True))
        both = precision and recall  # one is 0 exactly when the other is
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision) if both else 0.0)
    return float(np.mean(scores)), np.array(scores)


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the dynamic program per integer (Hyyro 2004, bit-parallel)."""
    positions = defaultdict(int)
    for position, word in enumerate(left):
        positions[word] |= 1 << position
    full = (1 << len(left)) - 1
    row = full
    for word in right:
        match = row & positions.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(left) - row.bit_count()


def _ngrams(text: str) -> list[Counter]:
    words = text.split()
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, N_MAX + 1)]


def _check(predictions, references) -> list[str]:
    missing, extra = references.keys() - predictions.keys(), predictions.keys() - references.keys()
    if missing or extra:
        raise ValueError(
            f"predictions and references must have the same image ids; without a prediction: {_some(missing)}, "
            f"without references: {_some(extra)}"
        )
    if not references:
        raise ValueError("references is empty; give at least one image (two for a CIDEr-D above 0)")
    for image_id, group in references.items():
        if isinstance(group, str) or not group:
            raise ValueError(f"references[{image_id!r}] is {group!r}; give a list of one or more captions")
    return list(references)


def _some(ids) -> str:
    shown = sorted(map(repr, ids))
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "") if shown else "none"


_TOKEN = re.compile(
    r"""(?:[^\W\d_]\.){2,}                           # u.s.  a.m.
      | \b(?:mr|mrs|ms|dr|st|mt|vs|jr|sr|etc)\.      # abbreviations keep their period
      | '(?:n'|(?:s|m|d|re|ve|ll|\d\ds)\b)          # rock 'n' roll, the '90s, and a separate 's
      | \d+(?:[.,:]\d+)+(?:\w+)?                     # 3.5  10,000  9:30
      | [\#@]?\w+(?:[-/.&']\w+)*                     # words, t-shirt, black/white, o'clock
      | [!?]{2,}                                     # the PTB tokenizer keeps "!!" as a word, not punctuation
      | [^\w\s]""",
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?<=\w)(?=(?:n't|'(?:s|m|d|re|ve|ll))(?:$|'))")
_SPLIT_WORDS = {
    "cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta", "lemme": "lem me", "gimme": "gim me",
}  # fmt: skip
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset("'\"`.?!,:;-\u2026")
_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")


def tokenize(caption: str) -> str:
    """Lower-case words joined by single spaces, punctuation dropped, contractions split ("man's" -> "man 's").

    An *approximation* of the Java PTBTokenizer and punctuation list used for published COCO numbers: equal on plain
    captions, different in rare cases (unusual abbreviations, stray symbols, nested quotes). Brackets are kept as "-lrb-" and
    so on, because the reference lower-cases tokens but drops only the upper-case names. For numbers to compare with a paper,
    tokenise with Java and pass `tokenizer=str` to `captions_report`.
    """
    words = []
    for token in _TOKEN.findall(caption.lower().translate(_PLAIN)):
        if token in _BRACKETS or token in _SPLIT_WORDS:
            words.append(_BRACKETS.get(token) or _SPLIT_WORDS[token])
        elif token not in _DROPPED:
            words.extend(_CLITIC.split(token))
    return " ".join(words)


def plain_words(caption: str) -> str:
    """The words of a caption in `tokenizer.normal_form`, without punctuation: for your own captions, in any language."""
    return " ".join(word for word in normal_form(caption).split() if not (len(word) == 1 and is_mark(word)))


def captions_report(
    predictions: Predictions, references: References, tokenizer: Callable[[str], str] = tokenize
) -> dict[str, float]:
    """{'cider_d', 'bleu_1' .. 'bleu_4', 'rouge_l', 'n'} of a split; `tokenizer=str` is for tokenised text."""
    _check(predictions, references)
    ours = {i: tokenizer(text) for i, text in predictions.items()}
    theirs = {i: [tokenizer(text) for text in group] for i, group in references.items()}
    report = {"cider_d": cider_d(ours, theirs)[0]}
    report |= {f"bleu_{n}": float(score) for n, score in enumerate(bleu(ours, theirs)[0], 1)}
    return report | {"rouge_l": rouge_l(ours, theirs)[0], "n": len(theirs)}
