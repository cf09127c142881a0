"""From raw values or rows to a batch on the CPU, with the preprocessing of each encoder, and which values a sample needs.

Nothing here refers to the weights of a model: a `Collator` is small to pickle, so that data workers can use it.

Shapes: B batch, N labels, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mopefuse.core.error_codes import DataCode
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Inputs, Preprocess
from mopefuse.errors import DataError
from mopefuse.modalities import base as modalities
from mopefuse.tasks.base import Task

LABEL = "label"
"""The key of a row's label."""


@dataclass(frozen=True)
class Requirements:
    """Which modalities a sample must have.

    Args:
        method: name of the fusion method, for messages.
        modality_of: side to the modality that its encoder reads, of all sides that the model reads.
        droppable_sides: the sides that a sample may have no value for.
        either_helps: whether training with ``--either`` lifts the requirement for the main side.
    """

    method: str
    modality_of: Mapping[str, str]
    droppable_sides: tuple[str, ...]
    either_helps: bool

    def check(self, lacking: Mapping[str, NDArray[np.bool_] | Tensor], *, where: str) -> None:
        """Refuse samples that lack a required modality, or all modalities that the model reads.

        Args:
            lacking: the sides that some sample has no value for, each with a mask (S,), True where a sample has none.

        Raises:
            DataError: a sample lacks a side that is not in `droppable_sides`, or has no value at all.
        """
        for side in lacking:
            if side in self.droppable_sides:
                continue
            fix = "leave them out with --on-missing skip"
            if self.either_helps and side == "main":
                fix = f"train with --either, or {fix}"
            what = f"samples lack {self.modality_of[side]}, which the {side} encoder of {self.method} needs"
            raise DataError(DataCode.MODALITY_REQUIRED, what, where=where, fix=fix)
        empty = int(reduce(and_, lacking.values()).sum()) if lacking.keys() >= self.modality_of.keys() else 0
        if empty:
            what = f"{empty} of the samples have no value for any encoder"
            raise DataError(DataCode.EMPTY_SAMPLES, what, where=where, fix="leave them out with --on-missing skip")


@dataclass(frozen=True)
class Collator:
    """Prepares raw values with each encoder's own preprocessing, without augmentation; `Fusion.collate` makes one.

    Args:
        readers: side to modality and preprocessing, of the sides that the model reads.
        num_labels: N; 0 if not known. task: what a label is; without one, rows must have no labels.
    """

    readers: Mapping[str, tuple[str, Preprocess]]
    requirements: Requirements
    num_labels: int = 0
    task: Task | None = None

    def __call__(self, images: Any = None, texts: Any = None, **more: Any) -> Batch:
        """A batch on the CPU, of values by modality or of rows.

        ``collate(images, texts)``, ``collate(texts=texts, audio=clips)``, or ``collate(rows)`` with rows such as those of
        `mopefuse.PairDataset`: ``{"image": image, "text": text, "label": index}``.

        Args:
            images, texts, more: one value for each sample, by modality; None for a sample without a value. Modalities that no
                encoder reads may be left out. Images are PIL images of any mode, paths, or arrays of uint8
                (height, width, 3); they are prepared as the files of a data set are. One value alone is a list of one.
                As the only argument, `images` can be a list of rows: mappings from modality to value; where all have the
                key "label", an index from 0 or, for multi-label, a list of indices, `Batch.targets` is set: (B,) int64, or
                (B, N) float32. Other keys are ignored.

        Raises:
            DataError: unequal numbers of values, none at all, a value of another kind, a missing value that is needed, or a
                label that is not an index from 0 to N - 1.
        """
        targets = None
        if texts is None and not more and _are_rows(images):
            targets = self._targets(images)
            values = _by_modality(images, {name for name, _ in self.readers.values()})
        else:
            values = modalities.from_arguments((images, texts), more)
        count = modalities.count_samples(values)
        if not count:
            given = " and ".join(f"0 {modalities.get_modality(name).plural}" for name in values) or "nothing"
            raise DataError(DataCode.NO_PAIRS, f"{given} do not form pairs", fix="pass one value for each sample")
        modalities.require_types(values)
        read = {name for name, _ in self.readers.values()}
        values |= {name: modalities.prepare_values(name, values[name]) for name in read if name in values}
        inputs: dict[str, Inputs] = {}
        missing: dict[str, Tensor] = {}
        for side, (name, preprocess) in self.readers.items():
            own = modalities.require_values(name, values, f"the {side} encoder")
            inputs[side] = preprocess.batch([preprocess.item(value) for value in modalities.fill_missing(name, own)])
            if any(value is None for value in own):
                missing[side] = torch.tensor([value is None for value in own])
        self.requirements.check(missing, where="collate")
        return Batch(inputs, {}, targets, torch.arange(count), missing)

    def _targets(self, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
        """The labels of rows as `Batch.targets`; None if no row has one."""
        without = [number for number, row in enumerate(rows) if LABEL not in row]
        if len(without) == len(rows):
            return None
        if without:
            what = "the row has no label, but other rows of the batch have one"
            raise DataError(
                DataCode.ROWS_WITH_AND_WITHOUT_LABEL,
                what,
                where=f"sample {without[0]}",
                fix="add a label to every row, or to none",
            )
        assert self.task is not None, "a model has a task"
        for number, row in enumerate(rows):
            self.task.check_label(row[LABEL], self.num_labels, f"sample {number}")
        return self.task.stack_labels([row[LABEL] for row in rows], self.num_labels)


def _are_rows(values: Any) -> bool:
    return isinstance(values, list | tuple) and bool(values) and all(isinstance(value, Mapping) for value in values)


def _by_modality(rows: Sequence[Mapping[str, Any]], read: set[str]) -> dict[str, Sequence[Any]]:
    """The values of rows, of each modality that some row has; None if a row has none."""
    return {name: [row.get(name) for row in rows] for name in sorted(read) if any(name in row for row in rows)}
