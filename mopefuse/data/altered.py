"""Samples whose input of one side is another's, or nothing: to see what an answer depends on.

Shapes: S samples of the split, B batch, C width of a pooled feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopefuse.data.base import Row
from mopefuse.data.collate import Samples, Table, blank, seed_of


def derangement(count: int, seed: int) -> Tensor:
    """A permutation (S,) that moves every sample, drawn evenly among all of one cycle; of one sample, itself.

    Sattolo's algorithm: Information Processing Letters 22 (1986), 315.
    """
    random = np.random.Generator(np.random.PCG64(seed_of(seed, count)))
    order = np.arange(count)
    for last in range(count - 1, 0, -1):
        other = int(random.integers(last))
        order[last], order[other] = order[other], order[last]
    return torch.from_numpy(order)


class Shuffled(Samples):
    """Each sample with the input that another has on some sides; targets and the other sides stay.

    Args:
        partner_S: the sample that each takes it from.
    """

    def __init__(self, samples: Samples, sides: Sequence[str], partner_S: Tensor) -> None:
        vars(self).update(vars(samples))
        self._sides, self._partner_S = sides, partner_S
        theirs = {side: lacks_S[partner_S.numpy()] for side, lacks_S in samples.lacking.items() if side in sides}
        self.lacking = {**samples.lacking, **theirs}
        exchanged = {side: _Partners(table, partner_S) for side, table in samples.features.items() if side in sides}
        self.features = {**samples.features, **exchanged}

    def value(self, side: str, epoch: int, index: int, row: Row | None) -> Any:
        """See `Samples.value`."""
        if side not in self._sides:
            return super().value(side, epoch, index, row)
        other = int(self._partner_S[index])
        if side in self.lacking and self.absent(side, epoch, index):
            return blank(*self.readers[side])
        return self.whole(side, epoch, other, row if row is None else self.split.rows[other])


class Blank(Samples):
    """Each sample with what says nothing on some sides, an empty text or an image of mid-grey; it is not told to be missing.

    Args:
        features: side to the pooled feature (1, C) of nothing, for a side whose features are known already.
    """

    def __init__(self, samples: Samples, sides: Sequence[str], features: Mapping[str, Tensor]) -> None:
        vars(self).update(vars(samples))
        self._sides = sides
        self.features = {**samples.features, **{side: _Same(features[side]) for side in sides if side in samples.features}}

    def value(self, side: str, epoch: int, index: int, row: Row | None) -> Any:
        """See `Samples.value`."""
        if side not in self._sides:
            return super().value(side, epoch, index, row)
        return blank(*self.readers[side])


class _Partners:
    def __init__(self, table: Table, partner_S: Tensor) -> None:
        self._table, self._partner_S = table, partner_S

    def __getitem__(self, index_B: Tensor) -> Tensor:
        return self._table[self._partner_S[index_B]]


class _Same:
    def __init__(self, feature_1C: Tensor) -> None:
        self._feature_1C = feature_1C

    def __getitem__(self, index_B: Tensor) -> Tensor:
        return self._feature_1C.expand(len(index_B), -1)
