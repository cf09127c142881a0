"""Ids in the masks of training that are probably a mistake: stray pixels, smoothed borders, gaps, and no object.

Shapes: S rows, K = 256 ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mopefuse.core.error_codes import DataCode
from mopefuse.core.formatting import several
from mopefuse.data.findings import Finding, finding_at
from mopefuse.data.index import Index
from mopefuse.errors import DataError
from mopefuse.metrics.names import IGNORED
from mopefuse.modalities.masks import ids_in

_STRAY = 0.05  # share of masks with other ids than 0 and that of the object, up to which these are mistakes
_OFTEN = 0.5  # share of masks with an id that is not
_NEARLY_ALL = 0.9
_HIGH = 128  # no known data set with such ids has 0 and 255 in nearly all masks
_LISTED = 8
_NAME_THEM = "or name the classes in labels.txt"

Rows = NDArray[np.int64]


def count_ids(index: Index, rows: Rows) -> NDArray[np.int64]:
    """The number of rows (K,) whose mask has each id."""
    assert index.masks is not None
    counts_K = np.zeros(IGNORED + 1, dtype=np.int64)
    numbers, rows_of = np.unique(index.masks.number_S[rows], return_counts=True)
    for number, count in zip(numbers.tolist(), rows_of.tolist(), strict=True):
        counts_K[ids_in(index.masks.infos[number])] += count
    return counts_K


def require_intended_ids(train: Index, rows: Rows, ignored: int) -> None:
    """Refuse ids that would turn masks that mark an object into masks of classes; to be used if no file names the classes.

    Args:
        ignored: `data.ignore_index`.

    Raises:
        DataError: masks have 0 and 255 (or 1), and a few of them another id, or nearly all have grey borders.
    """
    counts_K = count_ids(train, rows)
    known = [one for one in np.flatnonzero(counts_K).tolist() if one != IGNORED and one != ignored]
    if not known:
        return
    most = max(1.0, _STRAY * len(rows))
    black_and_white = min(counts_K[0], counts_K[IGNORED]) >= _NEARLY_ALL * len(rows)
    if black_and_white and known[-1] >= _HIGH and _rows_with(train, rows, known[1:]) > most:
        what = f"masks have 0 and 255, and {several(len(known) - 1, 'other id')} up to {known[-1]}, as if they were smoothed"
        fix = f"save masks without smoothing (nearest neighbour), {_NAME_THEM}"
        raise DataError(DataCode.UNINTENDED_IDS, what, where=_place(train, rows, known[-1]), fix=fix)
    for marked in (IGNORED, 1):
        others = [one for one in known if one not in (0, marked)]
        is_class = marked == 1 and others[:1] == [2]  # 0, 1 and 2 are classes, of which one is rare
        if not others or is_class or min(counts_K[0], counts_K[marked]) < _OFTEN * len(rows):
            continue
        if (stray := _rows_with(train, rows, others)) <= most:
            what = f"masks have the ids 0 and {marked}, and {stray} of {len(rows)} also {_listed(others)}"
            fix = f"correct the mask, {_NAME_THEM}"
            raise DataError(DataCode.UNINTENDED_IDS, what, where=_place(train, rows, others[0]), fix=fix)


def _rows_with(index: Index, rows: Rows, ids: Collection[int]) -> int:
    """The number of rows whose mask has one of some ids."""
    assert index.masks is not None
    has_I = np.array([not set(ids).isdisjoint(ids_in(info)) for info in index.masks.infos], dtype=bool)
    return int(np.count_nonzero(has_I[index.masks.number_S[rows]]))


def require_object(train: Index, rows: Rows, known: Collection[int], ignored: int) -> None:
    """Refuse masks of which at most one class counts.

    Args:
        known: the ids in the masks of train that count. ignored: `data.ignore_index`.

    Raises:
        DataError: there is nothing to learn.
    """
    if len(known) > 1:
        return
    found = np.flatnonzero(count_ids(train, rows)).tolist()
    if ignored != IGNORED and ignored in found:
        what = f"masks have the ids {_listed(found)}, of which data.ignore_index={ignored} leaves {_listed([*known])}"
        raise DataError(DataCode.ONE_CLASS, what, where=train.file, fix="remove data.ignore_index")
    what = f"masks of train have the id {_listed(found)} only, so there is nothing to learn"
    raise DataError(DataCode.ONE_CLASS, what, where=train.file, fix="mark the object of some rows with 1 or 255")


def find_gaps(train: Index, rows: Rows, labels: Sequence[str], ignored: int) -> Iterator[Finding]:
    """Yield a finding if some classes, which have no names, occur in no mask: the highest id may be a mistake.

    Args:
        labels: the classes. ignored: `data.ignore_index`.
    """
    known = [one for one in np.flatnonzero(count_ids(train, rows)).tolist() if one not in (ignored, IGNORED)]
    if absent := len(labels) - len(known):
        message = f"masks have the ids {_listed(known)} only, so {absent} of {len(labels)} classes occur in none of train"
        hint = f"if {known[-1]} is a mistake, correct the mask; to name the classes, write labels.txt"
        yield finding_at(train, _first_row(train, rows, known[-1]), "unused-class-ids", message, hint=hint)


def _listed(ids: Collection[int]) -> str:
    """Format ids, the first and the last if they are many."""
    shown = [str(one) for one in sorted(ids)]
    shown = [*shown[: _LISTED - 1], "…", shown[-1]] if len(shown) > _LISTED + 1 else shown
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown or ["none"])


def _first_row(index: Index, rows: Rows, wanted: int) -> int:
    """The first row whose mask has an id."""
    masks = index.masks
    assert masks is not None
    found: int = next(row for row in rows.tolist() if wanted in ids_in(masks.infos[masks.number_S[row]]))
    return found


def _place(index: Index, rows: Rows, wanted: int) -> str:
    row = _first_row(index, rows, wanted)
    assert index.masks is not None
    return f"{index.place(row)}, {index.masks.names[index.masks.number_S[row]]}"
