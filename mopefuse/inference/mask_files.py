"""Write predicted masks as PNG files with a palette, and overlays of them on their images.

The number of a pixel in the PNG is its class; the palette only makes it visible. Nothing here needs torch.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mopefuse.core.atomic_files import replace_atomically, write_atomically
from mopefuse.modalities.masks import Mask

_PLAIN = re.compile(r"[\w][\w.-]{0,120}")
_TURN = 0.618034  # of the colour wheel from one class to the next: neighbours differ most
_OPACITY = 0.5


def palette(classes: int) -> list[tuple[int, int, int]]:
    """A colour for each class; black for the first."""
    colours = [(0, 0, 0)]
    for number in range(1, classes):
        red, green, blue = colorsys.hsv_to_rgb((0.02 + _TURN * (number - 1)) % 1, 0.75, 1.0 if number % 2 else 0.75)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


def palette_image(mask: Mask, classes: int) -> Image.Image:
    """A mask (H, W) as an image whose pixels are class ids with a palette."""
    image = Image.fromarray(mask)
    image.putpalette([value for colour in palette(max(classes, 2)) for value in colour])
    return image


def overlay(image: Image.Image, mask: Mask, classes: int) -> Image.Image:
    """An image with the colours of its mask (H, W) on top, except where the class is the first."""
    picture = np.asarray(image.convert("RGB"), dtype=np.float32)
    colours = np.array(palette(max(classes, 2)), dtype=np.float32)[np.minimum(mask, max(classes, 2) - 1)]
    shown = np.where((mask > 0)[..., None], (1 - _OPACITY) * picture + _OPACITY * colours, picture)
    return Image.fromarray(shown.round().astype(np.uint8))


class MaskWriter:
    """Writes masks and overlays to a folder that is made on first use, and names them after the ids of rows.

    Args:
        folder: their folder. labels: names of the classes, which are written to ``classes.txt``.
    """

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        self.folder, self.labels = folder, labels
        self._used: set[str] = set()

    def write(self, identity: str, image: Image.Image, mask: Mask) -> str:
        """Write a mask and its overlay; returns the path of the mask relative to the parent of the folder.

        Raises:
            ResourceError: the disk is full or not writable.
        """
        if not self._used:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "classes.txt", "\n".join(self.labels) + "\n")
        name = self._name(identity)
        with replace_atomically(self.folder / f"{name}.png") as file:
            palette_image(mask, len(self.labels)).save(file, format="PNG", optimize=True)
        with replace_atomically(self.folder / f"{name}.overlay.jpg") as file:
            overlay(image, mask, len(self.labels)).save(file, format="JPEG", quality=90)
        return f"{self.folder.name}/{name}.png"

    def _name(self, identity: str) -> str:
        """A file name that is not used yet, the id itself if it can be one."""
        name = stem = identity if _PLAIN.fullmatch(identity) else re.sub(r"[^\w.-]+", "-", identity).strip(".-")[:120] or "row"
        number = 1
        while name.lower() in self._used:
            number += 1
            name = f"{stem}-{number}"
        self._used.add(name.lower())
        return name
