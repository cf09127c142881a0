"""The modality image, and reading untrusted images: inside their root, of a known format, not too large, and complete."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from mopefuse.core.error_codes import DataCode, NumericCode, PathCode
from mopefuse.errors import DataError, NumericError
from mopefuse.modalities.file_source import FileSource, as_source, read_content, regular_file
from mopefuse.modalities.files import FileInfo, Files

if TYPE_CHECKING:  # bundles run without pydantic
    from mopefuse.config.schema import Data as DataConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
SMALL = 16  # pixels; a shorter side gives a warning
STRIP = 10  # ratio of sides; a larger one gives a warning
SLOW = 2000  # milliseconds of decoding; more give a warning
_GREY = (128, 128, 128)
_NOT_IMAGES = {b"<!doctype": "HTML", b"<html": "HTML", b"<svg": "SVG", b"<?xml": "XML"}
_DISABLED = {
    b"%pdf": "PDF",
    b"%!ps": "PostScript",
    b"8bps": "PSD",
    b"simple  =": "FITS",
    b"ii*\0": "TIFF",
    b"mm\0*": "TIFF",
    b"\0\0\1\0": "ICO",
}
_KINDS = {  # kinds of findings by error code
    PathCode.OUTSIDE_ROOT.text: "unsafe-path",
    DataCode.FILE_NOT_FOUND.text: "missing-image",
    DataCode.TOO_MANY_PIXELS.text: "huge-image",
    DataCode.IMAGE_FORMAT_NOT_ENABLED.text: "wrong-format-image",
    DataCode.NOT_A_REGULAR_FILE.text: "not-a-file",
}
_UNREADABLE = {  # kinds of findings, by how the message of the decoder starts
    "empty-image": ("it is empty",),
    "wrong-format-image": ("looks like ",),
    "truncated-image": ("image file is truncated", "Truncated File Read"),
}

# Pillow warns of odd metadata, which does not matter for pixels, and of large images, which are rejected below. The filter is
# global, as temporary filters are not safe when several threads read images.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(
    files: FileSource | Sequence[Path], relative: str, *, where: str, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image as upright RGB: EXIF orientation applied, transparency over white, first frame of an animation.

    Args:
        files: where it is, or the folders that may contain it.
        where: file and line of the row, for messages.
        max_pixels: larger images are rejected by their header, before anything is decoded.

    Raises:
        DataError: the path is outside `files` or not a regular file, or the file is not an image of `FORMATS`, too large,
            or truncated.
    """
    content = as_source(files).read(relative, where=where, what="image")
    return _decoded(content, relative, where=where, max_pixels=max_pixels)[0]


def _decoded(
    content: bytes, relative: str, *, where: str, max_pixels: int, verify_only: bool = False
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image.

    Args:
        verify_only: only find out whether it can be decoded: a JPEG is read completely but decoded at an eighth of its size,
            which takes a fraction of the time.

    Returns:
        The image as upright RGB, and its (width, height) as stored.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        size = image.size
        if size[0] * size[1] > max_pixels:
            what = f"{relative} has {size[0]} x {size[1]} pixels, more than {max_pixels:,}"
            raise DataError(DataCode.TOO_MANY_PIXELS, what, where=where, fix="shrink the image, or raise data.max_pixels")
        if not verify_only:
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
        raise DataError(DataCode.TOO_MANY_PIXELS, what, where=where, fix="shrink the image") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders can raise any exception on damaged files
        other = _starts_as(content, _DISABLED)
        if other:
            fix = f"convert it to one of {', '.join(FORMATS)}"
            raise DataError(
                DataCode.IMAGE_FORMAT_NOT_ENABLED,
                f"{relative} is of the format {other}, which is not enabled",
                where=where,
                fix=fix,
            ) from None
        what = f"{relative} is not a readable image ({_looks_like(content, error)})"
        raise DataError(DataCode.FILE_UNREADABLE, what, where=where, fix="replace or remove the image") from None


def _from_python(image: Image.Image, *, where: str) -> Image.Image:
    """Convert an image from Python to upright RGB."""
    if 0 in image.size:
        raise DataError(
            DataCode.IMAGE_WITHOUT_PIXELS, "the image has no pixels", where=where, fix="remove it, or pass a different image"
        )
    try:
        if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
            raise NumericError(
                NumericCode.PIXELS_NOT_FINITE,
                "the image has pixels that are not finite",
                where=where,
                fix="pass an 8-bit image",
            )
        return upright_rgb(image)
    except (NumericError, MemoryError):
        raise
    except Exception as error:  # Pillow reads the file only now, and decoders raise anything
        raise DataError(
            DataCode.FILE_UNREADABLE,
            f"the image cannot be read ({_reason(error)})",
            where=where,
            fix="replace or remove the image",
        ) from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to RGB as viewers show it: upright, 16-bit grey scaled to 8, transparency over white."""
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
    other = _starts_as(content, _NOT_IMAGES)
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
    """Image files, read as upright RGB, see `open_image`."""

    plural: ClassVar[str] = "images"
    value_description: ClassVar[str] = "an image"
    type_fix: ClassVar[str] = "pass a PIL image, the path of a file, or an array of uint8 (height, width, 3)"
    common_columns: ClassVar[tuple[str, ...]] = (
        "image", "image_path", "img_path", "filename", "file_name", "file", "path", "photo", "picture",
    )  # fmt: skip
    leak_kind: ClassVar[str] = "leaked-image"
    is_picture: ClassVar[bool] = True
    prompt_length: ClassVar[int] = 6
    lr: ClassVar[float] = 4e-4

    def decode(self, content: bytes, name: str, *, where: str, config: DataConfig) -> Image.Image:
        """See `Files.decode`."""
        return _decoded(content, name, where=where, max_pixels=config.max_pixels)[0]

    def inspect(self, content: bytes, name: str, config: DataConfig) -> FileInfo:
        """See `Files.inspect`; a JPEG is decoded at an eighth of its size."""
        image, (width, height) = _decoded(content, name, where="", max_pixels=config.max_pixels, verify_only=True)
        return FileInfo(width=width, height=height, animated=_animated(image))

    def limits(self, config: DataConfig) -> tuple[object, ...]:
        """See `Files.limits`."""
        return (config.max_pixels,)

    def blank_value(self) -> Image.Image:
        """A grey image."""
        return Image.new("RGB", (64, 64), _GREY)

    def examples(self) -> list[Any]:
        """Wide, square and tall noise."""
        random = np.random.default_rng(1)
        return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 60), (64, 64), (90, 50))]

    def accepts(self, value: Any) -> bool:
        """Accepts PIL images, paths, 8-bit arrays, and 16-bit grey arrays."""
        if isinstance(value, np.ndarray):
            colours = value.ndim == 3 and value.shape[2] in (3, 4)
            return (value.dtype == np.uint8 and (colours or value.ndim == 2)) or (value.dtype == np.uint16 and value.ndim == 2)
        return isinstance(value, Image.Image | str | Path)

    def is_single(self, value: Any) -> bool:
        """Whether it is a path, a PIL image, or an array of two or three axes."""
        return isinstance(value, Image.Image | str | Path) or (isinstance(value, np.ndarray) and value.ndim in (2, 3))

    def prepare(self, value: Any, *, where: str) -> Image.Image:
        """Convert to upright RGB, as for a file. A path is trusted: it may be in any folder.

        Raises:
            DataError: see `open_image`; or the image has no pixels. NumericError: a pixel of a float image is not finite.
        """
        if isinstance(value, str | Path):
            file = regular_file(Path(value), str(value), where=where, what=self.name)
            return _decoded(read_content(file, str(value), where), str(value), where=where, max_pixels=MAX_PIXELS)[0]
        return _from_python(Image.fromarray(value) if isinstance(value, np.ndarray) else value, where=where)

    def prompt_bound(self, patch_size: int, width: int) -> float:
        """sqrt(6 / (3 patch^2 + width)), as in the papers."""
        return float((6 / (3 * patch_size**2 + width)) ** 0.5)

    def findings(self, name: str, info: FileInfo) -> Iterator[tuple[str, str, str]]:
        """See `Files.findings`."""
        if info.code:
            reason = info.what.rpartition(" is not a readable image (")[2]
            known = (kind for kind, starts in _UNREADABLE.items() if reason.startswith(starts))
            yield _KINDS.get(info.code) or next(known, "unreadable-image"), info.what, info.fix
            return
        short, long = sorted((info.width, info.height))
        sides = f"{name} has {info.width} x {info.height} pixels"
        if short < SMALL:
            yield "tiny-image", sides, ""
        if long > STRIP * short:
            yield "strip-image", sides, ""
        if info.animated:
            yield "animated-image", f"{name} is animated", ""
        if info.milliseconds > SLOW:
            yield "slow-image", f"{name} took {info.milliseconds / 1000:.1f} s to decode", ""


def _animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame, which is not used
        return True
