"""Masks: PNG files with the class of each pixel. They are labels of segmentation, not an input, and so no entry point.

A mask has one channel: class ids from 0 to 255, indices into a palette, or black and white. An RGB file whose channels are
equal is read as one channel; colours are refused, because which class a colour stands for is not known here.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mopefuse.core.error_codes import DataCode, PathCode
from mopefuse.errors import DataError
from mopefuse.modalities.base import Modality, get_modality
from mopefuse.modalities.files import MISSING, FileInfo, Files

if TYPE_CHECKING:  # bundles run without pydantic
    from mopefuse.config.schema import Data as DataConfig

Mask = NDArray[np.uint8]  # (h, w)
NAME = "mask"
SUFFIX = ".png"
_KINDS = {
    PathCode.OUTSIDE_ROOT.text: "unsafe-path",
    MISSING: "missing-mask",
    DataCode.NOT_A_REGULAR_FILE.text: "not-a-file",
}


class Masks(Files):
    """Mask files, read as class ids (h, w)."""

    name = NAME
    plural: ClassVar[str] = "masks"
    value_description: ClassVar[str] = "a mask"

    def decode(self, content: bytes, name: str, *, where: str, config: DataConfig) -> Mask:
        """See `Files.decode`.

        Raises:
            DataError: it is not a PNG, has too many pixels, is damaged, or has colours or ids above 255.
        """
        try:
            image = Image.open(io.BytesIO(content), formats=("PNG",))
            width, height = image.size
            if width * height > config.max_pixels:
                what = f"{name} has {width} x {height} pixels, more than {config.max_pixels:,}"
                raise DataError(DataCode.TOO_MANY_PIXELS, what, where=where, fix="shrink the mask, or raise data.max_pixels")
            ids = np.asarray(image)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # decoders can raise any exception on damaged files
            reason = "it is empty" if not content else "it is not a PNG" if content[:4] != b"\x89PNG" else str(error)
            what = f"{name} is not a readable mask ({reason})"
            raise DataError(DataCode.FILE_UNREADABLE, what, where=where, fix="save class ids as a PNG") from None
        return _one_channel(ids, name, where)

    def inspect(self, content: bytes, name: str, config: DataConfig) -> FileInfo:
        """See `Files.inspect`; also finds the ids that occur."""
        ids = self.decode(content, name, where="", config=config)
        present = np.bincount(ids.ravel(), minlength=256) > 0
        return FileInfo(width=ids.shape[1], height=ids.shape[0], ids=np.packbits(present).tobytes())

    def findings(self, name: str, info: FileInfo) -> Iterator[tuple[str, str, str]]:
        """See `Files.findings`."""
        if info.code:
            yield _KINDS.get(info.code, "unreadable-mask"), info.what, info.fix


def _one_channel(ids: NDArray[Any], name: str, where: str) -> Mask:
    if ids.ndim == 3:
        opaque = ids.shape[2] in (1, 3) or (ids[..., -1] == 255).all()
        grey = ids[..., :-1] if ids.shape[2] in (2, 4) else ids
        if not opaque or (grey != grey[..., :1]).any():
            what = f"{name} has colours instead of class ids"
            raise DataError(DataCode.MASK_WITH_COLOURS, what, where=where, fix="save the id of each pixel in a single channel")
        ids = grey[..., 0]
    if ids.size and (ids.min() < 0 or ids.max() > 255):
        what = f"{name} has the id {int(ids.max())}, above 255"
        raise DataError(DataCode.MASK_WITH_COLOURS, what, where=where, fix="number the classes from 0 to 254")
    return np.ascontiguousarray(ids, dtype=np.uint8)


MASKS = Masks()


def any_png(names: Sequence[str]) -> bool:
    """Whether some name is that of a PNG file, so that labels may be masks."""
    return any(name.lower().endswith(SUFFIX) for name in names)


def file_kind(name: str) -> Modality:
    """The kind of files with this name: masks, or a modality."""
    return MASKS if name == NAME else get_modality(name)


def ids_in(info: FileInfo) -> list[int]:
    """The ids that occur in a mask, ascending."""
    found: list[int] = np.flatnonzero(np.unpackbits(np.frombuffer(info.ids, dtype=np.uint8))).tolist()
    return found


def resized(ids: Mask, size: Sequence[int]) -> Mask:
    """Resize a mask (h, w) to `size`, (height, width), by taking the nearest pixel."""
    if ids.shape == tuple(size):
        return ids
    return np.asarray(Image.fromarray(ids).resize((size[1], size[0]), Image.Resampling.NEAREST))


def encode_runs(ids: Mask) -> dict[str, list[int]]:
    """Write a mask as runs of equal pixels, row after row: ``{"size": [h, w], "ids": [...], "lengths": [...]}``."""
    flat = ids.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths = np.diff(np.concatenate([starts, [len(flat)]]))
    return {"size": list(ids.shape), "ids": flat[starts].tolist(), "lengths": lengths.tolist()}


def decode_runs(runs: dict[str, list[int]]) -> Mask:
    """Read a mask (h, w) from `encode_runs`."""
    flat = np.repeat(np.array(runs["ids"], dtype=np.uint8), runs["lengths"])
    return flat.reshape(runs["size"])
