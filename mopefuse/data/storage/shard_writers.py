"""Write rows with their files to a tar file or a Parquet file."""

from __future__ import annotations

import io
import json
import re
import tarfile
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mopefuse.core.error_codes import DataCode
from mopefuse.data.storage.arrow_shards import PACKED
from mopefuse.data.storage.paths import PARQUET, TAR
from mopefuse.data.storage.tar_shards import NAMES, TEXTS
from mopefuse.errors import DataError

_GROUP_BYTES, _GROUP_ROWS = 8 << 20, 128  # of a row group, all of which is read for one of its files


class PackedRow(NamedTuple):
    """A row to be written.

    Args:
        values: its columns. files: by column, the name and the content of its files.
        main: the column whose files need no name of a column.
    """

    values: dict[str, Any]
    files: dict[str, tuple[str, bytes]]
    main: str


class ShardWriter(ABC):
    """Writes one shard.

    Attributes:
        suffix: of its file. count, size: rows, and bytes of their files, so far.
    """

    suffix: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = self.size = 0

    def add(self, row: PackedRow) -> None:
        """Add a row."""
        self._write(row)
        self.count += 1
        self.size += sum(len(content) for _, content in row.files.values())

    @abstractmethod
    def _write(self, row: PackedRow) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Complete the file."""


class TarWriter(ShardWriter):
    """Writes tar files that WebDataset can read too: ``00000042.json`` and ``00000042.jpg``."""

    suffix = TAR

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._archive = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed by `close`)

    def _write(self, row: PackedRow) -> None:
        parts = {column: _part(column, name, row.main) for column, (name, _) in row.files.items()}
        names = {parts[column]: name for column, (name, _) in row.files.items()}
        key = f"{self.count:08d}"
        self._add(f"{key}.json", json.dumps({**row.values, NAMES: names}, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        for column, (_, content) in row.files.items():
            self._add(f"{key}.{parts[column]}", content)

    def _add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # without time and owner: the same rows give the same bytes
        member.size = len(content)
        self._archive.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        """See `ShardWriter.close`."""
        self._archive.close()


def _part(column: str, name: str, main: str) -> str:
    """The part of a member's name that stands for a file: its suffix, after the column unless this is `main`."""
    suffix = re.sub(r"[^a-z0-9]", "", Path(name).suffix.lower()) or "bin"
    kind = f"{suffix}-file" if suffix in TEXTS else suffix
    return kind if column == main else f"{re.sub(r'[^a-z0-9_-]', '-', column.lower())}.{kind}"


class ParquetWriter(ShardWriter):
    """Writes Parquet files whose files are structs of bytes and path, as those of Hugging Face."""

    suffix = PARQUET

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._rows: list[PackedRow] = []

    def _write(self, row: PackedRow) -> None:
        self._rows.append(row)

    def close(self) -> None:
        """See `ShardWriter.close`; the types of the columns follow from all rows of the shard."""
        import pyarrow as arrow
        from pyarrow import parquet

        columns = [*dict.fromkeys(column for row in self._rows for column in row.files)]
        listed = [{name: value for name, value in row.values.items() if name not in columns} for row in self._rows]
        try:
            plain = arrow.Table.from_pylist(listed) if any(listed) else None
        except arrow.ArrowException as error:
            what = f"{_odd_column(listed)} has values of several types: {error}"
            raise DataError(DataCode.BAD_ROW, what, where=self.path.name, fix="use --format tar") from None
        kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        fields = [*(plain.schema if plain is not None else ()), *(arrow.field(column, kind) for column in columns)]
        schema = arrow.schema(fields, metadata={PACKED: b"1"})
        texts = [item.name for item in fields if item.name not in columns]
        codecs = {**dict.fromkeys(texts, "zstd"), **{f"{column}.bytes": "none" for column in columns}}  # images are compressed
        options = {"compression": codecs, "use_dictionary": texts, "write_page_checksum": True}
        with parquet.ParquetWriter(self.path, schema, **options) as file:
            for first, end in self._groups():
                cells = [_cells(self._rows[first:end], column, kind) for column in columns]
                own = [plain.column(name)[first:end].combine_chunks() for name in texts] if plain is not None else []
                file.write_table(arrow.Table.from_arrays([*own, *cells], schema=schema), row_group_size=end - first)

    def _groups(self) -> list[tuple[int, int]]:
        """First row and end of each row group."""
        ends, size = [0], 0
        for number, row in enumerate(self._rows):
            size += sum(len(content) for _, content in row.files.values())
            if size >= _GROUP_BYTES or number + 1 - ends[-1] >= _GROUP_ROWS:
                ends.append(number + 1)
                size = 0
        ends += [len(self._rows)] if ends[-1] < len(self._rows) else []
        return [*pairwise(ends)]


def _odd_column(rows: list[dict[str, Any]]) -> str:
    """The column whose values have no common type, for a message."""
    import pyarrow as arrow

    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            arrow.array([row.get(name) for row in rows])
        except arrow.ArrowException:
            return f"the column {name}"
    return "a column"


def _cells(rows: list[PackedRow], column: str, kind: Any) -> Any:
    import pyarrow as arrow

    files = (row.files.get(column) for row in rows)
    return arrow.array([None if file is None else {"bytes": file[1], "path": file[0]} for file in files], type=kind)
