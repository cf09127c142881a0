"""What is wrong between rows and splits: labels that do not agree, ids and contents that two splits have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.formatting import several
from mopefuse.data.base import SPLITS, Keys, Split
from mopefuse.data.findings import Finding, at
from mopefuse.data.index import Index
from mopefuse.data.labels import Labels
from mopefuse.data.leaks import leak
from mopefuse.data.load import listed_labels
from mopefuse.errors import DataError, nearest
from mopefuse.modalities.base import of

Indexes = Mapping[str, Index]
_MOST_HINTS = 100  # unknown labels of a split whose nearest known one is looked for, which takes long among many


def labels(indexes: Indexes, root: Path, config: DataConfig) -> tuple[tuple[str, ...], list[Finding]]:
    """The labels that a list or else the training split defines, and what is wrong with them.

    Those of rows whose file is bad count: once it is mended, they are there. None where neither can be read.
    """
    listed = Path(config.labels) if config.labels else root / "labels.txt"
    train = indexes.get("train")
    if config.labels or listed.exists():
        try:
            known = listed_labels(listed, fold=config.fold_labels)
        except DataError as error:
            return (), [Finding("bad-labels-file", "", error.where, error.what, error.fix, error.code)]
    else:
        known = tuple(sorted(train.labels.counts())) if train else ()
    if train is None or not len(train.lines_S) or len(known) > 1:
        return known, []
    said = f"only the label {known[0]!r}" if known else "no label at all"
    return known, [Finding("one-class", "train", train.file, f"{said}: there is nothing to learn", code="MF-DATA-07")]


def mixed_labels(indexes: Indexes) -> Iterator[Finding]:
    """Labels as strings beside labels as lists, at the first row of the kind that is rarer."""
    lists = sum(int(index.list_S.sum()) for index in indexes.values())
    strings = sum(len(index.list_S) for index in indexes.values()) - lists
    if not lists or not strings:
        return
    rarer = lists <= strings
    index = next(index for index in indexes.values() if (index.list_S == rarer).any())
    row = int(np.flatnonzero(index.list_S == rarer)[0])
    message = f"labels are strings in {strings} rows and lists in {lists}"
    yield at(index, row, "mixed-labels", message, code="MF-DATA-05", rows=min(lists, strings))


def unknown_labels(indexes: Indexes, known: tuple[str, ...]) -> Iterator[Finding]:
    """Each label of a split that is not known, and each known one that the split lacks."""
    for name, index in indexes.items() if known else ():
        counts, first = index.labels.counts(), index.labels.first_rows()
        for number, label in enumerate(sorted(counts.keys() - set(known))):
            near = nearest(label, known, most=1) if number < _MOST_HINTS else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            message = f"the label {label!r} is not known to training (in {several(counts[label], 'row')}){hint}"
            yield at(index, first[label], "unknown-label", message, code="MF-DATA-06", rows=counts[label])
        for label in known if len(index.lines_S) else ():
            if label not in counts:
                yield Finding("absent-label", name, index.file, f"no row of {name} has the label {label!r}")


def ids(indexes: Indexes) -> Iterator[Finding]:
    """Ids that two splits have; not of image folders, where they are names of files."""
    seen: dict[str, str] = {}
    for index in indexes.values():
        if index.file.endswith("/"):
            continue
        for row, identity in enumerate(index.ids):
            if identity in seen:
                yield at(index, row, "id-in-two-splits", f"the id {identity!r} is also in {seen[identity]}")
            else:
                seen[identity] = f"{index.file}:{index.lines_S[row]}"


def leaks(indexes: Indexes) -> Iterator[tuple[str, Finding]]:
    """(modality, finding) of rows of val and test that share a value with train, see `mopefuse.data.leaks`. Rows with a bad
    file do not count."""
    good = {name: index.good() for name, index in indexes.items()}
    splits = {name: _keys_of(index, good[name]) for name, index in indexes.items()}
    for name in SPLITS[1:]:
        if name not in splits or "train" not in splits:
            continue
        mine, train = splits[name], splits["train"]
        for modality, rows in leak(train, mine).items():
            for row, twin in zip(rows.tolist(), _first(train.alike[modality], mine.alike[modality][rows]), strict=True):
                other = int(good["train"][twin])
                place = f"{indexes['train'].file}:{indexes['train'].lines_S[other]}, id {indexes['train'].ids[other]}"
                kind, message = of(modality).leaked, f"its {modality} is also in {place}"
                yield modality, at(indexes[name], int(good[name][row]), kind, message, twin=other)


def _keys_of(index: Index, rows: NDArray[np.int64]) -> Split:
    """What `leak` looks at."""
    keys = {modality: each.keys()[rows] for modality, each in index.values.items()}
    alike = {modality: each.alike()[rows] for modality, each in index.values.items()}
    return Split(index.split, index.file, (), Labels.of(()), keys, alike, "")


def _first(keys: Keys, wanted: Keys) -> list[int]:
    """Where each of `wanted` is first among `keys`."""
    values, first = np.unique(keys, return_index=True)
    found: list[int] = first[np.searchsorted(values, wanted)].tolist() if len(wanted) else []
    return found
