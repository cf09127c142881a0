"""Everything that is wrong with a data set, found in one pass; nothing is written and nothing is printed.

A table that cannot be read hides nothing of the others, and one problem hides no other.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.formatting import several
from mopefuse.data import across
from mopefuse.data.base import SPLITS, Row
from mopefuse.data.columns import modalities_of
from mopefuse.data.contents import Advance, Texts, Tokens, balance, describe_split, extremes, read_texts, rows_of
from mopefuse.data.findings import KINDS, Finding, kind_of_row, of_files, of_missing, of_rows
from mopefuse.data.index import Index, build, read_rows
from mopefuse.data.label_check import check_labels
from mopefuse.data.load import notice_splits, parts_of, roots_of, to_have
from mopefuse.data.tables import Table, find_tables
from mopefuse.errors import DataError
from mopefuse.modalities.base import of

Indexes = dict[str, Index]
_NO_SPLIT = ("missing-split", "unreadable-table", "empty-split", "many-labels", "list-label")  # say why a split has no rows
_RANK = {kind: number for number, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class Report:
    """What a data set is and what is wrong with it.

    Args:
        roots: folders that its files may be in, its own first.
        modalities: that its rows have.
        findings: errors first, by kind, split and line.
        splits: counts of each. balance: label to split to rows.
        trained: rows and labels of each split as training would have them, where some are held out or drawn.
        seconds: that the pass over tables and files took, or reading their index from the cache.
        looked: files that were read in it. from_cache: all that is known of the tables and files was there.
    """

    config: DataConfig
    roots: tuple[Path, ...]
    modalities: tuple[str, ...]
    indexes: Indexes
    findings: list[Finding]
    splits: dict[str, dict[str, Any]]
    trained: dict[str, dict[str, int]]
    balance: dict[str, dict[str, int]]
    multi_label: bool
    texts: Texts
    leaks: dict[str, dict[str, int]]
    seconds: float
    looked: int
    from_cache: bool

    @property
    def errors(self) -> int:
        """How many."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        """How many."""
        return len(self.findings) - self.errors

    @property
    def files_per_second(self) -> float | None:
        """Of the files that were read; None where none was."""
        return self.looked / self.seconds if self.looked else None

    @property
    def extremes(self) -> dict[str, Any]:
        """The most frequent and the rarest label, see `mopefuse.data.contents.extremes`."""
        return extremes(self.balance)

    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind that there is, errors first."""
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault(finding.kind, []).append(finding)
        return groups

    def todo(self, kind: str) -> str:
        """What to do about findings of a kind: in their own words where all have the same."""
        own = {finding.todo for finding in self.by_kind()[kind]}
        return own.pop() if len(own) == 1 else KINDS[kind].todo

    def row(self, split: str, number: int) -> Row:
        """A row, read again."""
        return rows_of(self.indexes[split], self.config)[number]

    def as_dict(self, most: int) -> dict[str, Any]:
        """Plain values.

        Args:
            most: findings to list; all are counted.
        """
        return {
            "errors": self.errors,
            "warnings": self.warnings,
            "kinds": {kind: len(found) for kind, found in self.by_kind().items()},
            "problems": [finding.as_dict() for finding in self.findings[:most]],
            "splits": self.splits,
            "splits_in_training": self.trained,
            "labels": {
                "count": len(self.balance),
                "multi_label": self.multi_label,
                **self.extremes,
                "balance": self.balance,
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
    """Look at every row, file and text of the data set at `config.path`.

    Args:
        tokens: how the encoder that is to read the texts counts them; without, words are counted.
        fresh: do not trust the index in the cache.
        advance: told of (split or "texts", how many are done, how many there are).

    Raises:
        DataError: there is no such folder or file.
    """
    path = Path(config.path or "")
    if not path.is_dir() and not path.is_file():
        find_tables(path, config)  # says so
    if path.is_dir():  # each split has a table of its own
        config = config.model_copy(update={"split_col": None})
    roots = roots_of(path, config)
    looked = Counter[str]()

    def count(split: str, done: int, total: int) -> None:
        looked[split] = done
        advance(split, done, total)

    began = time.perf_counter()
    tables, unreadable = _find(path, config)
    notice_splits(tables, config)
    modalities = modalities_of(tables.values(), config, lenient=True)
    indexes, found = _read(path, tables, unreadable, roots, modalities, config, fresh, count)
    seconds = time.perf_counter() - began
    seen: set[tuple[str, str]] = set()
    for index in indexes.values():
        ours = [finding for finding in of_rows(index) if (finding.where, finding.message) not in seen]
        seen |= {(finding.where, finding.message) for finding in ours}  # of one table, each split sees what names none
        found += [*ours, *of_files(index, roots), *of_missing(index)]
    texts, odd = read_texts(indexes, config, tokens, advance)
    labels, wrong = across.labels(indexes, roots[0], config)
    leaked = list(across.leaks(indexes))
    doubted = check_labels(indexes["train"], roots[0], config) if "train" in indexes else []
    found += [*odd, *wrong, *doubted, *across.mixed_labels(indexes), *across.unknown_labels(indexes, labels)]
    found += [*across.ids(indexes), *(finding for _, finding in leaked)]
    trained, refused = _in_training(indexes, path, config)
    found += refused if not any(finding.kind in _NO_SPLIT for finding in found) else []
    counts = Counter((finding.split, modality) for modality, finding in leaked)
    return Report(
        config,
        roots,
        modalities,
        indexes,
        sorted(found, key=_order),
        {name: describe_split(index, _bad_rows(index)) for name, index in indexes.items()},
        trained,
        balance(indexes, labels),
        any(bool(index.list_S.any()) for index in indexes.values()),
        texts,
        {
            name: {of(modality).plural: counts[name, modality] for modality in sorted(modalities, key=_files_first)}
            for name in indexes
            if name != "train" and "train" in indexes
        },
        seconds,
        looked.total(),
        bool(indexes) and not any(index.fresh for index in indexes.values()),
    )


def _files_first(modality: str) -> bool:
    return not of(modality).is_file


def _order(finding: Finding) -> tuple[int, int, int, str]:
    line = finding.where.rpartition(":")[2]
    split = SPLITS.index(finding.split) if finding.split else -1
    return _RANK[finding.kind], split, int(line) if line.isdecimal() else 0, finding.message


def read_split(config: DataConfig, split: str) -> tuple[Index, tuple[Path, ...]]:
    """The rows of one split and the folders that their files may be in; files are not looked at.

    Raises:
        DataError: there is no such folder, file or split, or its table cannot be read.
    """
    path = Path(config.path or "")
    tables = find_tables(path, config)
    table = tables.get(split) or (tables.get("") if config.split_col or split == "train" else None)
    index = read_rows(table, split, modalities_of(tables.values(), config), config) if table else None
    if index is not None and index.row_problems and not len(index.lines_S):
        first, rows = index.row_problems[0], several(len(index.row_problems), "row")
        what = f"none of {rows} can be read, the first as: {first.what}"
        raise DataError(82, what, where=first.where, fix=first.fix or KINDS[kind_of_row(first.what)].todo)
    if index is None or not len(index.lines_S):
        there = ", ".join(tables) if path.is_dir() else path.name
        fix = f"there is {there or 'none'}; mopefuse data check says more"
        raise DataError(82, f"there are no rows of a {split} split", where=str(path), fix=fix)
    return index, roots_of(path, config)


def _find(path: Path, config: DataConfig) -> tuple[dict[str, Table], list[Finding]]:
    """The table of each split that is there, or of all splits; and what is wrong with others."""
    tables: dict[str, Table] = {}
    found: list[Finding] = []
    for name in SPLITS if path.is_dir() else SPLITS[:1]:
        try:
            tables |= find_tables(path, config, splits=(name,))
        except DataError as error:
            found.append(_unreadable(name, error))
    return tables, found


def _unreadable(split: str, error: DataError) -> Finding:
    return Finding("unreadable-table", split, error.where, error.what, error.fix, error.code)


def _read(
    path: Path,
    tables: Mapping[str, Table],
    unreadable: list[Finding],
    roots: tuple[Path, ...],
    modalities: tuple[str, ...],
    config: DataConfig,
    fresh: bool,
    advance: Advance,
) -> tuple[Indexes, list[Finding]]:
    """The index of each split that can be read, and what is wrong with the others."""
    indexes: Indexes = {}
    found = list(unreadable)
    for name in SPLITS if path.is_dir() or config.split_col else SPLITS[:1]:
        table = tables.get(name) or tables.get("")
        if table is None:
            continue
        try:
            index = build(table, name, roots, modalities, config, fresh=fresh, advance=partial(advance, name))
            if len(index.lines_S) or index.row_problems or path.is_dir():
                indexes[name] = index
        except DataError as error:
            found.append(_unreadable(name, error))
    if found and not path.is_dir():
        return {}, found[:1]
    silent = {finding.split for finding in found}
    for name, fraction in (("train", None), ("val", config.val_fraction), ("test", config.test_fraction)):
        if name in indexes and not len(indexes[name].lines_S) and not indexes[name].row_problems:
            where = indexes[name].file
            found.append(Finding("empty-split", name, where, f"the {name} split has no rows", code="MF-DATA-04"))
        elif name not in indexes and name not in silent and not fraction:
            found.append(_missing(name, path, config))
    return indexes, found


def _in_training(indexes: Indexes, path: Path, config: DataConfig) -> tuple[dict[str, dict[str, int]], list[Finding]]:
    """What training has of each split where rows are held out or drawn, and why it has nothing of some."""
    if not (config.val_fraction or config.test_fraction or config.shots or config.fraction):
        return {}, []
    try:
        parts = parts_of(indexes, path, config)
    except DataError as error:
        return {}, [Finding("empty-split", "", error.where, error.what, error.fix, error.code)]
    return {
        name: {"rows": len(rows), "labels": len(index.labels.take(rows).counts())}
        for name, (index, rows) in sorted(parts.items(), key=lambda part: SPLITS.index(part[0]))
    }, []


def _missing(name: str, path: Path, config: DataConfig) -> Finding:
    hint = to_have(name, path, config)
    if name == "test":
        return Finding("missing-test", name, str(path), "there is no test split", hint)
    return Finding("missing-split", name, str(path), f"the {name} split is missing", hint, "MF-DATA-02")


def _bad_rows(index: Index) -> int:
    return len(index.row_problems) + len(index.lines_S) - len(index.good())
