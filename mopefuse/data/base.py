"""Rows, splits and batches: what every data reader produces and every fusion method consumes.

Shapes: B batch, N labels, S samples of a split, C width of a pooled feature, L tokens, D width of
a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.data.labels import Labels, Targets
from mopefuse.modalities.base import digest, get_modality
from mopefuse.modalities.file_source import FileSource, Folders

if TYPE_CHECKING:  # rows can be read without torch
    import torch
    from torch import Tensor

    from mopefuse.data.index import FileValues
    from mopefuse.tasks.base import Task

SPLITS = ("train", "val", "test")
Keys = NDArray[np.bytes_]


@dataclass(frozen=True)
class Row:
    """One sample: its value of each modality, and its labels."""

    id: str
    values: Mapping[str, str | None]  # by modality: a text, a path relative to the data root, or None if missing
    labels: tuple[str, ...]
    line: int  # in its file, counted from 1


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row.

    Args:
        code: code of the error. where: file and line, and the id if it is known.
        file: the file that the row names, if the problem is with that file.
    """

    code: str
    where: str
    what: str
    fix: str = ""
    file: str = ""

    def __str__(self) -> str:
        return f"{self.where}{':' if self.file else ''} {self.what}"


@dataclass(frozen=True)
class Split:
    """The rows of one split, in the order of its file.

    Args:
        name: train, val or test. file: name of its file, for messages.
        rows: each is read when it is accessed.
        labels: labels of each row; available without reading it.
        keys: by modality, digests (S,) of the values (a text, or the content of a file); zero where the value is missing.
        loose_keys: by modality, digests (S,) that ignore unimportant differences (in texts: case and spacing).
        hash: digest of everything in the split, including what was skipped.
        skipped: bad rows that were left out (see `data.on_bad`).
        masks: the files that labels name, if these are masks.
    """

    name: str
    file: str
    rows: Sequence[Row]
    labels: Labels
    keys: Mapping[str, Keys]
    loose_keys: Mapping[str, Keys]
    hash: str
    skipped: tuple[Problem, ...] = ()
    masks: FileValues | None = None

    def where(self, row: Row) -> str:
        """Format file, line and id of a row, for messages."""
        return f"{self.file}:{row.line}, id {row.id}"

    def is_missing(self, modality: str) -> NDArray[Any]:
        """Whether the value of a modality is missing, for each row (S,)."""
        return np.asarray(self.keys[modality] == b"")

    def is_empty(self, modality: str) -> NDArray[Any]:
        """Whether the value of a modality is there but empty, such as an empty text, for each row (S,)."""
        return np.asarray(self.loose_keys[modality] == digest(""))

    def select_rows(self, numbers: Sequence[int]) -> Split:
        """Select rows by number.

        Returns:
            The split with these rows only, in the order of `numbers`.
        """
        index = np.asarray(numbers, dtype=np.int64)
        keys, loose_keys = ({name: digests[index] for name, digests in kind.items()} for kind in (self.keys, self.loose_keys))
        rows = [self.rows[number] for number in numbers]
        masks = None if self.masks is None else self.masks.take(index)
        return replace(self, rows=rows, labels=self.labels.take(index), keys=keys, loose_keys=loose_keys, masks=masks)


@dataclass(frozen=True)
class DataSet:
    """The splits of a data set.

    Args:
        root: folder that paths in rows are relative to.
        labels: the labels, defined by the training split or by a list of labels.
        task: what a label is.
        files: where the files are that rows name.
        notices: notices for the user.
    """

    root: Path
    splits: dict[str, Split]
    labels: tuple[str, ...]
    task: Task
    files: FileSource = field(default_factory=lambda: Folders(()))
    notices: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """N, the number of outputs of a model for a sample."""
        return self.task.outputs(self.labels)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of the rows."""
        return tuple(next(iter(self.splits.values())).keys)

    def fingerprint(self) -> dict[str, str]:
        """Digest of each split; it changes with any row, image or skipped row."""
        return {name: split.hash for name, split in self.splits.items()}

    def read(self, split: Split, row: Row, modality: str, config: DataConfig) -> Any:
        """Read the value of a modality for an encoder's preprocessing; a blank value where it is missing.

        Raises:
            DataError: the value cannot be read; the error names file, line and id.
        """
        reader, value = get_modality(modality), row.values[modality]
        if value is None:
            return reader.blank_value()
        return reader.read(value, self.files, where=split.where(row), config=config)

    def targets(self, split: str) -> Tensor:
        """The targets of a split, see `mopefuse.tasks.base.Task.targets`. For large data see `sparse_targets`."""
        return self.sparse_targets(split).dense()

    def sparse_targets(self, split: str) -> Targets:
        """The targets of a split in sparse form; ``sparse_targets("val")[index_B]`` is the dense target of a batch."""
        found = self.splits[split]
        if found.masks is None:
            return Targets(found.labels, self.labels, self.task)
        from mopefuse.data.mask_targets import MaskTargets

        return MaskTargets(found, self.files, self.labels, self.task)


@dataclass(frozen=True)
class Batch:
    """The input of a model.

    Args:
        inputs: by side ("main", "comp"), the input of its encoder.
        features: by side, pooled features (B, C) computed earlier; used instead of encoding.
        targets: class indices (B,), or zeros and ones (B, N); None in prediction.
        index: positions (B,) of the samples in their split, always on the CPU.
        missing: by side, True (B,) where a sample lacks the modality of that side, whose input is then blank; only of sides
            where a sample may lack it.
        prefixes: by side, the tokens (B, L, D) that enter layer `Fusion.prefix_layers` of its encoder, computed earlier; the
            layers before it are not run.
        tokens: by side, normalised output tokens computed earlier, ``values_BLC`` (B, L, C) and ``mask_BL`` (B, L); a side with
            tokens has `features` too.
    """

    inputs: dict[str, dict[str, Tensor]]
    features: dict[str, Tensor]
    targets: Tensor | None
    index: Tensor
    missing: dict[str, Tensor] = field(default_factory=dict)
    prefixes: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor."""

        def walk(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: walk(inner) for key, inner in value.items()}
            return value if value is None else change(value)

        return Batch(**{item.name: walk(getattr(self, item.name)) for item in fields(self)})

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to `device`; `index` stays on the CPU."""
        return replace(self._map(lambda tensor: tensor.to(device, non_blocking=True)), index=self.index)

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory; called by the data loader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def part(self, number: int, count: int) -> Batch:
        """One of `count` nearly equal parts, counted from 0."""
        return self._map(lambda tensor: tensor.tensor_split(count)[number])

    def select(self, index_P: Tensor) -> Batch:
        """The samples (P,) at some places of the batch, of which any can occur several times."""
        return self._map(lambda tensor: tensor[index_P.to(tensor.device)])
