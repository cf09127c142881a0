"""Targets that are read from mask files.

Shapes: B samples of a batch, S of a split, H and W of a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.data.labels import Targets
from mopefuse.modalities.base import Modality, digest, get_modality
from mopefuse.modalities.file_source import FileSource
from mopefuse.modalities.masks import MASKS, Mask, resized
from mopefuse.tasks.base import Task
from mopefuse.tasks.segmentation import Segmentation

if TYPE_CHECKING:  # rows can be read without torch
    from torch import Tensor

    from mopefuse.data.base import Split

_COUNTED = 500
_KEPT = 512 * 2**20  # bytes of resized masks that are kept in memory


def text_among(modalities: Sequence[str]) -> str:
    """The first modality whose values are in the rows, not in files; empty if there is none."""
    return next((name for name in modalities if not get_modality(name).is_file), "")


def ids_by_digest(names: Sequence[str], text: Modality) -> dict[bytes, int]:
    """The position of each name by the digest that a text equal to it has in `Split.loose_keys`."""
    return {digest(text.normalise(name)).rstrip(b"\0"): number for number, name in enumerate(names)}


class MaskTargets(Targets):
    """The targets of a split: classes (B, H, W), read from mask files when they are accessed.

    Args:
        split: its labels are masks. files: where they are. known: the classes. task: of a model, or of the
            data set.
    """

    def __init__(self, split: Split, files: FileSource, known: Sequence[str], task: Task) -> None:
        assert split.masks is not None and isinstance(task, Segmentation)
        self.split, self.masks, self.segmentation, self._files = split, split.masks, task, files
        self._known, self._config = known, DataConfig.model_construct(max_pixels=10**12)  # files have been checked
        self._kept: dict[int, Mask] = {}
        self._bytes = 0
        self._wanted_S: list[int] | None = None
        if task.names:
            name = text_among([*split.loose_keys])
            number_of = ids_by_digest(task.names, get_modality(name))
            self._wanted_S = [number_of.get(key, -1) for key in split.loose_keys[name].tolist()]

    def __len__(self) -> int:
        return len(self.masks.number_S)

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """The targets of some rows."""
        import torch

        masks = [self.classes(row) for row in index_B.tolist()]
        return torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *self.segmentation.size), np.uint8))

    def classes(self, row: int) -> Mask:
        """The target (H, W) of a row."""
        wanted = None if self._wanted_S is None else self._wanted_S[row]
        return self.segmentation.to_classes(self._ids(int(self.masks.number_S[row]), row), wanted)

    def _ids(self, number: int, row: int) -> Mask:
        """The ids of a mask at the size of targets."""
        if number in self._kept:
            return self._kept[number]
        where = self.split.where(self.split.rows[row])
        ids: Mask = MASKS.read(self.masks.names[number], self._files, where=where, config=self._config)
        ids = resized(ids, self.segmentation.size) if self.segmentation.size else ids
        if self._bytes + ids.nbytes <= _KEPT:
            self._kept[number], self._bytes = ids, self._bytes + ids.nbytes
        return ids

    def label_counts(self) -> dict[str, int]:
        """Count the pixels of each class, of at most `_COUNTED` masks that are evenly spaced."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), _COUNTED)).astype(int)).tolist()
        counts = sum(np.bincount(self.classes(row).ravel(), minlength=256) for row in rows)
        return dict(zip(self._known, np.asarray(counts).tolist(), strict=False))

    def numbers(self) -> NDArray[np.int64]:
        """Height and width of each mask (S, 2), in pixels."""
        sides = np.array([(info.height, info.width) for info in self.masks.infos], dtype=np.int64).reshape(-1, 2)
        found: NDArray[np.int64] = sides[self.masks.number_S]
        return found
