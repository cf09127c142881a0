"""Rows, splits and batches: what every reader produces and every fusion method takes.

Shapes: B batch, N labels, C width of a pooled feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Row:
    """One sample: a text, an image and its labels."""

    id: str
    text: str
    img: str  # relative to the data root
    labels: tuple[str, ...]
    line: int  # in its file, from 1


@dataclass(frozen=True)
class Split:
    """The rows of one file, in its order."""

    name: str
    root: Path
    rows: tuple[Row, ...]
    sha256: str  # of the file

    @property
    def file(self) -> str:
        """The file's name, for messages."""
        return f"{self.name}.jsonl"


@dataclass(frozen=True)
class DataSet:
    """The splits of one folder and the labels that its training split (or labels.txt) defines."""

    root: Path
    splits: dict[str, Split]
    labels: tuple[str, ...]
    multi_label: bool

    def fingerprint(self) -> dict[str, str]:
        """sha256 of the file of each split."""
        return {name: split.sha256 for name, split in self.splits.items()}

    def target(self, row: Row) -> Tensor:
        """The label's index, or for multi-label data a float vector (N,) of zeros and ones."""
        indices = [self.labels.index(label) for label in row.labels]
        if not self.multi_label:
            return torch.tensor(indices[0])
        return torch.zeros(len(self.labels)).index_fill(0, torch.tensor(indices, dtype=torch.long), 1.0)


@dataclass(frozen=True)
class Batch:
    """A batch on its way through a model.

    inputs: side ("main", "comp") to what that side's encoder takes.
    features: side to pooled features (B, C) computed earlier; used instead of encoding.
    targets: (B,) class indices, or (B, N) zeros and ones; None in prediction.
    index: (B,) positions of the samples in their split, always on the CPU.
    """

    inputs: dict[str, dict[str, Tensor]]
    features: dict[str, Tensor]
    targets: Tensor | None
    index: Tensor

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def walk(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: walk(inner) for key, inner in value.items()}
            return value if value is None else change(value)

        return Batch(walk(self.inputs), walk(self.features), walk(self.targets), walk(self.index))

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        return replace(self._map(lambda tensor: tensor.to(device, non_blocking=True)), index=self.index)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the data loader asks for it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def part(self, number: int, of: int) -> Batch:
        """The `number`-th of `of` nearly equal parts."""
        return self._map(lambda tensor: tensor.tensor_split(of)[number])
