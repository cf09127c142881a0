"""Find values that two splits share: a test is too easy for a model that has seen its images or texts in training."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mopefuse.data.base import Split
from mopefuse.modalities.base import get_modality

Numbers = NDArray[np.int64]


def find_leaks(train: Split, other: Split) -> dict[str, Numbers]:
    """Find the rows of `other` that share a value with `train`: the same bytes of a file, or a text regardless of case and
    spacing.

    If fewer than half of the texts of train are distinct, they are phrases of the task ("what is the red digit?") that
    repeat by design, and no text counts as shared. Empty texts never count.

    Returns:
        Row numbers, by modality.
    """
    found = {}
    for name in sorted(train.keys, key=lambda name: not get_modality(name).is_file):
        values = train.loose_keys[name][~(train.is_missing(name) | train.is_empty(name))]
        known = np.unique(values)
        are_phrases = not get_modality(name).is_file and 2 * len(known) < len(values)
        found[name] = np.flatnonzero(np.isin(other.loose_keys[name], known[:0] if are_phrases else known))
    return found
