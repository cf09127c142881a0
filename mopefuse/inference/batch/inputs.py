"""The tables to predict: which files there are, how their rows are divided into partitions, and the rows of a partition.

This is all that the rest of the package knows about inputs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.data.csv_records import Records, delimiter_of
from mopefuse.data.storage.paths import ARROW, TAR, data_path, expand_braces, remote_stamp, stamp_of
from mopefuse.data.storage.shards import open_files, shards_table
from mopefuse.data.storage.table import Table, TableRow, parse_json_line
from mopefuse.data.storage.tar_shards import open_shard
from mopefuse.data.tables import SUFFIXES as TABLES
from mopefuse.data.tables import decode_text
from mopefuse.errors import ConfigError, DataError, MopefuseError
from mopefuse.inference.batch.storage import FileSystem, full_name, is_local, is_url, open_storage, reading
from mopefuse.modalities.file_source import FileSource

SUFFIXES = tuple(suffix for suffix in TABLES if suffix != ARROW)
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

    @property
    def suffix(self) -> str:
        """The end of its name, which is its format, in lower case."""
        return PurePosixPath(self.path).suffix.lower()


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

    Those of a folder or a glob are sorted by name; names that begin with ``_`` or ``.`` are left out, and so are tar files in a
    folder with other tables.

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
        if not has_magic(path):  # an archive next to tables is not one of them
            tables = [name for name in tables if not name.lower().endswith(TAR)] or tables
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


def divide(file: InputFile, rows: int, columns: Sequence[str], config: DataConfig) -> list[Span]:
    """Divide a table into partitions of at most `rows` rows.

    Parquet is divided by its metadata; other formats are read once.

    Args:
        columns: those that will be read, by which the delimiter of a CSV file is recognised. config: names of columns.

    Raises:
        DataError: it is damaged, is not what its name says, or cannot be read. PackageError: Parquet needs pyarrow.
    """
    storage, path = open_storage(file.path)
    if file.suffix == ".jsonl":
        with reading(file.path), storage.open(path, "rb") as lines:
            return _divide_lines(lines, rows, file)
    if file.suffix == ".parquet":
        with _parquet(storage, path, file) as table:
            count = table.metadata.num_rows
    elif file.suffix == TAR:
        count = _count_tar_rows(file)
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


def read_rows(file: InputFile, span: Span, columns: Sequence[str], config: DataConfig) -> Iterator[TableRow]:
    """The rows of a partition.

    Args:
        columns: those that are needed; of Parquet, no others are read, if there are all of them. config: names of columns.

    Raises:
        DataError: the file is damaged, cannot be read, or has changed since it was divided.
    """
    if identify(file.path) != file:
        raise _changed(file)
    count = 0
    for row in _rows_of(file, span, columns, config):
        count += 1
        yield row
    if count != span.rows:
        raise _changed(file)


def _rows_of(file: InputFile, span: Span, columns: Sequence[str], config: DataConfig) -> Iterator[TableRow]:
    if file.suffix == ".jsonl":
        return _json_rows(file, span)
    if file.suffix == ".parquet":
        return _parquet_rows(file, span, columns)
    if file.suffix == TAR:
        return islice(_tar_table(file, config).rows(), span.start, span.start + span.rows)
    return _csv_rows(file, columns, span)


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
    default = "\t" if file.suffix == ".tsv" else ","
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


# -- tar


def _count_tar_rows(file: InputFile) -> int:
    """Raises: DataError: it is damaged or compressed."""
    path = data_path(file.path)
    with reading(file.path):
        shard = open_shard(path, file.name, stamp_of(path))
    if shard.problem:
        what, _, fix = shard.problem.rpartition("; ")
        raise DataError(DataCode.TABLE_UNREADABLE, f"{file.name} {what}", where=file.path, fix=fix)
    return sum(1 for _ in shard.samples())


def files_in(file: InputFile, config: DataConfig) -> FileSource | None:
    """The files of a tar shard, and those next to it; None for other formats."""
    if file.suffix != TAR:
        return None
    return open_files(data_path(file.path), config, [_tar_table(file, config)])


def _tar_table(file: InputFile, config: DataConfig) -> Table:
    path = data_path(file.path)
    return shards_table([path], config, path.parent, complete=False)


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
