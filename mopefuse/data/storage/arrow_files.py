"""The files in cells of Parquet and Arrow files.

Shapes: K columns of packed shards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mopefuse.core import cache
from mopefuse.core.error_codes import DataCode
from mopefuse.data.storage.arrow_shards import ArrowFile
from mopefuse.data.storage.byte_cache import ByteCache
from mopefuse.data.storage.name_table import NameTable, name_key
from mopefuse.data.storage.paths import is_remote
from mopefuse.errors import DataError
from mopefuse.modalities.file_source import FileSource, Stamp

_CELL = re.compile(r"(.+?\.(?:parquet|arrow))/(\d{1,18})/(.+)", re.DOTALL)


class ArrowCells(FileSource):
    """Files in cells, by their names in rows; of equal names, the first file counts.

    Args:
        shards: the files with the rows. kept: where copies of files of remote shards are kept.
    """

    def __init__(self, shards: Sequence[ArrowFile], kept: ByteCache) -> None:
        self._shards, self._cache = tuple(shards), kept
        self._by_name = {shard.name: shard for shard in shards}

    def stamp(self, name: str, *, where: str, what: str) -> Stamp:
        """See `FileSource.stamp`; the size of the file that has the cell stands for that of the cell."""
        shard, _, _ = self._find(name, where, what)
        return shard.stamp

    def read(self, name: str, *, where: str, what: str) -> bytes:
        """See `FileSource.read`."""
        shard, row, column = self._find(name, where, what)
        try:
            content = self._fetch(shard, row, column) if is_remote(shard.path) else shard.read_cell(row, column)[0]
        except DataError as error:
            reason = error.what.partition(" is damaged: ")[2] or error.what
            message = f"{name} cannot be read from {shard.name}: {reason}"
            raise DataError(DataCode.FILE_UNREADABLE, message, where=where, fix=error.fix) from None
        return content or b""

    def identity(self) -> tuple[str, ...]:
        """See `FileSource.identity`."""
        return (cache.make_key("arrow", *(shard.path.resolve() for shard in self._shards)),)

    def has(self, name: str) -> bool:
        """See `FileSource.has`."""
        return self._locate(name) is not None

    def _fetch(self, shard: ArrowFile, row: int, column: str) -> bytes:
        """A file of a remote shard; all files that are read with it are kept."""

        def key(number: int) -> str:
            return cache.make_key(str(shard.path), *shard.stamp, number, column)

        def fetch() -> bytes:
            content, together = shard.read_cell(row, column)
            for number in together:
                if number != row:
                    self._cache.get(key(number), lambda number=number: shard.read_cell(number, column)[0] or b"")  # type: ignore[misc]
            return content or b""

        return self._cache.get(key(row), fetch)

    def _find(self, name: str, where: str, what: str) -> tuple[ArrowFile, int, str]:
        found = self._locate(name)
        if found is None:
            raise DataError(DataCode.FILE_NOT_FOUND, f"{what} not found: {name}", where=where, fix="add the file")
        return found

    def _locate(self, name: str) -> tuple[ArrowFile, int, str] | None:
        """The shard, row and column of a file."""
        place = self._packed.find(name) if self._columns else None
        if place is not None:
            number = int(np.searchsorted(self._first_K, place, side="right")) - 1
            shard, column = self._columns[number]
            return shard, place - int(self._first_K[number]), column
        parts = _CELL.fullmatch(name)
        found = self._by_name.get(parts[1]) if parts is not None else None
        if parts is None or found is None or parts[3] not in found.file_columns or int(parts[2]) >= found.starts_G1[-1]:
            return None
        return found, int(parts[2]), parts[3]

    @cached_property
    def _columns(self) -> list[tuple[ArrowFile, str]]:
        """The columns of packed files whose cells have names in the data set."""
        packed = [shard for shard in self._shards if shard.packed]
        return [(shard, column) for shard in packed for column, is_struct in shard.file_columns.items() if is_struct]

    @cached_property
    def _first_K(self) -> NDArray[np.int64]:
        """The place of the first cell of each of `_columns` among all their cells."""
        return np.cumsum([0, *(int(shard.starts_G1[-1]) for shard, _ in self._columns[:-1])])

    @cached_property
    def _packed(self) -> NameTable:
        keys = (name_key(path) for shard, column in self._columns for path in shard.paths(column))
        return NameTable(np.fromiter(keys, dtype=np.uint64))
