"""Pictures of rows for pages: thumbnails, and placeholders for images that cannot be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mopefuse.errors import DataError
from mopefuse.modalities.files import resolve_inside
from mopefuse.modalities.image import open_image
from mopefuse.report.pages import thumbnail

_SMALL = 64  # pixels; an image whose longer side is shorter is shown enlarged
_HEAD = 64  # bytes of a file that is not an image


@dataclass(frozen=True)
class Picture:
    """An image of a row: its address, or the text to show instead."""

    name: str
    address: str = ""
    sides: str = ""
    small: bool = False
    instead: str = ""
    place: str = ""  # position of the row
    text: str = ""


def picture(roots: Sequence[Path], name: str, *, max_pixels: int, place: str = "", text: str = "") -> Picture:
    """A thumbnail of an image, or a description of its error; nothing outside `roots` is opened."""
    try:
        image = open_image(roots, name, where=place, max_pixels=max_pixels)
    except DataError as error:
        return Picture(name, instead=error.what, place=place, text=text)
    sides = f"{image.width} x {image.height} pixels"
    return Picture(name, thumbnail(image), sides, max(image.size) < _SMALL, place=place, text=text)


def first_bytes(roots: Sequence[Path], name: str) -> bytes:
    """The beginning of a file in `roots`; nothing if there is no such file."""
    try:
        with resolve_inside(roots, name, where="", what="file").open("rb") as file:
            return file.read(_HEAD)
    except (DataError, OSError):
        return b""
