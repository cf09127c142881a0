"""Read the samples to predict from the rows of a table or a stream; an invalid row gives an error instead of values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.data.columns import Layout, sort_modalities
from mopefuse.data.rows import InvalidRow, check_input
from mopefuse.data.storage.shards import open_files
from mopefuse.data.storage.table import TableRow, parse_json_line
from mopefuse.data.tables import find_tables
from mopefuse.errors import DataError, MopefuseError
from mopefuse.modalities import base as modality
from mopefuse.modalities.file_source import FileSource
from mopefuse.modalities.files import Files

Fetch = Callable[[str, str, str], bytes | None]
"""Returns the content of a file, given the modality, the name of the file in the row, and the place of the row; None if it is
on this machine."""


@dataclass(frozen=True)
class Pair:
    """One line of the input: its value of each modality that the model reads, or the error that makes it invalid."""

    id: str
    values: Mapping[str, Any] = field(default_factory=dict)
    error: MopefuseError | None = None


def read_pairs(
    source: Path | Iterable[bytes],
    config: DataConfig,
    modalities: Sequence[str],
    optional_modalities: Sequence[str] = (),
    *,
    empty_is_missing: bool = False,
) -> Iterator[Pair]:
    """The samples of a table, or of lines of JSON as they arrive; files are relative to the table's folder.

    Args:
        modalities, optional_modalities, empty_is_missing: see `make_layouts`.

    Raises:
        DataError: there is no such file, or it is not a table.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise DataError(
                DataCode.NO_TABLE,
                f"file not found: {source}",
                fix="pass a .jsonl, .csv, .tsv or .parquet file, or - for stdin",
            )
        table = find_tables(source, config)[""]
        file, rows, files = table.file, table.rows(), open_files(source, config, [table])
    else:
        file, files = "stdin", open_files(Path(), config, [])
        rows = (TableRow(number, parse_json_line(line)) for number, line in enumerate(source, start=1) if line.strip())
    layouts = make_layouts(config, modalities, optional_modalities, empty_is_missing=empty_is_missing)
    for found in rows:
        yield make_pair(found, file, files, layouts, config)


class RowReader:
    """Reads the values of single rows of a table, when they are needed.

    Args:
        path, config, modalities: see `read_pairs`.
    """

    def __init__(self, path: Path, config: DataConfig, modalities: Sequence[str]) -> None:
        table = find_tables(path, config)[""]
        self._file, self._rows, self._files = table.file, [*table.rows()], open_files(path, config, [table])
        self._config, self._layouts = config, make_layouts(config, modalities)

    def values(self, number: int) -> Mapping[str, Any]:
        """The values of a row by modality.

        Raises:
            DataError: the row cannot be read.
        """
        pair = make_pair(self._rows[number], self._file, self._files, self._layouts, self._config)
        if pair.error is not None:
            raise pair.error
        return pair.values


def make_layouts(
    config: DataConfig, modalities: Sequence[str], optional_modalities: Sequence[str] = (), *, empty_is_missing: bool = False
) -> list[Layout]:
    """How to read rows: first what each needs, then what it may have.

    Args:
        modalities: the modalities to read; rows need no others.
        optional_modalities: the modalities that a row may lack; a row that lacks all of them is invalid.
        empty_is_missing: whether a row with an empty value lacks the modality.
    """
    needed = [name for name in modalities if name not in optional_modalities]
    layouts = [Layout.from_config(sort_modalities(needed), config)] if needed else []
    if optional_modalities:
        lenient = Layout.from_config(sort_modalities(modalities), config.model_copy(update={"on_missing": "absent"}))
        layouts.append(replace(lenient, empty_is_missing=empty_is_missing))
    return layouts


def make_pair(
    found: TableRow,
    file: str,
    files: FileSource,
    layouts: Sequence[Layout],
    config: DataConfig,
    fetch: Fetch | None = None,
) -> Pair:
    """The sample of a row.

    Args:
        file: name of the table, for messages. files: where the files are that rows name.
        fetch: returns the contents of files that are not in `files`.
    """
    where, identity = f"{file}:{found.line}", str(found.line)
    try:
        if isinstance(found.value, str):
            raise InvalidRow(found.value)
        values: dict[str, Any] = {}
        for layout in layouts:
            identity, found_values = check_input(found.value, found.line, layout)
            values = {**found_values, **values}  # the first layout decides on modalities that are needed
        place = f"{where}, id {identity}"
        for name, value in values.items():
            if value is None:
                continue
            kind = modality.get_modality(name)
            content = fetch(name, value, place) if fetch is not None and isinstance(kind, Files) else None
            if content is not None and isinstance(kind, Files):
                values[name] = kind.decode(content, value, where=place, config=config)
            else:
                values[name] = kind.read(value, files, where=place, config=config)
        return Pair(identity, values)
    except InvalidRow as error:
        named = "specify its column with --text-col, --image-col or --column, or remove the row"
        fix = named if str(error).startswith(("has no ", "has none of ")) else "correct or remove the row"
        return Pair(identity, error=DataError(DataCode.BAD_ROW, f"{where} {error}", where=where, fix=fix))
    except MopefuseError as error:
        return Pair(identity, error=error)
