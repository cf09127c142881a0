"""Pack a data set into shards, from which it trains as from its folder: the same rows in the same order.

Rows keep their columns, ids and the names of their files, so that held-out rows and all random draws stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.atomic_files import replace_atomically
from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import DataCode
from mopefuse.data.bad_rows import skip_bad_rows
from mopefuse.data.columns import Layout, get_column
from mopefuse.data.index import Index
from mopefuse.data.known_labels import labels_file
from mopefuse.data.load import read_indexes
from mopefuse.data.storage.paths import data_folder, data_path
from mopefuse.data.storage.shard_writers import PackedRow, ParquetWriter, ShardWriter, TarWriter
from mopefuse.errors import DataError
from mopefuse.modalities.base import picture_among
from mopefuse.modalities.file_source import FileSource
from mopefuse.modalities.masks import NAME as MASK

FORMATS: dict[str, type[ShardWriter]] = {"tar": TarWriter, "parquet": ParquetWriter}
_AT_ONCE = 64  # rows whose files are read at once
Advance = Callable[[int, int], None]


@dataclass
class Packed:
    """What was written: rows and shards by split, and bytes in all."""

    rows: dict[str, int] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)
    size: int = 0


def pack(
    config: DataConfig, out: Path, *, kind: str, shard_bytes: int, advance: Advance = lambda done, total: None
) -> Packed:
    """Write the data set of `config` to a new folder, as shards ``train-000000.tar`` and so on.

    Args:
        kind: one of `FORMATS`. shard_bytes: size of the files in a shard, from which the next one begins.
        advance: called with (rows written, rows).

    Raises:
        DataError: the folder is not empty, or the data have bad rows and `data.on_bad` does not skip them.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fix = "choose a new folder, or remove this one"
        raise DataError(DataCode.MADE_FOLDER_NOT_EMPTY, "the folder is not empty", where=str(out), fix=fix)
    if kind == "parquet":
        require("pyarrow", extra="parquet", what="writing Parquet files")
    indexes, files = read_indexes(config)
    folder = data_folder(data_path(config.path or ""))
    for index in indexes.values():
        skip_bad_rows(index, files, folder, config, may_skip=True)
    total = sum(len(index.good()) for index in indexes.values())
    with replace_atomically(out.resolve()) as building:
        building.mkdir()
        packing = _Packing(building, FORMATS[kind], shard_bytes, lambda done: advance(done, total))
        for split, index in indexes.items():
            packing.write(split, _rows(index, files, config))
        listed = labels_file(folder, config)
        if listed is not None:
            (building / "labels.txt").write_bytes(listed.read_bytes())
        packing.packed.size = sum(file.stat().st_size for file in building.iterdir())
    return packing.packed


class _Packing:
    """Writes the shards of one data set.

    Args:
        advance: called with the number of rows written.
    """

    def __init__(self, folder: Path, writer: type[ShardWriter], shard_bytes: int, advance: Callable[[int], None]) -> None:
        self.folder, self.writer, self.shard_bytes, self.advance = folder, writer, shard_bytes, advance
        self.packed = Packed()

    def write(self, split: str, rows: Iterator[PackedRow]) -> None:
        """Write the rows of a split."""
        packed = self.packed
        packed.rows[split] = packed.shards[split] = 0
        shard: ShardWriter | None = None
        for row in rows:
            if shard is None:
                shard = self.writer(self.folder / f"{split}-{packed.shards[split]:06d}{self.writer.suffix}")
                packed.shards[split] += 1
            shard.add(row)
            packed.rows[split] += 1
            self.advance(sum(packed.rows.values()))
            if shard.size >= self.shard_bytes:
                shard.close()
                shard = None
        if shard is not None:
            shard.close()


def _rows(index: Index, files: FileSource, config: DataConfig) -> Iterator[PackedRow]:
    """The valid rows of a split, in order, with their files."""
    layout = Layout.from_config([*index.values], config)
    columns = {get_column(name, config): name for name in index.values if name in index.files}
    columns |= {layout.label: MASK} if index.masks is not None else {}
    picture = picture_among(index.values)
    main = get_column(picture, config) if picture else ""

    def read(number: int) -> PackedRow:
        values: dict[str, Any] = dict(index.store.row(number))
        values[layout.identity] = index.ids[number]
        found = {}
        for column, name in columns.items():
            file = index.files[name]
            place = int(file.number_S[number])
            if place >= 0:
                found[column] = (file.names[place], files.read(file.names[place], where=index.place(number), what=name))
        return PackedRow(values, found, main)

    with ThreadPoolExecutor(files.at_once or 1) as pool:
        numbers = iter(index.good().tolist())
        while some := [*islice(numbers, _AT_ONCE)]:
            yield from pool.map(read, some)
