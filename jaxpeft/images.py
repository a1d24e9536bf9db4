"""Images: bytes -> uint8 RGB pixels -> square uint8 -> normalised float32, as BLIP does it.

Everything here is plain numpy and Pillow, has no state and may be called from many threads.  Pixels stay uint8 until
the batch is made, so that a cache and the copy to the device are four times smaller.  Axes: Y rows, X columns, C = RGB.
"""

import functools
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

MEAN_C = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # the CLIP constants, which BLIP keeps
STD_C = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

# not EPS or PS, for which Pillow starts another program on what the file says, nor formats that pictures do not come in
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "DIB", "PCX")
MOST_BYTES = 1 << 28  # of a picture file

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def decode(source, name=None):
    """Bytes or a path -> uint8 RGB image_YXC of the native size, turned upright by its EXIF orientation.

    Reads what Pillow reads (JPEG, PNG, WebP, GIF, BMP, TIFF, ...; of an animation the first frame).  Transparency is
    composited on white, 16-bit grey is scaled to 8 bits, palettes and CMYK are converted; ICC profiles are not applied.
    Raises ValueError, naming the file, for data that are truncated, damaged or so large that they look like an attack.
    `name` is how messages call data that came as bytes.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source), name or f"{len(source)} bytes"
    else:
        name, size = name or str(source), Path(source).stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"cannot decode the image {name}: it has {size:,} bytes, more than {MOST_BYTES:,}")
        data = Path(source).read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_area(image)
            image.load()  # Pillow is lazy: a truncated file shows itself only here
            return np.array(_to_rgb(_upright(image)), np.uint8)
    except Exception as error:  # Pillow's plugins raise nearly every type on damaged data
        raise ValueError(f"cannot decode the image {name}: {error}; replace the file or drop its rows") from error


@functools.cache
def _formats():
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_area(image):
    # Pillow itself only warns up to twice the limit, and turning a warning into an error is not thread-safe.
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise ValueError(f"{image.width}x{image.height} pixels, more than the limit of {limit}")


def _upright(image):
    """Not ImageOps.exif_transpose: that one writes the tags back, which fails on tags that cameras do write."""
    try:
        turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # unreadable tags beside good pixels: viewers show the picture as stored, and so do we
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image):
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255 instead of scaling
        grey_YX = np.asarray(image).astype(np.int64)
        if grey_YX.min() < 0 or grey_YX.max() > 65535:
            raise ValueError(f"32-bit values {grey_YX.min()}..{grey_YX.max()}; allowed: 0..65535 (16 bits)")
        image = Image.fromarray(((grey_YX + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257, rounded
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed white level; convert the file to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize(image_YXC, size):
    """uint8 image_YXC -> uint8 (size, size, 3): Pillow's antialiased bicubic, aspect ratio not kept (BLIP's choice)."""
    _check_pixels(image_YXC)
    return np.array(Image.fromarray(image_YXC).resize((size, size), Image.Resampling.BICUBIC))


def normalise(image_YXC):
    """uint8 (..., 3) -> float32 (..., 3): /255, then CLIP's mean and standard deviation per channel."""
    return (np.asarray(image_YXC).astype(np.float32) / 255 - MEAN_C) / STD_C


def augment(image_YXC, rng, scale=(0.5, 1.0), size=None, flip=True):
    """A random crop of `scale` of the area with ratio 3/4..4/3; with `flip`, mirrored half of the time; uint8.

    With `size` the crop is resized as `resize` does (BLIP's training transform without RandAugment); without, it keeps
    its native size.  `rng` is an np.random.Generator: one rng state gives one result.
    """
    _check_pixels(image_YXC)
    top, left, height, width = _crop_box(*image_YXC.shape[:2], rng, scale)
    crop_YXC = image_YXC[top : top + height, left : left + width]
    if flip and rng.random() < 0.5:
        crop_YXC = crop_YXC[:, ::-1]
    crop_YXC = np.ascontiguousarray(crop_YXC)
    return crop_YXC if size is None else resize(crop_YXC, size)


def _crop_box(rows, columns, rng, scale):
    """Inception-style box: ten draws of (area, log ratio), then the largest central box whose ratio is allowed."""
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = rows * columns * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < height <= rows and 0 < width <= columns:
            return int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1)), height, width
    height, width = min(rows, round(columns / low)), min(columns, round(rows * high))
    return (rows - height) // 2, (columns - width) // 2, height, width


def resize_positions(position_PD, new_grid):
    """Position embeddings (1 + g*g, D) -> (1 + new_grid**2, D) for another image size, same dtype (numpy).

    Row 0 (CLS) is kept.  The grid is interpolated as torch's `interpolate(mode='bicubic', align_corners=False)` does:
    Keys' cubic with a = -0.75, edges clamped, no antialias; not the cubic (a = -0.5) of jax.image and Pillow.
    """
    position_PD = np.asarray(position_PD)
    grid = math.isqrt(len(position_PD) - 1) if len(position_PD) > 1 else 0
    if position_PD.ndim != 2 or grid * grid != len(position_PD) - 1 or not grid or new_grid < 1:
        raise ValueError(
            f"position embeddings of shape {position_PD.shape}, new grid {new_grid}; expected (1 + g*g, D), CLS first, "
            "and a new grid of at least 1"
        )
    cls_1D, grid_YXD = position_PD[:1], position_PD[1:].reshape(grid, grid, -1).astype(np.float64)
    weight_NO = _cubic_weights(grid, new_grid)
    new_YXD = np.einsum("yi,xj,ijd->yxd", weight_NO, weight_NO, grid_YXD, optimize=True)
    return np.concatenate([cls_1D, new_YXD.reshape(new_grid**2, -1).astype(position_PD.dtype)])


def _cubic_weights(old, new, a=-0.75):
    """(new, old) matrix of one-dimensional bicubic interpolation; a row's weights sum to one."""
    centre_N = (np.arange(new) + 0.5) * old / new - 0.5
    first_N = np.floor(centre_N).astype(int)
    weight_NO = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        x = np.abs(centre_N - first_N - tap)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        np.add.at(weight_NO, (np.arange(new), np.clip(first_N + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return weight_NO


def _check_pixels(image_YXC):
    if image_YXC.dtype != np.uint8 or image_YXC.ndim != 3 or image_YXC.shape[-1] != 3 or not image_YXC.size:
        raise ValueError(f"expected uint8 pixels (rows, columns, 3), got {image_YXC.dtype} {image_YXC.shape}: decode")
