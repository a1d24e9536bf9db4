import collections
import pathlib
import pickle
import threading

import numpy as np
import pytest
from PIL import Image

from jaxpeft.data import base, pipeline, randaugment
from jaxpeft.inputs import images

GOLDEN = pathlib.Path(__file__).parent / "golden/randaugment.npz"
OURS = {
    "shear_x": lambda x: randaugment.affine(x, [[1, 0.15, 0], [0, 1, 0]]),
    "shear_y": lambda x: randaugment.affine(x, [[1, 0, 0], [-0.15, 1, 0]]),
    "translate_x": lambda x: randaugment.affine(x, [[1, 0, -5], [0, 1, 0]]),
    "translate_y": lambda x: randaugment.affine(x, [[1, 0, 0], [0, 1, 3.5]]),
    "rotate": lambda x: randaugment.rotate(x, 15),
    "rotate_back": lambda x: randaugment.rotate(x, -15),
    "sharpness_low": lambda x: randaugment.sharpness(x, 0.46),
    "sharpness_high": lambda x: randaugment.sharpness(x, 1.36),
}


class Fixed:
    """A random state whose numbers are given: `random()` in turn, and the operations drawn."""

    def __init__(self, names, *numbers):
        self._names, self._numbers = names, list(numbers)

    def choice(self, names, n):
        assert tuple(names) == randaugment.OPERATIONS and n == len(self._names)
        return self._names

    def random(self):
        return self._numbers.pop(0)


def picture(rows=21, columns=26, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", OURS)
def test_operations_are_opencvs_to_one_level(name):
    golden = np.load(GOLDEN)
    ours = OURS[name](golden["image"])
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - golden[name]).max() <= 1
    assert np.abs(golden["image"].astype(int) - golden[name]).max() > 5


def test_operations_are_opencvs_live():
    pytest.importorskip("cv2", reason="compares with the installed OpenCV: pip install opencv-python-headless")
    import golden.make_randaugment as maker

    image = picture(40, 33)
    for name, expected in maker.expected(image).items():
        assert np.abs(OURS[name](image).astype(int) - expected).max() <= 1, name


def test_two_are_drawn_with_replacement_and_each_applied_half_of_the_time(monkeypatch):
    applied = []
    monkeypatch.setattr(randaugment, "apply", lambda name, x, m, rng: (applied.append((name, m)), x)[1])
    n = 4000
    for seed in range(n):
        randaugment.randaugment(picture(), np.random.default_rng(seed))
    counts = collections.Counter(name for name, _ in applied)
    assert set(counts) == set(randaugment.OPERATIONS) and {m for _, m in applied} == {5}
    assert len(applied) / n == pytest.approx(1.0, abs=0.045)  # 2 * 1/2; four standard errors
    for count in counts.values():
        assert count / n == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("name", ["brightness", "sharpness", "identity"])
def test_at_blips_magnitude_these_change_nothing(name):
    image = picture()
    np.testing.assert_array_equal(randaugment.randaugment(image, Fixed([name, name], 0.1, 0.1)), image)
    if name != "identity":
        assert not np.array_equal(randaugment.apply(name, image, 7, np.random.default_rng(0)), image)


@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_geometry_goes_either_way_and_comes_back(name):
    ramp = np.clip(np.arange(40)[:, None, None] * 3 + np.arange(40)[None, :, None] * 2 + np.zeros(3), 0, 255).astype(
        np.uint8
    )
    one, other = (randaugment.randaugment(ramp, Fixed([name, "identity"], 0.1, side, 0.9)) for side in (0.2, 0.8))
    assert not np.array_equal(one, ramp) and not np.array_equal(one, other)
    there = randaugment.apply(name, ramp, 5, Fixed([], 0.2))
    back = randaugment.apply(name, there, 5, Fixed([], 0.8))
    middle = slice(14, 26)
    assert np.abs(back[middle, middle].astype(int) - ramp[middle, middle]).max() <= 2


def test_sizes_translate_five_pixels_and_turn_fifteen_degrees():
    image = picture(30, 30)
    moved = randaugment.apply("translate_x", image, 5, Fixed([], 0.2))  # 0.2: the positive way, which moves left
    np.testing.assert_array_equal(moved[:, :-5], image[:, 5:])
    assert (moved[:, -5:] == 128).all()
    image = np.zeros((61, 61, 3), np.uint8)
    image[30, 40:60] = 255
    turned = randaugment.apply("rotate", image, 5, Fixed([], 0.2))
    y, x = np.argwhere(turned[..., 0] > 200).mean(0) - 30.5
    assert np.degrees(np.arctan2(-y, x)) == pytest.approx(15 + np.degrees(np.arctan2(0.5, 19)), abs=0.3)


def test_autocontrast_and_equalize_stretch_each_channel():
    image = picture() // 4 + np.array([10, 60, 120], np.uint8)
    for name in ("autocontrast", "equalize"):
        out = randaugment.apply(name, image, 5, None)
        assert out.min((0, 1)).tolist() == [0, 0, 0] and out.max((0, 1)).min() >= 250


def test_crops_are_of_the_native_picture_and_one_state_gives_one_result():
    fine = np.zeros((64, 128, 3), np.uint8)
    fine[:, ::2] = 255  # at 16 pixels this is grey; a crop of it is grey too, whatever the order
    split = [fine, picture(50, 70)]
    resized = pipeline.Resized(split, 16)
    examples = base.Examples({"image_index": np.array([1, 1])}, resized, [])
    for kind in ("crop", "crop_flip", "blip"):
        one, again = (pipeline.gather(examples, [0, 1], kind, [3, 4])["image"] for _ in range(2))
        np.testing.assert_array_equal(one, again)
        assert one.shape == (2, 16, 16, 3) and not np.array_equal(one[0], one[1])
        # a row depends on its own seed alone, so that any host can make it
        np.testing.assert_array_equal(pipeline.gather(examples, [1], kind, [4])["image"][0], one[1])
    expected = images.resize(images.cropped(split[1], _row(3)), 16)
    np.testing.assert_array_equal(pipeline.gather(examples, [0], "crop_flip", [3])["image"][0], expected)
    rng = _row(3)
    expected = randaugment.randaugment(images.resize(images.cropped(split[1], rng), 16), rng)
    np.testing.assert_array_equal(pipeline.gather(examples, [0], "blip", [3])["image"][0], expected)


def test_pictures_go_to_worker_processes():
    resized = pipeline.Resized([picture(30, 40)], 16)
    again = pickle.loads(pickle.dumps(resized))
    np.testing.assert_array_equal(again[0], resized[0])
    one, other = (x.augmented(0, "blip", np.random.default_rng(1)) for x in (resized, again))
    np.testing.assert_array_equal(one, other)


def _row(seed):
    return np.random.Generator(np.random.Philox(key=seed))


def test_threads_do_not_disturb_each_other():
    image = picture(60, 60)
    expected = [randaugment.randaugment(image, np.random.default_rng(seed)) for seed in range(40)]
    found = [None] * 40

    def work(part):
        for seed in range(part, 40, 4):
            found[seed] = randaugment.randaugment(image, np.random.default_rng(seed))

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_tiny_pictures_survive():
    for shape in ((1, 1), (2, 5), (3, 3)):
        image = picture(*shape)
        for name in randaugment.OPERATIONS:
            assert randaugment.apply(name, image, 9, np.random.default_rng(0)).shape == image.shape
    assert Image.fromarray(randaugment.rotate(picture(), 0)).size == (26, 21)
