"""Build the index of a split: one pass over its table, then one over its files, unless the cache has it.

The cache key is a digest of everything the index depends on. When an index is read from the cache, sizes and times of its
files are compared with those recorded, and only files that changed are read again.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.error_codes import DataCode
from mopefuse.data import index_cache
from mopefuse.data.base import SPLITS, Problem
from mopefuse.data.columns import Layout
from mopefuse.data.index import FileValues, Index, InlineValues, masks_named_by
from mopefuse.data.index_columns import read_columns
from mopefuse.data.labels import LabelsBuilder
from mopefuse.data.row_store import ArrowRows, JsonRows
from mopefuse.data.rows import EXPECTED_LABEL, InvalidRow, RowSkipped, ValidRow, add_missing_hints, check_row
from mopefuse.data.storage.table import Table, TableRow
from mopefuse.data.strings import Strings
from mopefuse.data.tables import split_named
from mopefuse.modalities import base as modality
from mopefuse.modalities.file_infos import FileInfos
from mopefuse.modalities.file_source import FileSource
from mopefuse.modalities.files import Files
from mopefuse.modalities.inspect_files import inspect_files
from mopefuse.modalities.masks import MASKS
from mopefuse.modalities.masks import NAME as MASK

VERSION = 2  # version of the definition of a row; it is part of the fingerprint by which a run recognises its data
_NO_ROW, _MISSING = DataCode.BAD_ROW.text, bytes(16)
Advance = Callable[[int, int], None]


def build(
    table: Table,
    split: str,
    source: FileSource,
    modalities: Sequence[str],
    config: DataConfig,
    *,
    fresh: bool = False,
    advance: Advance = lambda done, total: None,
) -> Index:
    """Read the index of a split from the cache, or build and cache it.

    Args:
        split: for a single table with a split column: only the rows of this split are used.
        source: where the files are.
        modalities: modalities of the rows.
        fresh: read everything again and replace the index in the cache.
        advance: called with (files read, files to read).
    """
    kinds = {name: kind for name in modalities if isinstance(kind := modality.get_modality(name), Files)}
    settings = (config.split_col, *(limit for kind in kinds.values() for limit in kind.limits(config)))
    index_digest = cache.make_key(
        VERSION, table.digest, split, table.file, *Layout.from_config(modalities, config).describe(), *settings
    )
    key = index_cache.make_key(index_digest, source, config)
    index = None if fresh else index_cache.load(key, table)
    if index is None:
        index = read_rows(table, split, modalities, config, index_digest)
    kinds |= {} if index.masks is None else {MASK: MASKS}
    updated, total_before = {}, 0
    for name, kind in kinds.items():
        values, read_now = index.files[name], 0

        def count(done: int, total: int) -> None:
            nonlocal read_now
            read_now = done
            advance(total_before + done, total_before + total)  # noqa: B023 (called before the next)

        infos = inspect_files(kind, source, values.names, config, known=FileInfos.of(values.infos), advance=count)
        updated[name] = replace(values, infos=infos)
        total_before += read_now
    if index.fresh or any(updated[name].infos != values.infos for name, values in index.files.items()):
        masks = updated.pop(MASK, None)
        index = replace(index, values={**index.values, **updated}, masks=masks, fresh=True)
        index_cache.save(key, index, source)
        kept = index_cache.load(key, table) if isinstance(index.store, ArrowRows) else None
        index = index if kept is None else replace(kept, fresh=True)  # which needs less memory
    return index


def read_rows(table: Table, split: str, modalities: Sequence[str], config: DataConfig, digest: str = "") -> Index:
    """Build the index of a split from one pass over its table; files are not read, and nothing is cached."""
    found = read_columns(table, split, modalities, config, digest)
    if found is not None:
        return found
    rows = _IndexBuilder(table, split, modalities, config)
    rows.add_all()
    if rows.of_other_kind > len(rows.line_of):  # numbers among texts, or the opposite, and the first row is one of the few
        rows = _IndexBuilder(table, split, modalities, config, numeric=not rows.numeric)
        rows.add_all()
    return rows.build(digest)


class _IndexBuilder:
    """Collects the rows of a split, one at a time."""

    def __init__(
        self, table: Table, split: str, modalities: Sequence[str], config: DataConfig, *, numeric: bool | None = None
    ) -> None:
        self.table, self.split, self.config = table, split, config
        self.layout = Layout.from_config(modalities, config)
        self.used_columns = {self.layout.identity, self.layout.label, *self.layout.columns.values()}
        self.values = {name: _ValuesBuilder(name) for name in modalities}
        self.rewritten = bytearray()  # JSON lines, of a table in another format
        self.places, self.lines, self.lists, self.labels = array("q"), array("q"), bytearray(), LabelsBuilder()
        self.line_of: dict[str, int] = {}  # by id, in the order of the rows
        self.numeric = numeric  # whether labels are numbers; None until the first valid row
        self.of_other_kind = 0  # rows that are otherwise valid
        self.problems: list[Problem] = []
        self.left_out: Counter[str] = Counter()

    def add_all(self) -> None:
        """Add the rows of the split, and those that name no split."""
        for found in self.table.rows():
            named = _named_split(found, self.config)
            if named not in SPLITS or named == self.split:
                self.add(found, named)

    def add(self, found: TableRow, named_split: str | None) -> None:
        """Add a row, or its problem.

        Args:
            named_split: the split that the row names, see `_named_split`.
        """
        try:
            row = self._check(found, named_split)
        except InvalidRow as error:
            where = f"{self.table.file}:{found.line}"
            self.problems.append(Problem(code=_NO_ROW, where=where, what=str(error)))
            return
        except RowSkipped as missing:
            self.left_out[str(missing)] += 1
            return
        self.line_of[row.id] = found.line
        self._add_place(found)
        self.lines.append(found.line)
        for name, value in row.values.items():
            self.values[name].add(value)
        self.labels.add(row.labels)
        self.lists.append(row.is_list)

    def _check(self, found: TableRow, named_split: str | None) -> ValidRow:
        if isinstance(found.value, str):
            raise InvalidRow(found.value)
        if named_split == "":
            raise InvalidRow(f"has no {self.config.split_col}; found {', '.join(sorted(map(str, found.value)))}")
        if named_split not in (None, self.split):
            raise InvalidRow(f"{self.config.split_col} is none of {', '.join(SPLITS)}")
        row = check_row(found.value, found.line, self.split, self.layout)
        self.numeric = row.is_number if self.numeric is None else self.numeric
        if row.is_number != self.numeric:
            self.of_other_kind += 1
            what = f"a number, expected {EXPECTED_LABEL}" if row.is_number else "a string, expected a number, as in other rows"
            raise InvalidRow(f"{self.layout.label} is {what}")
        if row.id in self.line_of:
            raise InvalidRow(f"duplicate id {row.id!r}, first used on line {self.line_of[row.id]}")
        return row

    def _add_place(self, found: TableRow) -> None:
        if self.table.content is not None:
            self.places.extend((found.start, found.stop))
            return
        assert isinstance(found.value, dict)
        self.places.append(len(self.rewritten))
        native = {name: value for name, value in found.value.items() if name in self.used_columns}
        self.rewritten += json.dumps(native).encode("utf-8") + b"\n"
        self.places.append(len(self.rewritten) - 1)

    def build(self, digest: str) -> Index:
        """The index of all rows that were added."""
        is_rewritten = self.table.content is None
        labels = self.labels.build()
        return Index(
            split=self.split,
            file=self.table.file,
            digest=digest,
            store=JsonRows(
                bytes(self.rewritten) if is_rewritten else self.table.content or b"",
                np.array(self.places, dtype=np.int64).reshape(-1, 2),
                converted=is_rewritten,
            ),
            lines_S=np.array(self.lines, dtype=np.int64),
            values={name: values.build() for name, values in self.values.items()},
            labels=labels,
            masks=masks_named_by(labels, self.config) if not any(self.lists) else None,
            list_S=np.frombuffer(bytes(self.lists), dtype=bool),
            ids=Strings.of(self.line_of),
            row_problems=add_missing_hints(self.problems, self.layout) if self.line_of else self.problems,
            left_out=dict(self.left_out),
            fresh=True,
        )


class _ValuesBuilder:
    """Collects the values of one modality, row by row."""

    def __init__(self, name: str) -> None:
        self.modality = modality.get_modality(name)
        self.keys, self.loose_keys = bytearray(), bytearray()
        self.numbers = array("q")
        self.names: dict[str, int] = {}

    def add(self, value: str | None) -> None:
        """Add the value of the next row; None if it is missing."""
        if self.modality.is_file:
            self.numbers.append(-1 if value is None else self.names.setdefault(value, len(self.names)))
            return
        self.keys += _MISSING if value is None else modality.digest(value)
        self.loose_keys += _MISSING if value is None else modality.digest(self.modality.normalise(value))

    def build(self) -> InlineValues | FileValues:
        """The values of all rows that were added; files have not been checked yet."""
        if self.modality.is_file:
            names = Strings.of(self.names)
            return FileValues(np.array(self.numbers, dtype=np.int64), names, FileInfos.unknown(len(names)))
        return InlineValues(np.frombuffer(bytes(self.keys), dtype="S16"), np.frombuffer(bytes(self.loose_keys), dtype="S16"))


def _named_split(found: TableRow, config: DataConfig) -> str | None:
    """The split that a row names in the column `data.split_col`, "" if the cell is empty; None without such a column."""
    if config.split_col is None or not isinstance(found.value, dict):
        return None
    return split_named(found.value.get(config.split_col))
