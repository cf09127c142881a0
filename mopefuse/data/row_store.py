"""Where the rows of a split are kept, so that half a million of them take little memory: each is parsed when it is used.

Shapes: S rows of a split.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mopefuse.core import cache
from mopefuse.core.atomic_files import TEMPORARY, lasting_temporary
from mopefuse.core.lazy_sequence import LazySequence

Numbers = NDArray[np.int64]


class RowStore(Protocol):
    """Rows as they are written in the data: columns to values."""

    def __len__(self) -> int: ...

    def row(self, number: int) -> Mapping[str, Any]:
        """Read a row."""

    def take(self, rows: Numbers) -> RowStore:
        """Select some rows, in the order of `rows`."""


@dataclass(frozen=True, eq=False)
class JsonRows:
    """Rows in JSON lines.

    Args:
        content: the lines. byte_ranges_S2: first byte and end of each row.
        converted: whether the lines were converted from another format, of which they have the columns in use.
    """

    content: bytes
    byte_ranges_S2: Numbers
    converted: bool

    def __len__(self) -> int:
        return len(self.byte_ranges_S2)

    def row(self, number: int) -> Mapping[str, Any]:
        """See `RowStore.row`."""
        start, stop = self.byte_ranges_S2[number]
        found: dict[str, Any] = json.loads(self.content[start:stop])
        return found

    def take(self, rows: Numbers) -> JsonRows:
        """See `RowStore.take`."""
        return replace(self, byte_ranges_S2=self.byte_ranges_S2[rows])


@dataclass(frozen=True, eq=False)
class ArrowRows:
    """Rows in an Arrow file, which stays on disk.

    Args:
        path: the file. number_S: the number of each row in the file; None if these are all its rows.
    """

    path: Path
    number_S: Numbers | None = None

    def __len__(self) -> int:
        return int(self._starts[-1]) if self.number_S is None else len(self.number_S)

    def row(self, number: int) -> Mapping[str, Any]:
        """See `RowStore.row`."""
        place = number if self.number_S is None else int(self.number_S[number])
        batch = int(np.searchsorted(self._starts, place, side="right")) - 1
        inside = place - int(self._starts[batch])
        columns = zip(self._batches[batch].schema.names, self._batches[batch].columns, strict=True)
        return {name: column[inside].as_py() for name, column in columns}

    def take(self, rows: Numbers) -> ArrowRows:
        """See `RowStore.take`."""
        return replace(self, number_S=rows if self.number_S is None else self.number_S[rows])

    def cells(self, column: str) -> Iterator[str]:
        """The texts in a column of all rows of the file."""
        for batch in self._batches:
            yield from batch.column(batch.schema.get_field_index(column)).to_pylist()

    @cached_property
    def _batches(self) -> list[Any]:
        import pyarrow as arrow

        reader = arrow.ipc.open_file(arrow.memory_map(str(self.path)))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]

    @cached_property
    def _starts(self) -> Numbers:
        return np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "number_S": self.number_S}  # each process opens the file


@dataclass(frozen=True, eq=False)
class StoredStrings(LazySequence[str]):
    """Texts in a column of an Arrow file.

    Args:
        store: all rows of the file. rows_N: those whose texts these are, ascending; None for all.
    """

    store: ArrowRows
    column: str
    rows_N: Numbers | None = None

    def __len__(self) -> int:
        return len(self.store) if self.rows_N is None else len(self.rows_N)

    def at(self, number: int) -> str:
        """See `LazySequence.at`."""
        return str(self.store.row(number if self.rows_N is None else int(self.rows_N[number]))[self.column])

    def __iter__(self) -> Iterator[str]:
        cells = self.store.cells(self.column)
        if self.rows_N is None:
            return cells
        return (cell for row, cell in zip(self._counted(), cells, strict=False) if row)

    def _counted(self) -> Iterator[bool]:
        """Whether each row of the file is one of `rows_N`."""
        assert self.rows_N is not None
        chosen = np.zeros(len(self.store), dtype=bool)
        chosen[self.rows_N] = True
        return iter(chosen)


def temporary_file() -> Path | None:
    """A new path in the cache folder for rows; None if nothing can be cached."""
    base = cache.root()
    if base is None:
        return None
    (base / "index").mkdir(exist_ok=True)
    return lasting_temporary(base / "index" / "rows")


def place_file(path: Path, target: Path) -> None:
    """Move a temporary file to `target`; any other file is linked or copied."""
    if TEMPORARY in path.name:
        path.replace(target)
        return
    try:
        os.link(path, target)
    except OSError:  # no hard links
        shutil.copyfile(path, target)
