"""Find every problem of a data set in one pass; nothing is written or printed.

A table that cannot be read does not hide the problems of the others, and one problem does not hide another.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.core.formatting import several
from mopefuse.data import cross_row_checks
from mopefuse.data.base import SPLITS, Row
from mopefuse.data.columns import modalities_of
from mopefuse.data.findings import (
    KINDS,
    Finding,
    file_findings,
    finding_of,
    kind_of_row,
    lack_columns,
    missing_findings,
    row_findings,
)
from mopefuse.data.guess_columns import suggest_columns
from mopefuse.data.index import Index
from mopefuse.data.index_build import build, read_rows
from mopefuse.data.label_problems import find_label_problems, find_task, summarize_splits
from mopefuse.data.load import notice_splits
from mopefuse.data.masks import count_classes
from mopefuse.data.repeated_rows import find_repeated_rows
from mopefuse.data.split_rows import Parts, divide_rows, missing_split_hint
from mopefuse.data.storage.paths import data_folder, data_path, is_pattern
from mopefuse.data.storage.shards import open_files
from mopefuse.data.storage.table import Table
from mopefuse.data.summary import Advance, Texts, Tokens, count_labels, describe_split, find_extremes, read_texts, rows_of
from mopefuse.data.tables import find_tables
from mopefuse.errors import DataError
from mopefuse.modalities.base import get_modality
from mopefuse.modalities.file_source import FileSource
from mopefuse.tasks.base import Task

Indexes = dict[str, Index]
_NO_ROWS = ("missing-split", "unreadable-table", "empty-split", "many-labels", "list-label")  # explain a split without rows
_RANK = {kind: number for number, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Report:
    """The contents of a data set and what is wrong with it.

    Args:
        files: where the files are that rows name.
        modalities: modalities of the rows.
        indexes: by split.
        findings: errors first, then by kind, split and line.
        splits: counts of each split, see `mopefuse.data.summary.describe_split`.
        trained: rows and labels of each split as training uses them; empty unless rows are held out or drawn.
        balance: rows of each split, by label. numbers: of a regression, a summary of each target of each split.
        task: what a label is.
        leaks: rows that share a value with train, by split and modality.
        seconds: time for reading tables and files, or their index in the cache.
        files_read: number of files that were read. from_cache: whether the indexes of all splits were in the cache.
    """

    config: DataConfig
    files: FileSource
    modalities: tuple[str, ...]
    indexes: Indexes
    findings: list[Finding]
    splits: dict[str, dict[str, Any]]
    trained: dict[str, dict[str, int]]
    balance: dict[str, dict[str, int]]
    numbers: dict[str, dict[str, dict[str, float]]]
    task: str
    texts: Texts
    leaks: dict[str, dict[str, int]]
    seconds: float
    files_read: int
    from_cache: bool

    @property
    def errors(self) -> int:
        """The number of errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        """The number of warnings."""
        return len(self.findings) - self.errors

    @property
    def files_per_second(self) -> float | None:
        """The speed of reading files; None if none was read."""
        return self.files_read / self.seconds if self.files_read else None

    @property
    def extremes(self) -> dict[str, Any]:
        """The most frequent and the rarest label, see `mopefuse.data.summary.find_extremes`."""
        return find_extremes(self.balance)

    def by_kind(self) -> dict[str, list[Finding]]:
        """Group the findings by kind, errors first."""
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault(finding.kind, []).append(finding)
        return groups

    def fix(self, kind: str) -> str:
        """How to fix the findings of a kind: the hint of the findings if they share one, else that of the kind."""
        hints = {finding.fix for finding in self.by_kind()[kind]}
        return hints.pop() if len(hints) == 1 else KINDS[kind].fix

    def row(self, split: str, number: int) -> Row:
        """Read a row again."""
        return rows_of(self.indexes[split], self.config)[number]

    def as_dict(self, limit: int) -> dict[str, Any]:
        """Convert to plain values.

        Args:
            limit: number of findings to list; all are counted.
        """
        return {
            "errors": self.errors,
            "warnings": self.warnings,
            "kinds": {kind: len(found) for kind, found in self.by_kind().items()},
            "problems": [finding.as_dict() for finding in self.findings[:limit]],
            "splits": self.splits,
            "splits_in_training": self.trained,
            "labels": {
                "count": len(self.balance),
                "task": self.task,
                **self.extremes,
                "balance": self.balance,
                **({"numbers": self.numbers} if self.numbers else {}),
            },
            "texts": self.texts.as_dict(),
            "leaks": self.leaks,
            "seconds": self.seconds,
            "images_per_second": self.files_per_second,
            "from_cache": self.from_cache,
        }


def check(
    config: DataConfig,
    *,
    tokens: Tokens | None = None,
    fresh: bool = False,
    advance: Advance = lambda stage, done, total: None,
) -> Report:
    """Check every row, file and text of the data set at `config.path`.

    Args:
        tokens: token counter of the encoder that will read the texts; without it, words are counted.
        fresh: read everything again instead of using the index in the cache.
        advance: called with (split or "texts", number done, total number).

    Raises:
        DataError: there is no such folder or file.
    """
    path = data_path(config.path or "")
    folder = data_folder(path)
    if not path.is_dir() and not path.is_file() and not is_pattern(path):
        find_tables(path, config)  # raises
    if path.is_dir():  # each split has its own table
        config = config.model_copy(update={"split_col": None})
    reading = _Reading(path=path, config=config, fresh=fresh, advance=advance)
    began = time.perf_counter()
    indexes, found = reading.read()
    seconds = time.perf_counter() - began

    texts, text_findings = read_texts(indexes, config, tokens, advance)
    task = find_task(indexes, folder, config)
    labels, label_findings = find_label_problems(indexes, folder, config, task)
    parts, refused = _divide(indexes, path, config, task)
    leaks = list(cross_row_checks.leak_findings(parts))
    columns = suggest_columns(config) if any(map(lack_columns, indexes.values())) else ""
    found += _row_and_file_findings(indexes, reading.files, columns)
    found += [*text_findings, *label_findings]
    found += [*cross_row_checks.shared_ids(indexes), *(finding for _, _, finding in leaks)]
    all_bad = any(_bad_rows(index) and not len(index.good()) for index in indexes.values())
    found += refused if not (all_bad or any(finding.kind in _NO_ROWS for finding in found)) else []
    return Report(
        config=config,
        files=reading.files,
        modalities=reading.modalities,
        indexes=indexes,
        findings=sorted(found, key=_order),
        splits={name: describe_split(index, _bad_rows(index)) for name, index in indexes.items()},
        trained=_count_trained(parts) if _differs_in_training(config) and not refused else {},
        balance=_balance(indexes, labels, task),
        numbers=summarize_splits(indexes, config) if task.label_kind == "number" else {},
        task=task.name,
        texts=texts,
        leaks=_count_leaks(leaks, parts, reading.modalities),
        seconds=seconds,
        files_read=reading.files_read.total(),
        from_cache=bool(indexes) and not any(index.fresh for index in indexes.values()),
    )


def _balance(indexes: Indexes, labels: tuple[str, ...], task: Task) -> dict[str, dict[str, int]]:
    """Count the rows with each label in each split, or with each class in their mask."""
    if task.label_kind == "mask":
        return count_classes(indexes, labels)
    return count_labels(indexes, labels) if task.is_classification else {}


def _row_and_file_findings(indexes: Indexes, files: FileSource, columns: str) -> list[Finding]:
    """Args: columns: what to do about rows that lack a column; empty for the general advice."""
    found: list[Finding] = []
    seen: set[tuple[str, str]] = set()  # in a single table, a row that names no split is found once for each split
    for index in indexes.values():
        of_rows = [finding for finding in row_findings(index) if (finding.where, finding.message) not in seen]
        seen |= {(finding.where, finding.message) for finding in of_rows}
        of_rows = [replace(one, hint=columns) if one.kind == "missing-column" else one for one in of_rows]
        found += [*of_rows, *file_findings(index, files), *missing_findings(index), *find_repeated_rows(index)]
    return found


def _count_leaks(
    leaks: list[tuple[str, str, Finding]], parts: Parts, modalities: tuple[str, ...]
) -> dict[str, dict[str, int]]:
    """Count the leaks of val and test by the plural of the modality, files first."""
    counts = Counter((split, modality) for split, modality, _ in leaks)
    ordered = sorted(modalities, key=lambda modality: not get_modality(modality).is_file)
    return {
        name: {get_modality(modality).plural: counts[name, modality] for modality in ordered}
        for name in sorted(parts, key=SPLITS.index)
        if name != "train" and "train" in parts
    }


def _order(finding: Finding) -> tuple[int, int, int, str]:
    line = finding.where.rpartition(":")[2]
    split = SPLITS.index(finding.split) if finding.split else -1
    return _RANK[finding.kind], split, int(line) if line.isdecimal() else 0, finding.message


def _bad_rows(index: Index) -> int:
    return len(index.row_problems) + len(index.lines_S) - len(index.good())


def read_split(config: DataConfig, split: str) -> tuple[Index, FileSource]:
    """Read the rows of one split, without reading files.

    Returns:
        The index, and where the files are.

    Raises:
        DataError: there is no such folder, file or split, its table cannot be read, or none of its rows is valid.
    """
    path = data_path(config.path or "")
    tables = find_tables(path, config)
    table = tables.get(split) or (tables.get("") if config.split_col or split == "train" else None)
    index = read_rows(table, split, modalities_of(tables.values(), config), config) if table else None
    if index is not None and index.row_problems and not len(index.lines_S):
        first, rows = index.row_problems[0], several(len(index.row_problems), "row")
        what = f"could not read any of the {rows}; first error: {first.what}"
        raise DataError(DataCode.NO_ROW_TO_CHECK, what, where=first.where, fix=first.fix or KINDS[kind_of_row(first.what)].fix)
    if index is None or not len(index.lines_S):
        present = ", ".join(tables) if path.is_dir() else path.name
        fix = f"the data have {present or 'no split'}; run mopefuse data check for details"
        raise DataError(DataCode.NO_ROW_TO_CHECK, f"the {split} split has no rows", where=str(path), fix=fix)
    return index, open_files(path, config, [*tables.values()])


class _Reading:
    """Reads the tables and files of a data set.

    Attributes:
        modalities, files: modalities of the rows, and where their files are, known after `read`.
        files_read: number of files that were read, by split.
    """

    def __init__(self, *, path: Path, config: DataConfig, fresh: bool, advance: Advance) -> None:
        self.path, self.config, self.fresh = path, config, fresh
        self.files = open_files(path, config, ())
        self.modalities: tuple[str, ...] = ()
        self.files_read = Counter[str]()
        self._advance = advance

    def read(self) -> tuple[Indexes, list[Finding]]:
        """Read the index of each split that can be read, and the findings about splits that are missing or unreadable."""
        tables, found = self._find_tables()
        notice_splits(tables, self.config)
        self.modalities = modalities_of(tables.values(), self.config, lenient=True)
        self.files = open_files(self.path, self.config, [*tables.values()])
        indexes, unreadable = self._build_indexes(tables)
        found += unreadable
        if found and not self.path.is_dir():
            return {}, found[:1]
        return indexes, found + self._absent_splits(indexes, {finding.split for finding in found})

    def _find_tables(self) -> tuple[dict[str, Table], list[Finding]]:
        """Find the table of each split, or the one of all splits, and the findings about tables that cannot be read."""
        tables: dict[str, Table] = {}
        found: list[Finding] = []
        for name in SPLITS if self.path.is_dir() else SPLITS[:1]:
            try:
                tables |= find_tables(self.path, self.config, splits=(name,))
            except DataError as error:
                found.append(finding_of(error, "unreadable-table", name))
        return tables, found

    def _build_indexes(self, tables: Mapping[str, Table]) -> tuple[Indexes, list[Finding]]:
        indexes: Indexes = {}
        found: list[Finding] = []
        for name in SPLITS if self.path.is_dir() or self.config.split_col else SPLITS[:1]:
            table = tables.get(name) or tables.get("")
            if table is None:
                continue
            advance = partial(self._count, name)
            try:
                index = build(table, name, self.files, self.modalities, self.config, fresh=self.fresh, advance=advance)
            except DataError as error:
                found.append(finding_of(error, "unreadable-table", name))
                continue
            if len(index.lines_S) or index.row_problems or self.path.is_dir() or not self.config.split_col:
                indexes[name] = index
        return indexes, found

    def _count(self, split: str, done: int, total: int) -> None:
        self.files_read[split] = done
        self._advance(split, done, total)

    def _absent_splits(self, indexes: Indexes, explained: set[str]) -> list[Finding]:
        """Splits that have no rows or are missing, without those that are `explained` by other findings."""
        found: list[Finding] = []
        for name, fraction in (("train", None), ("val", self.config.val_fraction), ("test", self.config.test_fraction)):
            if name in indexes and not len(indexes[name].lines_S) and not indexes[name].row_problems:
                where, message = indexes[name].file, f"the {name} split has no rows"
                found.append(
                    Finding(kind="empty-split", split=name, where=where, message=message, code=DataCode.EMPTY_SPLIT.text)
                )
            elif name not in indexes and name not in explained and not fraction:
                found.append(self._missing_split(name))
        return found

    def _missing_split(self, name: str) -> Finding:
        where, hint = str(self.path), missing_split_hint(name, self.path, self.config)
        if name == "test":
            return Finding(kind="missing-test", split=name, where=where, message="the test split is missing", hint=hint)
        message = f"the {name} split is missing"
        return Finding(kind="missing-split", split=name, where=where, message=message, hint=hint, code=DataCode.NO_SPLIT.text)


def _divide(indexes: Indexes, path: Path, config: DataConfig, task: Task) -> tuple[Parts, list[Finding]]:
    """Divide rows among splits as training does.

    Returns:
        The rows of each split, and the finding that training could not use the data.
    """
    whole: Parts = {name: (index, index.good()) for name, index in indexes.items()}
    if not _differs_in_training(config):
        return whole, []
    try:
        return divide_rows(indexes, path, config, task=task), []
    except DataError as error:
        return whole, [finding_of(error, "empty-split")]


def _differs_in_training(config: DataConfig) -> bool:
    """Whether rows are held out or drawn."""
    return bool(config.val_fraction or config.test_fraction or config.shots or config.fraction)


def _count_trained(parts: Parts) -> dict[str, dict[str, int]]:
    """Count rows and labels of each split as training uses them."""
    return {
        name: {"rows": len(rows), "labels": len(index.labels.take(rows).counts())}
        for name, (index, rows) in sorted(parts.items(), key=lambda part: SPLITS.index(part[0]))
    }
