"""Find and read tables: JSON lines, CSV or TSV files, folders of images with captions, and shards.

Each reader yields the rows of its file with line numbers; `mopefuse.data.rows` checks them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import stat
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.data.base import SPLITS
from mopefuse.data.csv_records import Record, Records, delimiter_of, name_of
from mopefuse.data.storage.paths import SHARD_SUFFIXES, exists, is_pattern, is_remote, read_range, remote_errors
from mopefuse.data.storage.shards import find_shards, pattern_shards, shards_table, unnamed_shards
from mopefuse.data.storage.table import Table, TableRow, parse_json_line
from mopefuse.data.storage.tar_shards import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from mopefuse.errors import DataError, Notice, did_you_mean, similar_names

SUFFIXES = (".jsonl", ".csv", ".tsv", *SHARD_SUFFIXES)
_MAGIC = {b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\x03\x04": "a zip"}
_SPLIT_SYNONYMS = {"dev": "val", "valid": "val", "validation": "val", "training": "train", "testing": "test"}
_FIRST_ROWS = 1000  # rows in which a column that names splits is searched
_METADATA = ("metadata.jsonl", "metadata.csv")


def find_tables(
    path: Path,
    config: DataConfig,
    *,
    splits: Sequence[str] = SPLITS,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Table]:
    """Find the table of each split in a folder, or the single table at `path`, which may be a pattern for shards.

    Args:
        splits: the splits to look for in a folder.
        advance: called with (shards opened, shards).

    Returns:
        Tables by split; a single table under "".

    Raises:
        DataError: `path` does not exist, a split has two tables, or a file cannot be read or is not a table.
    """
    with remote_errors(path):
        if path.is_file():
            return {"": _table(path, config, advance)}
        if not path.is_dir():
            if is_pattern(path):
                shards, root = pattern_shards(path)
                return {"": shards_table(shards, config, root, advance=advance)}
            raise _not_found(path)
        tables = {split: _split_table(path, split, config, advance) for split in splits}
        found = {split: table for split, table in tables.items() if table is not None}
        if not found and (unnamed := unnamed_shards(path)):
            return {"": shards_table(unnamed, config, path, advance=advance)}
        return found


def _split_table(path: Path, split: str, config: DataConfig, advance: Callable[[int, int], None]) -> Table | None:
    """The table of a split in a folder; None if there is none."""
    found = [path / f"{split}{suffix}" for suffix in SUFFIXES if _lexists(path / f"{split}{suffix}")]
    shards = [shard for shard in find_shards(path, split) if shard not in found]
    if not found and not shards and (path / split).is_dir() and any(child.is_dir() for child in (path / split).iterdir()):
        found.append(path / split)
    if len(found) + bool(shards) > 1:
        names = " and ".join(file.name for file in [*found, *shards[:1]])
        raise DataError(
            DataCode.SPLIT_TWICE, f"the {split} split has two tables: {names}", where=str(path), fix="remove one of them"
        )
    if shards:
        return shards_table(shards, config, path, advance=advance)
    return _table(found[0], config, advance) if found else None


def _lexists(path: Path) -> bool:
    return exists(path) if is_remote(path) else os.path.lexists(path)


def _not_found(path: Path) -> DataError:
    """The error for data that do not exist; a remote path that cannot be reached raises its own."""
    exists(path)
    siblings = _siblings(path)
    stems = similar_names(path.stem, {item.stem for item in siblings})
    similar = [item for stem in stems for item in siblings if item.stem == stem]
    suggestion = f"did you mean {', '.join(map(str, similar[:3]))}? Otherwise " if similar else ""
    fix = f"{suggestion}pass a folder with train.jsonl, val.jsonl and test.jsonl, or one table"
    return DataError(DataCode.NO_DATA_FOLDER, f"data folder not found: {path}", fix=fix)


def _siblings(path: Path) -> list[Path]:
    """Folders and tables in the parent folder of `path`."""
    try:
        return [item for item in sorted(path.parent.iterdir()) if item.suffix in SUFFIXES or item.is_dir()]
    except OSError:
        return []


def _table(path: Path, config: DataConfig, advance: Callable[[int, int], None]) -> Table:
    if path.is_dir() and path.suffix == "":
        return _image_folder(path, config)
    kind = path.suffix.lower()
    if kind in SHARD_SUFFIXES:
        return shards_table([path], config, path.parent, complete=False, advance=advance)
    content = read_bytes(path)
    digest = hashlib.sha256(content).hexdigest()
    for start, name in _MAGIC.items():
        if content.startswith(start):
            raise DataError(
                DataCode.NOT_TEXT, f"this is {name}, not text", where=str(path), fix="convert it to UTF-8 JSON lines or CSV"
            )
    if kind in (".csv", ".tsv"):
        delimiter = _delimiter(content, path, config)
        return Table(path.name, digest, lambda: _csv(content, path, delimiter))
    if kind != ".jsonl":
        fix = f"pass a {', '.join(SUFFIXES)} file or a folder"
        raise DataError(DataCode.NOT_A_TABLE, f"{path.name} is not a table", where=str(path), fix=fix)
    return Table(path.name, digest, lambda: _json_lines(content), content)


def columns_in(table: Table, names: Collection[str]) -> set[str]:
    """Find which of `names` are columns of some row; only in JSON lines may rows have different columns."""
    objects = (row.value for row in table.rows() if isinstance(row.value, dict))
    if table.content is None:
        return set(names) & next(objects, {}).keys()
    wanted = {name for name in names if any(key in table.content for key in _json_forms(name))}
    found: set[str] = set()
    for value in objects:
        found |= wanted & value.keys()
        if found == wanted:
            break
    return found


def some_columns(table: Table) -> set[str]:
    """The columns of the first row that could be parsed; none if there is no such row."""
    return {str(name) for name in next((row.value for row in table.rows() if isinstance(row.value, dict)), {})}


def split_named(value: Any) -> str:
    """The split that a cell names: train, val or test, also by a synonym; otherwise the cell in lower case."""
    name = str(value or "").strip().lower()
    return _SPLIT_SYNONYMS.get(name, name)


def split_column(table: Table, config: DataConfig) -> str | None:
    """Find a column whose cells all name splits, in the first rows of a table; None if there is none."""
    rows = [row.value for row in islice(table.rows(), _FIRST_ROWS) if isinstance(row.value, dict)]
    taken = {config.text_col, config.img_col, config.label_col, config.id_col, *config.columns.values()}
    names = [str(name) for name in rows[0] if name not in taken] if rows else []
    return next((name for name in names if all(split_named(row.get(name)) in SPLITS for row in rows)), None)


def _json_forms(name: str) -> Iterator[bytes]:
    """Yield a key as it can be written in JSON."""
    yield json.dumps(name).encode()
    yield json.dumps(name, ensure_ascii=False).encode("utf-8", "surrogatepass")


def read_bytes(path: Path) -> bytes:
    """Read a regular file.

    Raises:
        DataError: it is a pipe, device or folder (nothing is opened), or cannot be read.
    """
    try:
        if not is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
            raise DataError(
                DataCode.TABLE_UNREADABLE, f"{path.name} is not a regular file", where=str(path), fix="pass a regular file"
            )
        return read_range(path)
    except OSError as error:
        raise DataError(
            DataCode.TABLE_UNREADABLE, f"{path.name} cannot be read: {error.strerror}", where=str(path), fix="make it readable"
        ) from None


# -- JSON lines


def _json_lines(content: bytes) -> Iterator[TableRow]:
    start = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    number = 0
    while start < len(content):
        number += 1
        end = content.find(b"\n", start)
        stop = len(content) if end < 0 else end
        line = content[start:stop]
        if line.strip():
            yield TableRow(number, parse_json_line(line), start, stop)
        start = stop + 1


# -- CSV


def _csv(content: bytes, path: Path, delimiter: str) -> Iterator[TableRow]:
    """Yield the rows of a CSV file; an unclosed quote affects only its own row."""
    csv.field_size_limit(2**31 - 1)  # texts may be long
    records = Records(decode_text(content, path), delimiter)
    header: list[str] = []
    for record in records:
        if not header:
            header = _header(record, path)
            records.width = len(header)
        elif record.problem:
            yield TableRow(record.line, record.problem)
        elif len(record.cells) != len(header):
            yield TableRow(record.line, f"has {len(record.cells)} fields, the header has {len(header)}")
        else:
            yield TableRow(record.line, dict(zip(header, record.cells, strict=True)))


def _delimiter(content: bytes, path: Path, config: DataConfig) -> str:
    """Detect the delimiter of a file; gives a notice if it differs from that of its suffix."""
    default = "\t" if path.suffix.lower() == ".tsv" else ","
    wanted = {config.text_col, config.img_col, config.label_col, config.id_col, *config.columns.values()}
    found = delimiter_of(content, default, wanted)
    if found != default:
        what = f"{path.name} is parsed as {name_of(found)}-separated, not {name_of(default)}-separated, because of its header"
        warnings.warn(what, Notice, stacklevel=2)
    return found


def decode_text(content: bytes, path: Path) -> str:
    """Decode the content of a file as UTF-8.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"{path.name}:{line} is not UTF-8 (byte 0x{content[error.start]:02x})"
        fix = "convert the file to UTF-8, for example with iconv -f latin1 -t utf-8"
        raise DataError(DataCode.NOT_UTF8, what, where=str(path), fix=fix) from None


def _header(record: Record, path: Path) -> list[str]:
    if record.problem:
        fix = "correct the line with the column names"
        raise DataError(DataCode.BAD_HEADER, f"the header {record.problem}", where=f"{path.name}:{record.line}", fix=fix)
    header = [cell.strip() for cell in record.cells]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        what = f"the column {repeated[0]!r} occurs twice"
        raise DataError(DataCode.COLUMN_TWICE, what, where=f"{path.name}:{record.line}", fix="rename or remove one of them")
    return header


# -- folders of images


def _image_folder(path: Path, config: DataConfig) -> Table:
    """Read ``<split>/<label>/<image>``, with texts in ``<image>.txt`` next to each or in the metadata file of the split."""
    metadata = next((path / name for name in _METADATA if (path / name).is_file()), None)
    captions = _captions(metadata, config) if metadata else None
    rows: list[TableRow] = []
    for number, file in enumerate(_images_below(path), start=1):
        name = file.relative_to(path).as_posix()
        value: dict[str, Any] = {config.id_col: name, config.img_col: f"{path.name}/{name}", config.label_col: file.parent.name}
        if captions is not None:
            value[config.text_col] = captions.get(name)
        elif file.with_suffix(".txt").is_file():
            try:
                value[config.text_col] = read_bytes(file.with_suffix(".txt")).decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                rows.append(TableRow(number, f"({name}) has a caption that is not UTF-8"))
                continue
        else:
            value[config.text_col] = None
        if value[config.text_col] is None and not config.allow_missing_text and config.on_missing == "error":
            hint = f"add {file.with_suffix('.txt').name} beside it, or a line in metadata.jsonl, or --on-missing skip or absent"
            rows.append(TableRow(number, f"({name}) has no text: {hint}"))
            continue
        rows.append(TableRow(number, value))
    digest = hashlib.sha256(json.dumps([row.value for row in rows]).encode()).hexdigest()
    return Table(f"{path.name}/", digest, lambda: iter(rows))


def _images_below(path: Path) -> list[Path]:
    found = [file for label in path.iterdir() if label.is_dir() for file in label.iterdir()]
    return sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES)


def _captions(metadata: Path, config: DataConfig) -> dict[str, Any]:
    """Read the texts of a metadata file by ``file_name``, the format of Hugging Face image folders."""
    captions = {}
    for row in _table(metadata, config, lambda done, total: None).rows():
        if isinstance(row.value, str):
            raise DataError(
                DataCode.FIELD_MISSING, f"{metadata.name}:{row.line} {row.value}", where=str(metadata), fix="correct the line"
            )
        missing = {"file_name", config.text_col} - row.value.keys()
        if missing:
            fix = did_you_mean(config.text_col, row.value.keys())
            what = f"{metadata.name}:{row.line} has no {' or '.join(sorted(missing))}"
            raise DataError(DataCode.FIELD_MISSING, what, where=str(metadata), fix=fix)
        captions[str(row.value["file_name"])] = row.value[config.text_col]
    return captions
