"""Samples with the input of some sides shuffled or blank, to measure what predictions depend on.

Shapes: S samples of the split, B batch, C width of a pooled feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopefuse.data.base import Row
from mopefuse.data.collate import FeatureTable, Samples, TokenSource, blank_input, derive_seed


def draw_derangement(count: int, seed: int) -> Tensor:
    """Draw a permutation (S,) that moves every sample, drawn uniformly from those with a single cycle; a single sample stays.

    Sattolo's algorithm: Information Processing Letters 22 (1986), 315.
    """
    random = np.random.Generator(np.random.PCG64(derive_seed(seed, count)))
    order = np.arange(count)
    for last in range(count - 1, 0, -1):
        other = int(random.integers(last))
        order[last], order[other] = order[other], order[last]
    return torch.from_numpy(order)


class ShuffledSamples(Samples):
    """Samples that have the input of another sample on some sides; targets and the other sides stay.

    Args:
        partner_S: the other sample of each.
    """

    def __init__(self, samples: Samples, sides: Sequence[str], partner_S: Tensor) -> None:
        vars(self).update(vars(samples))
        self._sides, self._partner_S = sides, partner_S
        partner_lacks = {side: lacks_S[partner_S.numpy()] for side, lacks_S in samples.lacking.items() if side in sides}
        self.lacking = {**samples.lacking, **partner_lacks}
        self.features = {**samples.features, **_exchanged(samples.features, sides, partner_S)}
        self.tokens = {**samples.tokens, **_exchanged(samples.tokens, sides, partner_S)}

    def value(self, side: str, epoch: int, index: int, row: Row | None) -> Any:
        """See `Samples.value`."""
        if side not in self._sides:
            return super().value(side, epoch, index, row)
        other = int(self._partner_S[index])
        if side in self.lacking and self.is_missing(side, epoch, index):
            return blank_input(*self.readers[side])
        return self.present_value(side, epoch, other, row if row is None else self.split.rows[other])


class BlankSamples(Samples):
    """Samples that have a blank input on some sides, such as an empty text or a grey image, but are not marked as missing it.

    Args:
        features: by side, the pooled feature (1, C) of a blank input, for sides whose features are precomputed.
        tokens: by side, the output tokens of a blank input, likewise.
    """

    def __init__(
        self,
        samples: Samples,
        sides: Sequence[str],
        features: Mapping[str, Tensor],
        tokens: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        vars(self).update(vars(samples))
        self._sides = sides
        self.features = {**samples.features, **{side: _Repeated(features[side]) for side in sides if side in samples.features}}
        repeated = {side: _RepeatedTokens(tokens[side]) for side in sides if side in samples.tokens}
        self.tokens = {**samples.tokens, **repeated}

    def value(self, side: str, epoch: int, index: int, row: Row | None) -> Any:
        """See `Samples.value`."""
        if side not in self._sides:
            return super().value(side, epoch, index, row)
        return blank_input(*self.readers[side])


def _exchanged(tables: Mapping[str, Any], sides: Sequence[str], partner_S: Tensor) -> dict[str, Any]:
    return {side: _Partners(table, partner_S) for side, table in tables.items() if side in sides}


class _Partners:
    """Features or tokens of the partner of each row."""

    def __init__(self, table: FeatureTable | TokenSource, partner_S: Tensor) -> None:
        self._table, self._partner_S = table, partner_S

    def __getitem__(self, index_B: Tensor) -> Any:
        return self._table[self._partner_S[index_B]]


class _Repeated:
    """The same feature for every row."""

    def __init__(self, feature_1C: Tensor) -> None:
        self._feature_1C = feature_1C

    def __getitem__(self, index_B: Tensor) -> Tensor:
        return self._feature_1C.expand(len(index_B), -1)


class _RepeatedTokens:
    """The same tokens for every row."""

    def __init__(self, tokens: Mapping[str, Tensor]) -> None:
        self._tokens = tokens

    def __getitem__(self, index_B: Tensor) -> dict[str, Tensor]:
        return {name: tensor.expand(len(index_B), *tensor.shape[1:]) for name, tensor in self._tokens.items()}
