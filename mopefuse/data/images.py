"""Open an image that somebody else provided: inside its root, of a known format, of a bearable size, and whole."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from mopefuse.errors import DataError, MopefuseError, UnsafePathError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_NO_IMAGE = {b"<!doctype": "HTML", b"<html": "HTML", b"<svg": "SVG", b"<?xml": "XML"}
_DISABLED = {
    b"%pdf": "PDF",
    b"%!ps": "PostScript",
    b"8bps": "PSD",
    b"simple  =": "FITS",
    b"ii*\0": "TIFF",
    b"mm\0*": "TIFF",
    b"\0\0\1\0": "ICO",
}

# Of odd metadata, which pixels do not need, and of large images, which we refuse ourselves. A filter of the whole
# process, as those that are set and reset are not safe when several threads read images.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(roots: Sequence[Path], relative: str, *, where: str, max_pixels: int = 50_000_000) -> Image.Image:
    """The image as upright RGB: EXIF orientation applied, transparency over white, first frame of an animation.

    Args:
        roots: folders that it may be in; see `contained`.
        where: file and line of the row, for the message.
        max_pixels: refused from the header, before anything is decoded.

    Raises:
        DataError: a path outside `roots`, not a regular file, not an image of `FORMATS`, too large, or cut short.
    """
    path = contained(roots, relative, where=where)
    return _decoded(_content(path, relative, where), relative, where=where, max_pixels=max_pixels)[0]


def _content(path: Path, relative: str, where: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fix = "make it readable"
        raise DataError(13, f"{relative} cannot be read: {error.strerror}", where=where, fix=fix) from None


def _decoded(
    content: bytes, relative: str, *, where: str, max_pixels: int, glance: bool = False
) -> tuple[Image.Image, tuple[int, int]]:
    """An image as upright RGB, and its (width, height) as stored.

    Args:
        glance: only find out whether it can be decoded: of a JPEG every byte is read, but only an eighth of the size is
            computed, which takes a fraction of the time.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        size = image.size
        if size[0] * size[1] > max_pixels:
            what = f"{relative} has {size[0]} x {size[1]} pixels, more than {max_pixels:,}"
            raise DataError(12, what, where=where, fix="shrink it, or raise data.max_pixels")
        if not glance:
            return upright_rgb(image), size
        image.draft(None, (size[0] // 8, size[1] // 8))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image, size
    except DataError:
        raise
    except Image.DecompressionBombError as error:  # "Image size (400000000 pixels) exceeds ...", nothing was decoded
        count = int(next(iter(re.findall(r"\d+", str(error))), 0))
        what = f"{relative} has {count:,} pixels, more than {max_pixels:,}"
        raise DataError(12, what, where=where, fix="shrink it") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they please on damaged files
        other = _starts_as(content, _DISABLED)
        if other:
            fix = f"convert it to one of {', '.join(FORMATS)}"
            raise DataError(14, f"{relative} is of the format {other}, which is not enabled", where=where, fix=fix) from None
        what = f"{relative} is not a readable image ({_looks_like(content, error)})"
        raise DataError(13, what, where=where, fix="replace or remove it") from None


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
    fix = "use a path relative to the data folder, or allow its folder with --image-root"
    return UnsafePathError(1, "the image path leaves the image root", where=where, fix=fix)


def contained(roots: Sequence[Path], relative: str, *, where: str) -> Path:
    """The file that a path means: relative to the first of `roots` that has it, or absolute inside one of the others.

    Raises:
        UnsafePathError: the path is a URL or leads out of every root. DataError: it is not a regular file.
    """
    path = _place(roots, relative, where)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        raise DataError(11, f"image not found: {relative}", where=where, fix=_other_case(path) or "add the file") from None
    if not stat.S_ISREG(mode):
        raise DataError(15, f"{relative} is not a regular file", where=where, fix="name an image file")
    return path


def _place(roots: Sequence[Path], relative: str, where: str) -> Path:
    if "\0" in relative or "://" in relative or relative.startswith(("\\", "~")) or relative[1:2] == ":":
        raise _leaves_root(where)
    bases = [root.resolve() for root in roots]
    absolute = relative.startswith("/")
    allowed = bases[1:] if absolute else bases
    try:
        places = [path.resolve() for path in ([Path(relative)] if absolute else [base / relative for base in bases])]
    except (OSError, RuntimeError, ValueError):  # links that go round in circles, half a character
        raise DataError(11, f"image not found: {relative}", where=where, fix="add the file") from None
    if not all(any(path.is_relative_to(base) for base in allowed) for path in places):
        raise _leaves_root(where)
    return next((path for path in places[:-1] if os.path.exists(path)), places[-1])


def _other_case(path: Path) -> str:
    try:
        there = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    alike = [name for name in there if name.lower() == path.name.lower()]
    return f"the folder has {alike[0]}: mind upper and lower case" if alike else ""


def _looks_like(content: bytes, error: Exception) -> str:
    if not content.strip():
        return "it is empty"
    other = _starts_as(content, _NO_IMAGE)
    if other:
        return f"looks like {other}"
    return re.split("['<]", str(error))[0].strip().rstrip(".") or type(error).__name__


def _starts_as(content: bytes, known: Mapping[bytes, str]) -> str:
    head = content[:64].lower()
    return next((name for start, name in known.items() if head.startswith(start) or head.lstrip().startswith(start)), "")


# -- looking at many, without keeping any


class Look(NamedTuple):
    """What is known of an image file."""

    size: int = -1  # bytes; -1 for what is no file
    mtime: int = 0  # ns
    width: int = 0
    height: int = 0
    animated: bool = False
    milliseconds: int = 0  # that decoding took
    digest: bytes = b""  # of its content, 16 bytes
    code: str = ""  # of the error that it is, if it is one
    what: str = ""
    fix: str = ""


def look_at(
    roots: Sequence[Path],
    names: Sequence[str],
    *,
    max_pixels: int,
    known: Mapping[str, Look] | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Look]:
    """Read and decode images with all processors; those that did not change since they were `known` are not read again.

    Args:
        advance: told of (images looked at, images to look at).
    """
    known = known or {}
    looks = {name: known[name] for name in names if name in known and _unchanged(roots, name, known[name])}
    rest = [name for name in names if name not in looks]
    with ThreadPoolExecutor(processors()) as pool:  # decoders let other threads run
        for start in range(0, len(rest), 512):
            futures = [pool.submit(_look, roots, name, max_pixels) for name in rest[start : start + 512]]
            for done, future in enumerate(as_completed(futures), start=start + 1):
                name, look = future.result()
                looks[name] = look
                advance(done, len(rest))
    return looks


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unchanged(roots: Iterable[Path], name: str, look: Look) -> bool:
    for root in roots:
        try:
            now = os.stat(f"{root}/{name}" if not name.startswith("/") else name)
        except (OSError, ValueError):
            continue
        return now.st_size == look.size and now.st_mtime_ns == look.mtime
    return False


def _look(roots: Sequence[Path], name: str, max_pixels: int) -> tuple[str, Look]:
    look = Look()
    try:
        path = contained(roots, name, where="")
        status = path.stat()
        look = look._replace(size=status.st_size, mtime=status.st_mtime_ns)
        content = _content(path, name, "")
        look = look._replace(digest=hashlib.blake2b(content, digest_size=16).digest())
        began = time.perf_counter()
        image, (width, height) = _decoded(content, name, where="", max_pixels=max_pixels, glance=True)
        took = round(1000 * (time.perf_counter() - began))
        return name, look._replace(width=width, height=height, animated=_animated(image), milliseconds=took)
    except MopefuseError as error:
        return name, look._replace(code=error.code, what=error.what, fix=error.fix)


def _animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame, which nobody looks at
        return True
