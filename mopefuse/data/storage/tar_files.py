"""The files inside tar shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mopefuse.core import cache
from mopefuse.core.error_codes import DataCode
from mopefuse.data.storage.byte_cache import ByteCache
from mopefuse.data.storage.name_table import NameTable
from mopefuse.data.storage.paths import is_remote, read_range
from mopefuse.data.storage.tar_shards import Shard
from mopefuse.errors import DataError
from mopefuse.modalities.file_source import FileSource, Stamp

_AT_ONCE = 32  # reads from remote shards


class TarFiles(FileSource):
    """Files of shards, by their names in rows; of equal names, the first file counts.

    Args:
        kept: where copies of files of remote shards are kept.
    """

    def __init__(self, shards: Sequence[Shard], kept: ByteCache) -> None:
        self._shards, self._cache = tuple(shards), kept
        self.at_once = _AT_ONCE if any(is_remote(shard.path) for shard in shards) else 0

    def stamp(self, name: str, *, where: str, what: str) -> Stamp:
        """See `FileSource.stamp`."""
        shard, _, size = self._find(name, where, what)
        return Stamp(size, shard.stamp.version)

    def read(self, name: str, *, where: str, what: str) -> bytes:
        """See `FileSource.read`."""
        shard, start, size = self._find(name, where, what)
        if is_remote(shard.path):
            key = cache.make_key(str(shard.path), *shard.stamp, start, size)
            content = self._cache.get(key, lambda: read_range(shard.path, start, start + size))
        else:
            try:
                content = read_range(shard.path, start, start + size)
            except OSError as error:
                raise _unreadable(name, shard, str(error.strerror), where) from None
        if len(content) != size:
            raise _unreadable(name, shard, "the shard ends before the file does", where)
        return content

    def identity(self) -> tuple[str, ...]:
        """See `FileSource.identity`."""
        return (cache.make_key("tar", *(shard.path.resolve() for shard in self._shards)),)

    def has(self, name: str) -> bool:
        """See `FileSource.has`."""
        return self._names.find(name) is not None

    def _find(self, name: str, where: str, what: str) -> tuple[Shard, int, int]:
        """The shard of a file, its first byte and its size."""
        position = self._names.find(name)
        if position is None:
            raise DataError(DataCode.FILE_NOT_FOUND, f"{what} not found: {name}", where=where, fix="add the file")
        number = int(np.searchsorted(self._first_H, position, side="right")) - 1
        shard, place = self._shards[number], position - int(self._first_H[number])
        return shard, int(shard.start_M[place]), int(shard.size_M[place])

    @cached_property
    def _first_H(self) -> NDArray[np.int64]:
        """Place of the first file of each shard among those of all shards."""
        return np.cumsum([0, *(len(shard.key_M) for shard in self._shards[:-1])])

    @cached_property
    def _names(self) -> NameTable:
        return NameTable(np.concatenate([shard.key_M for shard in self._shards]))


def _unreadable(name: str, shard: Shard, reason: str, where: str) -> DataError:
    what = f"{name} cannot be read from {shard.name}: {reason}"
    return DataError(DataCode.FILE_UNREADABLE, what, where=where, fix="replace the shard with the complete file")
