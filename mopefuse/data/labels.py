"""Labels of many rows, stored as numbers: the labels themselves, and the targets that a model is trained on.

Both are sparse: memory grows with the number of labels that rows have, not with rows times labels. A million rows with three
of 10,000 labels each take 20 MB here and 40 GB as one dense tensor.

Shapes: S rows of a split, B of them in a batch, Z labels of all rows together, N labels of a model, n some of them,
U distinct labels of the rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # rows can be read without torch
    from torch import Tensor

    from mopefuse.tasks.base import Task

Numbers = NDArray[np.int64]


class Labels(Sequence[tuple[str, ...]]):
    """The labels of each row: a sequence of tuples, each of which is built when it is accessed.

    Args:
        names: the distinct labels (U).
        start_S1: where the labels of each row start in `code_Z`, and where the last ones end (S + 1,).
        code_Z: positions of labels in `names`, row after row.
    """

    def __init__(self, names: Sequence[str], start_S1: Numbers, code_Z: NDArray[np.int32]) -> None:
        self.names, self.start_S1, self.code_Z = tuple(names), start_S1, code_Z

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[str]]) -> Labels:
        """Build the labels of some rows, in their order."""
        builder = LabelsBuilder()
        for row in rows:
            builder.add(row)
        return builder.build()

    def __len__(self) -> int:
        return len(self.start_S1) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> Labels: ...

    def __getitem__(self, index: int | slice) -> tuple[str, ...] | Labels:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self)
        return tuple(self.names[code] for code in self.code_Z[self.start_S1[row] : self.start_S1[row + 1]].tolist())

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        for first in range(0, len(self), 4096):
            starts = self.start_S1[first : first + 4097].tolist()
            codes = self.code_Z[starts[0] : starts[-1]].tolist()
            for start, stop in pairwise(starts):
                yield tuple(self.names[code] for code in codes[start - starts[0] : stop - starts[0]])

    def take(self, rows: NDArray[np.integer[Any]]) -> Labels:
        """Select the labels of some rows, in the order of `rows`."""
        start_S1, code_Z = take_rows(self.start_S1, self.code_Z, rows)
        return Labels(self.names, start_S1, code_Z)

    def counts(self) -> dict[str, int]:
        """Count the rows of each label; labels without rows are left out."""
        count_U = np.bincount(self.code_Z, minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, count_U, strict=True) if count}

    def first_rows(self) -> dict[str, int]:
        """The number of the first row of each label."""
        codes, places = np.unique(self.code_Z, return_index=True)
        rows = np.searchsorted(self.start_S1, places, side="right") - 1
        return {self.names[code]: row for code, row in zip(codes.tolist(), rows.tolist(), strict=True)}

    def count_unlabelled(self) -> int:
        """Count the rows that have no label."""
        return int((np.diff(self.start_S1) == 0).sum())


class LabelsBuilder:
    """Collects the labels of rows one row at a time."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._starts, self._codes = array("q", [0]), array("i")

    def add(self, row: Iterable[str]) -> None:
        """Add the labels of the next row."""
        number = self._number
        self._codes.extend([number.setdefault(label, len(number)) for label in row])
        self._starts.append(len(self._codes))

    def build(self) -> Labels:
        """The labels of all rows that were added."""
        return Labels(list(self._number), np.array(self._starts, dtype=np.int64), np.array(self._codes, dtype=np.int32))


class Targets:
    """The training targets of a split. Only the rows or labels that are accessed become dense.

    Args:
        labels: labels of the rows. known: the labels of the model, in the order of its outputs (N).
        task: what a label is.

    Raises:
        KeyError: a row has a label that the model does not know.
    """

    def __init__(self, labels: Labels, known: Sequence[str], task: Task) -> None:
        present = np.unique(labels.code_Z)
        encoded = task.encode([labels.names[code] for code in present.tolist()], known)
        number_U = np.zeros(len(labels.names), dtype=encoded.dtype)
        number_U[present] = encoded
        self.start_S1, self.label_Z, self._labels = labels.start_S1, number_U[labels.code_Z], labels
        self.count, self.task = len(known), task

    def __len__(self) -> int:
        return len(self.start_S1) - 1

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """The targets of some rows, see `mopefuse.tasks.base.Task.targets`."""
        return self.task.targets(*take_rows(self.start_S1, self.label_Z, index_B.numpy()), self.count)

    def dense(self) -> Tensor:
        """The targets of all rows."""
        import torch

        return self[torch.arange(len(self))]

    def numbers(self) -> NDArray[Any]:
        """What `Task.encode` returned for each row (S, T); only if all rows have T labels."""
        return self.label_Z.reshape(len(self), -1)

    def columns(self, first: int, stop: int) -> Tensor:
        """The targets of the labels from `first` up to but not including `stop`: zeros and ones (S, n). Multi-label only."""
        import torch

        targets_Sn = torch.zeros(len(self), stop - first)
        places = np.flatnonzero((self.label_Z >= first) & (self.label_Z < stop))
        rows = np.searchsorted(self.start_S1, places, side="right") - 1
        targets_Sn[torch.from_numpy(rows), torch.from_numpy(self.label_Z[places] - first)] = 1.0
        return targets_Sn

    def label_counts(self) -> dict[str, int]:
        """Count the rows with each label as it is written, or the pixels of each class of masks."""
        return self._labels.counts()

    def counts(self) -> Tensor:
        """Count the rows of each label (N,); classification only."""
        import torch

        return torch.from_numpy(np.bincount(self.label_Z, minlength=self.count))


def take_rows(start_S1: Numbers, value_Z: NDArray[Any], rows: NDArray[np.integer[Any]]) -> tuple[Numbers, NDArray[Any]]:
    """Select rows of a sparse table.

    Returns:
        A sparse table again: where the values of each row start (B + 1,), and the values.
    """
    starts, lengths = start_S1[:-1][rows], start_S1[1:][rows] - start_S1[:-1][rows]
    start_B1 = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    places = np.arange(start_B1[-1]) + np.repeat(starts - start_B1[:-1], lengths)
    return start_B1, value_Z[places]
