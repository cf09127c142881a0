"""Parquet files, and the Arrow files that ``Dataset.save_to_disk`` of Hugging Face writes: rows, and files in their cells.

A cell is a file if its column has bytes, or structs of bytes and path as Hugging Face's images have. Files are read by row
group (of Parquet) or record batch (of Arrow).
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mopefuse.core.error_codes import DataCode
from mopefuse.data.storage.paths import ARROW, is_remote, open_remote
from mopefuse.data.storage.table import TableRow
from mopefuse.errors import DataError, MopefuseError
from mopefuse.modalities.file_source import Stamp

PACKED = b"mopefuse.pack"
"""Key of the metadata of files that `mopefuse data pack` wrote: the paths beside bytes are names in the data set, and equal
paths stand for equal files."""
_KEPT_BYTES = 256 << 20  # of groups in memory
_ROWS_AT_ONCE = 16_384


class ArrowFile:
    """A Parquet or Arrow file.

    Attributes:
        path, stamp: the file. name: its name in the data set. packed: see `PACKED`.
        file_columns: the columns whose cells are files. starts_G1: number of the first row of each group, and of all rows.

    Raises:
        DataError: it cannot be read, or pyarrow is not installed.
    """

    def __init__(self, path: Path, name: str, stamp: Stamp) -> None:
        self.path, self.name, self.stamp = path, name, stamp
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._opened: tuple[int, Any] = (-1, None)  # by this process
        with arrow_errors(path):
            reader = self._reader()
            self.starts_G1 = np.concatenate([[0], np.cumsum(reader.group_sizes())]).astype(np.int64)
            schema = reader.schema
        self.packed = PACKED in (schema.metadata or {})
        self.columns = [field.name for field in schema]
        if repeated := sorted({name for name in self.columns if self.columns.count(name) > 1}):
            what = f"the column {repeated[0]!r} occurs twice"
            raise DataError(DataCode.COLUMN_TWICE, what, where=str(path), fix="rename or remove one of them")
        self.file_columns = {field.name: _is_struct(field.type) for field in schema if _holds_files(field.type)}
        self._names = _label_names(schema.metadata or {})

    def rows(self, first_line: int) -> Iterator[TableRow]:
        """The rows; the value of a cell that is a file is its name; integers and truth values are texts.

        Args:
            first_line: number of the first row.
        """
        line = first_line
        for batch in self.batches():
            for row in batch.to_pylist():
                yield TableRow(line, row)
                line += 1

    def batches(self) -> Iterator[Any]:
        """The rows as Arrow tables of bounded size, with the same values as those of `rows`."""
        for group, start in enumerate(self.starts_G1[:-1].tolist()):
            plain = [name for name in self.columns if name not in self.file_columns]
            paths = [f"{name}.path" for name, is_struct in self.file_columns.items() if is_struct]
            with arrow_errors(self.path):
                table = self._reader().read(group, [*plain, *paths])
                present = {name: self._present(group, name) for name in self.file_columns}
            for first in range(0, len(table), _ROWS_AT_ONCE):
                part = table.slice(first, _ROWS_AT_ONCE)
                with arrow_errors(self.path):
                    yield self._named(part, start + first, {name: found[first:] for name, found in present.items()})

    def _named(self, part: Any, first_row: int, present: Mapping[str, NDArray[np.bool_]]) -> Any:
        """Put names of files and texts in the place of files and integers, in the order of the columns."""
        import pyarrow as arrow

        columns = []
        for name in self.columns:
            if name not in self.file_columns:
                columns.append(self._plain(name, part.column(name)))
                continue
            is_struct, count = self.file_columns[name], len(part)
            paths = part.column(name).combine_chunks().field("path").to_pylist() if is_struct else [None] * count
            own = (self.name_of(first_row + number, name) for number in range(count))
            named = [
                (path if self.packed and path else mine) if is_there else path
                for path, mine, is_there in zip(paths, own, present[name], strict=False)
            ]
            columns.append(arrow.array(named, type=arrow.string()))
        return arrow.table(columns, names=self.columns)

    def name_of(self, row: int, column: str) -> str:
        """The name in rows of the file in a cell."""
        return f"{self.name}/{row}/{column}"

    def paths(self, column: str) -> Iterator[str]:
        """The path of the file in each row, of a column of structs; empty where there is none."""
        for group in range(len(self.starts_G1) - 1):
            with arrow_errors(self.path):
                cells = self._reader().read(group, [f"{column}.path"]).column(column).to_pylist()
            yield from ((cell or {}).get("path") or "" for cell in cells)

    def read_cell(self, row: int, column: str) -> tuple[bytes | None, range]:
        """The file in a cell, and the rows that are read with it.

        Raises:
            DataError: the row group is damaged.
        """
        group = int(np.searchsorted(self.starts_G1, row, side="right")) - 1
        first, end = int(self.starts_G1[group]), int(self.starts_G1[group + 1])
        return cast("bytes | None", self._group(group, column)[row - first].as_py()), range(first, end)

    def _group(self, group: int, column: str) -> Any:
        """The bytes of a column in a group, kept in memory with those that were used last."""
        with self._lock:
            if (group, column) in self._kept:
                self._kept.move_to_end((group, column))
                return self._kept[group, column]
            with arrow_errors(self.path):
                is_struct = self.file_columns[column]
                found = self._reader().read(group, [f"{column}.bytes" if is_struct else column]).column(column).combine_chunks()
            self._kept[group, column] = found.field("bytes") if is_struct else found
            while len(self._kept) > 1 and sum(array.nbytes for array in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            return self._kept[group, column]

    def _present(self, group: int, column: str) -> NDArray[np.bool_]:
        """Whether the cells of a column in a group have bytes; these are read only if some may be missing."""
        size = int(self.starts_G1[group + 1] - self.starts_G1[group])
        if self._reader().null_count(group, f"{column}.bytes" if self.file_columns[column] else column) == 0:
            return np.ones(size, dtype=bool)
        valid: NDArray[np.bool_] = self._group(group, column).is_valid().to_numpy(zero_copy_only=False)
        return valid

    def _plain(self, name: str, column: Any) -> Any:
        """Convert integers and truth values to texts: a column has one type, so they are not a mistake as in JSON."""
        import pyarrow as arrow

        kind, names = column.type, self._names.get(name)
        if names is not None:
            known = dict(enumerate(names))  # without -1, which stands for a missing label
            cells = column.to_pylist()
            return arrow.array([[*map(known.get, cell)] if isinstance(cell, list) else known.get(cell) for cell in cells])
        if arrow.types.is_dictionary(kind):
            column, kind = column.cast(kind.value_type), kind.value_type
        return column.cast(arrow.string()) if arrow.types.is_integer(kind) or arrow.types.is_boolean(kind) else column

    def _reader(self) -> Any:
        """The reader of this process: one that was opened before a fork is not used."""
        if self._opened[0] != os.getpid():
            reader = _BatchReader(self.path) if self.path.suffix == ARROW else _ParquetReader(self.path)
            self._opened = (os.getpid(), reader)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_kept": None, "_opened": (-1, None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _kept=OrderedDict())


class _ParquetReader:
    """Reads row groups of a Parquet file."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(open_binary(path), page_checksum_verification=True, pre_buffer=is_remote(path))
        self.schema = self._file.schema_arrow

    def group_sizes(self) -> list[int]:
        return [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]

    def read(self, group: int, columns: list[str]) -> Any:
        return self._file.read_row_group(group, columns=columns, use_threads=False)

    def null_count(self, group: int, column: str) -> int | None:
        chunks = self._file.metadata.row_group(group)
        for number in range(chunks.num_columns):
            statistics = chunks.column(number).statistics
            if chunks.column(number).path_in_schema == column and statistics is not None and statistics.has_null_count:
                return int(statistics.null_count)
        return None


class _BatchReader:
    """Reads record batches of an Arrow file, which stays on disk until they are used."""

    def __init__(self, path: Path) -> None:
        import pyarrow as arrow

        source = open_binary(path) if is_remote(path) else arrow.memory_map(str(path))
        try:
            reader = arrow.ipc.open_stream(source)
            self._batches = list(reader)
        except arrow.ArrowInvalid:
            reader = arrow.ipc.open_file(source)
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self.schema, self._table = reader.schema, arrow.Table.from_batches

    def group_sizes(self) -> list[int]:
        return [batch.num_rows for batch in self._batches]

    def read(self, group: int, columns: list[str]) -> Any:
        names = [*dict.fromkeys(column.partition(".")[0] for column in columns)]
        return self._table([self._batches[group].select(names)])

    def null_count(self, group: int, column: str) -> int | None:
        return None


def open_binary(path: Path) -> Any:
    """Open a local or remote file for pyarrow."""
    return open_remote(path) if is_remote(path) else str(path)


@contextmanager
def arrow_errors(path: Path) -> Iterator[None]:
    """Turn errors of pyarrow into a DataError."""
    try:
        import pyarrow as arrow
    except ImportError:
        fix = 'pip install "mopefuse[parquet]", or convert the file to JSON lines'
        raise DataError(DataCode.PARQUET_NEEDS_PYARROW, "reading Parquet needs pyarrow", where=str(path), fix=fix) from None
    try:
        yield
    except MopefuseError:
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what, fix = f"{path.name} is damaged: {reason}", "replace it with the complete file"
        raise DataError(DataCode.PARQUET_DAMAGED, what, where=str(path), fix=fix) from None


def _is_struct(kind: Any) -> bool:
    import pyarrow as arrow

    return bool(arrow.types.is_struct(kind))


def _holds_files(kind: Any) -> bool:
    """Whether the cells of a column of this type are files."""
    import pyarrow as arrow

    if _is_struct(kind):
        return {"bytes", "path"} <= {field.name for field in kind} and _holds_files(kind.field("bytes").type)
    return bool(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind))


def _label_names(metadata: Mapping[bytes, bytes]) -> dict[str, Sequence[str]]:
    """The names of labels that are stored as numbers, by column: the feature ClassLabel of Hugging Face data sets."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        kinds = {name: kind.get("feature", kind) if isinstance(kind, dict) else {} for name, kind in features.items()}
        return {name: tuple(kind["names"]) for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
