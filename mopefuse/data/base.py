"""Rows, splits and batches: what every reader produces and every fusion method takes.

Shapes: B batch, N labels, S samples of a split, C width of a pooled feature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.data.labels import Labels, Targets
from mopefuse.modalities.base import of

if TYPE_CHECKING:  # rows are read where there is no torch, too
    import torch
    from torch import Tensor

SPLITS = ("train", "val", "test")
Keys = NDArray[np.bytes_]


@dataclass(frozen=True)
class Row:
    """One sample: what it says of each modality, and its labels."""

    id: str
    values: Mapping[str, str | None]  # by modality: a text, a path relative to the data root, or None where there is none
    labels: tuple[str, ...]
    line: int  # in its file, from 1


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row: the code of the error that it is, where, and what."""

    code: str
    where: str  # file:line, and the id where it is known
    what: str
    fix: str = ""
    file: str = ""  # that the row names, where it is the file that is wrong

    def __str__(self) -> str:
        return f"{self.where}{':' if self.file else ''} {self.what}"


def digest_of(value: str) -> bytes:
    """What stands for a value in a row, in `Split.keys` and `Split.alike`."""
    return hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class Split:
    """The rows of one split, in the order of its file.

    Args:
        name: train, val or test. file: its file's name, for messages.
        rows: as they are asked for; iterating reads each once.
        labels: of each row, without reading it.
        keys: modality to digests of what rows have of it (S,), a file's content or a text: equal where these are, and zero
            where a row has none.
        alike: the same, but equal where two values say the same: of texts in lower case with single spaces.
        hash: of everything that the split consists of, what was skipped included.
        skipped: bad rows that were left out (`data.on_bad`).
    """

    name: str
    file: str
    rows: Sequence[Row]
    labels: Labels
    keys: Mapping[str, Keys]
    alike: Mapping[str, Keys]
    hash: str
    skipped: tuple[Problem, ...] = ()

    def where(self, row: Row) -> str:
        """File, line and id of a row, for messages."""
        return f"{self.file}:{row.line}, id {row.id}"

    def lacks(self, modality: str) -> NDArray[Any]:
        """Whether each row has nothing of a modality (S,)."""
        return np.asarray(self.keys[modality] == b"")

    def empties(self, modality: str) -> NDArray[Any]:
        """Whether each row has a value of a modality that says nothing, as an empty text (S,)."""
        return np.asarray(self.alike[modality] == digest_of(""))

    def part(self, numbers: Sequence[int]) -> Split:
        """The split with some of its rows only."""
        index = np.asarray(numbers, dtype=np.int64)
        keys, alike = ({name: each[index] for name, each in kind.items()} for kind in (self.keys, self.alike))
        rows = [self.rows[number] for number in numbers]
        return replace(self, rows=rows, labels=self.labels.take(index), keys=keys, alike=alike)


@dataclass(frozen=True)
class DataSet:
    """The splits of a data set and the labels that its training split (or a list of labels) defines."""

    root: Path
    splits: dict[str, Split]
    labels: tuple[str, ...]
    multi_label: bool
    image_roots: tuple[Path, ...] = ()  # that images and other files may be in, the root first
    notices: tuple[str, ...] = ()  # what whoever uses it should know

    @property
    def modalities(self) -> tuple[str, ...]:
        """What rows have, in the order of messages."""
        return tuple(next(iter(self.splits.values())).keys)

    def fingerprint(self) -> dict[str, str]:
        """Of each split: changes with any row, image or skipped row."""
        return {name: split.hash for name, split in self.splits.items()}

    def read(self, split: Split, row: Row, modality: str, config: DataConfig) -> Any:
        """What a row has of a modality, as encoders' preprocessing takes it, or what says nothing.

        Raises:
            DataError: it cannot be read; it names file, line and id.
        """
        kind, value = of(modality), row.values[modality]
        return kind.nothing() if value is None else kind.read(value, self.image_roots, where=split.where(row), config=config)

    def targets(self, split: str) -> Tensor:
        """Class indices (S,), or for multi-label data zeros and ones (S, N) as floats; of large data see `sparse_targets`."""
        return self.sparse_targets(split).dense()

    def sparse_targets(self, split: str) -> Targets:
        """The targets of a split, which give the dense rows of a batch: ``sparse_targets("val")[index_B]``."""
        return Targets(self.splits[split].labels, self.labels, multi_label=self.multi_label)


@dataclass(frozen=True)
class Batch:
    """A batch on its way through a model.

    inputs: side ("main", "comp") to what that side's encoder takes.
    features: side to pooled features (B, C) computed earlier; used instead of encoding.
    targets: (B,) class indices, or (B, N) zeros and ones; None in prediction.
    index: (B,) positions of the samples in their split, always on the CPU.
    missing: side to (B,), True where a sample has nothing for that side's encoder, whose input then says nothing either;
        only of sides where that can be.
    """

    inputs: dict[str, dict[str, Tensor]]
    features: dict[str, Tensor]
    targets: Tensor | None
    index: Tensor
    missing: dict[str, Tensor] = field(default_factory=dict)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def walk(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: walk(inner) for key, inner in value.items()}
            return value if value is None else change(value)

        return Batch(*(walk(getattr(self, one.name)) for one in fields(self)))

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""
        return replace(self._map(lambda tensor: tensor.to(device, non_blocking=True)), index=self.index)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the data loader asks for it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def part(self, number: int, of: int) -> Batch:
        """The `number`-th of `of` nearly equal parts."""
        return self._map(lambda tensor: tensor.tensor_split(of)[number])
