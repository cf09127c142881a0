"""The validated index of a split: where its rows are, what they contain, and which of them are bad.

`mopefuse.data.index_build` builds an index and `mopefuse.data.index_cache` keeps it.

Shapes: S valid rows of a split, I files of a modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.data.base import Problem
from mopefuse.data.labels import Labels
from mopefuse.data.row_store import RowStore
from mopefuse.modalities.file_infos import FileInfos
from mopefuse.modalities.files import MISSING, FileInfo
from mopefuse.modalities.masks import NAME as MASK
from mopefuse.modalities.masks import SUFFIX

Array = NDArray[Any]
_MISTAKES, _ENOUGH = 0.05, 4  # share of labels that are no PNG files if the others are masks; labels of which one can be


@dataclass
class InlineValues:
    """The values of a modality that are stored in the rows, as digests of 16 bytes; zeros if a value is missing.

    Args:
        key_S: digest of each value. loose_key_S: digest of each value after `Modality.normalise`.
    """

    key_S: Array
    loose_key_S: Array

    def keys(self) -> Array:
        """Digests (S,), see `Split.keys`."""
        return self.key_S

    def loose_keys(self) -> Array:
        """Digests (S,), see `Split.loose_keys`."""
        return self.loose_key_S

    def is_missing(self) -> Array:
        """Whether the value is missing, for each row (S,)."""
        return np.asarray(self.key_S == b"")


@dataclass
class FileValues:
    """The values of a modality that are files.

    Args:
        number_S: number of each row's file; -1 if the value is missing.
        names, infos: name and check result of each file (I,).
    """

    number_S: Array
    names: Sequence[str]
    infos: Sequence[FileInfo]

    def take(self, rows: Array) -> FileValues:
        """Select the values of some rows, in the order of `rows`."""
        return replace(self, number_S=self.number_S[rows])

    def keys(self) -> Array:
        """Digests (S,), see `Split.keys`."""
        return np.append(FileInfos.of(self.infos).digest_I, np.array([b""], dtype="S16"))[self.number_S]

    def loose_keys(self) -> Array:
        """Digests (S,), see `Split.loose_keys`; the same as `keys`."""
        return self.keys()

    def is_missing(self) -> Array:
        """Whether the value is missing, for each row (S,)."""
        return self.number_S < 0

    def all_missing(self) -> bool:
        """Whether there are several files, and none of them exists at the path in its row."""
        return len(self.names) > 1 and all(info.code == MISSING for info in self.infos)

    def animated(self) -> list[int]:
        """The numbers of the files that are animations."""
        found: list[int] = np.flatnonzero(FileInfos.of(self.infos).animated_I).tolist()
        return found

    def bad(self) -> Array:
        """Whether the file cannot be read, for each row (S,)."""
        return np.append(FileInfos.of(self.infos).bad_I, False)[self.number_S]


@dataclass
class Index:
    """What is known about a split without reading its rows again.

    Args:
        digest: digest of the table and of the settings that decide how it is read, except `data.on_missing`.
        store: the rows as they are written.
        lines_S: line number of each row in its file, from 1.
        values: values of the rows, by modality.
        list_S: whether the labels of a row are written as a list.
        row_problems: problems of rows that are not valid.
        left_out: number of rows that are skipped because modalities are missing, by the names of these.
        fresh: whether a part of the index was not in the cache.
        left_out_S: rows that are left out because their label is not of the task.
        masks: the files that labels name, if these are masks.
    """

    split: str
    file: str
    digest: str
    store: RowStore
    lines_S: Array
    values: dict[str, InlineValues | FileValues]
    labels: Labels
    list_S: Array
    ids: Sequence[str]
    row_problems: list[Problem]
    left_out: dict[str, int]
    fresh: bool = False
    left_out_S: Array | None = None
    masks: FileValues | None = None

    @property
    def files(self) -> dict[str, FileValues]:
        """The modalities whose values are files, and the masks."""
        found = {name: values for name, values in self.values.items() if isinstance(values, FileValues)}
        return found if self.masks is None else {**found, MASK: self.masks}

    def place(self, row: int) -> str:
        """Format file and line of a row, for messages."""
        return f"{self.file}:{self.lines_S[row]}"

    def problems(self) -> list[Problem]:
        """The problem of every bad row, ordered by line."""
        found = list(self.row_problems)
        for values in self.files.values():
            for row in np.flatnonzero(values.bad()).tolist():
                name, info = values.names[values.number_S[row]], values.infos[values.number_S[row]]
                where = f"{self.place(row)}, id {self.ids[row]}"
                found.append(Problem(code=info.code, where=where, what=info.what, fix=info.fix, file=name))
        return sorted(found, key=lambda problem: (_line(problem), problem.what))

    def good(self) -> Array:
        """The numbers of the valid rows whose files can be read."""
        bad_S = np.zeros(len(self.lines_S), dtype=bool) if self.left_out_S is None else self.left_out_S.copy()
        for values in self.files.values():
            bad_S |= values.bad()
        return np.flatnonzero(~bad_S)

    def groups(self) -> list[str]:
        """The group (S,) of each row when rows are held out: its first file, or the row itself."""
        groups = [f"\0{identity}" for identity in self.ids]
        for values in reversed([values for values in self.values.values() if isinstance(values, FileValues)]):
            groups = [values.names[i] if i >= 0 else group for i, group in zip(values.number_S, groups, strict=True)]
        return groups


def _line(problem: Problem) -> int:
    return int(problem.where.partition(":")[2].partition(",")[0] or 0)


def masks_named_by(labels: Labels, config: DataConfig) -> FileValues | None:
    """The masks that labels name, which have not been checked yet: for segmentation, or if nearly all labels are PNG files."""
    one_each = len(labels) > 0 and bool((np.diff(labels.start_S1) == 1).all())
    odd, total = sum(not name.lower().endswith(SUFFIX) for name in labels.names), len(labels.names)
    are_files = config.task is None and odd <= max(_MISTAKES * total, 1 if total >= _ENOUGH else 0)
    if not one_each or not (are_files or config.task == "segmentation"):
        return None
    return FileValues(labels.code_Z.astype(np.int64), labels.names, FileInfos.unknown(len(labels.names)))
