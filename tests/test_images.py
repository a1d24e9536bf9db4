import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxpeft.inputs import images
from jaxpeft.models import vit

GOLDEN = np.load(Path(__file__).parent / "golden" / "positions.npz")


def picture(rows=20, columns=30):
    """Smooth, so that lossy formats come close, and without any symmetry."""
    y, x = np.mgrid[0:rows, 0:columns]
    return np.stack([y * 250 // rows, x * 250 // columns, (x + 2 * y) * 80 // (columns + rows)], -1).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = images.decode(encoded(picture(), kind, **options))
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, picture())


def test_jpeg_is_close_and_a_path_equals_its_bytes(tmp_path):
    data = encoded(picture(), "JPEG", quality=95)
    (tmp_path / "a.jpg").write_bytes(data)
    assert np.abs(images.decode(data).astype(int) - picture()).mean() < 3
    np.testing.assert_array_equal(images.decode(tmp_path / "a.jpg"), images.decode(data))


@pytest.mark.parametrize(
    "edge, part", [(0, 1), (900, 1), (101, 1), (100, 2), (51, 2), (50, 4), (26, 4), (25, 8), (1, 8)]
)
@pytest.mark.parametrize("kind", ["plain", "progressive", "4:4:4", "grey", "cmyk", "turned", "several images"])
def test_jpeg_edge_is_the_least_length_of_the_shorter_side(edge, part, kind):
    image, exif, size = Image.fromarray(picture(200, 251)), Image.Exif(), (-(-251 // part), 200 // part)
    image = image.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    if kind == "turned":
        exif[0x0112], size = 6, size[::-1]
    options = {"progressive": {"progressive": True}, "4:4:4": {"subsampling": 0}}.get(kind, {})
    if kind == "several images":  # as some phones write
        data = encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)])
    else:
        data = encoded(image, "JPEG", exif=exif, **options)
    found = images.opened(data, jpeg_edge=edge)
    assert found.size == size and found.mode == "RGB"
    whole = images.resize(images.opened(data), 16).astype(int)
    assert np.abs(images.resize(found, 16) - whole).max() <= 6  # of 255: edges of a smooth image


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_jpeg_edge_changes_nothing_in_other_formats(kind):
    data = encoded(picture(80, 100), kind)
    np.testing.assert_array_equal(np.array(images.opened(data, jpeg_edge=1)), images.decode(data))


# EXIF: what turns the stored pixels into the picture; 6 = rotate 90 degrees clockwise
UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
           5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
           7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a)}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    plain = images.decode(encoded(picture(), kind, **options))
    turned = images.decode(encoded(picture(), kind, exif=exif, **options))
    np.testing.assert_array_equal(turned, UPRIGHT[orientation](plain))


def test_unreadable_exif_leaves_the_picture_as_stored():
    np.testing.assert_array_equal(images.decode(encoded(picture(), exif=b"Exif\x00\x00MM\x00*\xff\xff")), picture())


def test_grey_is_repeated_and_black_and_white_is_full_range():
    grey = picture()[..., 1]
    np.testing.assert_array_equal(images.decode(encoded(grey)), np.repeat(grey[..., None], 3, -1))
    bits = Image.fromarray(grey > 100)
    assert bits.mode == "1"
    assert set(np.unique(images.decode(encoded(bits)))) == {0, 255}


def test_transparency_is_white_in_every_mode():
    alpha = np.zeros((20, 30), np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 255, 128
    decoded = images.decode(encoded(np.dstack([picture(), alpha]))).astype(int)
    np.testing.assert_array_equal(decoded[:, :10], picture()[:, :10])
    np.testing.assert_allclose(decoded[:, 10:20], picture()[:, 10:20] * (128 / 255) + 127, atol=1.01)
    assert (decoded[:, 20:] == 255).all()
    grey_alpha = Image.merge("LA", [Image.new("L", (2, 1), 0), Image.fromarray(np.array([[255, 0]], np.uint8))])
    np.testing.assert_array_equal(images.decode(encoded(grey_alpha))[0, :, 0], [0, 255])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for transparent in (1, b"\xff\x00"):  # one colour, and one alpha per colour
        decoded = images.decode(encoded(palette, transparency=transparent))
        np.testing.assert_array_equal(decoded, [[[10, 20, 30], [255, 255, 255]]])
    colour_key = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    decoded = images.decode(encoded(colour_key, transparency=(4, 5, 6)))
    np.testing.assert_array_equal(decoded, [[[1, 2, 3], [255, 255, 255]]])


def test_palette_and_first_frame_of_a_gif():
    frames = [Image.new("RGB", (6, 4), colour).quantize(4) for colour in ((200, 10, 30), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert images.decode(data).shape == (4, 6, 3)
    assert (images.decode(data) == [200, 10, 30]).all()
    np.testing.assert_array_equal(images.decode(encoded(frames[0])), images.decode(data))


ENDINGS = sorted(images.endings())


@pytest.mark.parametrize("end", ENDINGS)
def test_every_ending_is_that_of_a_picture_that_is_read(tmp_path, end):
    kind = Image.registered_extensions()[end]
    for name in (f"a{end}", f"b.x{end.upper()}"):
        assert images.is_read(name) and not images.is_unread(name)
        Image.fromarray(picture(16, 16)).save(tmp_path / name, kind)
        decoded = images.decode(tmp_path / name)
        assert decoded.shape == (16, 16, 3)
        assert np.abs(decoded.astype(int) - picture(16, 16)).mean() < (
            12 if kind in ("JPEG", "GIF", "AVIF", "MPO") else 3
        )


def test_what_people_have_is_read_or_known():
    read = "jpg jpeg jpe jfif mpo png apng webp gif bmp dib tif tiff ppm pgm pbm pnm jp2 j2k avif ico tga pcx".split()
    assert {f".{end}" for end in read} <= images.endings()
    for end in "heic HEIF hif jxl svg psd ai eps dng CR2 cr3 nef arw raf rw2 icns cur dds qoi exr".split():
        assert images.is_unread(f"a.{end}") and not images.is_read(f"a.{end}")
    for name in ("a.txt", "a.csv", "a.mp4", "jpg", "a.jpg.txt", "a"):
        assert not images.is_read(name) and not images.is_unread(name)


def ftyp(brand):
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + bytes(40)


@pytest.mark.parametrize("data, name, kind", [
    *((ftyp(brand), "IMG_1.jpg", "HEIC/HEIF") for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")),
    (b"", "a.HEIC", "HEIC/HEIF"), (b"\xff\x0a" + bytes(20), "a.png", "JPEG XL"), (b"8BPS" + bytes(20), "a.jpg", "PSD"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "a", "JPEG XL"), (b"II*\x00 nothing", "dir.x/a.Cr2", "CR2"),
    (b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg/>', "a.png", "SVG"), (b"<svg xmlns=''/>", "a", "SVG"),
])  # fmt: skip
def test_a_kind_that_is_not_read_is_named_with_the_remedy(tmp_path, data, name, kind):
    phone = " (a phone can be set to save 'Most Compatible' JPEGs)" if kind == "HEIC/HEIF" else ""
    said = f"{kind} images are unsupported; convert them to JPEG or PNG first{phone}"
    with pytest.raises(images.Unsupported) as error:
        images.decode(data, name=name)
    assert str(error.value) == f"cannot decode the image {name}: {said}"
    if images.is_unread(name):
        assert images.why_unread(name) == said


@pytest.mark.parametrize(
    "data, name", [(b"\xff\xd8 no picture", "a.jpg"), (b"<html><svg/></html>", "a.png"), (b"", "a")]
)
def test_a_damaged_picture_is_of_no_other_kind(data, name):
    with pytest.raises(ValueError, match="replace the file or drop its rows") as error:
        images.decode(data, name=name)
    assert not isinstance(error.value, images.Unsupported)


def test_cmyk_jpeg_becomes_rgb():
    cmyk = Image.fromarray(picture()).convert("CMYK")
    decoded = images.decode(encoded(cmyk, "JPEG", quality=100, subsampling=0))
    assert np.abs(decoded.astype(int) - picture()).max() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    grey = np.array([[0, 128, 129, 257, 300, 32896, 65406, 65407, 65535]], np.uint16)
    decoded = images.decode(encoded(grey, kind))
    np.testing.assert_array_equal(decoded[0, :, 0], np.rint(grey[0] / 257))
    assert decoded[0, 5, 0] == 128


def deep_png(value_YXC):
    """A PNG of 16 bits a value with 3 or 4 channels, which Pillow does not write."""
    rows, columns, channels = value_YXC.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in value_YXC)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", columns, rows, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("most, dark", [(0, True), (4095, True), (8191, True), (8192, False), (65535, False)])
def test_16_bits_of_which_an_eighth_is_used_are_remarked_on(most, dark):
    grey = np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)
    alpha = np.full((8, 8, 1), 65535, np.uint16)
    colour = np.dstack([grey // 2, grey, grey * 0])
    pgm = b"P5 8 8 65535\n" + grey.astype(">u2").tobytes()
    files = {
        "png": encoded(grey),
        "tiff": encoded(grey, "TIFF"),
        "pgm": pgm,
        "32 bits": encoded(grey.astype(np.int32), "TIFF"),
    }
    for kind, data in (files | {"rgb": deep_png(colour), "rgba": deep_png(np.dstack([colour, alpha]))}).items():
        pixels_YXC, remark = images.decode_and_remark(data)
        np.testing.assert_array_equal(pixels_YXC, images.decode(data))
        upper = most if "rgb" not in kind else most | 255  # Pillow keeps the upper 8 bits of colours
        assert remark == (f"values up to {upper} of 65535" if dark else None), kind
    assert images.decode_and_remark(encoded((grey >> 8).astype(np.uint8)))[1] is None


def test_pixels_without_a_white_level_are_refused():
    with pytest.raises(ValueError, match="x.tif: floating-point"):
        images.decode(encoded(np.ones((2, 2), np.float32), "TIFF"), name="x.tif")
    with pytest.raises(ValueError, match="65535"):
        images.decode(encoded(np.full((2, 2), 70000, np.int32), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.95])
def test_truncated_files_name_themselves(tmp_path, kind, part):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    data = encoded(noise, kind)
    (tmp_path / "cut.bin").write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match="cut.bin"):
        images.decode(tmp_path / "cut.bin")


def test_damaged_bytes_and_other_files_are_refused(tmp_path):
    data = bytearray(encoded(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)))
    data[len(data) // 2] ^= 255
    for broken in (bytes(data), b"<html>not found</html>"):
        with pytest.raises(ValueError, match="photo.png"):
            images.decode(broken, name="photo.png")
    with pytest.raises(FileNotFoundError):
        images.decode(tmp_path / "absent.png")


def test_a_decompression_bomb_is_an_error_under_any_warning_filter(monkeypatch):
    data = encoded(picture())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)  # 600 pixels: Pillow alone would only warn up to 1198
    for action in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            with pytest.raises(ValueError, match="bomb.png.*(exceeds|more than the) limit"):
                images.decode(data, name="bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert images.decode(data).shape == (20, 30, 3)


def normalised(image_YXC):
    """The pixels as the image tower reads them."""
    return np.asarray(vit.normalised(image_YXC[None], vit.VitConfig()))[0]


@pytest.mark.parametrize("rows, columns, size", [(37, 53, 24), (11, 9, 32)])
def test_resize_and_normalise_equal_the_reference_processor(rows, columns, size):
    image = (np.arange(rows * columns * 3) ** 2 % 251).astype(np.uint8).reshape(rows, columns, 3)
    resized = images.resize(image, size)
    assert resized.shape == (size, size, 3) and resized.dtype == np.uint8
    ours = normalised(resized)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, GOLDEN[f"blip_{rows}_{columns}_{size}"], rtol=0, atol=1e-6)


def test_normalise_by_hand():
    white_black = normalised(np.array([[[255, 255, 255], [0, 0, 0]]], np.uint8))
    np.testing.assert_allclose(white_black[0, 0, 0], (1 - 0.48145466) / 0.26862954, rtol=1e-6)
    np.testing.assert_allclose(white_black[0, 1, 2], -0.40821073 / 0.27577711, rtol=1e-6)


@pytest.mark.parametrize("old, new", [(14, 24), (24, 30), (8, 5), (2, 7), (5, 5), (1, 3)])
def test_positions_equal_torch(old, new):
    grid = (np.arange(old * old * 3) ** 2 % 251 / 128 - 1).reshape(-1, 3)
    position = np.concatenate([[[7, 8, 9]], grid])
    resized = images.resize_positions(position, new)
    assert resized.shape == (1 + new * new, 3)
    np.testing.assert_array_equal(resized[0], [7, 8, 9])
    np.testing.assert_allclose(resized[1:], GOLDEN[f"grid_{old}_{new}"], rtol=0, atol=1e-12)
    single = images.resize_positions(position.astype(np.float32), new)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single[1:], GOLDEN[f"grid_{old}_{new}"], rtol=0, atol=1e-6)


def test_positions_equal_torch_live():
    torch = pytest.importorskip("torch", reason="torch is only in the environment that makes golden numbers")
    grid = np.random.default_rng(0).standard_normal((7, 7, 4))
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(grid).permute(2, 0, 1)[None], size=(12, 12), mode="bicubic", align_corners=False
    )
    ours = images.resize_positions(np.concatenate([np.zeros((1, 4)), grid.reshape(49, 4)]), 12)[1:]
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).reshape(144, 4).numpy(), rtol=0, atol=1e-6)


def test_positions_keep_dtype_and_a_same_size_grid():
    position = np.random.default_rng(0).standard_normal((1 + 36, 5)).astype(np.float16)
    same = images.resize_positions(position, 6)
    assert same.dtype == np.float16
    np.testing.assert_array_equal(same, position)


@pytest.mark.parametrize("shape, new", [((12, 3), 4), ((1, 3), 4), ((10, 3, 1), 4), ((10, 3), 0)])
def test_positions_of_another_shape_are_refused(shape, new):
    with pytest.raises(ValueError, match="1 \\+ g"):
        images.resize_positions(np.zeros(shape), new)


def crops(image, seed, **options):
    return np.array(images.cropped(image, np.random.default_rng(seed), **options))


def test_a_crop_is_in_the_allowed_range_flipped_half_of_the_time():
    rows, columns = 60, 90
    y, x = np.mgrid[0:rows, 0:columns].astype(np.uint8)
    image = np.stack([y, x, x], -1)  # a pixel says where it came from
    areas, flips, tops, lefts = [], 0, set(), set()
    for seed in range(300):
        crop = crops(image, seed)
        np.testing.assert_array_equal(crop, crops(image, seed))
        flipped = bool(crop[0, 0, 1] > crop[0, -1, 1])
        upright = crop[:, ::-1] if flipped else crop
        top, left = upright[0, 0, :2]
        np.testing.assert_array_equal(upright, image[top : top + crop.shape[0], left : left + crop.shape[1]])
        assert 0.72 < crop.shape[1] / crop.shape[0] < 1.36
        areas.append(crop.shape[0] * crop.shape[1] / (rows * columns))
        flips += flipped
        tops.add(int(top))
        lefts.add(int(left))
    assert 0.48 < min(areas) < 0.55 and 0.85 < max(areas) <= 1
    assert 120 < flips < 180
    assert len(tops) > 10 and len(lefts) > 20


def test_crops_without_flip_never_mirrors():
    image = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 3, -1).repeat(40, 0)  # brighter to the right
    mirrored = {
        flip: sum(crop[0, 0, 0] > crop[0, -1, 0] for crop in (crops(image, seed, flip=flip) for seed in range(40)))
        for flip in (True, False)
    }
    assert mirrored[False] == 0 and 10 < mirrored[True] < 30


def test_crops_of_extreme_shapes():
    assert crops(picture(1, 200), 0).shape == (1, 1, 3)
    assert crops(picture(200, 3), 0).shape == (4, 3, 3)  # the central box of ratio 3/4
    whole = crops(picture(40, 40), 1, scale=(1.0, 1.0))
    assert min(whole.shape[:2]) >= 34


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)])
def test_pixels_of_another_kind_are_refused(bad):
    for function in (lambda a: images.resize(a, 2), lambda a: images.cropped(a, np.random.default_rng(0))):
        with pytest.raises(ValueError, match="uint8"):
            function(bad)
