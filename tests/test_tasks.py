"""What the two tasks make of a record, by hand."""

import numpy as np
import pytest
import tiny

from jaxpeft import data, evals, tasks
from jaxpeft.datasets import Split
from jaxpeft.text import SPECIAL, Tokenizer

TOKENIZER = Tokenizer.from_words("a picture of red blue dog cat is it".split())
IDS = TOKENIZER.ids
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
    examples = tasks.build("captioning").examples(SPLIT, TOKENIZER)
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
    examples = tasks.build("vqa").examples(SPLIT, TOKENIZER)
    assert examples.arrays["question"][0].tolist() == [IDS[w] for w in ("[ENC]", "is", "it", "red", "[UNK]", "[SEP]")]
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

    examples = tasks.build("vqa").examples(SPLIT, TOKENIZER)
    total, count = tasks.build("vqa").loss(Uniform, None, examples.arrays, None)
    assert count == 2
    np.testing.assert_allclose(total, (0.5 * 2 + 0.25 * 2 + 0.25 * 3 + 1 * 2) * np.log(20), rtol=1e-6)


def test_scores_and_blind_baselines():
    task = tasks.build("vqa")
    cases = task.cases(SPLIT, TOKENIZER)
    assert [row["answers"] for row in cases.rows][1] == ["dog"] * 10
    assert (
        task.score(cases.rows, ["red", "dog"])["accuracy"] > task.score(cases.rows, ["cat", "dog"])["accuracy"] == 0.5
    )
    blind = task.blind(SPLIT, cases.rows)
    assert blind["question_only"]["by_type"]["t"]["n"] == 2 and blind["question_only"]["accuracy"] > 0.9
    captioning = tasks.build("captioning")
    caption_cases = captioning.cases(SPLIT, TOKENIZER)
    assert [row["image_id"] for row in caption_cases.rows] == ["0", "1"]  # a picture without captions is not scored
    assert captioning.score(caption_cases.rows, ["a red dog", "blue cat"])["rouge_l"] > 0.99


@pytest.mark.parametrize("name", ["captioning", "vqa"])
def test_a_split_without_texts_is_named(name):
    with pytest.raises(ValueError, match="split 'train' has no"):
        tasks.build(name).examples(Split("train", PICTURES[:1], SPLIT.rows[2:]), TOKENIZER)


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


def test_padding_of_the_last_batch_never_changes_a_score():
    """Five cases in batches of 2, 3, 5 and 8: the same answers and the same likelihood."""
    model, variables = tiny.model(), {"params": tiny.params()}
    task, split = tasks.build("vqa"), _scenario(5)
    pictures = data.Resized(split.images, 16)
    cases, examples = (
        data.Examples(e.arrays, pictures, e.rows)
        for e in (task.cases(split, tiny.TOKENIZER), task.examples(split, tiny.TOKENIZER))
    )
    found = []
    for size in (2, 5, 8):
        texts = [one["text"] for one in evals.predict(model, variables, task, cases, batch_size=size)]
        found.append((texts, evals.nll(model, variables, task, examples, batch_size=size)))
    assert all(len(texts) == 5 and texts == found[0][0] for texts, _ in found)
    np.testing.assert_allclose([nll for _, nll in found], found[0][1], rtol=1e-6)


def test_generate_answers_and_names_misuse():
    model, variables = tiny.model(), {"params": tiny.params()}
    split = _scenario(3)
    texts = evals.generate(model, variables, split.images, "w1 w2", beams=2, batch_size=2)
    assert len(texts) == 3 and all(word in tiny.TOKENIZER.ids for text in texts for word in text.split())
    with pytest.raises(ValueError, match="give prompts"):
        evals.generate(model, variables, split.images)
    with pytest.raises(ValueError, match="2 prompts for 3 pictures"):
        evals.generate(model, variables, split.images, ["w1", "w2"])
    assert len(SPECIAL) == 7
