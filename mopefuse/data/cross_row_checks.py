"""Findings about several rows or splits: inconsistent labels, ids and values that two splits share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.core.formatting import several
from mopefuse.data.base import SPLITS, Keys, Split
from mopefuse.data.findings import Finding, finding_at, finding_of
from mopefuse.data.index import Index
from mopefuse.data.known_labels import describe_few, labels_file, read_labels_file
from mopefuse.data.labels import Labels
from mopefuse.data.leaks import find_leaks
from mopefuse.data.split_rows import Parts
from mopefuse.errors import DataError, similar_names
from mopefuse.modalities.base import get_modality

Indexes = Mapping[str, Index]
_MAX_HINTS = 100  # unknown labels of a split for which a similar known label is searched, which is slow


def find_labels(indexes: Indexes, root: Path, config: DataConfig) -> tuple[tuple[str, ...], list[Finding]]:
    """Find the labels that the labels file, or else the training split, defines.

    Labels of rows with a bad file count, as the file can be repaired.

    Returns:
        The labels, none if neither can be read, and the findings about them.
    """
    train = indexes.get("train")
    if (listed := labels_file(root, config)) is not None:
        try:
            known = read_labels_file(listed, fold=config.fold_labels)
        except DataError as error:
            return (), [finding_of(error, "bad-labels-file")]
    else:
        known = tuple(sorted(train.labels.counts())) if train else ()
    if train is None or not len(train.lines_S) or len(known) > 1:
        return known, []
    message = f"{describe_few(known)}; a classifier needs at least two"
    return known, [Finding(kind="one-class", split="train", where=train.file, message=message, code=DataCode.ONE_CLASS.text)]


def mixed_labels(indexes: Indexes) -> Iterator[Finding]:
    """Yield a finding if some labels are strings and some are lists, at the first row of the rarer kind."""
    lists = sum(int(index.list_S.sum()) for index in indexes.values())
    strings = sum(len(index.list_S) for index in indexes.values()) - lists
    if not lists or not strings:
        return
    rarer_is_list = lists <= strings
    index = next(index for index in indexes.values() if (index.list_S == rarer_is_list).any())
    row = int(np.flatnonzero(index.list_S == rarer_is_list)[0])
    message = f"labels are strings in {strings} rows and lists in {lists}"
    yield finding_at(index, row, "mixed-labels", message, code=DataCode.MIXED_LABELS.text, rows=min(lists, strings))


def unknown_labels(indexes: Indexes, known: tuple[str, ...]) -> Iterator[Finding]:
    """Yield each label of a split that does not occur in train, and each known label that a split lacks."""
    for name, index in indexes.items() if known else ():
        counts, first = index.labels.counts(), index.labels.first_rows()
        for number, label in enumerate(sorted(counts.keys() - set(known))):
            near = similar_names(label, known, most=1) if number < _MAX_HINTS else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            message = f"the label {label!r} does not occur in train (in {several(counts[label], 'row')}){hint}"
            yield finding_at(
                index, first[label], "unknown-label", message, code=DataCode.UNKNOWN_LABEL.text, rows=counts[label]
            )
        for label in known if len(index.lines_S) else ():
            if label not in counts:
                message = f"no row of {name} has the label {label!r}"
                yield Finding(kind="absent-label", split=name, where=index.file, message=message)


def shared_ids(indexes: Indexes) -> Iterator[Finding]:
    """Yield ids that occur in two splits. Image folders are left out, as their ids are file names."""
    seen: dict[str, str] = {}
    for index in indexes.values():
        if index.file.endswith("/"):
            continue
        for row, identity in enumerate(index.ids):
            if identity in seen:
                yield finding_at(index, row, "id-in-two-splits", f"the id {identity!r} is also in {seen[identity]}")
            else:
                seen[identity] = index.place(row)


def leak_findings(parts: Parts) -> Iterator[tuple[str, str, Finding]]:
    """Yield (split, modality, finding) for each row of val and test that shares a value with train.

    See `mopefuse.data.leaks`. Rows that are held out of train are checked too.

    Args:
        parts: the rows of each split; those with a bad file are left out.
    """
    splits = {name: _keys_of(index, rows) for name, (index, rows) in parts.items()}
    for name in SPLITS[1:]:
        if name not in splits or "train" not in splits:
            continue
        (index, rows_S), (train_index, train_rows_S) = parts[name], parts["train"]
        held_out = f"held out for {name}, but " if index.split != name else ""
        split, train = splits[name], splits["train"]
        for modality, rows in find_leaks(train, split).items():
            twins = _first_places(train.loose_keys[modality], split.loose_keys[modality][rows])
            for row, twin in zip(rows.tolist(), twins, strict=True):
                other = int(train_rows_S[twin])
                place = f"{train_index.place(other)}, id {train_index.ids[other]}"
                kind, message = get_modality(modality).leak_kind, f"{held_out}its {modality} is also in {place}"
                yield name, modality, finding_at(index, int(rows_S[row]), kind, message, twin=other)


def _keys_of(index: Index, rows: NDArray[np.int64]) -> Split:
    """A split with what `find_leaks` needs."""
    return Split(
        name=index.split,
        file=index.file,
        rows=(),
        labels=Labels.from_rows(()),
        keys={modality: values.keys()[rows] for modality, values in index.values.items()},
        loose_keys={modality: values.loose_keys()[rows] for modality, values in index.values.items()},
        hash="",
    )


def _first_places(keys: Keys, wanted: Keys) -> list[int]:
    """Where each of `wanted` first occurs among `keys`."""
    values, first = np.unique(keys, return_index=True)
    found: list[int] = first[np.searchsorted(values, wanted)].tolist() if len(wanted) else []
    return found
