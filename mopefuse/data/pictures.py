"""Decoded and resized images in one memory-mapped file: decoding is what reading costs, and it never changes.

Each different image is kept once, whatever the number of rows that show it, as 8-bit RGB of its own height and width;
cropping and augmentation come after. Nothing of this changes a result: what is read here is what decoding gives.

Shapes: S rows of a split, U different images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.data.base import DataSet, Split
from mopefuse.encoders.base import Preprocess
from mopefuse.errors import ResourceError
from mopefuse.modalities.files import processors

VERSION = 1
_AT_ONCE = 256
Pixels = NDArray[np.uint8]


class Pictures:
    """The reduced image of each row of a split, by row."""

    def __init__(self, folder: Path, number_S: NDArray[np.int64]) -> None:
        with np.load(folder / "sizes.npz", allow_pickle=False) as arrays:
            self._sides_U2, self._starts_U = arrays["sides"], arrays["starts"]
        self._number_S, self._file = number_S, folder / "pixels.bin"
        self._pixels: np.memmap[tuple[int], np.dtype[np.uint8]] | None = None

    def __getitem__(self, row: int) -> Pixels:
        """(h, w, 3), read when it is looked at."""
        if self._pixels is None:  # in each process by itself
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
    """The reduced images of a split, from the cache or decoded into it; where a row has none, one that says nothing.

    Args:
        modality: whose values are pictures.
        advance: told of (images decoded, images to decode).

    Raises:
        ResourceError: there is no folder to keep them in, or no space. DataError: an image that cannot be read.
    """
    _, first_U, number_S = np.unique(split.keys[modality], return_index=True, return_inverse=True)
    how = {name: value for name, value in preprocess.describe().items() if name in ("resize", "interpolation")}
    different = split.keys[modality][first_U].tobytes().hex()
    key = cache.key_of(VERSION, different, how, PIL.__version__, version("torchvision"))
    found = cache.find("images", key, thorough=False)
    if found is not None:
        return Pictures(found[0], number_S)

    def write(folder: Path) -> None:
        sides, starts, end = [], [], 0
        with (folder / "pixels.bin").open("wb") as file:
            for pixels in _decoded(data, split, modality, first_U, preprocess, config, advance):
                sides.append(pixels.shape[:2])
                starts.append(end)
                end += file.write(np.ascontiguousarray(pixels).tobytes())
        np.savez(folder / "sizes.npz", sides=np.array(sides, dtype=np.int64), starts=np.array(starts, dtype=np.int64))

    kept = cache.keep("images", key, write, {"images": len(first_U), "root": str(data.root), **how})
    if kept is None:
        where = str(cache.root() or "there is no folder for it")
        raise ResourceError(9, "decoded images cannot be kept", where=where, fix="set MOPEFUSE_CACHE to a folder with space")
    return Pictures(kept, number_S)


def _decoded(
    data: DataSet,
    split: Split,
    modality: str,
    first_U: NDArray[np.int64],
    preprocess: Preprocess,
    config: DataConfig,
    advance: Callable[[int, int], None],
) -> Iterator[Pixels]:
    def one(number: int) -> Pixels:
        pixels: Pixels = preprocess.reduce(data.read(split, split.rows[number], modality, config))
        return pixels

    with ThreadPoolExecutor(processors()) as pool:  # decoding and resizing let other threads run
        for start in range(0, len(first_U), _AT_ONCE):
            yield from pool.map(one, first_U[start : start + _AT_ONCE].tolist())
            advance(min(start + _AT_ONCE, len(first_U)), len(first_U))
