"""What two splits share: an image or a text that a model has seen in training makes a test too easy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mopefuse.data.base import Split
from mopefuse.modalities.base import of

Numbers = NDArray[np.int64]


def leak(train: Split, other: Split) -> dict[str, Numbers]:
    """By modality, the rows of `other` that share a value with `train`, by number: a file to the byte, or a text, whatever
    its case and spaces.

    Where less than half of train's texts are different, texts are phrases of the task ("what is the red digit?") that are
    meant to come again, and none counts. Empty texts never do.
    """
    found = {}
    for name in sorted(train.keys, key=lambda name: not of(name).is_file):
        values = train.alike[name][~(train.lacks(name) | train.empties(name))]
        known = np.unique(values)
        phrases = not of(name).is_file and 2 * len(known) < len(values)
        found[name] = np.flatnonzero(np.isin(other.alike[name], known[:0] if phrases else known))
    return found
