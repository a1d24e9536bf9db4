"""Metrics equal the published scorers: committed numbers (tests/golden/make_metrics.py) and, where installed, live."""

import json
import pathlib
import random
import time

import numpy as np
import pytest
from golden import make_metrics as make

from jaxpeft import metrics
from jaxpeft.inputs.tokenizer import normal_form
from jaxpeft.metrics import vqa

GOLDEN = pathlib.Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "metrics.json").read_text())


WORDS = make.contraction_words(vqa._CONTRACTIONS)
TOLERANCE = 1e-9


def _scores(predictions, references):
    """(six corpus numbers, six rows of numbers per image) in the order of the golden file."""
    ours, theirs = dict(enumerate(predictions)), dict(enumerate(references))
    (cider, ciders), (bleu, bleus), (rouge, rouges) = (
        metric(ours, theirs) for metric in (metrics.cider_d, metrics.bleu, metrics.rouge_l)
    )
    return np.array([cider, *bleu, rouge]), np.array([ciders, *bleus, rouges])


def _assert_golden(golden, predictions, references):
    corpus, each = _scores(predictions, references)
    np.testing.assert_allclose(corpus, golden["corpus"], rtol=0, atol=TOLERANCE)
    stored = np.array(golden["each"])
    np.testing.assert_allclose(each[:, : stored.shape[1]], stored, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("index", range(len(make.HAND)))
def test_captions_hand_sets_equal_golden(index):
    _assert_golden(EXPECTED["hand"][index], *make.HAND[index])


@pytest.mark.parametrize("seed", make.SEEDS)
def test_captions_random_sets_equal_golden(seed):
    _assert_golden(EXPECTED["captions"][seed], *make.caption_set(seed))


@pytest.mark.parametrize("seed", (100, 101, 102))
def test_captions_equal_pycocoevalcap_on_every_image(seed):
    pytest.importorskip("pycocoevalcap", reason="live comparison with the reference scorers")
    predictions, references = make.caption_set(seed)
    live = make.caption_scores(predictions, references, kept=make.IMAGES)
    corpus, each = _scores(predictions, references)
    np.testing.assert_allclose(corpus, live["corpus"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(each, live["each"], rtol=0, atol=TOLERANCE)


def test_one_image_has_cider_zero_and_a_subset_other_scores():
    assert metrics.cider_d({"x": "a b"}, {"x": ["a b"]})[0] == 0.0
    predictions, references = {"x": "a b", "y": "a c", "z": "q"}, {"x": ["a b d"], "y": ["a c e"], "z": ["q"]}
    whole = metrics.cider_d(predictions, references)[1][0]
    part = metrics.cider_d({i: predictions[i] for i in "xy"}, {i: references[i] for i in "xy"})[1][0]
    gauss, rare, common, unseen = np.exp(-1 / 72), np.log(3), np.log(3 / 2), np.log(2)  # by hand: idf of b, of a; of b
    one_gram = (rare**2 + common**2) / np.sqrt((rare**2 + common**2) * (2 * rare**2 + common**2))
    assert whole == pytest.approx(10 / 4 * gauss * (one_gram + 1 / np.sqrt(2)), abs=1e-12)
    assert part == pytest.approx(10 / 4 * gauss * (unseen / np.hypot(unseen, unseen) + 1 / np.sqrt(2)), abs=1e-12)


def test_captions_do_not_depend_on_the_order_of_images_or_references():
    predictions, references = make.caption_set(4)
    ours, theirs = dict(enumerate(predictions)), dict(enumerate(references))
    before = metrics.captions_report(ours, theirs)
    rng = random.Random(0)
    order = rng.sample(range(make.IMAGES), make.IMAGES)
    after = metrics.captions_report(
        {i: ours[i] for i in reversed(order)}, {i: rng.sample(theirs[i], len(theirs[i])) for i in order}
    )
    assert before.keys() == after.keys() == {"cider_d", *(f"bleu_{n}" for n in (1, 2, 3, 4)), "rouge_l", "n"}
    assert after["n"] == make.IMAGES
    assert before == pytest.approx(after, abs=TOLERANCE)


def test_captions_get_worse_with_every_damaged_word():
    rng = random.Random(1)
    truth = {i: [rng.choice("abcdefghijklmnopqrst") for _ in range(9)] for i in range(300)}
    references = {i: [" ".join(words)] for i, words in truth.items()}
    ladder = []
    for damage in range(10):
        predictions = {i: " ".join(["zzz"] * damage + words[damage:]) for i, words in truth.items()}
        ladder.append(metrics.captions_report(predictions, references))
    assert ladder[0] == pytest.approx(
        {"cider_d": 10, "bleu_1": 1, "bleu_2": 1, "bleu_3": 1, "bleu_4": 1, "rouge_l": 1, "n": 300}, abs=1e-6
    )
    for name in ("cider_d", "bleu_1", "rouge_l"):
        values = [report[name] for report in ladder]
        assert values == sorted(values, reverse=True) and len(set(values)) == 10, name
    assert ladder[-1]["cider_d"] == 0 and ladder[-1]["rouge_l"] == 0


@pytest.mark.slow
def test_cider_is_fast_on_a_coco_sized_split():
    rng = random.Random(2)
    words = [f"word{i}" for i in range(3000)]
    drawn = rng.choices(words, [1 / (i + 1) for i in range(3000)], k=6 * 5000 * 11)
    captions = [" ".join(drawn[i : i + 11]) for i in range(0, len(drawn), 11)]
    predictions = dict(enumerate(captions[:5000]))
    references = {i: captions[5000 + 5 * i : 5005 + 5 * i] for i in predictions}
    start = time.process_time()
    metrics.cider_d(predictions, references)
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ({"7": "a"}, {"7": ["a"], "8": ["b"]}, "without a prediction: '8'"),
        ({"7": "a", "9": "c"}, {"7": ["a"]}, "without references: '9'"),
        ({"7": "a"}, {"7": []}, r"references\['7'\]"),
        ({"7": "a"}, {"7": "a dog"}, r"references\['7'\] is 'a dog'"),
        ({}, {}, "references is empty"),
    ],
)
def test_captions_bad_input_is_named(predictions, references, message):
    for metric in (metrics.cider_d, metrics.bleu, metrics.rouge_l, metrics.captions_report):
        with pytest.raises(ValueError, match=message):
            metric(predictions, references)


@pytest.mark.parametrize(  # the right-hand sides are the Java tokenizer's, punctuation list applied
    "text, expected",
    [
        ("A man's dog don't like it's T-shirt, cannot.", "a man 's dog do n't like it 's t-shirt can not"),
        ('A black/white "cat" (sitting) on the mat...', "a black/white cat -lrb- sitting -rrb- on the mat"),
        ("He's gonna go; they've 3.5 apples & 10,000 trees -- 9:30 a.m.",
         "he 's gon na go they 've 3.5 apples & 10,000 trees 9:30 a.m."),
        ("U.S. flag on Dr. Smith's car.", "u.s. flag on dr. smith 's car"),
        ("a dog - running \u2013 fast \u2014 away", "a dog running fast away"),
        ("the dogs' bowl, the 1/2 pizza of $5.00", "the dogs bowl the 1/2 pizza of $ 5.00"),
        ("rock 'n' roll at 5 o'clock in the '90s", "rock 'n' roll at 5 o'clock in the '90s"),
        ("I'd've said \u201ccaf\u00e9\u201d; AT&T #tag c_d", "i 'd 've said caf\u00e9 at&t #tag c_d"),
        ("Hello!! What?? no...", "hello !! what ?? no"),
        ("a dog 's ball, do n't; red--blue", "a dog 's ball do n't red blue"),
        ("  double  spaces \n here ", "double spaces here"),
        ("", ""),
    ],
)  # fmt: skip
def test_tokenize_follows_the_ptb_tokenizer(text, expected):
    assert metrics.tokenize(text) == expected


def test_report_tokenises_unless_told_not_to():
    predictions = {0: "A dog's ball.", 1: "Two cats"}
    references = {0: ["a dog 's ball"], 1: ["two cats."]}
    assert metrics.captions_report(predictions, references)["bleu_1"] == pytest.approx(1)
    raw = metrics.captions_report(predictions, references, tokenizer=str)
    assert raw["bleu_1"] < 0.01


# --------------------------------------------------------------------------------------------------- VQA


def test_contractions_equal_the_published_table():
    assert make.digest(WORDS) == EXPECTED["contractions"]["words"], "the list of contractions differs"
    assert make.digest(map(metrics.normalize_answer, WORDS)) == EXPECTED["contractions"]["outputs"]


@pytest.mark.parametrize("variant", metrics.PUBLISHED_VARIANTS)
def test_vqa_accuracy_equals_golden(variant):
    sets = [make.vqa_set(seed, WORDS) for seed in range(make.VQA_SETS)]
    assert make.digest(json.dumps(each) for each in sets) == EXPECTED["vqa"]["sets"], "the generator changed"
    ours = [metrics.vqa_accuracy(*each, variant) for each in sets]
    expected = [make.LEVELS[int(i)] for i in EXPECTED["vqa"][variant]]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", metrics.VQA_VARIANTS)
@pytest.mark.parametrize("count", range(11))
def test_vqa_accuracy_by_number_of_matching_answers(count, variant):
    expected = (0, 0.3, 0.6, 0.9, 1)[min(count, 4)]
    answers = ["red"] * count + [f"other {i}" for i in range(10 - count)]
    assert metrics.vqa_accuracy("red", answers, variant) == pytest.approx(expected, abs=1e-12)
    assert metrics.vqa_accuracy("red", answers[::-1], variant) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "prediction, answers, official, legacy",
    [
        ("Yes", ["yes"] * 10, 0, 1),  # unanimous: official compares as it is
        ("two", ["two"] * 10, 1, 0),  # legacy normalises the prediction only
        ("two", ["two"] * 9 + ["three"], 1, 0),
        ("2", ["two"] * 10, 0, 0),
        ("2", ["2"] * 9 + ["3"], 1, 1),
        ("black/white", ["black/white"] * 10, 1, 0),
        ("black/white", ["black/white"] * 9 + ["grey"], 1, 1),
        ("A Dog.", ["dog"] * 9 + ["cat"], 1, 1),
        ("A dog", ["dog", "dog "] * 5, 0, 1),  # official strips before it asks whether all agree
    ],
)
def test_vqa_unanimity_rule_and_variants(prediction, answers, official, legacy):
    scores = [metrics.vqa_accuracy(prediction, answers, variant) for variant in metrics.PUBLISHED_VARIANTS]
    assert scores == [official, legacy]


@pytest.mark.parametrize(
    "text, expected",
    [("The two dogs, a cat", "2 dogs cat"), ("10,000 t-shirts", "10000 tshirts"), ("t-shirt", "t shirt"),
     ("9:30 a.m.", "9:30 am"), ("dont", "don't"), ("3.5", "3.5"), ("", ""), ("Im", "im"), ("none", "0"),
     ("." * 40, "." * 8)],
)  # fmt: skip
def test_normalize_answer(text, expected):
    assert metrics.normalize_answer(text) == expected


def test_vqa_report_counts_every_row_once():
    right, wrong = ["red"] * 10, ["blue"] * 10
    colour = {"prediction": "red", "type": "colour"}
    rows = [colour | {"question_id": i, "answers": right if i < 3 else wrong} for i in range(4)]
    rows.append({"question_id": "n", "prediction": "2", "answers": ["2"] * 10, "type": "count"})
    report = metrics.vqa_report(iter(rows))
    assert report == {
        "overall": pytest.approx(4 / 5),
        "by_type": {"colour": {"accuracy": 0.75, "n": 4}, "count": {"accuracy": 1.0, "n": 1}},
        "n": 5,
        "variant": "official2021",
    }
    assert metrics.vqa_report(rows[::-1])["overall"] == report["overall"]
    with pytest.raises(ValueError, match="question_id 0 occurs twice"):
        metrics.vqa_report([*rows, rows[0]])
    with pytest.raises(ValueError, match="rows is empty"):
        metrics.vqa_report([])


def test_vqa_bad_input_is_named():
    with pytest.raises(ValueError, match="'v2'.*official2021, legacy"):
        metrics.vqa_accuracy("red", ["red"] * 10, "v2")
    with pytest.raises(ValueError, match="answers is 'red'"):
        metrics.vqa_accuracy("red", "red")
    with pytest.raises(ValueError, match=r"answers is \[\]"):
        metrics.vqa_accuracy("red", [], "basic")


@pytest.mark.parametrize("variant", metrics.VQA_VARIANTS)
@pytest.mark.parametrize("n", range(1, 13))
def test_few_answers_score_alike_in_any_order_and_agreement_scores_one(variant, n):
    """Leave-one-out, written out, over every number of matches; ten are the published score."""
    assert metrics.vqa_accuracy("x", ["x"] * n, variant) == 1
    assert metrics.vqa_accuracy("x", ["y"] * n, variant) == 0
    for k in range(n + 1):
        answers = ["x"] * k + ["y"] * (n - k)
        left_out = (
            [sum(a == "x" for a in answers[:i] + answers[i + 1 :]) / min(3, n - 1) for i in range(n)] if n > 1 else [k]
        )
        expected = np.mean([min(1, one) for one in left_out])
        orders = [answers, answers[::-1], answers[n // 2 :] + answers[: n // 2]]
        assert [metrics.vqa_accuracy("x", one, variant) for one in orders] == pytest.approx([expected] * 3, abs=1e-12)
    three = [metrics.vqa_accuracy("y", one, variant) for one in (["x", "y", "y", "y"], ["y", "y", "y", "x"])]
    assert three == [0.75, 0.75]


@pytest.mark.parametrize(
    "text, form",
    [
        ("Red", "red"),
        ("t-shirt", "t - shirt"),
        ("T - Shirt", "t - shirt"),
        ("3.5", "3 . 5"),
        ("Caf\u00e9", "cafe"),
        ("cafe\u0301", "cafe"),
        ("\uff32\uff45\uff44", "red"),  # full width
        ("STRASSE", "strasse"),
        ("Stra\u00dfe", "strasse"),
        ("\u0130stanbul", "istanbul"),
        ("\u4e00\u53ea\u732b", "\u4e00 \u53ea \u732b"),  # Chinese: a word each
        ("\u304c", "\u304c"),  # Japanese ga is not ka
        ("\u092e\u0947\u0932", "\u092e\u0947\u0932"),  # Hindi keeps its vowels
        ("\u0e21\u0e49\u0e32", "\u0e21\u0e49\u0e32"),  # Thai keeps its tones: horse, not come
        ("\ud55c\uad6d\uc5b4", "\ud55c\uad6d\uc5b4"),  # Korean stays composed
        ("\u2764\ufe0f zero\u200bwidth", "\u2764 zerowidth"),
        (" two\twords\n", "two words"),
        ("\u0418\u0306\u043e\u0434", "\u0438\u043e\u0434"),  # as uncased BERT writes it
        ("", ""),
    ],
)
def test_the_normal_form_of_own_texts(text, form):
    assert normal_form(text) == form == normal_form(form)


def test_different_words_stay_different_in_the_normal_form():
    words = [
        "\u304b",
        "\u304c",
        "\u092e\u0947\u0932",
        "\u092e\u0932",
        "\u0e21\u0e32",
        "\u0e21\u0e49\u0e32",
        "red",
        "read",
        "3.5",
        "35",
    ]
    assert len({normal_form(word) for word in words}) == len(words)
    assert metrics.vqa_accuracy("", ["\u200b"], "basic") == 0  # nothing written is never right


def test_own_captions_are_read_without_case_accents_and_punctuation():
    assert metrics.plain_words("A man's T-shirt, caf\u00e9: $5!") == "a man s t shirt cafe 5"
    assert metrics.plain_words("\u4e00\u53ea\u732b\u3002") == "\u4e00 \u53ea \u732b"
