"""The labels of a data set: those of its labels file, or else of its training split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.data.base import Split
from mopefuse.data.findings import Finding
from mopefuse.data.label_cells import is_blank, normalise
from mopefuse.data.tables import read_bytes
from mopefuse.errors import DataError, similar_names

_MAX_LISTED = 20


def known_labels(
    root: Path, splits: Mapping[str, Split], config: DataConfig, label_warnings: Sequence[Finding]
) -> tuple[str, ...]:
    """Find the labels that a model can learn.

    Args:
        label_warnings: findings about the labels of the training split; used to suggest a fix for an unknown label.

    Raises:
        DataError: a split has a label that does not occur in train, there are fewer than two labels, or the labels file
            cannot be read.
    """
    if (listed := labels_file(root, config)) is not None:
        labels = read_labels_file(listed, fold=config.fold_labels)
    else:
        labels = tuple(sorted(splits["train"].labels.counts())) if "train" in splits else ()
    known = set(labels)
    for split in splits.values() if labels else ():
        unknown = Counter({label: count for label, count in split.labels.counts().items() if label not in known})
        if unknown:
            raise _unknown(unknown, split, labels, label_warnings)
    if "train" in splits and len(labels) < 2:
        what = f"{describe_few(labels)}; a classifier needs at least two"
        raise DataError(DataCode.ONE_CLASS, what, where=splits["train"].file, fix="add rows of a second class")
    return labels


def labels_file(root: Path, config: DataConfig) -> Path | None:
    """The file that lists the labels: that of `data.labels`, or else labels.txt in the data folder; None if there is none."""
    if config.labels:
        return Path(config.labels)
    usual = root / "labels.txt"
    return usual if usual.exists() else None


def describe_few(labels: Sequence[str]) -> str:
    """Describe one label, or none, in words."""
    return f"there is only the label {labels[0]!r}" if labels else "there are no labels"


def _unknown(unknown: Counter[str], split: Split, labels: Sequence[str], label_warnings: Sequence[Finding]) -> DataError:
    """The error for labels that do not occur in train, at the first row that has one."""
    listed = []
    for label, count in unknown.most_common(_MAX_LISTED):
        near = similar_names(label, labels, most=1)
        listed.append(f"{label} ({count}{f'; did you mean {near[0]}?' if near else ''})")
    rest = len(unknown) - len(listed)
    what = f"labels that do not occur in train: {', '.join(listed)}{f', and {rest} more' if rest else ''}"
    first = min(row for label, row in split.labels.first_rows().items() if label in unknown)
    fix = "correct them or, if they are right, list all labels in labels.txt or with --labels FILE"
    fix = next((f"{warning.hint}; otherwise {fix}" for warning in label_warnings if warning.kind == "joined-labels"), fix)
    return DataError(DataCode.UNKNOWN_LABEL, what, where=split.where(split.rows[first]), fix=fix)


def read_labels_file(path: Path, *, fold: bool = False) -> tuple[str, ...]:
    """Read a file that lists labels, one per line, in its order.

    Args:
        fold: see `data.fold_labels`.

    Raises:
        DataError: it cannot be read, is not UTF-8, or lists a label twice.
    """
    if not path.exists():
        what = f"file not found: {path}"
        fix = "pass the path of a file with one label per line"
        raise DataError(DataCode.BAD_LABEL_FILE, what, where="--labels", fix=fix)
    try:
        lines = read_bytes(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        fix = "convert it with iconv -t utf-8"
        raise DataError(DataCode.BAD_LABEL_FILE, f"{path.name} is not UTF-8: {error}", where=str(path), fix=fix) from None
    labels = [line.rstrip("\r") for line in lines if not is_blank(line)]
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise DataError(
            DataCode.BAD_LABEL_FILE, f"{path.name} lists {repeated[0]!r} twice", where=str(path), fix="list each label once"
        )
    return tuple(dict.fromkeys(map(normalise, labels))) if fold else tuple(labels)
