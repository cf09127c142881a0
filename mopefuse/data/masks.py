"""Masks of a data set: their classes, and the targets that are read from their files.

Shapes: B samples of a batch, S of a split, H and W of a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.core.formatting import several
from mopefuse.data.findings import Finding, finding_at, finding_of
from mopefuse.data.index import Index
from mopefuse.data.known_labels import labels_file, read_labels_file
from mopefuse.data.mask_ids import find_gaps, require_intended_ids, require_object
from mopefuse.data.mask_targets import ids_by_digest, text_among
from mopefuse.errors import DataError
from mopefuse.metrics.names import IGNORED
from mopefuse.modalities.base import get_modality, picture_among
from mopefuse.modalities.masks import ids_in
from mopefuse.tasks.segmentation import OBJECT, Segmentation

Parts = Mapping[str, tuple[Index, NDArray[np.int64]]]
_KINDS = {DataCode.UNINTENDED_IDS.text: "unintended-ids", DataCode.ONE_CLASS.text: "one-class"}


def find_classes(parts: Parts, root: Path, config: DataConfig) -> tuple[Segmentation, tuple[str, ...]]:
    """Find what masks mean, and the names of their classes.

    Masks mark an object if the training split has no ids but 0 and 1, or 0 and 255; or if a file lists the names of ids, and
    each training text is one of them: then the object of a sample is the class that its text names. Otherwise an id is a class.

    Raises:
        DataError: ids without a name in the file of names, ids that train does not have, ids that are probably a mistake (see
            `mopefuse.data.mask_ids`), or a text that names no class.
    """
    ids = {name: _ids_of(index, rows) for name, (index, rows) in parts.items()}
    known = ids["train"] if "train" in ids else set().union(*ids.values())
    listed = labels_file(root, config)
    names = read_labels_file(listed, fold=config.fold_labels) if listed is not None else ()
    train = parts.get("train")
    if train and not names:
        require_intended_ids(*train, config.ignore_index)
    if not names and known == {0, IGNORED} and config.ignore_index == IGNORED:
        return Segmentation(foreground=IGNORED), OBJECT
    ignored = {config.ignore_index, IGNORED}
    known -= ignored
    if train:
        require_object(*train, known, config.ignore_index)
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
    text = text_among([*next(iter(parts.values()))[0].values])
    if not text:
        return False
    known = ids_by_digest(names, get_modality(text))
    for split in sorted(parts, key=lambda split: split != "train"):
        index, rows = parts[split]
        loose_keys = index.values[text].loose_keys()
        unknown = [row for row in rows.tolist() if loose_keys[row] not in known]
        if unknown and (split == "train" or "train" not in parts):
            return False
        if unknown:
            what = f"the text of {len(unknown)} rows is not the name of a class, as those of train are"
            raise DataError(DataCode.TEXT_NOT_A_CLASS, what, where=index.place(unknown[0]), fix="write the name of a class")
    return True


def find_mask_problems(indexes: Mapping[str, Index], root: Path, config: DataConfig) -> tuple[tuple[str, ...], list[Finding]]:
    """Find the classes of masks, and the problems of masks that can be read, for a data check."""
    found = [finding for index in indexes.values() for finding in _odd_shapes(index)]
    parts = {name: (index, index.good()) for name, index in indexes.items()}
    try:
        task, labels = find_classes(parts, root, config)
        return task.names or labels, [*found, *_gaps(parts, task, labels, root, config)]
    except DataError as error:
        return (), [*found, finding_of(error, _KINDS.get(error.code, "unlisted-class"))]


def _gaps(parts: Parts, task: Segmentation, labels: Sequence[str], root: Path, config: DataConfig) -> Iterator[Finding]:
    if "train" in parts and not task.marks_object and labels_file(root, config) is None:
        yield from find_gaps(*parts["train"], labels, config.ignore_index)


def mask_notices(parts: Parts, task: Segmentation, labels: Sequence[str], root: Path, config: DataConfig) -> tuple[str, ...]:
    """What a user should know about masks that training accepts."""
    gaps = [f"{finding.message}; {finding.hint} ({finding.where})" for finding in _gaps(parts, task, labels, root, config)]
    indexes = {id(index): index for index, _ in parts.values()}  # held-out rows are in the index of train
    shapes = [finding for index in indexes.values() for finding in _odd_shapes(index)]
    text = several(
        len(shapes), "mask has another shape than its image and is", "masks have another shape than their image and are"
    )
    return (*gaps, *([f"{text} stretched to fit; the first, {shapes[0].where}: {shapes[0].message}"] if shapes else []))


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
    picture, masks = picture_among([*index.values]), index.masks
    if not picture or masks is None:
        return
    images = index.files[picture]
    for row in index.good().tolist():
        image, mask = images.infos[images.number_S[row]], masks.infos[masks.number_S[row]]
        if abs(image.width * mask.height - image.height * mask.width) > max(image.width, image.height):
            name = masks.names[masks.number_S[row]]
            sides = f"{mask.width} x {mask.height} pixels, and the image {image.width} x {image.height}"
            yield finding_at(index, row, "mask-of-other-shape", f"{name} has {sides}", image=name)
