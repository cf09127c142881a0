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
    rows_R = index.good()
    key_R = _joint_keys(index)[rows_R]
    _, first, inverse = np.unique(key_R, return_index=True, return_inverse=True)
    earlier_R = first[inverse]
    for position in np.flatnonzero(earlier_R < np.arange(len(rows_R))).tolist():
        row, earlier = int(rows_R[position]), int(rows_R[earlier_R[position]])
        other = f"{index.place(earlier)}, id {index.ids[earlier]}"
        here, there = index.labels[row], index.labels[earlier]
        if set(here) == set(there):
            yield finding_at(index, row, "repeated-row", f"it has the same inputs and label as {other}")
        else:
            message = f"its label is {_name(here)}, but that of {other}, with the same inputs, is {_name(there)}"
            yield finding_at(index, row, "contradicting-labels", message)


def notice_contradictions(indexes: Iterable[Index]) -> list[str]:
    """Format a notice for training about each split that has contradicting labels."""
    notices = []
    for index in indexes:
        found = [finding for finding in find_repeated_rows(index) if finding.kind == "contradicting-labels"]
        if found:
            have = "row has" if len(found) == 1 else "rows have"
            what = f"labels: {len(found)} {have} the same inputs as an earlier row, but a different label"
            notices.append(f"{what}, first in {found[0].where}: mopefuse data check lists all")
    return notices


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
