"""Store what an encoder computes for a sample by content, in append-only shards that processes, runs and data sets share.

A shard is a folder ``<kind>/<encoder>/<number>`` of the cache with sorted keys (the 16-byte digests of `Split.keys`) and their
values: one row each (a feature), or several (the tokens of a layer). It is published whole and never changed; if two processes
computed the same sample, both use the shard with the lower number. Nothing is locked, and a damaged shard is ignored.

Shapes: N keys in all shards, U wanted keys, M keys of one shard, R rows of one shard, C width of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mopefuse.core import cache
from mopefuse.data.base import Keys

KEY = np.dtype("S16")
Values = NDArray[np.floating[Any]]
Counts = NDArray[np.int64]


class Mapped:
    """A memory-mapped file of values (rows, C). Pickling sends its path to the other process, not its content."""

    def __init__(self, file: Path, shape: tuple[int, int], dtype: str = "float32") -> None:
        self._file, self._shape, self._dtype = file, shape, dtype
        self._open()

    def _open(self) -> None:
        self._values: Values = np.asarray(np.memmap(self._file, self._dtype, mode="r", shape=self._shape))

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_shape": self._shape, "_dtype": self._dtype}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> Values:
        """Some rows: a copy of those that are listed, a view of a slice."""
        found: Values = self._values[rows]
        return found


class Shard(NamedTuple):
    """One published shard."""

    name: str
    sha256: str  # digest of its values
    keys: Keys
    values: Mapped
    ends_M: Counts | None  # where the rows of each key end; None if each key has one row

    def rows(self, number: int) -> slice:
        """The rows of one key."""
        if self.ends_M is None:
            return slice(number, number + 1)
        return slice(int(self.ends_M[number - 1]) if number else 0, int(self.ends_M[number]))


class Lookup(NamedTuple):
    """The place of each wanted key: the number of a shard, -1 if no shard has it, and the number of the key in it."""

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
        kind: kind of the entry in the cache. dtype: type of the values.
        ragged: whether a key may have any number of rows instead of one.
    """

    def __init__(
        self, key: str, width: int, *, kind: str = "features", dtype: str = "float32", ragged: bool = False
    ) -> None:
        self.key, self.width, self.kind, self.dtype, self.ragged = key, width, kind, dtype, ragged
        self.shards: list[Shard] = []
        self._opened: dict[str, Shard] = {}

    def refresh(self, names: list[str] | None = None) -> None:
        """Open the shards that have been published since.

        Args:
            names: open only these, those of another process.
        """
        folders = {folder.name: folder for folder in cache.list_parts(self.kind, self.key)}
        self.shards = []
        for name in sorted(folders, key=int) if names is None else [name for name in names if name in folders]:
            shard = self._opened.get(name) or self._read(folders[name])
            if shard is not None:
                self._opened[name] = shard
                self.shards.append(shard)

    def find(self, wanted_U: Keys) -> Lookup:
        """Find the values of some keys."""
        shard_U, row_U = np.full(len(wanted_U), -1, dtype=np.int32), np.zeros(len(wanted_U), dtype=np.int64)
        if not self.shards:
            return Lookup(shard_U, row_U)
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
        return Lookup(shard_U, row_U)

    def append(self, keys: Keys, values: Values, facts: Mapping[str, Any], counts_M: Counts | None = None) -> bool:
        """Publish values as a new shard.

        Args:
            values: (R, C), the rows of each key in the order of `keys`.
            counts_M: number of rows of each key, in a ragged store.

        Returns:
            False if the cache cannot keep it.
        """
        assert self.ragged == (counts_M is not None)
        order_M = np.argsort(keys, kind="stable")
        order_R = order_M if counts_M is None else _rows_in_order(counts_M, order_M)

        def write(folder: Path) -> None:
            np.ascontiguousarray(keys[order_M], dtype=KEY).tofile(folder / "keys.bin")
            np.ascontiguousarray(values[order_R], dtype=self.dtype).tofile(folder / "values.bin")
            if counts_M is not None:
                np.cumsum(counts_M[order_M], dtype=np.int64).tofile(folder / "ends.bin")

        facts = {**facts, "rows": len(keys), "width": self.width}
        return cache.append(self.kind, self.key, write, facts) is not None

    def _read(self, folder: Path) -> Shard | None:
        """Read a shard; None if it is damaged or gone. Each process checks its digests once."""
        try:
            stamp = _stamp(folder)
        except OSError:
            return None
        facts = cache.verify_entry(folder, self.kind, thorough=_verified.get(folder) != stamp)
        if facts is None or facts.get("width") != self.width:
            return None
        _verified[folder] = stamp
        try:
            keys, file = np.fromfile(folder / "keys.bin", dtype=KEY), folder / "values.bin"
            ends_M = np.fromfile(folder / "ends.bin", dtype=np.int64) if self.ragged else None
            count = len(keys) if ends_M is None else int(ends_M[-1])
            if ends_M is not None and not (len(ends_M) == len(keys) and _are_ends(ends_M)):
                return None
            if file.stat().st_size != count * self.width * np.dtype(self.dtype).itemsize:
                return None
            values = Mapped(file, (count, self.width), self.dtype)
            return Shard(folder.name, facts["files"][file.name]["sha256"], keys, values, ends_M)
        except (OSError, ValueError, KeyError, IndexError):
            return None


def _rows_in_order(counts_M: Counts, order_M: Counts) -> Counts:
    """The rows of all keys (R,), for keys in another order."""
    starts_M = np.cumsum(counts_M) - counts_M
    return np.concatenate([np.arange(starts_M[m], starts_M[m] + counts_M[m]) for m in order_M])


def _are_ends(ends_M: Counts) -> bool:
    """Whether every key has at least one row."""
    return bool(ends_M[0] > 0 and (ends_M[1:] > ends_M[:-1]).all())


_Stamp = tuple[tuple[str, int, int, int], ...]
_verified: dict[Path, _Stamp] = {}  # shards whose digests this process has checked, with the state of their files


def _stamp(folder: Path) -> _Stamp:
    """Name, inode, size and time of the files of a shard; some of these change when a file does."""
    found = ((path.name, path.stat()) for path in folder.iterdir())
    return tuple(sorted((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found))
