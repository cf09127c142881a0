"""Open an image that somebody else provided: inside its root, of a known format, of a bearable size, and whole."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from mopefuse.errors import DataError, UnsafePathError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def open_image(root: Path, relative: str, *, where: str, max_pixels: int = 50_000_000) -> Image.Image:
    """The image as upright RGB: EXIF orientation applied, transparency over white, first frame of an animation.

    Args:
        where: file and line of the row, for the message.
        max_pixels: refused from the header, before anything is decoded.

    Raises:
        DataError: a path outside `root`, not a regular file, not an image of `FORMATS`, too large, or cut short.
    """
    path = contained(root, relative, where=where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of odd metadata, which pixels do not need
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise DataError(
                        12,
                        f"{relative} has {image.width} x {image.height} pixels, more than {max_pixels:,}",
                        where=where,
                        fix="shrink it, or raise data.max_pixels",
                    )
                return upright_rgb(image)
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(12, f"{relative} has too many pixels", where=where, fix="shrink it") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they please on damaged files
        raise DataError(
            13, f"{relative} is not a readable image ({_looks_like(path, error)})", where=where, fix="replace or remove it"
        ) from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB the way a viewer shows it: upright, 16-bit grey scaled to 8, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _leaves_root(where: str) -> UnsafePathError:
    return UnsafePathError(
        1, "the image path leaves the image root", where=where, fix="use a path relative to the data folder"
    )


def contained(root: Path, relative: str, *, where: str) -> Path:
    """The file `relative` to `root`, which it must not leave.

    Raises:
        UnsafePathError: the path is absolute, a URL, or leads out of `root`. DataError: it is not a regular file.
    """
    if "\0" in relative or "://" in relative or relative.startswith(("/", "\\", "~")) or relative[1:2] == ":":
        raise _leaves_root(where)
    base = root.resolve()
    try:
        path = (base / relative).resolve()
    except (OSError, RuntimeError, ValueError):  # links that go round in circles, half a character
        raise DataError(11, f"image not found: {relative}", where=where, fix="add the file") from None
    if not path.is_relative_to(base):
        raise _leaves_root(where)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        raise DataError(11, f"image not found: {relative}", where=where, fix=_other_case(path) or "add the file") from None
    if not stat.S_ISREG(mode):
        raise DataError(15, f"{relative} is not a regular file", where=where, fix="name an image file")
    return path


def _other_case(path: Path) -> str:
    try:
        there = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    alike = [name for name in there if name.lower() == path.name.lower()]
    return f"the folder has {alike[0]}: mind upper and lower case" if alike else ""


def _looks_like(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip().lower()
    except OSError as unreadable:
        return unreadable.strerror or "it cannot be opened"
    if not head:
        return "it is empty"
    for start, name in {
        b"<!doctype": "HTML",
        b"<html": "HTML",
        b"<svg": "SVG",
        b"<?xml": "XML",
        b"%pdf": "PDF",
        b"8bps": "PSD",
        b"ii*\0": "TIFF",
        b"mm\0*": "TIFF",
    }.items():
        if head.startswith(start):
            return f"looks like {name}; enabled are {', '.join(FORMATS)}"
    return str(error).split("'")[0].strip().rstrip(".") or type(error).__name__
