"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719) as in BLIP's fine-tuning (Li et al. 2022, arXiv:2201.12086).

For each image two operations are drawn with replacement from ten, and each is applied with probability 1/2, at magnitude 5
of 10. At that magnitude the factors of brightness and sharpness are exactly 1, so both leave the image unchanged.
The functions take a uint8 image_YXC and a number and are thread-safe; the random state is the caller's np.random.Generator.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter, ImageOps

FILL = (128, 128, 128)  # the colour outside the image
OPERATIONS = ("identity", "autocontrast", "equalize", "brightness", "sharpness", "shear_x", "shear_y", "translate_x",
              "translate_y", "rotate")  # fmt: skip
CHANCE = 0.5  # the probability that a drawn operation is applied
TRANSLATE, SHEAR, DEGREES = 10, 0.3, 30  # pixels, pixels per row, degrees: at magnitude 10


def randaugment(image_YXC: np.ndarray, rng: np.random.Generator, n: int = 2, magnitude: float = 5) -> np.ndarray:
    """Apply `n` drawn operations to a uint8 image_YXC, keeping its shape. mPLUG uses magnitude 7."""
    for name in rng.choice(OPERATIONS, n):
        if rng.random() < CHANCE:
            image_YXC = apply(str(name), image_YXC, magnitude, rng)
    return image_YXC


def apply(name: str, image_YXC: np.ndarray, magnitude: float, rng: np.random.Generator) -> np.ndarray:
    """Apply one operation; geometric ones have either sign with probability 1/2."""
    level = magnitude / 10
    if name == "identity":
        return image_YXC
    if name == "autocontrast":
        return _pillow(ImageOps.autocontrast, image_YXC)
    if name == "equalize":
        return _pillow(ImageOps.equalize, image_YXC)
    if name in ("brightness", "sharpness"):
        return (brightness if name == "brightness" else sharpness)(image_YXC, 1.8 * level + 0.1)
    sign = -1 if rng.random() > 0.5 else 1
    if name == "shear_x":
        return affine(image_YXC, [[1, sign * SHEAR * level, 0], [0, 1, 0]])
    if name == "shear_y":
        return affine(image_YXC, [[1, 0, 0], [sign * SHEAR * level, 1, 0]])
    if name == "translate_x":
        return affine(image_YXC, [[1, 0, -sign * TRANSLATE * level], [0, 1, 0]])
    if name == "translate_y":
        return affine(image_YXC, [[1, 0, 0], [0, 1, -sign * TRANSLATE * level]])
    return rotate(image_YXC, sign * DEGREES * level)


def brightness(image_YXC: np.ndarray, factor: float) -> np.ndarray:
    """Multiply every value by `factor` and clip to 0..255."""
    table = (np.arange(256) * factor).clip(0, 255).astype(np.uint8)
    return table[image_YXC] if factor != 1 else image_YXC


def sharpness(image_YXC: np.ndarray, factor: float) -> np.ndarray:
    """Move away from (factor > 1) or towards the image smoothed over 3x3 pixels; the outermost pixels do not change."""
    if factor == 1 or min(image_YXC.shape[:2]) < 3:
        return image_YXC
    smooth = _pillow(lambda image: image.filter(ImageFilter.SMOOTH), image_YXC).astype(np.float32)
    return np.clip(smooth + factor * (image_YXC - smooth), 0, 255).astype(np.uint8)


def rotate(image_YXC: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate counter-clockwise about the centre."""
    a, b = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = image_YXC.shape[0] / 2, image_YXC.shape[1] / 2
    return affine(image_YXC, [[a, b, (1 - a) * x - b * y], [-b, a, b * x + (1 - a) * y]])


def affine(image_YXC: np.ndarray, forward_23: Sequence[Sequence[float]]) -> np.ndarray:
    """Move the pixel at (x, y) to forward_23 @ (x, y, 1): bilinear, blended with FILL at the border, as OpenCV's warpAffine."""
    (a, b, c), (d, e, f) = forward_23
    det = a * e - b * d
    a, b, d, e = e / det, -b / det, -d / det, a / det
    c, f = -(a * c + b * f), -(d * c + e * f)
    # Pillow's coordinates are of pixel corners, not centres. The border is blended with one pixel of FILL around the image.
    c, f = c + 1.5 - 0.5 * (a + b), f + 1.5 - 0.5 * (d + e)
    rows, columns = image_YXC.shape[:2]
    framed = np.empty((rows + 2, columns + 2, 3), np.uint8)
    framed[:] = FILL
    framed[1:-1, 1:-1] = image_YXC
    image = Image.fromarray(framed).transform(
        (columns, rows), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=FILL
    )
    return np.array(image)


def _pillow(function: Callable[[Image.Image], Image.Image], image_YXC: np.ndarray) -> np.ndarray:
    return np.array(function(Image.fromarray(image_YXC)))
