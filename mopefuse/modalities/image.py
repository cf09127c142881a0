"""Images that somebody else provided: inside their root, of a known format, of a bearable size, and whole."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from mopefuse.errors import DataError, NumericError
from mopefuse.modalities.files import Files, Look, contained, content_of, regular_file

if TYPE_CHECKING:  # a bundle is asked where there is no pydantic
    from mopefuse.config.schema import Data as DataConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
SMALL = 16  # pixels; an image with a shorter side is remarked on
STRIP = 10  # of the sides of an image; a longer strip is remarked on
SLOW = 2000  # milliseconds of decoding
_GREY = (128, 128, 128)
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
_KINDS = {  # of findings
    "MF-SEC-01": "unsafe-path",
    "MF-DATA-11": "missing-image",
    "MF-DATA-12": "huge-image",
    "MF-DATA-14": "wrong-format-image",
    "MF-DATA-15": "not-a-file",
}
_UNREADABLE = {  # how what a decoder says begins
    "empty-image": ("it is empty",),
    "wrong-format-image": ("looks like ",),
    "truncated-image": ("image file is truncated", "Truncated File Read"),
}

# Of odd metadata, which pixels do not need, and of large images, which we refuse ourselves. A filter of the whole
# process, as those that are set and reset are not safe when several threads read images.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(roots: Sequence[Path], relative: str, *, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as upright RGB: EXIF orientation applied, transparency over white, first frame of an animation.

    Args:
        roots: folders that it may be in; see `contained`.
        where: file and line of the row, for the message.
        max_pixels: refused from the header, before anything is decoded.

    Raises:
        DataError: a path outside `roots`, not a regular file, not an image of `FORMATS`, too large, or cut short.
    """
    path = contained(roots, relative, where=where, what="image")
    return _decoded(content_of(path, relative, where), relative, where=where, max_pixels=max_pixels)[0]


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


def _from_python(image: Image.Image, *, where: str) -> Image.Image:
    """An image that is open, or was made, as upright RGB."""
    if 0 in image.size:
        raise DataError(310, "the image has no pixels", where=where, fix="leave it out, or give another")
    try:
        if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
            raise NumericError(4, "the image has pixels that are not finite", where=where, fix="give an image of 8 bits")
        return upright_rgb(image)
    except (NumericError, MemoryError):
        raise
    except Exception as error:  # of a file that is read only now: whatever its decoder pleases
        raise DataError(13, f"the image cannot be read ({_reason(error)})", where=where, fix="replace or remove it") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB the way a viewer shows it: upright, 16-bit grey scaled to 8, transparency over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _looks_like(content: bytes, error: Exception) -> str:
    if not content.strip():
        return "it is empty"
    other = _starts_as(content, _NO_IMAGE)
    if other:
        return f"looks like {other}"
    return _reason(error)


def _reason(error: Exception) -> str:
    return re.split("['<]", str(error))[0].strip().rstrip(".") or type(error).__name__


def _starts_as(content: bytes, known: Mapping[bytes, str]) -> str:
    head = content[:64].lower()
    return next((name for start, name in known.items() if head.startswith(start) or head.lstrip().startswith(start)), "")


# -- the modality


class Images(Files):
    """An image file: upright RGB, see `open_image`."""

    plural: ClassVar[str] = "images"
    kind: ClassVar[str] = "an image"
    give: ClassVar[str] = "give a PIL image, the path of a file, or an array of uint8 (height, width, 3)"
    meant: ClassVar[tuple[str, ...]] = (
        "image", "image_path", "img_path", "filename", "file_name", "file", "path", "photo", "picture",
    )  # fmt: skip
    leaked: ClassVar[str] = "leaked-image"
    is_picture: ClassVar[bool] = True
    prompt_length: ClassVar[int] = 6
    lr: ClassVar[float] = 4e-4

    def decode(self, content: bytes, name: str, *, where: str, config: DataConfig) -> Image.Image:
        """See `Files.decode`."""
        return _decoded(content, name, where=where, max_pixels=config.max_pixels)[0]

    def look(self, content: bytes, name: str, config: DataConfig) -> Look:
        """See `Files.look`; of a JPEG only an eighth of the size is computed."""
        image, (width, height) = _decoded(content, name, where="", max_pixels=config.max_pixels, glance=True)
        return Look(width=width, height=height, animated=_animated(image))

    def limits(self, config: DataConfig) -> tuple[object, ...]:
        """See `Files.limits`."""
        return (config.max_pixels,)

    def nothing(self) -> Image.Image:
        """Mid-grey."""
        return Image.new("RGB", (64, 64), _GREY)

    def examples(self) -> list[Any]:
        """Noise, wide, square and tall."""
        random = np.random.default_rng(1)
        return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 60), (64, 64), (90, 50))]

    def accepts(self, value: Any) -> bool:
        """PIL images, paths, arrays of 8 bits, and of 16 bits in grey."""
        if isinstance(value, np.ndarray):
            colours = value.ndim == 3 and value.shape[2] in (3, 4)
            return (value.dtype == np.uint8 and (colours or value.ndim == 2)) or (value.dtype == np.uint16 and value.ndim == 2)
        return isinstance(value, Image.Image | str | Path)

    def is_single(self, value: Any) -> bool:
        """Also PIL images, and arrays of two or three axes."""
        return isinstance(value, Image.Image | str | Path) or (isinstance(value, np.ndarray) and value.ndim in (2, 3))

    def prepare(self, value: Any, *, where: str) -> Image.Image:
        """Upright RGB, as of a file; a path is one that the caller trusts, as `PIL.Image.open` would.

        Raises:
            DataError: see `open_image`; or there are no pixels. NumericError: a pixel is not finite, as images of floats can
                have them.
        """
        if isinstance(value, str | Path):
            file = regular_file(Path(value), str(value), where=where, what=self.name)
            return _decoded(content_of(file, str(value), where), str(value), where=where, max_pixels=MAX_PIXELS)[0]
        return _from_python(Image.fromarray(value) if isinstance(value, np.ndarray) else value, where=where)

    def prompt_bound(self, patch_size: int, width: int) -> float:
        """sqrt(6 / (3 patch^2 + width)), as in the papers."""
        return float((6 / (3 * patch_size**2 + width)) ** 0.5)

    def findings(self, name: str, look: Look) -> Iterator[tuple[str, str, str]]:
        """See `Files.findings`."""
        if look.code:
            said = look.what.rpartition(" is not a readable image (")[2]
            known = (kind for kind, starts in _UNREADABLE.items() if said.startswith(starts))
            yield _KINDS.get(look.code) or next(known, "unreadable-image"), look.what, look.fix
            return
        short, long = sorted((look.width, look.height))
        sides = f"{name} has {look.width} x {look.height} pixels"
        if short < SMALL:
            yield "tiny-image", sides, ""
        if long > STRIP * short:
            yield "strip-image", sides, ""
        if look.animated:
            yield "animated-image", f"{name} is an animation", ""
        if look.milliseconds > SLOW:
            yield "slow-image", f"{name} took {look.milliseconds / 1000:.1f} s to decode", ""


def _animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame, which nobody looks at
        return True
