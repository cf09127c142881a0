"""Images as an encoder takes them, without torch: resized by Pillow, cut to size, 8 bits. Normalising is the model's part.

Training, `mopefuse predict` on a run and on an exported bundle all go through these two functions.
Shapes: h, w of an image as it comes, H, W of what the encoder sees.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # (h, w, 3)

_MOST_RATIO = 50  # of the sides of an image; of a longer strip only the middle is resized
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def shrink(image: Image.Image, resize: int | tuple[int, int], interpolation: str) -> Pixels:
    """An RGB image with its shorter side at `resize` pixels, or squeezed to (height, width)."""
    if not isinstance(resize, int):
        return np.asarray(_resized(image, resize[1], resize[0], interpolation))
    width, height = image.size
    short = min(width, height)
    if max(width, height) > _MOST_RATIO * short:
        # A strip would grow to gigabytes when its short side is scaled up; only its middle is ever seen.
        left, top = (max(0, round((side - _MOST_RATIO * short) / 2)) for side in (width, height))
        width, height = min(width, _MOST_RATIO * short), min(height, _MOST_RATIO * short)
        image = image.crop((left, top, left + width, top + height))
    long = int(resize * max(width, height) / short)
    return np.asarray(_resized(image, *((resize, long) if width <= height else (long, resize)), interpolation))


def _resized(image: Image.Image, width: int, height: int, interpolation: str) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), INTERPOLATIONS[interpolation])


def centre(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The middle (H, W, 3) of an image; black around one that is smaller."""
    short = [max(0, side - given) for side, given in zip(size, pixels.shape[:2], strict=True)]
    if any(short):
        pixels = np.pad(pixels, [(missing // 2, (missing + 1) // 2) for missing in short] + [(0, 0)])
    (height, width), (h, w) = size, pixels.shape[:2]
    top, left = round((h - height) / 2), round((w - width) / 2)
    return pixels[top : top + height, left : left + width]
