"""Find rows whose inputs are those of an earlier row of their split: repeated samples, and samples with contradicting labels.

Shapes: S rows of a split, R good ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mopefuse.data.findings import Finding, finding_at
from mopefuse.data.index import Index

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it keeps distinct numbers distinct
_EXAMPLES = 3  # of labels in a message


def find_repeated_rows(index: Index) -> Iterator[Finding]:
    """Yield a finding for each row that has the same files and, regardless of case and spacing, texts as an earlier row.

    Rows with a bad file are left out.
    """
    for row, earlier in _repeats(index):
        other = f"{index.place(earlier)}, id {index.ids[earlier]}"
        if _contradicts(index, row, earlier):
            here, there = _name(index.labels[row]), _name(index.labels[earlier])
            message = f"its label is {here}, but that of {other}, with the same inputs, is {there}"
            yield finding_at(index, row, "contradicting-labels", message)
        else:
            yield finding_at(index, row, "repeated-row", f"it has the same inputs and label as {other}")


def notice_contradictions(indexes: Iterable[Index]) -> list[str]:
    """Format a notice for training about each split that has contradicting labels."""
    notices = []
    for index in indexes:
        rows = [row for row, earlier in _repeats(index) if _contradicts(index, row, earlier)]
        if rows:
            have = "row has" if len(rows) == 1 else "rows have"
            what = f"labels: {len(rows)} {have} the same inputs as an earlier row, but a different label"
            notices.append(f"{what}, first in {index.place(rows[0])}: mopefuse data check lists all")
    return notices


def _repeats(index: Index) -> list[tuple[int, int]]:
    """The numbers of each good row whose inputs are those of an earlier one, and of the first that has them."""
    rows_R = index.good()
    _, first, inverse = np.unique(_joint_keys(index)[rows_R], return_index=True, return_inverse=True)
    earlier_R = first[inverse]
    again = np.flatnonzero(earlier_R < np.arange(len(rows_R)))
    return list(zip(rows_R[again].tolist(), rows_R[earlier_R[again]].tolist(), strict=True))


def _contradicts(index: Index, row: int, earlier: int) -> bool:
    if index.masks is not None:
        return bool(index.masks.keys()[row] != index.masks.keys()[earlier])
    return set(index.labels[row]) != set(index.labels[earlier])


def _joint_keys(index: Index) -> NDArray[np.uint64]:
    """One number (S,) for the inputs of each row. Two rows of a million get the same one by accident in one of 10^7 cases."""
    joint_S = np.zeros(len(index.lines_S), dtype=np.uint64)
    for values in index.values.values():
        digest_S = np.ascontiguousarray(values.loose_keys(), dtype="S16").view(np.uint64)[::2]
        joint_S = joint_S * _MULTIPLIER + digest_S
    return joint_S


def _name(labels: Iterable[str]) -> str:
    names = sorted(labels)
    return ", ".join(map(repr, names[:_EXAMPLES])) + (" …" if len(names) > _EXAMPLES else "") if names else "none"
