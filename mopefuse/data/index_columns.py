"""Build the index of a split from columns, tens of thousands of rows at a time: for Parquet and Arrow files.

The result is that of `mopefuse.data.index_build`, which checks row by row. Rows that lack a value, or have an unusual one, are
checked in the same way here; tables with other labels than single ones, or with an id twice, are left to it.

Shapes: S valid rows of a split, B rows of a batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.data.base import Problem
from mopefuse.data.columns import Layout
from mopefuse.data.index import FileValues, Index, InlineValues, masks_named_by
from mopefuse.data.label_cells import is_blank
from mopefuse.data.labels import Labels
from mopefuse.data.row_store import ArrowRows, StoredStrings, temporary_file
from mopefuse.data.rows import InvalidRow, RowSkipped, ValidRow, add_missing_hints, check_row
from mopefuse.data.storage.table import Table
from mopefuse.data.strings import Strings
from mopefuse.modalities import base as modality
from mopefuse.modalities.file_infos import FileInfos

_MISSING = bytes(16)
_MOST_ODD = 0.2  # share of rows of a batch that are checked one by one


class _NotInColumns(Exception):
    """The table has to be read row by row."""


def read_columns(table: Table, split: str, modalities: Sequence[str], config: DataConfig, digest: str) -> Index | None:
    """Build the index of a split; None if the table has to be read row by row."""
    layout = Layout.from_config(modalities, config)
    whole = not (config.split_col or layout.separator or layout.fold_labels) and layout.label
    path = temporary_file() if table.batches is not None and whole else None
    if path is None or table.batches is None:
        return None
    import pyarrow as arrow

    builder, index = _ColumnBuilder(table.file, split, layout, path), None
    try:
        for batch in table.batches():
            builder.add(batch)
        index = builder.build(digest, config)
    except (_NotInColumns, arrow.ArrowInvalid, UnicodeDecodeError):  # texts that are not UTF-8
        return None
    finally:  # also if the file turns out to be damaged
        builder.close()
        if index is None:
            path.unlink(missing_ok=True)
    return index


class _ColumnBuilder:
    """Collects the rows of a split, a batch at a time."""

    def __init__(self, file: str, split: str, layout: Layout, path: Path) -> None:
        self.file, self.split, self.layout, self.path = file, split, layout, path
        self.used = [*dict.fromkeys([layout.identity, *layout.columns.values(), layout.label])]
        self.values = {name: _FileColumn() if name not in layout.in_rows else _InlineColumn(name) for name in layout.columns}
        self.labels: dict[Any, int] = {}
        self.codes: list[NDArray[np.int32]] = []
        self.lines: list[NDArray[np.int64]] = []
        self.ids: list[Strings] = []  # if the rows have none
        self.id_hashes: list[NDArray[np.int64]] = []
        self.problems: list[Problem] = []
        self.left_out: Counter[str] = Counter()
        self.seen = 0
        self._writer: Any = None

    def add(self, batch: Any) -> None:
        """Add the rows of a batch.

        Raises:
            _NotInColumns: a column is missing or has a type that is not handled here, or too many rows are unusual.
        """
        count, first = len(batch), self.seen + 1
        self.seen += count
        texts = {name: self._texts(batch, column) for name, column in self.layout.columns.items()}
        has_ids = self.layout.identity in batch.column_names
        lines = range(first, first + count)
        ids = self._texts(batch, self.layout.identity) if has_ids else [f"{self.split}-{line}" for line in lines]
        labels, label_B, odd_B = self._read_labels(batch)
        for listed in (*texts.values(), ids):
            odd_B |= np.fromiter((one is None or not one.strip() for one in listed), dtype=bool, count=count)
        if np.count_nonzero(odd_B) > max(_MOST_ODD * count, 1):
            raise _NotInColumns
        valid_B = np.ones(count, dtype=bool)
        for number in np.flatnonzero(odd_B).tolist():
            row = self._check(batch.slice(number, 1).to_pylist()[0], first + number)
            valid_B[number] = row is not None
            for name, value in row.values.items() if row is not None else ():
                texts[name][number] = value
        kept = np.flatnonzero(valid_B)
        for name, listed in texts.items():
            self.values[name].add(_select(listed, kept))
        self.codes.append(self._number(labels, label_B[kept]))
        self.lines.append(kept + first)
        some = _select(ids, kept)
        self.id_hashes.append(np.fromiter(map(hash, some), dtype=np.int64, count=len(some)))
        if not has_ids:
            self.ids.append(Strings.of(some))
        self._write(batch, kept)

    def _texts(self, batch: Any, column: str) -> list[Any]:
        import pyarrow as arrow

        if column not in batch.column_names:
            raise _NotInColumns
        found = batch.column(column)
        if not (arrow.types.is_string(found.type) or arrow.types.is_large_string(found.type)):
            raise _NotInColumns
        listed: list[Any] = found.to_pylist()
        return listed

    def _read_labels(self, batch: Any) -> tuple[list[str], NDArray[np.int64], NDArray[np.bool_]]:
        """The labels that occur, the position of each row's label in them (B,), and whether a row has no usable one (B,)."""
        import pyarrow as arrow

        if self.layout.label not in batch.column_names:
            raise _NotInColumns
        column = batch.column(self.layout.label)
        is_number = arrow.types.is_floating(column.type)
        if not (is_number or arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)):
            raise _NotInColumns
        encoded = column.combine_chunks().dictionary_encode()
        label_B = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        odd_B = column.is_null().to_numpy()
        found = encoded.dictionary.to_pylist()
        unusable = [not math.isfinite(label) if is_number else is_blank(label) for label in found]
        odd_B = odd_B | (np.array(unusable, dtype=bool)[label_B] if found else np.zeros(len(batch), dtype=bool))
        return [repr(label) if is_number else label for label in found], label_B, odd_B

    def _number(self, labels: Sequence[str], label_K: NDArray[np.int64]) -> NDArray[np.int32]:
        """Number labels in the order in which they occur.

        Args:
            label_K: of each row, the position in `labels`.
        """
        present, first = np.unique(label_K, return_index=True)
        number_of = np.zeros(len(labels), dtype=np.int32)
        for position in present[np.argsort(first)].tolist():
            number_of[position] = self.labels.setdefault(labels[position], len(self.labels))
        return number_of[label_K]

    def _check(self, row: Mapping[str, Any], line: int) -> ValidRow | None:
        """Check an unusual row; None if it is not valid or left out."""
        try:
            return check_row(row, line, self.split, self.layout)
        except InvalidRow as error:
            self.problems.append(Problem(code=DataCode.BAD_ROW.text, where=f"{self.file}:{line}", what=str(error)))
        except RowSkipped as missing:
            self.left_out[str(missing)] += 1
        return None

    def _write(self, batch: Any, kept: NDArray[np.int64]) -> None:
        import pyarrow as arrow

        part = batch.select([name for name in self.used if name in batch.column_names])
        part = part if len(kept) == len(part) else part.take(arrow.array(kept))
        if self._writer is None:
            self._writer = arrow.ipc.new_file(str(self.path), part.schema)
        self._writer.write_table(part)

    def close(self) -> None:
        """Complete the file of the rows."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def build(self, digest: str, config: DataConfig) -> Index:
        """The index of all rows that were added.

        Raises:
            _NotInColumns: there are no rows, or an id occurs twice.
        """
        self.close()
        if not self.lines or not sum(map(len, self.lines)):
            raise _NotInColumns
        store = ArrowRows(self.path)
        ids = Strings.join(self.ids) if self.ids else StoredStrings(store, self.layout.identity)
        _require_distinct(ids, self.id_hashes)
        code_S = np.concatenate(self.codes)
        labels = Labels([*self.labels], np.arange(len(code_S) + 1, dtype=np.int64), code_S)
        return Index(
            split=self.split,
            file=self.file,
            digest=digest,
            store=store,
            lines_S=np.concatenate(self.lines),
            values={name: self.values[name].build(store, column) for name, column in self.layout.columns.items()},
            labels=labels,
            masks=masks_named_by(labels, config),
            list_S=np.zeros(len(code_S), dtype=bool),
            ids=ids,
            row_problems=add_missing_hints(self.problems, self.layout),
            left_out=dict(self.left_out),
            fresh=True,
        )


def _select(listed: list[Any], kept: NDArray[np.int64]) -> list[Any]:
    return listed if len(kept) == len(listed) else [listed[number] for number in kept.tolist()]


def _require_distinct(ids: Sequence[str], hashes: Sequence[NDArray[np.int64]]) -> None:
    """Require that no id occurs twice; `hashes` are those of the ids."""
    hash_S = np.concatenate(hashes)
    hash_S.sort()
    repeated = set(hash_S[1:][hash_S[1:] == hash_S[:-1]].tolist())
    seen: set[str] = set()
    for identity in ids if repeated else ():
        if hash(identity) in repeated:
            if identity in seen:
                raise _NotInColumns
            seen.add(identity)


class _InlineColumn:
    """The values of a modality that are stored in the rows."""

    def __init__(self, name: str) -> None:
        self._normalise = modality.get_modality(name).normalise
        self._keys, self._loose_keys = bytearray(), bytearray()

    def add(self, values: Sequence[str | None]) -> None:
        """Add values; None if one is missing."""
        keys = [_MISSING if value is None else modality.digest(value) for value in values]
        normalised = [value if value is None else self._normalise(value) for value in values]
        both = zip(values, normalised, keys, strict=True)
        loose = [key if value is None or value == other else modality.digest(other) for value, other, key in both]  # type: ignore[arg-type]
        self._keys += b"".join(keys)
        self._loose_keys += b"".join(loose)

    def build(self, store: ArrowRows, column: str) -> InlineValues:
        """All values that were added."""
        return InlineValues(np.frombuffer(self._keys, dtype="S16"), np.frombuffer(self._loose_keys, dtype="S16"))


class _FileColumn:
    """The values of a modality that are files; names are compared by 64 bits of their hash."""

    def __init__(self) -> None:
        self._hashes: list[NDArray[np.int64]] = []
        self._missing: list[NDArray[np.bool_]] = []

    def add(self, values: Sequence[str | None]) -> None:
        """Add names; None if one is missing."""
        self._hashes.append(np.fromiter(map(hash, values), dtype=np.int64, count=len(values)))
        self._missing.append(np.fromiter((value is None for value in values), dtype=bool, count=len(values)))

    def build(self, store: ArrowRows, column: str) -> FileValues:
        """All values that were added; the names are those in the column of `store`, in the order in which they occur."""
        is_missing_S, hash_S = np.concatenate(self._missing), np.concatenate(self._hashes)
        ordered = np.sort(hash_S)
        if not is_missing_S.any() and not (ordered[1:] == ordered[:-1]).any():
            names = StoredStrings(store, column)
            return FileValues(np.arange(len(hash_S)), names, FileInfos.unknown(len(names)))
        present = np.flatnonzero(~is_missing_S)
        _, first, number = np.unique(hash_S[present], return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        number_S = np.full(len(hash_S), -1, dtype=np.int64)
        number_S[present] = rank[number]
        names = StoredStrings(store, column, present[first[order]])
        return FileValues(number_S, names, FileInfos.unknown(len(names)))
