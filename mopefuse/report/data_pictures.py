"""Pictures of rows for pages: thumbnails, and placeholders for images that cannot be shown."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from mopefuse.config.schema import Data as DataConfig
from mopefuse.errors import DataError, MopefuseError
from mopefuse.inference.mask_files import overlay
from mopefuse.modalities.file_source import FileSource
from mopefuse.modalities.image import open_image
from mopefuse.modalities.masks import MASKS, resized
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


def picture(
    files: FileSource, name: str, *, max_pixels: int, place: str = "", text: str = "", mask: str = ""
) -> Picture:
    """A thumbnail of an image, or a description of its error; nothing outside `files` is opened.

    Args:
        mask: file of a mask that is shown on the image.
    """
    try:
        image = open_image(files, name, where=place, max_pixels=max_pixels)
    except DataError as error:
        return Picture(name, instead=error.what, place=place, text=text)
    sides = f"{image.width} x {image.height} pixels"
    if mask:
        with suppress(DataError):
            ids = MASKS.read(mask, files, where=place, config=DataConfig(max_pixels=max_pixels))
            image = overlay(image, resized(ids, (image.height, image.width)), 256)
    return Picture(name, thumbnail(image), sides, max(image.size) < _SMALL, place=place, text=text)


def first_bytes(files: FileSource, name: str) -> bytes:
    """The beginning of a file; nothing if there is no such file."""
    try:
        return files.read(name, where="", what="file")[:_HEAD]
    except MopefuseError:
        return b""
