"""Rows whose values come from different rows of a split: the pairs of a query and its candidates.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mopefuse.core.lazy_sequence import LazySequence
from mopefuse.data.base import Row, Split
from mopefuse.data.labels import Labels


@dataclass(frozen=True, eq=False)
class PairedRows(LazySequence[Row]):
    """Rows that take the value of each modality from a row of `rows`.

    Args:
        number_P: by modality, the row of its value. labels: of each pair.
    """

    rows: Sequence[Row]
    number_P: Mapping[str, NDArray[np.int64]]
    labels: Sequence[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, number: int) -> Row:
        """See `LazySequence.at`."""
        of = {name: self.rows[int(number_P[number])] for name, number_P in self.number_P.items()}
        values = {name: row.values[name] for name, row in of.items()}
        rows = list(of.values())
        return Row(id=" + ".join(row.id for row in rows), values=values, labels=self.labels[number], line=rows[0].line)


def pair_values(split: Split, number_P: Mapping[str, NDArray[np.int64]], label: str) -> Split:
    """A split of pairs of the values of `split`, all with the same label."""
    count = len(next(iter(number_P.values())))
    labels = Labels((label,), np.arange(count + 1), np.zeros(count, dtype=np.int32))
    keys, loose_keys = (
        {name: digests[name][rows] for name, rows in number_P.items()} for digests in (split.keys, split.loose_keys)
    )
    rows = PairedRows(split.rows, number_P, labels)
    return replace(split, rows=rows, labels=labels, keys=keys, loose_keys=loose_keys)
