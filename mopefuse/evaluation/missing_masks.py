"""Which samples of a split lose which modalities: a function of their ids, the modalities and a seed.

Shapes: S samples of the split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mopefuse.core.error_codes import ConfigCode
from mopefuse.data.base import DataSet
from mopefuse.data.modality_dropout import removal_order
from mopefuse.errors import ConfigError
from mopefuse.evaluation.missing_shares import GRID, Shares
from mopefuse.fusion.base import Fusion

GRID_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Shares of samples in ``--missing grid``."""


@dataclass(frozen=True)
class Removal:
    """The modalities that samples of a split may lose, and in which order samples lose them.

    Args:
        ids: ids of the samples.
        kinds: name ("text", "image+text") to the modalities that a sample loses together.
        missing: modality to (S,), whether a row of the data has none.
        orders: kind to the samples that can lose it, by position: rows that lack it first. A sample that has nothing else
            is not among them.
    """

    ids: tuple[str, ...]
    kinds: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, NDArray[np.bool_]]
    orders: Mapping[str, list[int]]

    @property
    def already_missing(self) -> dict[str, int]:
        """Number of rows that lack each modality in the data; without modalities that no row lacks."""
        return {name: count for name, missing_S in self.missing.items() if (count := int(missing_S.sum()))}

    def masks(self, shares: Shares) -> tuple[dict[str, NDArray[np.bool_]], dict[str, int]]:
        """Remove shares of modalities.

        No sample loses the last modality that it has, so an earlier kind limits which samples can lose a later one.

        Returns:
            Modality to (S,), True where a sample lacks it afterwards; and kind to the number of samples that lack it.
        """
        masks = {name: missing_S.copy() for name, missing_S in self.missing.items()}
        counts = {}
        for kind, share in shares.items():
            own, others = self.kinds[kind], [name for name in masks if name not in self.kinds[kind]]
            natural_S = np.logical_and.reduce([self.missing[name] for name in own])
            candidates = [index for index in self.orders[kind] if not all(masks[name][index] for name in others)]
            count = max(int(natural_S[candidates].sum()), round(share * len(natural_S)))
            for name in own:
                masks[name][candidates[:count]] = True
            counts[kind] = min(count, len(candidates))
        return masks, counts

    def actual_shares(self, shares: Shares, counts: Mapping[str, int]) -> Shares:
        """The shares reached: different from those requested if rows lack more, or fewer samples can lose a modality."""
        total = len(self.ids)
        return {
            kind: shares[kind] if count == round(shares[kind] * total) else count / total for kind, count in counts.items()
        }

    def require_shares(self, shares: Shares, counts: Mapping[str, int]) -> None:
        """Refuse shares that would leave samples without any modality.

        Raises:
            ConfigError: fewer samples can lose a kind than requested.
        """
        total = len(self.ids)
        for kind, share in shares.items():
            if counts[kind] < round(share * total):
                what = f"only {counts[kind]:,} of {total:,} samples can lack {kind}: the others have no other modality"
                fix = f"write at most {kind}={int(1000 * counts[kind] / total) / 1000:g}"
                raise ConfigError(ConfigCode.MISSING_SHARE_TOO_LARGE, what, where=f"--missing {kind}={share:g}", fix=fix)


def plan_removal(
    model: Fusion, data: DataSet, split: str, shares: Sequence[Shares] | None, seed: int
) -> tuple[Removal, list[Shares]]:
    """Check the requested shares, and order the samples.

    Args:
        shares: one entry per evaluation; None for each kind alone with each of `GRID_SHARES`, and the split as it is.

    Raises:
        ConfigError: a modality that the model does not read, or that it needs.
    """
    kinds = {"+".join(kind): kind for kind in _removable(model)}
    if shares is None:
        shares = [{}, *({kind: share} for kind in kinds for share in GRID_SHARES)]
    requested = dict.fromkeys(kind for one in shares for kind in one)
    for kind in sorted(requested) or ([] if kinds else [GRID]):
        _require_removable(kind, kinds, model)
    ids = tuple(row.id for row in data.splits[split].rows)
    missing = {name: data.splits[split].is_missing(name) for name in modalities_read(model)}
    orders = {kind: _order(ids, kinds[kind], missing, seed) for kind in requested}
    return Removal(ids=ids, kinds=kinds, missing=missing, orders=orders), list(shares)


def modalities_read(model: Fusion) -> tuple[str, ...]:
    """The modalities that a model's encoders read."""
    return tuple(dict.fromkeys(model.encoder(side).modality for side in model.uses))


def _removable(model: Fusion) -> list[tuple[str, ...]]:
    """Each modality that samples may lack, and each combination of these; never everything that the model reads."""
    may, read = sorted({model.encoder(side).modality for side in model.droppable_sides}), set(modalities_read(model))
    return [kind for size in range(1, len(may) + 1) for kind in combinations(may, size) if set(kind) < read]


def _require_removable(kind: str, kinds: Mapping[str, tuple[str, ...]], model: Fusion) -> None:
    if kind in kinds:
        return
    method = model.config.method
    if not kinds:
        fix = "use --method conditional, mlp, late-concat or linear, and encoders of several modalities"
        if model.task.compares_samples:
            fix = "remove --missing"
        raise ConfigError(
            ConfigCode.MODALITY_NOT_OPTIONAL, f"{method} needs every modality that it reads", where=f"--missing {kind}", fix=fix
        )
    parts, read = set(kind.split("+")), set(modalities_read(model))
    what, fix = f"{method} cannot predict without {kind}", f"use {' or '.join(f'--missing {name}=FRACTION' for name in kinds)}"
    if unknown := sorted(parts - read):
        what = f"no encoder of this model reads {unknown[0]}"
    elif parts == read:
        what = f"a sample without {' and '.join(sorted(parts))} has no input for this model"
    elif model.requirements.either_helps and not model.config.either:
        fix = f"train with --either, or {fix}"
    raise ConfigError(ConfigCode.MODALITY_NOT_OPTIONAL, what, where=f"--missing {kind}", fix=fix)


def _order(
    ids: Sequence[str], kind: tuple[str, ...], missing: Mapping[str, NDArray[np.bool_]], seed: int
) -> list[int]:
    """The samples that can lose `kind`, by position, in the order in which they lose it; rows that lack it come first."""
    natural_S = np.logical_and.reduce([missing[name] for name in kind])
    nothing_else_S = np.logical_and.reduce([missing_S for name, missing_S in missing.items() if name not in kind])
    order = sorted(removal_order(ids, kind, seed), key=lambda index: not natural_S[index])
    return [index for index in order if not nothing_else_S[index]]
