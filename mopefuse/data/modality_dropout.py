"""Remove modalities from samples: at random in each training epoch, or from a fixed set, to measure the drop in accuracy.

Shapes: S samples of the split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mopefuse.data.collate import Samples, derive_seed
from mopefuse.data.subsets import random_order

_DROPOUT = 1  # makes the random numbers differ from those of augmentation


def removal_order(ids: Sequence[str], modalities: Sequence[str], seed: int) -> list[int]:
    """The order (numbers of samples) in which samples lose `modalities`, so that a larger share includes a smaller one."""
    return random_order([f"{'+'.join(modalities)}:{name}" for name in ids], seed)


class FixedMissing(Samples):
    """Samples from which some modalities are removed.

    Args:
        masks: by modality (S,), True where it is removed.
    """

    def __init__(self, samples: Samples, masks: Mapping[str, NDArray[np.bool_]]) -> None:
        vars(self).update(vars(samples))
        self.lacking = {**samples.lacking}
        for side, modality in self.modality_of.items():
            if modality in masks:
                self.lacking[side] = masks[modality] | samples.lacking.get(side, False)


class ModalityDropout(Samples):
    """Training samples from which modalities are removed at random, as a function of (seed, epoch, index).

    Encoders of the same modality lose it together, and no sample loses all of its modalities.

    Args:
        sides: the sides whose modalities may be removed. share: probability of removing each.
    """

    def __init__(self, samples: Samples, sides: Sequence[str], share: float) -> None:
        vars(self).update(vars(samples))
        self._natural, self._share = samples.lacking, share
        self._modalities = sorted({self.modality_of[side] for side in sides})
        never_S = np.zeros(len(samples), dtype=np.bool_)
        self.lacking = {**{side: never_S for side in sides}, **samples.lacking}

    def is_missing(self, side: str, epoch: int, index: int) -> bool:
        """See `Samples.is_missing`."""
        return self._lacks(side, index) or self.modality_of[side] in self._drawn(epoch, index)

    def _drawn(self, epoch: int, index: int) -> set[str]:
        random = np.random.Generator(np.random.PCG64(derive_seed(self.seed, epoch, index, _DROPOUT)))
        chance = random.random(len(self._modalities)).tolist()
        drawn = {modality for modality, value in zip(self._modalities, chance, strict=True) if value < self._share}
        present = {modality for side, modality in self.modality_of.items() if not self._lacks(side, index)}
        return set() if drawn >= present else drawn

    def _lacks(self, side: str, index: int) -> bool:
        return side in self._natural and bool(self._natural[side][index])
