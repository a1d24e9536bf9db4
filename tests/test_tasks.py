"""What the two tasks make of a record, by hand."""

import numpy as np
import pytest
import test_mplug
import tiny
import tiny_vlm

import jaxpeft as jp
from jaxpeft import tasks
from jaxpeft.apps import pretrain_smolvlm
from jaxpeft.data import base, pipeline
from jaxpeft.data.base import Split
from jaxpeft.models import smolvlm_text
from jaxpeft.models.blip_tokens import SPECIAL, BlipTokenizer
from jaxpeft.training import evaluate

TOKENIZER = BlipTokenizer.from_words("a picture of red blue dog cat is it".split())
IDS = TOKENIZER.ids
CAPTION, ANSWER = (tiny.template(name, TOKENIZER) for name in ("captioning", "vqa"))
PICTURES = [np.full((16, 16, 3), i, np.uint8) for i in range(3)]


def _q(n, question, answers):
    return {"question_id": n, "question": question, "answers": answers, "type": "t"}


SPLIT = Split(
    "train",
    PICTURES,
    [
        {
            "image_id": "0",
            "captions": ["A red dog.", "dog"],
            "questions": [_q("q0", "Is it red?", ["red", "red", "blue", "cat dog"])],
        },
        {"image_id": "1", "captions": ["blue cat"], "questions": [_q("q1", "it", ["dog"])]},
        {"image_id": "2", "captions": [], "questions": []},
    ],
)


def test_captioning_examples_by_hand():
    examples = tasks.build("captioning").examples(SPLIT, CAPTION)
    row = [IDS[w] for w in ("[DEC]", "a", "picture", "of", "a", "red", "dog", "[SEP]")]
    assert examples.arrays["tokens"][0, 0].tolist() == row[:-1]
    assert examples.arrays["targets"][0, 0].tolist() == row[1:]
    # the prompt is given: its words and padding weigh nothing
    assert examples.arrays["weights"][:, 0].tolist() == [
        [0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
    ]
    assert examples.arrays["image_index"].tolist() == [0, 0, 1]


def test_vqa_examples_by_hand():
    examples = tasks.build("vqa").examples(SPLIT, ANSWER)
    assert examples.arrays["prompt"][0].tolist() == [IDS[w] for w in ("[ENC]", "is", "it", "red", "[UNK]", "[SEP]")]
    # distinct answers, most frequent first; weight = share of the annotators
    first = [TOKENIZER.decode(row[1:].tolist()) for row in examples.arrays["tokens"][0]]
    assert first == ["red", "blue", "cat dog"]
    assert examples.arrays["weights"][0].tolist() == [[0.5, 0.5, 0], [0.25, 0.25, 0], [0.25, 0.25, 0.25]]
    assert examples.arrays["weights"][1].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_vqa_loss_is_weighted_answer_sums_over_questions():
    class Uniform:
        @staticmethod
        def apply(variables, batch, rngs=None):
            return np.zeros((*batch["targets"].shape, 20), np.float32)

    examples = tasks.build("vqa").examples(SPLIT, ANSWER)
    total, count = tasks.build("vqa").loss(Uniform, None, examples.arrays, None)
    assert count == 2
    np.testing.assert_allclose(total, (0.5 * 2 + 0.25 * 2 + 0.25 * 3 + 1 * 2) * np.log(20), rtol=1e-6)


def test_scores_and_blind_baselines():
    task = tasks.build("vqa")
    cases = task.eval_examples(SPLIT, ANSWER)
    assert [row["answers"] for row in cases.rows][1] == ["dog"]
    assert (
        task.score(cases.rows, ["red", "dog"])["accuracy"] > task.score(cases.rows, ["cat", "dog"])["accuracy"] == 0.5
    )
    blind = {name: task.scores(cases.rows, texts) for name, texts in task.guesses(SPLIT, cases.rows).items()}
    # the majority of four answers, two alike: left out once each, (2 * 1/3 + 2 * 2/3) / 4
    assert blind["question_only"]["by_type"]["t"]["n"] == 2 and blind["question_only"]["accuracy"] == 0.75
    captioning = tasks.build("captioning")
    caption_cases = captioning.eval_examples(SPLIT, CAPTION)
    assert [row["image_id"] for row in caption_cases.rows] == ["0", "1"]  # a picture without captions is not scored
    assert captioning.score(caption_cases.rows, ["a red dog", "blue cat"])["rouge_l"] > 0.99


@pytest.mark.parametrize("name", ["captioning", "vqa"])
def test_a_split_without_texts_is_named(name):
    with pytest.raises(ValueError, match="split 'train' has no"):
        tasks.build(name).examples(Split("train", PICTURES[:1], SPLIT.rows[2:]), tiny.template(name, TOKENIZER))


def test_unknown_task_and_option():
    with pytest.raises(ValueError, match="unknown task 'ocr'; choose one of captioning, vqa"):
        tasks.build("ocr")
    with pytest.raises(ValueError, match=r"unknown options \['beam'\]"):
        tasks.build("vqa", beam=3)


def _scenario(n):
    rows = [
        {"image_id": str(i), "captions": [f"w{i} w{i + 1}"], "questions": [_q(f"q{i}", f"w{i} w2", [f"w{i}"])]}
        for i in range(n)
    ]
    rng = np.random.default_rng(0)
    return Split("test", [rng.integers(0, 256, (20, 30, 3)).astype(np.uint8) for _ in range(n)], rows)


@pytest.mark.slow
def test_padding_of_the_last_batch_never_changes_a_score():
    """Five cases in batches of 2, 3, 5 and 8: the same answers and the same likelihood."""
    model, variables = tiny.model(), {"params": tiny.params()}
    task, split = tasks.build("vqa"), _scenario(5)
    template = task.template(model)
    pictures = pipeline.Resized(split.images, 16)
    cases, examples = (
        base.Examples(e.arrays, pictures, e.rows)
        for e in (task.eval_examples(split, template), task.examples(split, template))
    )
    found = []
    for size in (2, 5, 8):
        texts = [one["text"] for one in evaluate.predict(model, variables, task, cases, batch_size=size)]
        found.append((texts, evaluate.nll(model, variables, task, examples, batch_size=size)))
    assert all(len(texts) == 5 and texts == found[0][0] for texts, _ in found)
    np.testing.assert_allclose([nll for _, nll in found], found[0][1], rtol=1e-6)


@pytest.mark.slow
def test_generate_answers_and_names_misuse():
    model, variables = tiny.model(), {"params": tiny.params()}
    split = _scenario(3)
    texts = jp.generate(model, variables, split.images, "w1 w2", beams=2, batch_size=2)
    assert len(texts) == 3 and all(word in tiny.TOKENIZER.ids for text in texts for word in text.split())
    with pytest.raises(ValueError, match="pass prompts"):
        jp.generate(model, variables, split.images)
    with pytest.raises(ValueError, match="this model captions: pass no prompts"):
        jp.generate(tiny.model(question_encoder=False), variables, split.images, "")
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        jp.generate(model, variables, split.images, ["w1", "w2"])
    assert len(SPECIAL) == 7


def test_ranked_answers_are_scored_whole_whatever_the_limit_of_written_ones():
    model, variables, split = tiny.model(), {"params": tiny.params()}, _scenario(3)
    answers = ["w1 w2 w3 w4", "w1", "w5 w6 w7"]
    whole, cut = (tasks.build("vqa", inference="rank", variant="official2021", max_new_tokens=most) for most in (5, 1))
    cases = whole.eval_examples(split, whole.template(model))
    cases = base.Examples(cases.arrays, pipeline.Resized(split.images, 16), cases.rows)
    found = [evaluate.choose(model, variables, task, cases, answers) for task in (whole, cut)]
    assert found[0] == found[1]


# ---------------------------------------------------------------- own texts: what is right scores right


def _answers(*answers):
    rows = [
        {
            "image_id": str(i),
            "captions": [],
            "questions": [_q(f"q{i}", "is it", [one] if isinstance(one, str) else one)],
        }
        for i, one in enumerate(answers)
    ]
    return Split("test", [np.zeros((4, 4, 3), np.uint8)] * len(rows), rows)


WORDS = BlipTokenizer.from_words("red t shirt - 3 . 5 cafe a picture of".split())
WRITES = tiny.template("vqa", WORDS)


@pytest.mark.parametrize("truth", ["red", "Red", "RED ", "t-shirt", "T - Shirt", "3.5", "caf\u00e9", "Cafe\u0301"])
def test_a_right_answer_scores_one_however_it_is_written(truth):
    task, split = tasks.build("vqa"), _answers(truth)
    rows, written = task.eval_examples(split, WRITES).rows, task.writable(truth, WRITES)
    assert task.score(rows, [written])["accuracy"] == task.score(rows, [truth])["accuracy"] == 1
    assert task.reachable(truth, WRITES) and task.candidates(split, WRITES) is None
    ranked = tasks.build("vqa", inference="rank")
    assert task.score(rows, ranked.candidates(split, WRITES))["accuracy"] == 1  # both ways agree


def test_what_the_vocabulary_lacks_is_out_of_reach_and_counted():
    task, split = tasks.build("vqa"), _answers("zebra", "yak", "red", ["red", "zebra", "zebra"])
    rows = task.eval_examples(split, WRITES).rows
    assert task.writable("zebra", WRITES) == task.writable("yak", WRITES) == ""
    assert [task.per_example(rows, [""] * 4).tolist(), task.reachable("yak", WRITES)] == [[0, 0, 0, 0], False]
    found = task.perfect_writer(rows, WRITES)
    assert (found["truths"], found["out_of_reach"]) == (5, 3)
    assert found["accuracy"] == (1 + 1 / 3) / 4 and found["unhindered"] == (3 + 2 / 3) / 4
    assert found["examples"][0] == ["zebra", ""]
    # of answers that are one to the model none is on the list
    assert tasks.build("vqa", inference="rank").candidates(split, WRITES) == ["red"]
    with pytest.raises(ValueError, match="none of the 2 answers, such as 'yak'"):
        tasks.build("vqa", inference="rank").candidates(_answers("zebra", "yak"), WRITES)


def test_answers_of_one_form_are_one_to_blind_guesses_and_lists():
    task, split = tasks.build("vqa", inference="rank"), _answers("Red", "red", "RED", "cafe")
    assert task.candidates(split, WRITES) == ["red", "cafe"]
    rows = task.eval_examples(split, WRITES).rows
    assert task.scores(rows, task.guesses(split, rows)["majority"])["accuracy"] == 0.75


OWN = [
    "A well-known T-shirt.",
    "Ein M\u00e4dchen, das l\u00e4uft",
    "\u4e00\u53ea\u732b\u5750\u7740",
    "a caf\u00e9 at 3.5 km",
]


def test_a_perfect_writer_reaches_the_ceiling_where_the_vocabulary_has_every_word():
    rows = [{"image_id": str(i), "captions": [text], "questions": []} for i, text in enumerate(OWN)]
    split, task = Split("test", [None] * 4, rows), tasks.build("captioning")
    plain = tiny.template("captioning", WORDS)
    tokenizer, _ = WORDS.extended(word for text in task.texts(split, plain) for word in WORDS.unknown_words(text))
    rich = tiny.template("captioning", tokenizer)
    cases = task.eval_examples(split, rich)
    found = task.perfect_writer(cases.rows, rich)
    assert (found["truths"], found["out_of_reach"]) == (4, 0) and found["cider_d"] == pytest.approx(10)
    poor = task.perfect_writer(cases.rows, plain)
    assert poor["out_of_reach"] == 4 and poor["cider_d"] < 5 < poor["unhindered"] == pytest.approx(10)
    published = tasks.build("captioning", variant="coco")  # what it was before, and is for COCO
    assert published.perfect_writer(published.eval_examples(split, rich).rows, rich)["cider_d"] < 9


# ---------------------------------------------------------------- limits


def test_limits_are_the_longest_texts_up_to_the_positions():
    captioning, vqa = tasks.build("captioning"), tasks.build("vqa")
    lengths = captioning.lengths(SPLIT, CAPTION)
    assert lengths["max_tokens"].tolist() == [8, 6, 7]  # [DEC] a picture of ... [SEP]
    assert lengths["max_new_tokens"].tolist() == [4, 2, 3]  # the four tokens of the start are given

    def limits(lengths, positions):
        limited = captioning.limited(lengths, positions, CAPTION)
        return limited.max_tokens, limited.max_new_tokens

    assert limits([lengths], 16) == (8, 4) and limits([lengths], 6) == (6, 2)
    assert limits([], 100) == (40, 36)  # nothing to measure
    asked = vqa.limited([vqa.lengths(SPLIT, ANSWER)], 64, ANSWER)
    assert (asked.max_question, asked.max_new_tokens) == (6, 3)
    cut = captioning.limited([lengths], 6, CAPTION).cuts(lengths)
    assert cut["max_tokens"] == {"limit": 6, "longest": 8, "cut": 2, "of": 3} and cut["max_words"]["cut"] == 0
    words = tasks.build("captioning", max_words=2)
    assert words.cuts(words.lengths(SPLIT, CAPTION))["max_words"] == {"limit": 2, "longest": 3, "cut": 1, "of": 3}
    for task, field, value, allowed in (
        ("vqa", "max_new_tokens", 69, "between 1 and 63"), ("vqa", "max_new_tokens", 64, "between 1 and 63"),
        ("vqa", "max_new_tokens", -1, "between 1 and 63"), ("vqa", "max_question", 2, "between 3 and 64"),
        ("captioning", "max_tokens", -1, "between 5 and 64"), ("captioning", "max_tokens", 4, "between 5 and 64"),
        ("captioning", "max_new_tokens", -1, "between 1 and 60"), ("captioning", "max_new_tokens", 61, "between 1 and 60"),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=f"task_options.{field} is {value}; with this base and prompt it must be {allowed}"
        ):
            tasks.build(task, **{field: value}).limited([], 64, tiny.template(task, TOKENIZER))


@pytest.mark.parametrize(
    "model, prompt, n_start",
    [
        (lambda: tiny.model(False), None, 4),
        (lambda: tiny.model(False), "", 1),
        (lambda: test_mplug.MODEL, None, 1),
        (lambda: tiny_vlm.model("paligemma"), None, 0),
        (lambda: tiny_vlm.model("smolvlm"), None, 0),
    ],
)
def test_a_caption_may_end_after_one_token_behind_any_start(model, prompt, n_start):
    def search(name, **options):
        found = tasks.build(name, **options).search(model())
        return len(found.start), found.min_length

    assert search("captioning", prompt=prompt) == (n_start, n_start + 1)
    assert search("captioning", prompt=prompt, min_length=3) == (n_start, 3)
    assert search("vqa")[1] == 0  # an answer may be empty


def test_a_cut_text_does_not_end_with_the_end_token():
    examples = tasks.build("captioning", max_tokens=6).examples(SPLIT, CAPTION)
    targets, weights = examples.arrays["targets"][:, 0], examples.arrays["weights"][:, 0]
    assert targets[0].tolist() == [IDS[w] for w in ("a", "picture", "of", "a", "red")]  # 'dog' is cut off
    assert targets[1].tolist() == [IDS[w] for w in ("a", "picture", "of", "dog", "[SEP]")]
    assert weights[0].tolist() == [0, 0, 0, 1, 1]
    answers = tasks.build("vqa", max_new_tokens=2).examples(SPLIT, ANSWER).arrays
    assert answers["targets"][0].tolist() == [
        [IDS["red"], IDS["[SEP]"]],
        [IDS["blue"], IDS["[SEP]"]],
        [IDS["cat"], IDS["dog"]],
    ]
    # the question encoder's frame stays whole
    cut = tasks.build("vqa", max_question=4).eval_examples(SPLIT, ANSWER).arrays["prompt"]
    assert cut[0].tolist() == [IDS[w] for w in ("[ENC]", "is", "it", "[SEP]")]


@pytest.mark.parametrize("inference, accuracy", [("generate", 0.5), ("rank", 1.0)])
def test_published_scores_have_the_ceiling_of_how_answers_are_made(inference, accuracy):
    """The official scorer compares unanimous answers as they are: "t - shirt" is wrong, and a ranked list has "t-shirt"."""
    task = tasks.build("vqa", variant="official2021", inference=inference)
    rows = task.eval_examples(_answers(["t-shirt"] * 10, ["red"] * 10), WRITES).rows
    found = task.perfect_writer(rows, WRITES)
    assert (found["accuracy"], found["unhindered"]) == (accuracy, 1.0)


def test_the_ceiling_counts_what_the_limit_cuts():
    task = tasks.build("vqa", max_new_tokens=2)
    rows = task.eval_examples(_answers("red t shirt", "red"), WRITES).rows
    found = task.perfect_writer(rows, WRITES)
    assert found["out_of_reach"] == 1 and found["accuracy"] == 0.5 and found["examples"] == [["red t shirt", "red t"]]


def test_what_smolvlm_is_trained_on_it_can_write():
    """ " black" is one token there, and "black" is four: texts are written as they are trained, behind a space."""
    template, split = smolvlm_text.vqa(pretrain_smolvlm.tokenizer()), _answers("black", "two")
    assert [len(template.target(text)[0]) for text in ("black", "two")] == [2, 2]  # with the end
    task = tasks.build("vqa").limited([tasks.build("vqa").lengths(split, template)], 64, template)
    found = task.perfect_writer(task.eval_examples(split, template).rows, template)
    assert (task.max_new_tokens, found["accuracy"], found["out_of_reach"]) == (2, 1.0, 0)
    ranked = tasks.build("vqa", inference="rank", max_new_tokens=2)
    assert ranked.candidates(split, template) == ["black", "two"]


@pytest.mark.parametrize("name, key", [("captioning", "image_id"), ("vqa", "question_id")])
def test_ids_that_repeat_in_a_split_are_named(name, key):
    rows = [
        row | {"image_id": "0", "questions": [_q("q0", "it", ["dog"])], "captions": ["dog"]} for row in SPLIT.rows[:2]
    ]
    task = tasks.build(name)
    cases = task.eval_examples(Split("val", PICTURES[:2], rows), tiny.template(name, TOKENIZER))
    with pytest.raises(ValueError, match=f"split 'val': {key} 'q?0' occurs twice"):
        tasks.check_ids(cases, task.id_key, "val")


def test_a_question_is_read_to_its_end_or_refused():
    model, variables = tiny.model(), {"params": tiny.params()}
    task = tasks.build("vqa", max_question=4, max_new_tokens=3)
    picture = [np.zeros((16, 16, 3), np.uint8)]
    long = " ".join(f"w{i}" for i in range(12))
    cut, whole = (
        jp.generate(model, variables, picture, long, task=one, top=3)
        for one in (task, tasks.build("vqa", max_new_tokens=3))
    )
    assert cut == whole  # what it was tuned with does not matter
    with pytest.raises(ValueError, match="a question has 22 tokens; it must have at most 16"):
        jp.generate(model, variables, picture, " ".join(["w1"] * 20), task=task)
