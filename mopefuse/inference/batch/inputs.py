"""The tables to predict: which files there are, how their rows are divided into partitions, and the rows of a partition.

This is all that the rest of the package knows about inputs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import ConfigCode, DataCode, PathCode
from mopefuse.data.csv_records import Records, delimiter_of
from mopefuse.data.storage.paths import ARROW, TAR, expand_braces, remote_stamp
from mopefuse.data.storage.table import TableRow, parse_json_line
from mopefuse.data.tables import SUFFIXES as TABLES
from mopefuse.data.tables import decode_text
from mopefuse.errors import ConfigError, DataError, MopefuseError, UnsafePathError
from mopefuse.inference.batch.storage import FileSystem, full_name, is_local, is_url, open_storage, reading

SUFFIXES = tuple(suffix for suffix in TABLES if suffix not in (TAR, ARROW))
_MAGIC = {b"\x1f\x8b": "gzip", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\x03\x04": "a zip"}
_BOM = b"\xef\xbb\xbf"
_ROWS = 256  # rows that are read from Parquet at a time


class InputFile(NamedTuple):
    """One table.

    Args:
        path: local path or URL. size: in bytes. version: changes with the content: the time of the last change, or the tag
            that an object store gives.
    """

    path: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """The name of the file, for messages."""
        return PurePosixPath(self.path).name


class Span(NamedTuple):
    """Some successive rows of a table.

    Args:
        start: rows before them. rows: how many.
        first_byte, end_byte, line: where they are in a file of JSON lines, and the lines before them.
    """

    start: int
    rows: int
    first_byte: int = 0
    end_byte: int = 0
    line: int = 0


# -- which files


def list_files(inputs: Sequence[str]) -> list[InputFile]:
    """The tables that paths, folders, globs, brace patterns and URLs name, each once, in the order of the arguments.

    Those of a folder or a glob are sorted by name; names that begin with ``_`` or ``.`` are left out.

    Raises:
        ConfigError: a pattern names no table. DataError: the store cannot be read. PackageError: see `open_storage`.
    """
    found: dict[str, InputFile] = {}
    for text in inputs:
        for pattern in [text] if not is_url(text) and os.path.exists(text) else expand_braces(text):
            files = _match(pattern)
            if not files:
                what = f"no table matches {pattern}"
                fix = f"pass tables ({', '.join(SUFFIXES)}), a folder of them, or a pattern in quotes"
                raise ConfigError(ConfigCode.BAD_PREDICT_INPUT, what, where="predict", fix=fix)
            found |= {file.path: file for file in files}
    return list(found.values())


def _match(pattern: str) -> list[InputFile]:
    """The tables of a folder, a glob or a path; none if there is none."""
    from fsspec.core import has_magic

    storage, path = open_storage(pattern)
    with reading(pattern):
        storage.invalidate_cache()
        if has_magic(path):
            found = storage.glob(path, detail=True)
        elif storage.isdir(path):
            found = {info["name"]: info for info in storage.ls(path, detail=True)}
        else:
            return [identify(full_name(storage, path))] if storage.exists(path) else []
        tables = sorted(name for name, info in found.items() if info["type"] == "file" and _is_table(name))
        return [_input_file(storage, name, found[name]) for name in tables]


def _is_table(name: str) -> bool:
    last = PurePosixPath(name)
    return last.suffix.lower() in SUFFIXES and not last.name.startswith(("_", "."))


def identify(path: str) -> InputFile:
    """A table with its size and version.

    Raises:
        DataError: it is gone, cannot be read, or is not a table by its name.
    """
    if PurePosixPath(path).suffix.lower() not in SUFFIXES:
        fix = f"pass {', '.join(SUFFIXES)} files"
        raise DataError(DataCode.NOT_A_TABLE, f"{PurePosixPath(path).name} is not a table", where=path, fix=fix)
    storage, place = open_storage(path)
    with reading(path):
        return _input_file(storage, place, {} if is_local(storage) else storage.info(place))


def _input_file(storage: FileSystem, path: str, info: Mapping[str, Any]) -> InputFile:
    """Args: info: what the file system knows of the file; of a local one, the file itself is asked."""
    if is_local(storage):
        status = os.stat(path)
        return InputFile(path, status.st_size, str(status.st_mtime_ns))
    stamp = remote_stamp(info)
    return InputFile(full_name(storage, path), stamp.size, str(stamp.version))


# -- partitions


def divide(file: InputFile, rows: int, columns: Sequence[str]) -> list[Span]:
    """Divide a table into partitions of at most `rows` rows.

    Parquet is divided by its metadata; JSON lines and CSV are read once.

    Args:
        columns: those that will be read, by which the delimiter of a CSV file is recognised.

    Raises:
        DataError: it is damaged, is not what its name says, or cannot be read. PackageError: Parquet needs pyarrow.
    """
    storage, path = open_storage(file.path)
    if file.path.lower().endswith(".jsonl"):
        with reading(file.path), storage.open(path, "rb") as lines:
            return _divide_lines(lines, rows, file)
    if file.path.lower().endswith(".parquet"):
        with _parquet(storage, path, file) as table:
            count = table.metadata.num_rows
    else:
        count = sum(1 for _ in _csv_rows(file, columns))
    return [Span(start, min(rows, count - start)) for start in range(0, count, rows)]


def _divide_lines(lines: Any, rows: int, file: InputFile) -> list[Span]:
    spans: list[Span] = []
    span, place = Span(0, 0), 0
    for number, line in enumerate(lines, start=1):
        if number == 1:
            _refuse_binary(line, file)
            line_is_blank = not line.removeprefix(_BOM).strip()
        else:
            line_is_blank = not line.strip()
        place += len(line)
        span = span._replace(rows=span.rows + (not line_is_blank), end_byte=place)
        if span.rows == rows:
            spans.append(span)
            span = Span(span.start + rows, 0, place, place, number)
    return [*spans, span] if span.rows else spans


def _refuse_binary(head: bytes, file: InputFile) -> None:
    for start, kind in {**_MAGIC, b"PAR1": "Parquet"}.items():
        if head.startswith(start):
            fix = "convert it to UTF-8 JSON lines or CSV, or give it the right suffix"
            raise DataError(DataCode.NOT_TEXT, f"this is {kind}, not text", where=file.path, fix=fix)


# -- rows


def read_rows(file: InputFile, span: Span, columns: Sequence[str]) -> Iterator[TableRow]:
    """The rows of a partition.

    Args:
        columns: those that are needed; of Parquet, no others are read, if there are all of them.

    Raises:
        DataError: the file is damaged, cannot be read, or has changed since it was divided.
    """
    if identify(file.path) != file:
        raise _changed(file)
    kind = PurePosixPath(file.path).suffix.lower()
    rows = _json_rows(file, span) if kind == ".jsonl" else _parquet_rows(file, span, columns) if kind == ".parquet" else None
    count = 0
    for row in rows if rows is not None else _csv_rows(file, columns, span):
        count += 1
        yield row
    if count != span.rows:
        raise _changed(file)


def _changed(file: InputFile) -> DataError:
    changed = f"{file.name} has changed since the prediction was started"
    return DataError(DataCode.DATA_CHANGED, changed, where=file.path, fix="start again with --overwrite")


def _json_rows(file: InputFile, span: Span) -> Iterator[TableRow]:
    storage, path = open_storage(file.path)
    with reading(file.path):
        content = storage.cat_file(path, start=span.first_byte, end=span.end_byte)
    for number, line in enumerate(io.BytesIO(content), start=span.line + 1):
        line = line.removeprefix(_BOM) if number == 1 else line
        if line.strip():
            yield TableRow(number, parse_json_line(line.rstrip(b"\n")))


@lru_cache(maxsize=1)
def _csv_text(file: InputFile, columns: Sequence[str]) -> tuple[str, str]:
    """The text of a CSV file and its delimiter."""
    storage, path = open_storage(file.path)
    with reading(file.path):
        content: bytes = storage.cat_file(path)
    _refuse_binary(content, file)
    default = "\t" if file.path.lower().endswith(".tsv") else ","
    return decode_text(content, Path(file.name)), delimiter_of(content, default, columns)


def _csv_rows(file: InputFile, columns: Sequence[str], span: Span | None = None) -> Iterator[TableRow]:
    """All rows, or those of a partition; the file is parsed from its start, since an open quote may change what follows."""
    text, delimiter = _csv_text(file, tuple(columns))
    records, header, number = Records(text, delimiter), None, 0
    for record in records:
        if header is None:
            header = _header(record.cells, record.problem, file)
            records.width = len(header)
            continue
        number += 1
        if span is not None and number <= span.start:
            continue
        if span is not None and number > span.start + span.rows:
            return
        wrong = f"has {len(record.cells)} fields, the header has {len(header)}" if len(record.cells) != len(header) else ""
        yield TableRow(record.line, record.problem or wrong or dict(zip(header, record.cells, strict=False)))


def _header(cells: Sequence[str], problem: str, file: InputFile) -> list[str]:
    header = [cell.strip() for cell in cells]
    if problem or len({*header}) < len(header):
        what = f"the header {problem}" if problem else "a column occurs twice"
        raise DataError(DataCode.BAD_HEADER, what, where=file.path, fix="correct the line with the column names")
    return header


# -- Parquet


class _parquet:
    """Opens a Parquet file, and turns whatever is wrong with it into a DataError."""

    def __init__(self, storage: FileSystem, path: str, file: InputFile) -> None:
        require("pyarrow", extra="parquet", what="reading Parquet")
        self._storage, self._path, self._file = storage, path, file

    def __enter__(self) -> Any:
        from pyarrow import parquet

        try:
            with reading(self._file.path):
                self._opened = self._storage.open(self._path, "rb")
            self._table = parquet.ParquetFile(self._opened)
        except Exception as error:
            self.__exit__(type(error), error)
            raise
        return self._table

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: Any) -> None:
        if hasattr(self, "_opened"):
            self._opened.close()
        if isinstance(error, Exception) and not isinstance(error, MopefuseError | MemoryError):
            reason = str(error).partition("\n")[0] or type(error).__name__
            what, fix = f"{self._file.name} is damaged: {reason}", "replace it with the complete file, and start again"
            raise DataError(DataCode.PARQUET_DAMAGED, what, where=self._file.path, fix=fix) from None


def _parquet_rows(file: InputFile, span: Span, columns: Sequence[str]) -> Iterator[TableRow]:
    storage, path = open_storage(file.path)
    with _parquet(storage, path, file) as table:
        groups, before, place = [], 0, 0
        for number in range(table.num_row_groups):  # only those that have rows of the partition
            count = table.metadata.row_group(number).num_rows
            if place + count <= span.start:
                before = place + count
            elif place < span.start + span.rows:
                groups.append(number)
            place += count
        present = set(table.schema_arrow.names)
        wanted = list(columns) if present.issuperset(columns) else None
        row = before
        for batch in table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=wanted):
            skipped = max(0, span.start - row)
            for at, value in enumerate(batch.slice(skipped, max(0, span.start + span.rows - row - skipped)).to_pylist()):
                yield TableRow(row + skipped + at + 1, {key: _plain(cell) for key, cell in value.items()})
            row += len(batch)


def _plain(value: Any) -> Any:
    """Integers as text: a column has one type, so integer ids are not a mistake as in JSON."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


# -- files that rows name or contain


class Contents:
    """The files of a table's rows: in a cell, as bytes or ``{"bytes", "path"}``, or next to a table in an object store.

    Args:
        columns: the column of each modality of files. folder: that of the table, if it is in an object store.
    """

    def __init__(self, columns: Mapping[str, str], folder: str | None) -> None:
        self._columns, self._folder = columns, folder

    def take(self, row: TableRow) -> tuple[TableRow, dict[str, bytes]]:
        """The row with names in place of contents, and the contents by modality."""
        if not isinstance(row.value, dict):
            return row, {}
        cells: dict[str, str | None] = {}
        contents: dict[str, bytes] = {}
        for modality, column in self._columns.items():
            cell = row.value.get(column)
            name, content = (cell.get("path"), cell.get("bytes")) if isinstance(cell, Mapping) else (None, cell)
            if isinstance(content, bytes):
                contents[modality] = content
                name = str(name or f"{column} of row {row.line}")
            if isinstance(cell, bytes | Mapping):
                cells[column] = name
        return (row._replace(value={**row.value, **cells}), contents) if cells else (row, contents)

    def fetch(self, what: str, name: str, where: str) -> bytes | None:
        """The content of a file next to the table in an object store; None if the table is on this machine.

        Raises:
            UnsafePathError: the path leads elsewhere. DataError: it cannot be read.
        """
        if self._folder is None:
            return None
        if is_url(name) or name.startswith(("/", "\\", "~")) or ".." in PurePosixPath(name).parts or "\0" in name:
            outside = f"the {what} path is outside the folder of the table"
            raise UnsafePathError(PathCode.OUTSIDE_ROOT, outside, where=where, fix="use a path relative to the table")
        storage, path = open_storage(f"{self._folder}/{name}")
        try:
            content: bytes = storage.cat_file(path, start=0)  # without a start, s3fs first asks for the size
            return content
        except FileNotFoundError:
            raise DataError(DataCode.FILE_NOT_FOUND, f"{what} not found: {name}", where=where, fix="add the file") from None
        except Exception as error:  # the libraries of object stores have errors of their own
            what = f"{name} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            raise DataError(DataCode.FILE_UNREADABLE, what, where=where, fix="make it readable") from None
