"""Masks of a data set: their classes, and the targets that are read from their files.

Shapes: B samples of a batch, S of a split, H and W of a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.data.base import Split, digest
from mopefuse.data.findings import Finding, finding_at, finding_of
from mopefuse.data.index import Index
from mopefuse.data.known_labels import labels_file, read_labels_file
from mopefuse.data.labels import Targets
from mopefuse.errors import DataError
from mopefuse.modalities.base import get_modality
from mopefuse.modalities.masks import MASKS, Mask, ids_in, resized
from mopefuse.tasks.base import Task
from mopefuse.tasks.segmentation import IGNORED, OBJECT, Segmentation

if TYPE_CHECKING:  # rows can be read without torch
    from torch import Tensor

Parts = Mapping[str, tuple[Index, NDArray[np.int64]]]
_COUNTED = 500
_KEPT = 512 * 2**20  # bytes of resized masks that are kept in memory
_TEXT = "text"


def find_classes(parts: Parts, root: Path, config: DataConfig) -> tuple[Segmentation, tuple[str, ...]]:
    """Find what masks mean, and the names of their classes.

    Masks mark an object if the training split has no ids but 0 and 1, or 0 and 255; or if a file lists the names of ids, and
    each training text is one of them: then the object of a sample is the class that its text names. Otherwise an id is a class.

    Raises:
        DataError: ids without a name in the file of names, ids that train does not have, or a text that names no class.
    """
    ids = {name: _ids_of(index, rows) for name, (index, rows) in parts.items()}
    known = ids["train"] if "train" in ids else set().union(*ids.values())
    listed = labels_file(root, config)
    names = read_labels_file(listed, fold=config.fold_labels) if listed is not None else ()
    if not names and known == {0, IGNORED} and config.ignore_index == IGNORED:
        return Segmentation(foreground=IGNORED), OBJECT
    ignored = {config.ignore_index, IGNORED}
    known -= ignored
    if not names and known <= {0, 1}:
        return Segmentation(ignored=config.ignore_index, foreground=1), OBJECT
    if names and max(known, default=0) >= len(names):
        what = f"masks have the id {max(known)}, and {listed} lists {len(names)} classes, 0 to {len(names) - 1}"
        fix = f"add its name, or use data.ignore_index={max(known)} if such pixels do not count"
        raise DataError(DataCode.CLASS_NOT_LISTED, what, where=str(root), fix=fix)
    names = names or tuple(map(str, range(max(known, default=0) + 1)))
    for split, found in ids.items():
        if unknown := sorted(one for one in found - ignored if one >= len(names)):
            what, fix = f"masks of {split} have the id {unknown[0]}, which those of train do not have", "correct the masks"
            raise DataError(DataCode.CLASS_NOT_LISTED, what, where=split, fix=fix)
    if listed is not None and _texts_name_classes(parts, names):
        return Segmentation(ignored=config.ignore_index, names=names), OBJECT
    return Segmentation(ignored=config.ignore_index), names


def _ids_of(index: Index, rows: NDArray[np.int64]) -> set[int]:
    assert index.masks is not None
    numbers = np.unique(index.masks.number_S[rows]).tolist()
    return {one for number in numbers for one in ids_in(index.masks.infos[number])}


def _texts_name_classes(parts: Parts, names: Sequence[str]) -> bool:
    """Whether the text of each row is a name of a class.

    Raises:
        DataError: the texts of train are, and one of another split is not.
    """
    known = _digests(names)
    for split in sorted(parts, key=lambda split: split != "train"):
        index, rows = parts[split]
        if _TEXT not in index.values:
            return False
        unknown = [row for row in rows.tolist() if index.values[_TEXT].loose_keys()[row] not in known]
        if unknown and (split == "train" or "train" not in parts):
            return False
        if unknown:
            what = f"the text of {len(unknown)} rows is not the name of a class, as those of train are"
            raise DataError(DataCode.TEXT_NOT_A_CLASS, what, where=index.place(unknown[0]), fix="write the name of a class")
    return True


def _digests(names: Sequence[str]) -> dict[bytes, int]:
    """The position of each name by the digest that a text equal to it has in `Split.loose_keys`."""
    text = get_modality(_TEXT)
    return {digest(text.normalise(name)).rstrip(b"\0"): number for number, name in enumerate(names)}


class MaskTargets(Targets):
    """The targets of a split: classes (B, H, W), read from mask files when they are accessed.

    Args:
        split: its labels are masks. roots: folders that may contain them. known: the classes. task: of a model, or of the
            data set.
    """

    def __init__(self, split: Split, roots: Sequence[Path], known: Sequence[str], task: Task) -> None:
        assert split.masks is not None and isinstance(task, Segmentation)
        self.split, self.files, self.roots, self.segmentation = split, split.masks, roots, task
        self._known, self._config = known, DataConfig.model_construct(max_pixels=10**12)  # files have been checked
        self._kept: dict[int, Mask] = {}
        self._bytes = 0
        self._wanted_S: list[int] | None = None
        if task.names:
            number_of = _digests(task.names)
            self._wanted_S = [number_of.get(key, -1) for key in split.loose_keys[_TEXT].tolist()]

    def __len__(self) -> int:
        return len(self.files.number_S)

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """The targets of some rows."""
        import torch

        masks = [self.classes(row) for row in index_B.tolist()]
        return torch.from_numpy(np.stack(masks) if masks else np.zeros((0, *self.segmentation.size), np.uint8))

    def classes(self, row: int) -> Mask:
        """The target (H, W) of a row."""
        wanted = None if self._wanted_S is None else self._wanted_S[row]
        return self.segmentation.to_classes(self._ids(int(self.files.number_S[row]), row), wanted)

    def _ids(self, number: int, row: int) -> Mask:
        """The ids of a mask at the size of targets."""
        if number in self._kept:
            return self._kept[number]
        where = self.split.where(self.split.rows[row])
        ids: Mask = MASKS.read(self.files.names[number], self.roots, where=where, config=self._config)
        ids = resized(ids, self.segmentation.size) if self.segmentation.size else ids
        if self._bytes + ids.nbytes <= _KEPT:
            self._kept[number], self._bytes = ids, self._bytes + ids.nbytes
        return ids

    def dense(self) -> Tensor:
        """The targets of all rows."""
        import torch

        return self[torch.arange(len(self))]

    def label_counts(self) -> dict[str, int]:
        """Count the pixels of each class, of at most `_COUNTED` masks that are evenly spaced."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), _COUNTED)).astype(int)).tolist()
        counts = sum(np.bincount(self.classes(row).ravel(), minlength=256) for row in rows)
        return dict(zip(self._known, np.asarray(counts).tolist(), strict=False))

    def numbers(self) -> NDArray[np.int64]:
        """Height and width of each mask (S, 2), in pixels."""
        sides = np.array([(info.height, info.width) for info in self.files.infos], dtype=np.int64).reshape(-1, 2)
        found: NDArray[np.int64] = sides[self.files.number_S]
        return found


def find_mask_problems(
    indexes: Mapping[str, Index], root: Path, config: DataConfig
) -> tuple[tuple[str, ...], list[Finding]]:
    """Find the classes of masks, and the problems of masks that can be read, for a data check."""
    found = [finding for index in indexes.values() for finding in _odd_shapes(index)]
    parts = {name: (index, index.good()) for name, index in indexes.items()}
    try:
        task, labels = find_classes(parts, root, config)
        return task.names or labels, found
    except DataError as error:
        return (), [*found, finding_of(error, "unlisted-class")]


def count_classes(indexes: Mapping[str, Index], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count the rows of each split whose mask has a class; of masks that mark an object, its id is the highest."""
    found: dict[str, dict[str, int]] = {label: dict.fromkeys(indexes, 0) for label in labels}
    for split, index in indexes.items():
        masks = index.masks
        rows_of = np.bincount(masks.number_S, minlength=len(masks.infos)).tolist() if masks is not None else []
        for info, rows in zip(masks.infos if masks is not None else (), rows_of, strict=True):
            for one in ids_in(info):
                label = labels[1] if one == IGNORED and tuple(labels) == OBJECT else labels[one] if one < len(labels) else None
                if label is not None:
                    found[label][split] += rows
    return found


def _odd_shapes(index: Index) -> Iterator[Finding]:
    """Yield a finding for each mask whose ratio of sides is not that of its image."""
    image, masks = index.files.get("image"), index.masks
    if image is None or masks is None:
        return
    for row in index.good().tolist():
        picture, mask = image.infos[image.number_S[row]], masks.infos[masks.number_S[row]]
        if abs(picture.width * mask.height - picture.height * mask.width) > max(picture.width, picture.height):
            name = masks.names[masks.number_S[row]]
            sides = f"{mask.width} x {mask.height} pixels, and the image {picture.width} x {picture.height}"
            yield finding_at(index, row, "mask-of-other-shape", f"{name} has {sides}", image=name)
