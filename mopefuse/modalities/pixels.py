"""Resize and crop 8-bit images for an encoder, without torch. The model normalises them.

Training, and `mopefuse predict` on a run or an exported bundle, all use these two functions.

Shapes: h, w of the original image, H, W of the input of the encoder.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (h, w, 3)

_MAX_RATIO = 50  # ratio of an image's sides; only the middle of a longer strip is resized
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def shrink(image: Image.Image, resize: int | tuple[int, int], interpolation: str) -> Pixels:
    """Resize an RGB image; returns pixels (h, w, 3).

    Args:
        resize: new length of the shorter side, or (height, width) regardless of the aspect ratio, in pixels.
        interpolation: a key of `INTERPOLATIONS`.
    """
    if not isinstance(resize, int):
        return np.asarray(_resized(image, resize[1], resize[0], interpolation))
    width, height = image.size
    short = min(width, height)
    if max(width, height) > _MAX_RATIO * short:
        # Scaling up the short side of a strip could take gigabytes, and the crop keeps only the middle.
        left, top = (max(0, round((side - _MAX_RATIO * short) / 2)) for side in (width, height))
        width, height = min(width, _MAX_RATIO * short), min(height, _MAX_RATIO * short)
        image = image.crop((left, top, left + width, top + height))
    long = int(resize * max(width, height) / short)
    return np.asarray(_resized(image, *((resize, long) if width <= height else (long, resize)), interpolation))


def _resized(image: Image.Image, width: int, height: int, interpolation: str) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), INTERPOLATIONS[interpolation])


def centre(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Crop the centre (H, W, 3) of an image (h, w, 3), with a black border if it is smaller.

    Args:
        size: (H, W), in pixels.
    """
    short = [max(0, side - given) for side, given in zip(size, pixels.shape[:2], strict=True)]
    if any(short):
        pixels = np.pad(pixels, [(missing // 2, (missing + 1) // 2) for missing in short] + [(0, 0)])
    (height, width), (h, w) = size, pixels.shape[:2]
    top, left = round((h - height) / 2), round((w - width) / 2)
    return pixels[top : top + height, left : left + width]
