"""Store the features of one encoder by content, in append-only shards that processes, runs and data sets share.

A shard is a folder ``features/<encoder>/<number>`` of the cache with sorted keys (the 16-byte digests of `Split.keys`) and
their features. It is published whole and never changed; if two processes computed the same sample, both use the shard with the
lower number. Nothing is locked, and a damaged shard is ignored.

Shapes: N keys in all shards, U wanted keys, C width of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mopefuse.core import cache
from mopefuse.data.base import Keys

KIND = "features"
KEY = np.dtype("S16")
Values = NDArray[np.float32]


class Mapped:
    """A memory-mapped file of features (rows, C). Pickling sends its path to the other process, not its content."""

    def __init__(self, file: Path, shape: tuple[int, int]) -> None:
        self._file, self._shape = file, shape
        self._open()

    def _open(self) -> None:
        self._values: Values = np.asarray(np.memmap(self._file, np.float32, mode="r", shape=self._shape))

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_shape": self._shape}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __getitem__(self, rows: NDArray[np.int64]) -> Values:
        """Copy some rows."""
        found: Values = self._values[rows]
        return found


class Shard(NamedTuple):
    """One published shard."""

    name: str
    sha256: str  # digest of its features
    keys: Keys
    values: Mapped


class Found(NamedTuple):
    """The place of each wanted key: the number of a shard, -1 if no shard has it, and the row in it."""

    shard_U: NDArray[np.int32]
    row_U: NDArray[np.int64]

    @property
    def known_U(self) -> NDArray[np.bool_]:
        """Whether each key is in a shard."""
        known: NDArray[np.bool_] = self.shard_U >= 0
        return known


class FeatureStore:
    """The shards of one encoder.

    Args:
        key: key of the encoder. width: C.
    """

    def __init__(self, key: str, width: int) -> None:
        self.key, self.width = key, width
        self.shards: list[Shard] = []
        self._opened: dict[str, Shard] = {}

    def refresh(self, names: list[str] | None = None) -> None:
        """Open the shards that have been published since.

        Args:
            names: open only these, those of another process.
        """
        folders = {folder.name: folder for folder in cache.list_parts(KIND, self.key)}
        self.shards = []
        for name in sorted(folders, key=int) if names is None else [name for name in names if name in folders]:
            shard = self._opened.get(name) or _read(folders[name], self.width)
            if shard is not None:
                self._opened[name] = shard
                self.shards.append(shard)

    def find(self, wanted_U: Keys) -> Found:
        """Find the features of some keys."""
        shard_U, row_U = np.full(len(wanted_U), -1, dtype=np.int32), np.zeros(len(wanted_U), dtype=np.int64)
        if not self.shards:
            return Found(shard_U, row_U)
        sizes = [len(shard.keys) for shard in self.shards]
        keys_N = np.concatenate([shard.keys for shard in self.shards])
        numbers_N = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        rows_N = np.concatenate([np.arange(size) for size in sizes])
        if len(sizes) > 1:
            order_N = np.argsort(keys_N, kind="stable")  # keeps the first shard of equal keys
            keys_N, numbers_N, rows_N = keys_N[order_N], numbers_N[order_N], rows_N[order_N]
        place_U = np.searchsorted(keys_N, wanted_U)
        place_U[place_U == len(keys_N)] = 0
        known_U = keys_N[place_U] == wanted_U
        shard_U[known_U], row_U[known_U] = numbers_N[place_U[known_U]], rows_N[place_U[known_U]]
        return Found(shard_U, row_U)

    def append(self, keys: Keys, values: Values, facts: Mapping[str, Any]) -> bool:
        """Publish features as a new shard.

        Returns:
            False if the cache cannot keep it.
        """
        order = np.argsort(keys, kind="stable")

        def write(folder: Path) -> None:
            np.ascontiguousarray(keys[order], dtype=KEY).tofile(folder / "keys.bin")
            np.ascontiguousarray(values[order], dtype=np.float32).tofile(folder / "values.bin")

        return cache.append(KIND, self.key, write, {**facts, "rows": len(keys), "width": self.width}) is not None


_Stamp = tuple[tuple[str, int, int, int], ...]
_verified: dict[Path, _Stamp] = {}  # shards whose digests this process has checked, with the state of their files


def _stamp(folder: Path) -> _Stamp:
    """Name, inode, size and time of the files of a shard; some of these change when a file does."""
    found = ((path.name, path.stat()) for path in folder.iterdir())
    return tuple(sorted((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found))


def _read(folder: Path, width: int) -> Shard | None:
    """Read a shard; None if it is damaged or gone. Each process checks its digests once."""
    try:
        stamp = _stamp(folder)
    except OSError:
        return None
    facts = cache.verify_entry(folder, KIND, thorough=_verified.get(folder) != stamp)
    if facts is None or facts.get("width") != width:
        return None
    _verified[folder] = stamp
    try:
        keys, file = np.fromfile(folder / "keys.bin", dtype=KEY), folder / "values.bin"
        return Shard(folder.name, facts["files"][file.name]["sha256"], keys, Mapped(file, (len(keys), width)))
    except (OSError, ValueError, KeyError):
        return None
