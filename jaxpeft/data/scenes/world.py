"""The content of a `scenes` image and how it is drawn: objects, quadrants, held-out pairs, pixels.

Everything is a pure function of (seed, split, index): each item has its own counter-based random streams (Philox, keyed by
these three and a purpose), so items are the same in whatever order and by however many processes they are generated.
Only `Generator.random` is used, whose values follow directly from the raw bits, so that a NumPy release that changes
another method does not change the data.
"""

import dataclasses
import functools
import math

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLORS = {
    "red": (232, 36, 36),
    "green": (34, 150, 40),
    "blue": (44, 70, 236),
    "yellow": (255, 228, 36),
    "purple": (178, 44, 204),
    "cyan": (44, 222, 232),
    "white": (252, 252, 252),
    "black": (12, 12, 12),
}
SIZES = {"small": 6.5, "large": 10.5}  # radius in pixels
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
HELD_PAIRS = frozenset((shape, (*COLORS,)[(3 * i + 4) % 8]) for i, shape in enumerate(SHAPES))  # each colour once
MID_MARGIN = 4.5  # the least distance of a centre from the mid lines, so that its quadrant is unambiguous
REACH = 1.12  # every outline fits in a disc of this many radii
# 'text' and 'swap' have no images: they are the scenes of the text-only corpus, and of captions given to another image.
SPLIT_IDS = {"pretrain": 0, "train": 1, "val": 2, "test": 3, "test_comp": 4, "text": 5, "swap": 6}
STREAM_IDS = {"objects": 0, "pixels": 1, "web": 2, "human": 3, "questions": 4, "text": 5, "clean": 6, "noise": 7}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object. x and y (centre) and radius in pixels, y downwards; angle in degrees; shade multiplies the colour."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    angle: float
    shade: float

    @property
    def pair(self):
        return self.shape, self.color

    @property
    def radius(self):
        return SIZES[self.size]

    @property
    def quadrant(self):
        return QUADRANTS[2 * (self.y > SIDE / 2) + (self.x > SIDE / 2)]


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of image `index` of `split` with `seed`: one to four objects that do not touch."""

    split: str
    index: int
    seed: int
    objects: tuple[Thing, ...]


def stream(split, index, seed, name):
    """The random generator of one item and one purpose. The 128-bit Philox key is (seed; split, purpose, index), not a
    hash of them, so two items never share a stream."""
    if split not in SPLIT_IDS:
        raise ValueError(f"unknown scenes split {split!r}; use one of {', '.join(SPLIT_IDS)}")
    if not 0 <= index < 1 << 48 or not 0 <= seed < 1 << 64:
        raise ValueError(f"scenes index is {index} and seed is {seed}; they must be in [0, 2**48) and [0, 2**64)")
    key = np.array([seed, SPLIT_IDS[split] << 56 | STREAM_IDS[name] << 48 | index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def chance(rng, probability):
    """True with that probability."""
    return rng.random() < probability


def pick(rng, items, weights=None):
    """One of a sequence, uniformly or by weight."""
    if weights is None:
        return items[int(rng.random() * len(items))]
    point = rng.random() * sum(weights)
    for item, weight in zip(items, weights, strict=True):
        point -= weight
        if point < 0:
            return item
    return items[-1]


def shuffled(rng, items):
    """A new list with the items in random order."""
    return [items[i] for i in np.argsort(rng.random(len(items)), kind="stable")]


@functools.lru_cache(maxsize=16)  # captions and questions of a row have the same scene
def scene(split, index, seed=0):
    """The Scene of (split, index, seed). Held-out pairs occur in 'test_comp' only, and there in every scene."""
    rng = stream(split, index, seed, "objects")
    number = pick(rng, (1, 2, 3, 4), (0.15, 0.3, 0.3, 0.25))
    kinds = _kinds(rng, number, comp=split == "test_comp")
    sizes = [pick(rng, (*SIZES,)) for _ in range(number)]
    centres = _centres(rng, [SIZES[size] for size in sizes])
    objects = []
    for (shape, color), size, (x, y) in zip(kinds, sizes, centres, strict=True):
        angle, shade = round(24 * rng.random() - 12, 1), round(0.84 + 0.16 * rng.random(), 2)
        objects.append(Thing(shape, color, size, x, y, angle, shade))
    return Scene(split, index, seed, tuple(objects))


def _kinds(rng, number, comp):
    """(shape, colour) of each object. Half of the later ones repeat the shape or the colour of an earlier one, so that
    counting, comparing and telling apart need more than finding one colour."""
    kinds = [pick(rng, sorted(HELD_PAIRS))] if comp else []
    while len(kinds) < number:
        shape, color = pick(rng, SHAPES), pick(rng, (*COLORS,))
        if kinds and chance(rng, 0.5):
            old_shape, old_color = pick(rng, kinds)
            shape, color = (old_shape, color) if chance(rng, 0.5) else (shape, old_color)
        if comp or (shape, color) not in HELD_PAIRS:
            kinds.append((shape, color))
    return kinds


def _centres(rng, radii, tries=60):
    """Centres that keep objects inside the image, off the mid lines and apart. After `tries` misses for one object, each
    object is put in the middle of a quadrant, which always fits."""
    centres = []
    for radius in radii:
        for _ in range(tries):
            x, y = (_coordinate(rng, radius) for _ in range(2))
            if all(
                math.hypot(x - a, y - b) > REACH * (radius + other) + 1
                for (a, b), other in zip(centres, radii, strict=False)
            ):
                centres.append((x, y))
                break
        else:
            return shuffled(rng, [(18.0, 18.0), (46.0, 18.0), (18.0, 46.0), (46.0, 46.0)])[: len(radii)]
    return centres


def _coordinate(rng, radius):
    """Uniform on the two intervals between border and mid line; one decimal, so that a spec prints the same everywhere."""
    low, high = REACH * radius + 0.5, SIDE / 2 - MID_MARGIN
    value = round(low + (high - low) * rng.random(), 1)
    return round(SIDE - value, 1) if chance(rng, 0.5) else value


def _arc(radius, start, stop, steps=40, x=0.0, y=0.0):
    angles = np.radians(np.linspace(start, stop, steps))
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)


@functools.cache
def _outline(shape):
    """The unit outline as points (point, xy), y downwards."""
    if shape == "circle":
        return _arc(1.0, 0, 360)
    if shape == "square":
        return 0.84 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        return np.array([(0, -1.05), (1.02, 0.78), (-1.02, 0.78)]) * 0.88 + (0, 0.08)
    if shape == "cross":
        a, b = 0.32, 1.05
        return np.array(
            [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
        )
    if shape == "star":
        radii = np.tile([1.12, 0.46], 5)[:, None]
        return radii * _arc(1.0, -90, 234, steps=10)
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 48)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -y - 2.5], 1) / 16
    if shape == "moon":  # a disc less a disc shifted to the right; both arcs end where the circles cross
        shift, inner = 0.62, 0.86
        cross = math.acos((1 + shift**2 - inner**2) / (2 * shift))
        tip = math.degrees(math.atan2(math.sin(cross), math.cos(cross) - shift))
        rim = _arc(1.08, math.degrees(cross), 360 - math.degrees(cross), x=0.1)
        return np.concatenate([rim, _arc(1.08 * inner, 360 - tip, tip, x=0.1 + 1.08 * shift)])
    raise ValueError(f"unknown shape {shape!r}; use one of {', '.join(SHAPES)}")


def render(spec):
    """Draw a Scene as a uint8 image_YXC of 64x64 RGB: a grey ground with a slight tint and gradient, and noise over all.

    Specs and text do not depend on Pillow. The pixels do (its polygon fill): compare them with the same Pillow version.
    """
    rng = stream(spec.split, spec.index, spec.seed, "pixels")
    direction, slope = 2 * np.pi * rng.random(), 30 * rng.random()
    ramp = np.linspace(-0.5, 0.5, SIDE)
    ramp_YX = slope * (np.sin(direction) * ramp[:, None] + np.cos(direction) * ramp[None, :])
    ground_YXC = ramp_YX[..., None] + 98 + 36 * rng.random() + 14 * (rng.random(3) - 0.5)
    canvas = Image.fromarray(ground_YXC.round().astype(np.uint8)).resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    for thing in spec.objects:
        fill = tuple(round(value * thing.shade) for value in COLORS[thing.color])
        if thing.shape == "ring":  # the only outline with a hole; as one polygon it shows a seam
            rim, x, y = 2.16 * thing.radius, 2 * thing.x - 0.5, 2 * thing.y - 0.5
            draw.ellipse((x - rim, y - rim, x + rim, y + rim), outline=fill, width=round(rim * 0.48))
            continue
        c, s = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
        points = thing.radius * _outline(thing.shape) @ np.array([(c, s), (-s, c)]) + (thing.x, thing.y)
        # Pixel (i, j) of the canvas covers [i, i + 1), but Pillow's polygon puts its centre at i: hence the 0.5.
        draw.polygon((2 * points - 0.5).ravel().tolist(), fill=fill)
    noise_YXC = 12 * rng.random((SIDE, SIDE, 1)) - 6
    return (np.asarray(canvas.reduce(2)) + noise_YXC).round().clip(0, 255).astype(np.uint8)
