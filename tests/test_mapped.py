"""Rows and arrays in temporary files are those in memory."""

import threading

import numpy as np
import pytest
import tiny

from jaxpeft import tasks
from jaxpeft.data import base, mapped, scenes
from jaxpeft.inputs.processor import Template
from jaxpeft.tasks.base import teacher_forced
from jaxpeft.training import run, setup

ROWS = [{"image_id": str(i), "captions": ["Größe ☃"] * (i % 3), "weight": i / 7} for i in range(7)] + [
    {"image_id": "\udcff", "captions": ["\n\u2028"], "questions": [{"answers": ["a", "b"]}]}
]


def test_rows_in_a_file_are_those_of_a_list():
    rows = mapped.Rows(iter(ROWS))
    assert len(rows) == 8 and list(rows) == ROWS and rows[-1] == ROWS[-1] and list(rows[2:5]) == ROWS[2:5]
    assert list(rows.take([5, 0, 5]).take(np.array([2, 1]))) == [ROWS[5], ROWS[0]]
    assert list(mapped.Rows([])) == []
    with pytest.raises(IndexError):
        rows[8]
    found = []
    threads = [threading.Thread(target=lambda: found.append(list(rows) == ROWS)) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == [True] * 4


@pytest.mark.parametrize("most, kind", [(8, list), (7, mapped.Rows), (0, mapped.Rows)])
def test_many_rows_go_to_a_file(most, kind, monkeypatch):
    monkeypatch.setattr(mapped, "MOST_ROWS", most)
    found = mapped.rows_of(iter(ROWS))
    assert type(found) is kind and list(found) == ROWS


@pytest.fixture(params=["memory", "file"])
def place(request, monkeypatch):
    """Arrays in memory, or in files and made in many pieces."""
    if request.param == "file":
        monkeypatch.setattr(mapped, "MOST_BYTES", 0)
        for module in (mapped, tasks.base):
            monkeypatch.setattr(module, "CHUNK", 2)
    return np.memmap if request.param == "file" else np.ndarray


def test_padded_tokens(place):
    found = base.pad_tokens(iter([[1, 2], [], (3, 4, 5), [6], [7]]), 9)
    assert type(found) is place and found.dtype == np.int32
    assert found.tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5], [6, 9, 9], [7, 9, 9]]
    assert base.pad_tokens([[1]], 0, 2).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match="a sequence of 3 tokens does not fit into 2"):
        base.pad_tokens([[1, 2, 3]], 0, 2)


def test_teacher_forcing_of_different_numbers_of_texts(place):
    texts, weights = (
        [[[5, 1, 2, 3]], [[5, 1], [5, 2, 3], [5, 4, 4, 3]], [[5, 3], [5, 6]]],
        [[1.0], [0.5, 0.25, 0.25], [0.1, 0.9]],
    )
    found = teacher_forced(iter(texts), iter(weights), Template(None, start=(5, 1), stop=(3,), pad=0))
    blank = [0, 0, 0]
    assert found["tokens"].tolist() == [
        [[5, 1, 2], blank, blank],
        [[5, 1, 0], [5, 2, 3], [5, 4, 4]],
        [[5, 3, 0], [5, 6, 0], blank],
    ]
    assert found["targets"].tolist() == [
        [[1, 2, 3], blank, blank],
        [[1, 0, 0], [2, 3, 0], [4, 4, 3]],
        [[3, 0, 0], [6, 0, 0], blank],
    ]
    some = np.float32([[[0, 1, 1], blank, blank], [blank, [0, 0.25, 0], [0, 0.25, 0.25]], [blank, blank, blank]])
    np.testing.assert_array_equal(found["weights"], some)
    assert {str(x.dtype) for x in found.values()} == {"int32", "float32"}
    # without a start, a placeholder stands before every text
    found = teacher_forced([[[7, 8]], [[9]]], [[1.0], [0.5]], Template(None, start=(), stop=(3,), pad=0))
    assert found["tokens"].tolist() == [[[0, 7]], [[0, 9]]] and found["targets"].tolist() == [[[7, 8]], [[9, 0]]]
    assert found["weights"].tolist() == [[[1.0, 1.0]], [[0.5, 0.0]]]


@pytest.mark.parametrize("task", ["captioning", "vqa"])
def test_a_task_makes_the_same_of_rows_in_a_file(task, place):
    split = scenes.load({"n_train": 30}, ["train"])["train"]
    other = base.Split("train", split.images, mapped.Rows(split.rows), source=split.source)
    template = tiny.template(task, tiny.SCENES)
    one = tasks.build(task)
    for first, second in ((split, other), (split.take([4, 2]), other.take(np.array([4, 2])))):
        for make in (one.examples, one.eval_examples):
            x, y = make(first, template), make(second, template)
            assert x.rows == y.rows and x.arrays.keys() == y.arrays.keys()
            for name, array in x.arrays.items():
                np.testing.assert_array_equal(array, y.arrays[name])
        assert list(one.texts(first, template)) == list(one.texts(second, template))
        for name, n in one.lengths(first, template).items():
            np.testing.assert_array_equal(n, one.lengths(second, template)[name])
        rows = one.eval_examples(first, template).rows[:3]
        assert one.guesses(first, rows) == one.guesses(second, rows)
        assert {len(texts) for texts in one.guesses(first, rows).values()} == {len(rows)}
        assert run._of_data(first) == run._of_data(second) == setup.digest([first.source, list(first.rows)])
