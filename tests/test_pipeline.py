"""Reader threads: what they read, in which order, and that evaluation does not wait for them."""

import io
import threading

import grain
import numpy as np
import pytest
from PIL import Image

from jaxpeft.data import base, pipeline
from jaxpeft.inputs import images
from jaxpeft.runtime import host
from jaxpeft.training import evaluate


class Jpegs:
    """Images of JPEG files, which note who reads which of them."""

    def __init__(self, n):
        rng, self.files, self.read = np.random.default_rng(0), [], []
        for _ in range(n):
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(out, "JPEG")
            self.files.append(out.getvalue())

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return images.decode(self.files[i], name=f"of id {i}")

    def opened(self, i):
        self.read.append((i, threading.current_thread()))
        return images.opened(self.files[i], name=f"of id {i}")


def examples_of(jpegs, index):
    index = np.array(index, np.int32)
    arrays = {"image_index": index, "prompt": np.arange(2 * len(index)).reshape(-1, 2)}
    return base.Examples(arrays, pipeline.Resized(jpegs, 16, cache_bytes=0), [])


@pytest.mark.parametrize("threads", [1, 3, 50])
def test_one_pass_is_the_same_with_any_number_of_reader_threads(threads):
    jpegs = Jpegs(11)
    examples = examples_of(jpegs, range(11))
    rows = np.array([0, 2, 3])
    found = list(pipeline.one_pass(examples, 4, rows, threads=threads))
    assert [n for _, n in found] == [4, 4, 3]
    for (batch, _), wanted in zip(found, ([0, 2, 3], [4, 6, 7], [8, 10, 10]), strict=True):
        expected = pipeline.gather(examples, wanted)
        assert batch.keys() == expected.keys() == {"prompt", "image"}
        for name, array in expected.items():
            np.testing.assert_array_equal(batch[name], array)


def test_one_pass_reads_ahead_in_other_threads_and_stops_at_a_broken_file_by_name():
    jpegs = Jpegs(8)
    jpegs.files[6] = jpegs.files[6][:300]
    batches = pipeline.one_pass(examples_of(jpegs, range(8)), 2, threads=2)
    for _ in range(3):
        next(batches)
    assert threading.main_thread() not in {thread for _, thread in jpegs.read}
    with pytest.raises(ValueError, match="cannot decode the image of id 6"):
        next(batches)


def test_an_image_that_rows_of_a_batch_share_is_read_once():
    jpegs = Jpegs(3)
    examples = examples_of(jpegs, [2, 2, 0, 2])
    batch = pipeline.gather(examples, np.arange(4))
    assert [i for i, _ in jpegs.read] == [2, 0]
    np.testing.assert_array_equal(batch["image"], np.stack([examples.images[i] for i in (2, 2, 0, 2)]))


def test_images_kept_as_pillow_have_the_pixels_of_arrays():
    jpegs = Jpegs(2)
    arrays = [images.decode(file) for file in jpegs.files]
    subset = base.Split("train", jpegs, [{}, {}]).take([1, 0]).images
    kept = [pipeline.Resized(source, 16, longest_edge=edge) for source in (subset, arrays[::-1]) for edge in (0, 32)]
    for i in range(2):
        for one, other in (kept[0::2], kept[1::2]):
            np.testing.assert_array_equal(one[i], other[i])
            for kind in ("crop", "crop_flip", "blip"):
                for seed in range(4):
                    rngs = np.random.default_rng(seed), np.random.default_rng(seed)
                    np.testing.assert_array_equal(
                        *(x.augmented(i, kind, r) for x, r in zip((one, other), rngs, strict=True))
                    )
    assert len(jpegs.read) == 2 * 2 * (1 + 3 * 4)  # none through an array


def test_every_core_reads(monkeypatch):
    asked = []

    class Options(grain.ReadOptions):
        def __init__(self, num_threads, prefetch_buffer_size):
            asked.append((num_threads, prefetch_buffer_size))
            super().__init__(num_threads=1, prefetch_buffer_size=1)

    monkeypatch.setattr(grain, "ReadOptions", Options)
    monkeypatch.setattr(host, "cores", lambda: 40)
    examples = examples_of(Jpegs(1), [0] * 400)
    next(pipeline.batches(examples, 2, seed=0))
    next(pipeline.one_pass(examples, 2))
    next(pipeline.one_pass(examples, 200))  # no more threads than batches
    assert asked == [(40, 42), (40, 40), (2, 2)]


def test_a_batch_is_fetched_after_the_next_one_was_started():
    events = []

    class Output:
        def __init__(self, k):
            self.k = k

        def __array__(self, dtype=None, copy=None):
            events.append(f"fetch {self.k}")
            return np.array([self.k, self.k, -1])  # the last row is padding

    def running():
        for k in range(3):
            events.append(f"start {k}")
            yield [Output(k)], 2

    found = [output.tolist() for (output,) in evaluate._fetched(running())]
    assert found == [[0, 0], [1, 1], [2, 2]]
    assert events == ["start 0", "start 1", "fetch 0", "start 2", "fetch 1", "fetch 2"]
    assert list(evaluate._fetched(iter(()))) == []
