"""What two splits share: an image or a text that a model has seen in training makes a test too easy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mopefuse.data._base import Split

Numbers = NDArray[np.int64]


class Leak(NamedTuple):
    """Rows of a split whose image or text is also in another, by number."""

    images: Numbers
    texts: Numbers


def leak(train: Split, other: Split) -> Leak:
    """Rows of `other` that share an image with `train`, to the byte, or a text, whatever its case and spaces.

    Where less than half of train's texts are different, texts are phrases of the task ("what is the red digit?") that are
    meant to come again, and none counts.
    """
    images = np.flatnonzero(np.isin(other.image_keys, train.image_keys))
    known = np.unique(train.alike_keys)
    phrases = 2 * len(known) < len(train.alike_keys)
    return Leak(images, np.flatnonzero(np.isin(other.alike_keys, known[:0] if phrases else known)))
