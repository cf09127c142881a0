"""The check results of many files, in arrays that can stay on disk.

Shapes: I files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopefuse.core.lazy_sequence import LazySequence
from mopefuse.modalities.file_source import Stamp
from mopefuse.modalities.files import FileInfo

Array = NDArray[Any]
Problem = tuple[str, str, str]  # code, what and fix
_IDS = 32  # bytes
COLUMNS: dict[str, Any] = {
    "size": np.int64, "mtime": np.int64, "width": np.int64, "height": np.int64, "animated": np.bool_,
    "milliseconds": np.int64, "digest": "S16", "ids": f"S{_IDS}",
}  # fmt: skip


class FileInfos(LazySequence[FileInfo]):
    """A sequence of `FileInfo`.

    Args:
        columns: by field, its values (I,). problems: by number of the file, why it cannot be read.
    """

    def __init__(self, columns: Mapping[str, Array], problems: Mapping[int, Problem]) -> None:
        self.columns, self.problems = dict(columns), dict(problems)

    @classmethod
    def of(cls, infos: Sequence[FileInfo]) -> FileInfos:
        """Convert a sequence; one that is converted already is returned as it is."""
        if isinstance(infos, FileInfos):
            return infos
        columns = {name: np.array([getattr(info, name) for info in infos], dtype=kind) for name, kind in COLUMNS.items()}
        return cls(columns, {number: (info.code, info.what, info.fix) for number, info in enumerate(infos) if info.code})

    @classmethod
    def unknown(cls, count: int) -> FileInfos:
        """The infos of files that have not been checked."""
        default = FileInfo()
        values = {name: np.array(getattr(default, name), dtype=kind) for name, kind in COLUMNS.items()}
        return cls({name: np.broadcast_to(value, count) for name, value in values.items()}, {})

    def copy(self) -> FileInfos:
        """Make a copy, which can be changed by `set`."""
        writable = {name: column.copy() for name, column in self.columns.items() if column.flags.writeable}
        return FileInfos({**self.columns, **writable}, self.problems)

    def set(self, number: int, info: FileInfo) -> None:
        """Set the info of a file."""
        for name, column in self.columns.items():
            value = getattr(info, name)
            if not column.flags.writeable and column[number] != value:
                self.columns[name] = column = np.array(column)
            if column.flags.writeable:
                column[number] = value
        self.problems.pop(number, None)
        if info.code:
            self.problems[number] = (info.code, info.what, info.fix)

    def stamps(self) -> Iterator[Stamp]:
        """The stamp of each file."""
        return map(Stamp, *(map(int, self.columns[name]) for name in ("size", "mtime")))

    @property
    def known_columns(self) -> dict[str, Array]:
        """The columns in which some file differs from an unknown one."""
        return {name: column for name, column in self.columns.items() if column.strides != (0,)}

    @property
    def digest_I(self) -> Array:
        """The digest of each file (I,), 16 bytes; zeros if it cannot be read."""
        return self.columns["digest"]

    @property
    def animated_I(self) -> Array:
        """Whether each file is an animation (I,)."""
        return self.columns["animated"]

    @property
    def bad_I(self) -> Array:
        """Whether each file cannot be read (I,)."""
        bad = np.zeros(len(self), dtype=bool)
        bad[list(self.problems)] = True
        return bad

    def __len__(self) -> int:
        return len(self.columns["size"])

    def at(self, number: int) -> FileInfo:
        """See `LazySequence.at`."""
        return self._info(number, {name: column[number].item() for name, column in self.columns.items()})

    def __iter__(self) -> Iterator[FileInfo]:
        rows = zip(*(column.tolist() for column in self.columns.values()), strict=True)
        for number, values in enumerate(rows):
            yield self._info(number, dict(zip(self.columns, values, strict=True)))

    def _info(self, number: int, values: dict[str, Any]) -> FileInfo:
        code, what, fix = self.problems.get(number, ("", "", ""))
        values["ids"] = values["ids"].ljust(_IDS, b"\0") if values["ids"] else b""
        return FileInfo(**values, code=code, what=what, fix=fix)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, FileInfos) or other is self:
            return super().__eq__(other)
        same = all(np.array_equal(column, other.columns[name]) for name, column in self.columns.items())
        return same and self.problems == other.problems

    __hash__ = None
