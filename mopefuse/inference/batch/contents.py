"""The files that the rows of a table name or contain: next to it, in its cells, or in the shard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from mopefuse.core.error_codes import DataCode, PathCode
from mopefuse.data.storage.table import TableRow
from mopefuse.errors import DataError, UnsafePathError
from mopefuse.inference.batch.storage import is_url, open_storage


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
