"""Features of the frozen encoders for cross-validation, computed once and cached for all runs.

Shapes: S samples of train followed by val, C width of one side's feature, N labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mopefuse.autofit.budget import Budget
from mopefuse.core.error_codes import ResourceCode
from mopefuse.core.formatting import duration
from mopefuse.data.base import Batch, DataSet, Split
from mopefuse.data.collate import FeatureTable
from mopefuse.data.feature_cache import split_features
from mopefuse.data.subsets import random_order
from mopefuse.errors import ResourceError
from mopefuse.fusion.regression import Fold
from mopefuse.modalities.base import get_modality
from mopefuse.tasks.base import Task
from mopefuse.training.listener import Listener
from mopefuse.training.plan import Prepared

FOLDS = 5
_JOINED = ("train", "val")
_LEAST_MEASURED, _MEASURED_SHARE = 5.0, 0.05  # seconds of encoding, and share of the budget, after which its pace is known
_SUNK = 0.5  # share of the budget, after which encoding is finished whatever it takes
_TOO_SLOW = 1.25  # times the budget


@dataclass(frozen=True)
class Features:
    """Features and targets of train followed by val.

    Args:
        tables: features (S, C) by side. missing: which samples (S,) lack a side, of sides that some lack.
        targets: of all samples. task: what a label is.
        groups: a digest of each sample (S,); samples with equal ones are kept in one fold.
        train_rows: number of samples of train.
    """

    tables: dict[str, Tensor]
    missing: dict[str, Tensor]
    targets: Tensor
    task: Task
    groups: tuple[bytes, ...]
    train_rows: int

    @property
    def val_rows(self) -> Tensor:
        """Numbers of the samples of val."""
        return torch.arange(self.train_rows, len(self.targets))

    def fold(self, rows_K: Tensor) -> Fold:
        """The features and targets of some samples."""
        tables: dict[str, FeatureTable] = {side: table_SC[rows_K] for side, table_SC in self.tables.items()}
        return Fold(tables, self.targets[rows_K], {side: flag_S[rows_K] for side, flag_S in self.missing.items()})

    def batch(self, rows_B: Tensor) -> Batch:
        """The input of a model that reads nothing but features."""
        features = {side: table_SC[rows_B] for side, table_SC in self.tables.items()}
        missing = {side: flag_S[rows_B] for side, flag_S in self.missing.items()}
        return Batch({}, features, self.targets[rows_B], rows_B, missing)

    @cached_property
    def held_out(self) -> list[Tensor]:
        """The samples of each of `FOLDS` folds: of every class about as many in each, and whole groups."""
        labels = self.targets.tolist() if self.targets.ndim == 1 else [tuple(row) for row in self.targets.bool().tolist()]
        members: dict[bytes, list[int]] = {}
        for row, group in enumerate(self.groups):
            members.setdefault(group, []).append(row)
        names = list(members)
        shuffled = [names[i] for i in random_order([name.hex() for name in names], seed=0)]
        shuffled.sort(key=lambda name: str(labels[members[name][0]]))  # stable: random within a class
        dealt = [[row for name in shuffled[fold::FOLDS] for row in members[name]] for fold in range(FOLDS)]
        return [torch.tensor(sorted(rows)) for rows in dealt if rows]

    def folds(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples to train on and those to predict, fold by fold."""
        for held_K in self.held_out:
            kept_S = torch.ones(len(self.targets), dtype=torch.bool)
            kept_S[held_K] = False
            yield kept_S.nonzero()[:, 0], held_K


def compute_features(prepared: Prepared, device: torch.device, listener: Listener, budget: Budget) -> Features:
    """Compute or read the features of all splits, also of test, so that no run has to wait for an encoder.

    Raises:
        ResourceError: the encoders alone would take longer than the budget; what was computed stays in the cache.
    """
    model, data = prepared.model, prepared.data
    tables: dict[str, Tensor] = {}
    missing: dict[str, Tensor] = {}
    splits = [name for name in (*_JOINED, "test") if name in data.splits]
    for side in model.uses:
        encoder = model.encoder(side)
        parts = []
        for number, split in enumerate(splits):
            left = _count_distinct(data, splits[number:], encoder.modality)
            times = left / _count_distinct(data, [split], encoder.modality)
            watch = _PaceCheck(f"{encoder.spec.name} on {split}", listener, budget, times)
            found = split_features(encoder, data, split, prepared.config, device, advance=watch)
            if split in _JOINED:
                parts.append(found[torch.arange(len(data.splits[split].rows))])
        tables[side] = torch.cat(parts)
        flag_S = np.concatenate([data.splits[split].is_missing(encoder.modality) for split in _JOINED])
        if flag_S.any():
            missing[side] = torch.from_numpy(flag_S)
    targets = torch.cat([data.targets(split) for split in _JOINED])
    groups = [group for split in _JOINED for group in _groups(data.splits[split])]
    return Features(tables, missing, targets, data.task, tuple(groups), len(data.splits["train"].rows))


def _count_distinct(data: DataSet, splits: Sequence[str], modality: str) -> int:
    """Count the distinct values of a modality in some splits, each of which is encoded once."""
    return len(np.unique(np.concatenate([data.splits[name].keys[modality] for name in splits])))


def _groups(split: Split) -> list[bytes]:
    """A digest for each row: of its first file, or a unique one."""
    unique = [f"{split.name}-{number}".encode() for number in range(len(split.rows))]
    file = next((name for name in split.keys if get_modality(name).is_file), None)
    return unique if file is None else [key or own for key, own in zip(split.keys[file].tolist(), unique, strict=True)]


class _PaceCheck:
    """Passes the progress of an encoder on, and stops it early if it would exceed the budget.

    Args:
        times: all values that the encoder still has to encode, over those of this split.
    """

    def __init__(self, what: str, listener: Listener, budget: Budget, times: float) -> None:
        self._what, self._listener, self._budget, self._times = what, listener, budget, times
        self._began = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self._listener.on_data_progress(self._what, done, total)
        seconds, budget = time.monotonic() - self._began, self._budget
        if seconds < max(_LEAST_MEASURED, _MEASURED_SHARE * budget.total) or budget.elapsed > _SUNK * budget.total:
            return
        needed = seconds / done * total * self._times
        if budget.elapsed - seconds + needed > _TOO_SLOW * budget.total:
            what = f"encoding alone takes about {duration(needed)}, and the budget is {duration(budget.total)}"
            fix = "raise --budget, use smaller encoders with --main and --comp, or train on a part with --fraction 0.1"
            raise ResourceError(ResourceCode.BUDGET_TOO_SMALL, what, where=self._what, fix=fix)
