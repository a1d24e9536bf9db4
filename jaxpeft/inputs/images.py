"""Images: bytes -> uint8 RGB pixels -> square uint8. The model normalises them.

All functions are stateless and thread-safe, and use only numpy and Pillow. Pixels stay uint8 until the batch is made, so that
caches and copies to the device are four times smaller. Axes: Y rows, X columns, C = RGB.

Copies between Pillow and numpy cost a tenth of reading an image, so loaders keep the Pillow image until it is resized:
`opened`, `cropped`, `resize`. The pixels are the same as those of `decode`, which returns arrays.
"""

import dataclasses
import functools
import io
import math
import mimetypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxpeft.runtime import files

Source = bytes | bytearray | memoryview | str | Path
Pixels = np.ndarray | Image.Image  # uint8 image_YXC, or an image of Pillow in mode RGB

MEAN_C = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # the CLIP constants, which BLIP keeps
STD_C = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

BICUBIC = int(Image.Resampling.BICUBIC)
FILTERS = tuple(int(one) for one in Image.Resampling)

# without EPS and PS, for which Pillow runs another program on the file's content, and formats that are not used for photos
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "DIB", "PCX")
MOST_BYTES = 1 << 28  # of an image file

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def decode(source: Source, name: str | None = None) -> np.ndarray:
    """Decode bytes or a file to uint8 RGB image_YXC of the native size, rotated by its EXIF orientation.

    Reads the FORMATS of Pillow (JPEG, PNG, WebP, GIF, BMP, TIFF, ...; the first frame of an animation). Transparency is
    composited on white, 16-bit grey is scaled to 8 bits, palettes and CMYK are converted; ICC profiles are not applied.
    Raises ValueError, naming the file, for truncated, damaged or excessively large data, and its subclass Unsupported for
    other formats, such as HEIC. `name` identifies data that is given as bytes in messages.
    """
    return np.array(opened(source, name), np.uint8)


def rgb(image: Image.Image) -> np.ndarray:
    """The pixels image_YXC of an image of Pillow in any mode, as `decode` reads them from its file."""
    return np.array(_to_rgb(_upright(image)), np.uint8)


def opened(source: Source, name: str | None = None, jpeg_edge: int = 0) -> Image.Image:
    """`decode`, as an image of Pillow in mode RGB. With `jpeg_edge` a JPEG is decoded at the smallest of 1/8, 1/4, 1/2 and 1
    of its size whose shorter side is at least that long, which skips most of the work for the photos of a phone."""
    return _read(source, name, jpeg_edge)[0]


def decode_and_remark(source: Source, name: str | None = None) -> tuple[np.ndarray, str | None]:
    """`decode`, with a remark if 16-bit values are so low that the image is nearly black, else None."""
    image, remark = _read(source, name)
    return np.array(image, np.uint8), remark


def _read(source: Source, name: str | None, jpeg_edge: int = 0) -> tuple[Image.Image, str | None]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source), name or f"{len(source)} bytes"
    else:
        name, size = name or str(source), Path(source).stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"cannot decode the image {name}: {size:,} bytes, more than the limit of {MOST_BYTES:,}")
        data = Path(source).read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_area(image)
            deep = _is_16_bit(image)
            if jpeg_edge:
                image.draft(None, (jpeg_edge, jpeg_edge))  # other formats have no such sizes and ignore it
            image.load()  # Pillow is lazy: a truncated file fails only here
            return _to_rgb(_upright(image)), _too_dark(image) if deep else None
    except Exception as error:  # Pillow's plugins raise nearly every type on damaged data
        if kind := _kind_by_content(data) or (is_unread(name) and _kind_by_name(name)):
            raise Unsupported(f"cannot decode the image {name}: {_why(kind)}") from error
        raise ValueError(f"cannot decode the image {name}: {error}; replace the file or drop its rows") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """The FORMATS that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def endings() -> frozenset[str]:
    """The file extensions, such as '.jpg', of what `decode` reads."""
    # Pillow opens MPO (several JPEGs in one file) as JPEG, without a separate entry
    read = {*_formats(), *(["MPO"] if "JPEG" in _formats() else [])}
    return frozenset(end for end, name in Image.registered_extensions().items() if name in read)


# image formats that `decode` does not read, in addition to those in the system's table of extensions
_OTHER = frozenset(
    ".svg .svgz .heic .heif .hif .heics .heifs .jxl .jxr .wdp .hdp .avif .avifs .bpg .psd .psb .xcf .ai .eps .ps .icns .cur "
    ".dds .qoi .exr .hdr .fits .sgi .xbm .xpm .pcd .dng .raw .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef "
    ".srw".split()
)
_HEIF = "HEIC/HEIF"
_HEIF_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1 heif".split())
_NAMES = {".heic": _HEIF, ".heif": _HEIF, ".hif": _HEIF, ".heics": _HEIF, ".heifs": _HEIF, ".jxl": "JPEG XL"}


class Unsupported(ValueError):
    """An image in an unsupported format, as opposed to a damaged one."""


def is_read(name: str) -> bool:
    """Whether a file name has the extension of an image that `decode` reads."""
    return Path(name).suffix.lower() in endings()


def is_unread(name: str) -> bool:
    """Whether a file name has the extension of an image in an unsupported format."""
    known = Path(name).suffix.lower() in _OTHER or (mimetypes.guess_type(name)[0] or "").startswith("image/")
    return known and not is_read(name)


def why_unread(name: str) -> str:
    """The message for an unsupported image, by its file name: its format and what to do."""
    return _why(_kind_by_name(name))


def _kind_by_name(name: str) -> str:
    end = Path(name).suffix.lower()
    return _NAMES.get(end, end[1:].upper())


def _kind_by_content(data: bytes) -> str | None:
    """The unsupported format of an image by its content, or None: HEIC files of phones are often named .jpg."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return _HEIF
    if data[:2] == b"\xff\x0a" or data[:12] == b"\x00\x00\x00\x0cJXL \r\n\x87\n":
        return "JPEG XL"
    if data[:4] == b"8BPS":
        return "PSD"
    start = data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")
    drawn = start.startswith((b"<svg", b"<?xml", b"<!DOCTYPE svg")) and b"<svg" in start
    return "SVG" if drawn else None


def _why(kind: str) -> str:
    phone = " (a phone can be set to save 'Most Compatible' JPEGs)" if kind == _HEIF else ""
    return f"{kind} images are unsupported; convert them to JPEG or PNG first{phone}"


def _check_area(image: Image.Image) -> None:
    # Pillow itself only warns up to twice the limit, and turning warnings into errors is not thread-safe.
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise ValueError(f"{image.width}x{image.height} pixels, more than the limit of {limit}")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. ImageOps.exif_transpose also writes the tags back, which fails for tags of some cameras."""
    try:
        turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # unreadable tags, good pixels: use the image as stored, as viewers do
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255 instead of scaling
        grey_YX = np.asarray(image).astype(np.int64)
        if grey_YX.min() < 0 or grey_YX.max() > 65535:
            raise ValueError(f"32-bit values {grey_YX.min()}..{grey_YX.max()}; expected 0..65535 (16 bits)")
        image = Image.fromarray(((grey_YX + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257, rounded
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no defined white level; convert the file to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has 16 bits per value; in color Pillow keeps only the upper 8."""
    return image.mode.startswith("I") or any(";16" in str(tile) for tile in image.tile)


def _too_dark(image: Image.Image) -> str | None:
    """A remark if the values of a 16-bit image use less than an eighth of the range, as those of 12-bit sensors do."""
    value_YX = np.asarray(image)
    colour = value_YX[..., : len(image.getbands()) - image.mode.endswith("A")] if value_YX.ndim == 3 else value_YX
    most = int(colour.max()) if image.mode.startswith("I") else 256 * int(colour.max()) + 255
    return f"values up to {most} of 65535" if most < 65536 // 8 else None


def resize(image: Pixels, size: int, resample: int = BICUBIC, longest_edge: int = 0) -> np.ndarray:
    """An image -> uint8 (size, size, 3), antialiased by Pillow's filter `resample`; the aspect ratio is not kept.

    With `longest_edge` the longer side is first resized to it with the aspect ratio kept, as SmolVLM does before it makes the
    frame of the whole image; both steps round to uint8.
    """
    image, resample = _as_pillow(image), Image.Resampling(resample)
    if longest_edge:
        image = image.resize(_kept_ratio(*image.size, longest_edge), resample)
    return np.array(image.resize((size, size), resample))


def _kept_ratio(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) with the longer side `longest`, the other one rounded down, then up to an even number, at least 1."""
    ratio = width / height  # in transformers' order of operations, whose rounding decides the size
    if width >= height:
        other = int(longest / ratio)
        return longest, max(1, other + other % 2)
    other = int(longest * ratio)
    return max(1, other + other % 2), longest


def per_channel(name: str, values: Iterable[float]) -> tuple[float, float, float]:
    """A mean or standard deviation of pixels in [0, 1] as three floats. Raises ValueError for anything else."""
    try:
        one = tuple(float(np.float32(value)) for value in values)  # in the precision in which they are used
    except (TypeError, ValueError):
        one = ()
    if len(one) != 3 or not all(math.isfinite(x) for x in one) or (name.endswith("std") and min(one) <= 0):
        raise ValueError(
            f"{name} is {values!r:.80}; expected three numbers{', above 0' if name.endswith('std') else ''}"
        )
    return one


@dataclasses.dataclass(frozen=True)
class ProcessorKind:
    """What an image processor of transformers does where its file says nothing, and the sizes that it has."""

    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = BICUBIC
    frames: bool = False  # whether it makes frames of `max_image_size` of an image resized to `size.longest_edge`


CLIP = ProcessorKind(tuple(MEAN_C.tolist()), tuple(STD_C.tolist()))  # BLIP
SIGLIP = ProcessorKind()  # PaliGemma
SMOLVLM = ProcessorKind(resample=int(Image.Resampling.LANCZOS), frames=True)  # and Idefics3


def processor_settings(directory: str | Path, kind: ProcessorKind = CLIP) -> dict:
    """Read the image processor files of a Hugging Face directory: {'image_size', 'image_mean', 'image_std',
    'image_resample'}; {} without such files.

    With `kind.frames` also 'image_longest_edge', the longer side after a first resize. `do_image_splitting` is not read: an
    image is always one frame, that of the whole image.

    Where both files are there, processor_config.json is read, as by transformers. Raises ValueError, naming file and key, for
    anything but a square resize and one affine map per channel.
    """
    path = Path(directory) / "processor_config.json"
    raw = _settings(path).get("image_processor")
    if not raw:
        path = Path(directory) / "preprocessor_config.json"
        raw = _settings(path)
    with files.reading(path, "is not a valid image processor configuration"):
        return (_framed if kind.frames else _processor)(path, raw, kind) if raw else {}


def _settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none."""
    return files.read_json(path) if path.is_file() else {}


# the keys of an image processor that are read, and those that do not affect pixels
_READ = {"size", "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
         "do_center_crop", "crop_size", "do_pad", "pad_size", "do_convert_rgb"}  # fmt: skip
_HARMLESS = {"image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "auto_map",
             "data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square",
             "size_divisor", "image_seq_length"}  # fmt: skip
_FRAMES = {"do_image_splitting", "return_row_col_info", "video_sampling"}  # not read where an image is one frame
MOST_EDGE = 4096  # transformers resizes longer sides once more


def _framed(path: Path, raw: dict[str, Any], kind: ProcessorKind) -> dict[str, Any]:
    """`_processor` for SmolVLM: the frame of the whole image, made by two resizes."""
    edges = {}
    for key in ("size", "max_image_size"):
        value = raw.get(key)
        edge = value.get("longest_edge") if isinstance(value, dict) and len(value) == 1 else None
        if type(edge) is not int or not 1 <= edge <= MOST_EDGE:
            raise ValueError(f"{path}: {key} is {value!r}; expected {{'longest_edge': 1 to {MOST_EDGE}}}")
        edges[key] = edge
    raw = {key: value for key, value in raw.items() if key not in _FRAMES | {"max_image_size"}}
    said = _processor(path, raw | {"size": edges["max_image_size"]}, kind)
    return said | {"image_longest_edge": edges["size"]}


def image_tokens(directory: str | Path) -> int | None:
    """The number of image tokens of an image in the processor files of a Hugging Face directory; None if they do not say.

    `image_seq_len` of processor_config.json (SmolVLM) or `image_seq_length` of preprocessor_config.json (PaliGemma).
    """
    for name, key in (("processor_config.json", "image_seq_len"), ("preprocessor_config.json", "image_seq_length")):
        path = Path(directory) / name
        raw = _settings(path)
        nested = raw.get("image_processor")
        for where in (raw, nested if isinstance(nested, dict) else {}):
            found = where.get(key, where.get("image_seq_length"))
            if found is not None:
                if type(found) is not int or found < 1:
                    raise ValueError(f"{path}: the number of image tokens is {found!r}; expected a positive integer")
                return found
    return None


def _processor(path: Path, raw: dict[str, Any], kind: ProcessorKind) -> dict[str, Any]:
    # do_pad, which published BLIPs set, has no effect on images of one size
    for key, neutral in {"do_resize": True, "do_center_crop": False, "pad_size": None, "do_convert_rgb": True}.items():
        if raw.get(key, neutral) not in (neutral, None):
            raise ValueError(f"{path}: {key} is {raw[key]!r}, which is unsupported; images are made square by resizing")
    if unknown := sorted(key for key in raw.keys() - _READ - _HARMLESS if raw[key] not in (None, False)):
        raise ValueError(f"{path}: {', '.join(unknown)} is unsupported; remove it if images do not depend on it")
    said, size = {}, raw.get("size")
    if size is not None:
        sides = {size} if isinstance(size, int) else set(size.values()) if set(size) == {"height", "width"} else set()
        if len(sides) != 1 or not isinstance(next(iter(sides)), int):
            raise ValueError(f"{path}: size is {size!r}; expected equal height and width")
        said["image_size"] = sides.pop()
    scale = raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= 1:
        raise ValueError(f"{path}: rescale_factor is {scale!r}; expected a number in (0, 1]")
    mean_C, std_C = (0.0,) * 3, (1.0,) * 3
    if raw.get("do_normalize", True):
        mean_C = per_channel(f"{path}: image_mean", raw.get("image_mean", kind.image_mean))
        std_C = per_channel(f"{path}: image_std", raw.get("image_std", kind.image_std))
    if scale != 1 / 255:  # (scale p - mean) / std in terms of p / 255
        mean_C, std_C = (tuple(x / (255 * scale) for x in values) for values in (mean_C, std_C))
    resample = raw.get("resample", kind.resample)
    if isinstance(resample, bool) or resample not in FILTERS:
        raise ValueError(f"{path}: resample is {resample!r}; expected a Pillow filter, {FILTERS}")
    return said | {"image_mean": mean_C, "image_std": std_C, "image_resample": resample}


def cropped(
    image: Pixels, rng: np.random.Generator, scale: tuple[float, float] = (0.5, 1.0), flip: bool = True
) -> Image.Image:
    """A random crop of `scale` of the area with aspect ratio 3/4..4/3; with `flip`, mirrored with probability 1/2.

    The result is determined by the state of `rng`. The crop is cut out before it is resized: `Image.resize(box=)` is no faster,
    and its filter also reads pixels outside the box.
    """
    image = _as_pillow(image)
    top, left, height, width = _crop_box(image.height, image.width, rng, scale)
    crop = image.crop((left, top, left + width, top + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and rng.random() < 0.5 else crop


def _crop_box(
    rows: int, columns: int, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Inception-style crop: ten draws of (area, log ratio), else the largest central box with an allowed ratio."""
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = rows * columns * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < height <= rows and 0 < width <= columns:
            return int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1)), height, width
    height, width = min(rows, round(columns / low)), min(columns, round(rows * high))
    return (rows - height) // 2, (columns - width) // 2, height, width


def resize_positions(position_PD: np.ndarray, new_grid: int, mode: str = "bicubic") -> np.ndarray:
    """Position embeddings (1 + g*g, D) -> (1 + new_grid**2, D) for another image size, same dtype (numpy).

    Row 0 (CLS) is kept. The grid is interpolated like torch's `interpolate(mode=mode, align_corners=False)`, with clamped edges
    and no antialiasing: 'bicubic', as BLIP does, is Keys' cubic with a = -0.75 (jax.image and Pillow have a = -0.5);
    'bilinear', as mPLUG does.
    """
    position_PD = np.asarray(position_PD)
    grid = math.isqrt(len(position_PD) - 1) if len(position_PD) > 1 else 0
    if position_PD.ndim != 2 or grid * grid != len(position_PD) - 1 or not grid or new_grid < 1:
        raise ValueError(
            f"position embeddings of shape {position_PD.shape}, new grid {new_grid}; expected (1 + g*g, D) with CLS first "
            "and a new grid of at least 1"
        )
    cls_1D, grid_YXD = position_PD[:1], position_PD[1:].reshape(grid, grid, -1).astype(np.float64)
    weight_NO = _weights(grid, new_grid, mode)
    new_YXD = np.einsum("yi,xj,ijd->yxd", weight_NO, weight_NO, grid_YXD, optimize=True)
    return np.concatenate([cls_1D, new_YXD.reshape(new_grid**2, -1).astype(position_PD.dtype)])


def _weights(old: int, new: int, mode: str, a: float = -0.75) -> np.ndarray:
    """(new, old) matrix of one-dimensional interpolation; a row's weights sum to one."""
    centre_N = (np.arange(new) + 0.5) * old / new - 0.5
    first_N = np.floor(centre_N).astype(int)
    weight_NO = np.zeros((new, old))
    for tap in {"bicubic": (-1, 0, 1, 2), "bilinear": (0, 1)}[mode]:
        x = np.abs(centre_N - first_N - tap)
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        weight_N = 1 - x if mode == "bilinear" else np.where(x <= 1, near, far)
        np.add.at(weight_NO, (np.arange(new), np.clip(first_N + tap, 0, old - 1)), weight_N)
    return weight_NO


def _as_pillow(image: Pixels) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    _check_pixels(image)
    return Image.fromarray(image)


def _check_pixels(image_YXC: np.ndarray) -> None:
    if image_YXC.dtype != np.uint8 or image_YXC.ndim != 3 or image_YXC.shape[-1] != 3 or not image_YXC.size:
        raise ValueError(f"expected an image of uint8 (rows, columns, 3), got {image_YXC.dtype} {image_YXC.shape}")
