"""Cache decoded and resized images in one memory-mapped file, as decoding takes most of the time of reading.

Each distinct image is kept once, however many rows show it, as 8-bit RGB of its own height and width; cropping and
augmentation come later. Results do not change: the file contains exactly the decoded pixels.

Shapes: S rows of a split, U distinct images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.error_codes import ResourceCode
from mopefuse.data.base import DataSet, Split
from mopefuse.encoders.base import Preprocess
from mopefuse.errors import ResourceError
from mopefuse.modalities.files import processor_count

VERSION = 1
_AT_ONCE = 256
Pixels = NDArray[np.uint8]


class Pictures:
    """The decoded and resized images of a split, by row (S)."""

    def __init__(self, folder: Path, number_S: NDArray[np.int64]) -> None:
        with np.load(folder / "sizes.npz", allow_pickle=False) as arrays:
            self._sides_U2, self._starts_U = arrays["sides"], arrays["starts"]
        self._number_S, self._file = number_S, folder / "pixels.bin"
        self._pixels: np.memmap[tuple[int], np.dtype[np.uint8]] | None = None

    def __getitem__(self, row: int) -> Pixels:
        """The image (h, w, 3) of a row, read when it is accessed."""
        if self._pixels is None:  # opened by each process
            self._pixels = np.memmap(self._file, np.uint8, mode="r")
        number = self._number_S[row]
        height, width = (int(side) for side in self._sides_U2[number])
        start = int(self._starts_U[number])
        return self._pixels[start : start + 3 * height * width].reshape(height, width, 3)


def pictures(
    data: DataSet,
    split: Split,
    modality: str,
    preprocess: Preprocess,
    config: DataConfig,
    *,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Pictures:
    """Get the decoded and resized images of a split from the cache, or decode them into it; missing images are blank.

    Args:
        modality: the modality whose values are the images.
        advance: called with (images decoded, images to decode).

    Raises:
        ResourceError: the cache has no folder or no space. DataError: an image cannot be read.
    """
    keys_U, first_U, number_S = np.unique(split.keys[modality], return_index=True, return_inverse=True)
    resizing = {name: value for name, value in preprocess.describe().items() if name in ("resize", "interpolation")}
    key = cache.make_key(VERSION, keys_U.tobytes().hex(), resizing, PIL.__version__, version("torchvision"))
    found = cache.find("images", key, thorough=False)
    if found is not None:
        return Pictures(found[0], number_S)

    def decode(number: int) -> Pixels:
        pixels: Pixels = preprocess.reduce(data.read(split, split.rows[number], modality, config))
        return pixels

    facts = {"images": len(first_U), "root": str(data.root), **resizing}
    folder = cache.store("images", key, lambda folder: _write(folder, decode, first_U.tolist(), advance), facts)
    if folder is None:
        where = str(cache.root() or "no cache folder")
        raise ResourceError(
            ResourceCode.IMAGE_CACHE_NOT_WRITABLE,
            "decoded images cannot be cached",
            where=where,
            fix="set MOPEFUSE_CACHE to a folder with space",
        )
    return Pictures(folder, number_S)


def _write(
    folder: Path, decode: Callable[[int], Pixels], numbers: Sequence[int], advance: Callable[[int, int], None]
) -> None:
    sides, starts, end = [], [], 0
    with (folder / "pixels.bin").open("wb") as file, ThreadPoolExecutor(processor_count()) as pool:  # decoding releases the GIL
        for start in range(0, len(numbers), _AT_ONCE):
            for pixels in pool.map(decode, numbers[start : start + _AT_ONCE]):
                sides.append(pixels.shape[:2])
                starts.append(end)
                end += file.write(np.ascontiguousarray(pixels).tobytes())
            advance(min(start + _AT_ONCE, len(numbers)), len(numbers))
    np.savez(folder / "sizes.npz", sides=np.array(sides, dtype=np.int64), starts=np.array(starts, dtype=np.int64))
