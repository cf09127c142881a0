"""What two splits share: an image or a text that a model has seen in training makes a test too easy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mopefuse.data._base import Keys, Split

Numbers = NDArray[np.int64]


class Leak(NamedTuple):
    """Rows of a split whose image or text is also in another, by number."""

    images: Numbers
    texts: Numbers


def leak(train: Split, other: Split) -> Leak:
    """Rows of `other` that share an image or a text with `train`, by the digest of their content.

    A text counts only if `train` has it once: one that comes often ("what is the red digit?") is a phrase of the task.
    """
    images = np.flatnonzero(np.isin(other.image_keys, train.image_keys))
    return Leak(images, np.flatnonzero(np.isin(other.text_keys, _once(train.text_keys))))


def _once(keys: Keys) -> Keys:
    values, counts = np.unique(keys, return_counts=True)
    once: Keys = values[counts == 1]
    return once
