"""What OpenCV makes of a small picture -> randaugment.npz: `python tests/golden/make_randaugment.py` (opencv-python 5.0).

BLIP's operations are OpenCV calls: warpAffine (bilinear, border 128) and filter2D; equalize and autocontrast there say that
they equal Pillow's. The formulas of the matrices and of the blend are those of its data code, written again here.
"""

import pathlib

import cv2
import numpy as np

FILL = (128, 128, 128)


def picture():
    rng = np.random.default_rng(5)
    smooth = np.linspace(0, 255, 21 * 26 * 3).reshape(21, 26, 3)
    return (0.6 * smooth + 0.4 * rng.integers(0, 256, (21, 26, 3))).astype(np.uint8)


def expected(image):
    rows, columns = image.shape[:2]

    def warp(matrix):
        return cv2.warpAffine(image, np.float32(matrix), (columns, rows), flags=cv2.INTER_LINEAR, borderValue=FILL)

    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(image, -1, kernel / 13).astype(np.float32)[1:-1, 1:-1]
    found = {
        "shear_x": warp([[1, 0.15, 0], [0, 1, 0]]),
        "shear_y": warp([[1, 0, 0], [-0.15, 1, 0]]),
        "translate_x": warp([[1, 0, -5], [0, 1, 0]]),
        "translate_y": warp([[1, 0, 0], [0, 1, 3.5]]),
        "rotate": warp(cv2.getRotationMatrix2D((columns / 2, rows / 2), 15, 1)),
        "rotate_back": warp(cv2.getRotationMatrix2D((columns / 2, rows / 2), -15, 1)),
    }
    for name, factor in (("sharpness_low", 0.46), ("sharpness_high", 1.36)):
        out = image.astype(np.float32)
        out[1:-1, 1:-1] = smooth + factor * (out[1:-1, 1:-1] - smooth)
        found[name] = out.clip(0, 255).astype(np.uint8)
    return found


if __name__ == "__main__":
    np.savez_compressed(pathlib.Path(__file__).with_name("randaugment.npz"), image=picture(), **expected(picture()))
