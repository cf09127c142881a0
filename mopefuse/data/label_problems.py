"""What a data check says about labels, which depends on the task."""

from __future__ import annotations

from pathlib import Path

from mopefuse.config.schema import Data as DataConfig
from mopefuse.data import cross_row_checks
from mopefuse.data.columns import has_labels
from mopefuse.data.cross_row_checks import Indexes
from mopefuse.data.findings import Finding, finding_of
from mopefuse.data.known_labels import labels_file
from mopefuse.data.label_check import locate_suspicious_labels
from mopefuse.data.labels_task import (
    constant_numbers,
    infer_task,
    mixed_currencies,
    odd_numbers,
    require_numbers,
    summarize_numbers,
)
from mopefuse.data.masks import find_mask_problems
from mopefuse.errors import DataError
from mopefuse.tasks.base import Task, get_task


def find_task(indexes: Indexes, root: Path, config: DataConfig) -> Task:
    """Return the task, or any for labels that training refuses because some are lists and some strings."""
    try:
        return infer_task(indexes, config, classes_are_listed=labels_file(root, config) is not None)
    except DataError:  # reported as mixed labels
        return get_task("multi-label")


def find_label_problems(indexes: Indexes, root: Path, config: DataConfig, task: Task) -> tuple[tuple[str, ...], list[Finding]]:
    """Find the labels of a classifier, none for a regression, and what is wrong with labels."""
    if not has_labels(config):
        return (), []
    if task.label_kind == "mask":
        return find_mask_problems(indexes, root, config)
    if task.label_kind == "number":
        found = list(odd_numbers(indexes)) or _uneven(indexes, config)
        if "train" in indexes:
            found += [*constant_numbers(indexes["train"], config), *mixed_currencies(indexes["train"])]
        return (), found
    labels, found = cross_row_checks.find_labels(indexes, root, config)
    if "train" in indexes:
        found += locate_suspicious_labels(indexes["train"], root, config)
    return labels, [*found, *cross_row_checks.mixed_labels(indexes), *cross_row_checks.unknown_labels(indexes, labels)]


def _uneven(indexes: Indexes, config: DataConfig) -> list[Finding]:
    """Rows with more or fewer numbers than the first."""
    try:
        require_numbers({name: (index, index.good()) for name, index in indexes.items()}, config)
    except DataError as error:
        return [finding_of(error, "label-not-a-number")]
    return []


def summarize_splits(indexes: Indexes, config: DataConfig) -> dict[str, dict[str, dict[str, float]]]:
    """Summarize each target of a regression in each split that has some numbers."""
    found = {name: summarize_numbers(index.labels, config) for name, index in indexes.items()}
    return {name: numbers for name, numbers in found.items() if numbers}
