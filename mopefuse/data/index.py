"""The validated index of a split: where its rows are, what they hold, and what is wrong with which.

It is built once, in one pass over the table and one over the files, and kept in the cache under a digest of all that
it depends on. When it is read again, the files' sizes and times are compared with those that were seen, and only what
changed is looked at.

Shapes: S rows that are rows, I files of a modality, 16 bytes of a digest.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.artifact import read_json
from mopefuse.data.base import SPLITS, Problem, digest_of
from mopefuse.data.columns import Layout
from mopefuse.data.labels import Labels, LabelsBuilder
from mopefuse.data.rows import LeftOut, NoRow, check_row, exceptions
from mopefuse.data.tables import Found, Table, split_named
from mopefuse.modalities import base as modality
from mopefuse.modalities.files import MISSING, Files, Look, look_at

VERSION = 5  # of what is kept
_ROWS = 2  # of what rows are: a run knows its data by it
Array = NDArray[Any]
Advance = Callable[[int, int], None]
_NO_ROW, _NOTHING = "MF-DATA-03", bytes(16)


@dataclass
class InRows:
    """What is known of a modality whose values stand in the rows."""

    key_S: Array  # digest of each value, S16; zeros where there is none
    alike_S: Array  # the same of what `Modality.alike` makes of it

    def keys(self) -> Array:
        """See `Split.keys`."""
        return self.key_S

    def alike(self) -> Array:
        """See `Split.alike`."""
        return self.alike_S

    def lacks(self) -> Array:
        """Whether each row has none (S,)."""
        return np.asarray(self.key_S == b"")


@dataclass
class InFiles:
    """What is known of a modality whose values are files."""

    number_S: Array  # of the row's file; -1 where it has none
    names: list[str]
    looks: list[Look]

    def keys(self) -> Array:
        """See `Split.keys`."""
        keys_I = np.array([*(look.digest.ljust(16, b"\0") for look in self.looks), b""], dtype="S16")
        return keys_I[self.number_S]

    def alike(self) -> Array:
        """See `Split.alike`."""
        return self.keys()

    def lacks(self) -> Array:
        """Whether each row has none (S,)."""
        return self.number_S < 0

    def all_missing(self) -> bool:
        """Whether there are several files, and none of them is where rows say."""
        return len(self.names) > 1 and all(look.code == MISSING for look in self.looks)

    def bad(self) -> Array:
        """Whether each row's file is none that can be read (S,)."""
        return np.array([*(bool(look.code) for look in self.looks), False])[self.number_S]


@dataclass
class Index:
    """What is known of a split before any of it is read again."""

    split: str
    file: str
    digest: str  # of the table and of how it is read, but for `data.on_missing`
    content: bytes  # JSON lines
    rewritten: bool  # `content` is ours, made from another format
    places_S2: Array  # first byte and end of each row in `content`
    lines_S: Array
    values: dict[str, InRows | InFiles]  # by modality
    labels: Labels
    list_S: Array  # whether a row's labels are written as a list
    ids: list[str]
    row_problems: list[Problem]
    left_out: dict[str, int]  # rows that are skipped, by what they have nothing of
    fresh: bool = False  # something of it was not in the cache

    @property
    def files(self) -> dict[str, InFiles]:
        """The modalities whose values are files."""
        return {name: each for name, each in self.values.items() if isinstance(each, InFiles)}

    def problems(self) -> list[Problem]:
        """Every bad row, by line."""
        found = list(self.row_problems)
        for each in self.files.values():
            for row in np.flatnonzero(each.bad()):
                name, look = each.names[each.number_S[row]], each.looks[each.number_S[row]]
                where = f"{self.file}:{self.lines_S[row]}, id {self.ids[row]}"
                found.append(Problem(look.code, where, look.what, look.fix, name))
        return sorted(found, key=lambda problem: (_line(problem), problem.what))

    def good(self) -> Array:
        """The rows that have no problem, by number."""
        bad = np.zeros(len(self.lines_S), dtype=bool)
        for each in self.files.values():
            bad |= each.bad()
        return np.flatnonzero(~bad)

    def groups(self) -> list[str]:
        """What keeps rows together where some are held out: the first file that each has, or the row itself."""
        found = [f"\0{identity}" for identity in self.ids]
        for each in reversed(self.files.values()):
            found = [each.names[number] if number >= 0 else mine for number, mine in zip(each.number_S, found, strict=True)]
        return found


def _line(problem: Problem) -> int:
    return int(problem.where.partition(":")[2].partition(",")[0] or 0)


def build(
    table: Table, split: str, roots: Sequence[Path], modalities: Sequence[str], config: DataConfig,
    *, fresh: bool = False, advance: Advance = lambda done, total: None,
) -> Index:
    """The index of a split, from the cache where it is there.

    Args:
        split: rows of a single table that names the split in a column are those of this one.
        roots: folders that files may be in, the data root first.
        modalities: that rows have.
        fresh: read everything again, and replace what is in the cache.
        advance: told of (files looked at, files to look at).
    """
    files = {name: kind for name in modalities if isinstance(kind := modality.of(name), Files)}
    how = (config.split_col, *(limit for kind in files.values() for limit in kind.limits(config)))
    digest = cache.key_of(_ROWS, table.digest, split, table.file, *Layout.of(modalities, config).describe(), *how)
    key = cache.key_of(VERSION, digest, config.on_missing, *(root.resolve() for root in roots))
    index = (None if fresh else _load(key, table)) or read_rows(table, split, modalities, config, digest)
    seen, before = {}, 0
    for name, kind in files.items():
        each, looked = index.files[name], 0

        def told(done: int, total: int) -> None:
            nonlocal looked
            looked = done
            advance(before + done, before + total)  # noqa: B023 (called before the next)

        found = look_at(kind, roots, each.names, config, known=dict(zip(each.names, each.looks, strict=True)), advance=told)
        seen[name] = replace(each, looks=[found[file] for file in each.names])
        before += looked
    if index.fresh or any(seen[name].looks != each.looks for name, each in index.files.items()):
        index = replace(index, values={**index.values, **seen}, fresh=True)
        cache.keep("index", key, lambda folder: _save(index, folder), _facts(index, roots))
    return index


class _Reading:
    """The values of one modality, row by row."""

    def __init__(self, name: str) -> None:
        self.modality = modality.of(name)
        self.keys, self.alike = bytearray(), bytearray()
        self.numbers = array("q")
        self.names: dict[str, int] = {}

    def add(self, value: str | None) -> None:
        if self.modality.is_file:
            self.numbers.append(-1 if value is None else self.names.setdefault(value, len(self.names)))
            return
        self.keys += _NOTHING if value is None else digest_of(value)
        self.alike += _NOTHING if value is None else digest_of(self.modality.alike(value))

    def done(self) -> InRows | InFiles:
        if self.modality.is_file:
            return InFiles(np.array(self.numbers, dtype=np.int64), [*self.names], [Look()] * len(self.names))
        return InRows(np.frombuffer(bytes(self.keys), dtype="S16"), np.frombuffer(bytes(self.alike), dtype="S16"))


def read_rows(table: Table, split: str, modalities: Sequence[str], config: DataConfig, digest: str = "") -> Index:
    """One pass over the table; files are not looked at, and nothing is kept."""
    layout = Layout.of(modalities, config)
    readings = {name: _Reading(name) for name in modalities}
    wanted = {layout.identity, layout.label, *layout.columns.values()}
    rewritten = bytearray()
    places, lines, lists, labels = array("q"), array("q"), bytearray(), LabelsBuilder()
    line_of: dict[str, int] = {}  # of each row's id, in order
    problems: list[Problem] = []
    left_out: Counter[str] = Counter()
    for found in table.rows():
        belongs = _split_of(found, config)
        if belongs in SPLITS and belongs != split:
            continue
        try:
            if isinstance(found.value, str):
                raise NoRow(found.value)
            if belongs == "":
                raise NoRow(f"has no {config.split_col}; found {', '.join(sorted(map(str, found.value)))}")
            if belongs not in (None, split):
                raise NoRow(f"{config.split_col} is none of {', '.join(SPLITS)}")
            row = check_row(found.value, found.line, split, layout)
            if row.id in line_of:
                raise NoRow(f"the id {row.id!r} is there already, in line {line_of[row.id]}")
        except NoRow as error:
            problems.append(Problem(_NO_ROW, f"{table.file}:{found.line}", str(error)))
            continue
        except LeftOut as missing:
            left_out[str(missing)] += 1
            continue
        line_of[row.id] = found.line
        if table.content is None:
            places.append(len(rewritten))
            native = {name: value for name, value in found.value.items() if name in wanted}
            rewritten += json.dumps(native).encode("utf-8") + b"\n"
            places.append(len(rewritten) - 1)
        else:
            places.extend((found.start, found.stop))
        lines.append(found.line)
        for name, value in row.values.items():
            readings[name].add(value)
        labels.add(row.labels)
        lists.append(row.is_list)
    return Index(
        split,
        table.file,
        digest,
        bytes(rewritten) if table.content is None else table.content,
        table.content is None,
        np.array(places, dtype=np.int64).reshape(-1, 2),
        np.array(lines, dtype=np.int64),
        {name: reading.done() for name, reading in readings.items()},
        labels.done(),
        np.frombuffer(bytes(lists), dtype=bool),
        list(line_of),
        exceptions(problems, layout) if line_of else problems,
        dict(left_out),
        fresh=True,
    )


def _split_of(found: Found, config: DataConfig) -> str | None:
    """The split that a row names in `data.split_col`; empty where it names none, None where it need not."""
    if config.split_col is None or not isinstance(found.value, dict):
        return None
    return split_named(found.value.get(config.split_col))


# -- in the cache


def _save(index: Index, folder: Path) -> None:
    arrays: dict[str, Any] = {
        "places": index.places_S2,
        "lines": index.lines_S,
        "list": index.list_S,
        "label_starts": index.labels.start_S1,
        "labels": index.labels.code_Z,
    }
    for name, each in index.values.items():
        found = _looks_as_arrays(each) if isinstance(each, InFiles) else {"key": each.key_S, "alike": each.alike_S}
        arrays |= {f"{name}.{part}": array for part, array in found.items()}
    np.savez(folder / "rows.npz", **arrays)
    about = {
        "labels": index.labels.names,
        "ids": index.ids,
        "modalities": list(index.values),
        "files": {name: each.names for name, each in index.files.items()},
        "bad_files": {
            name: {str(i): [look.code, look.what, look.fix] for i, look in enumerate(each.looks) if look.code}
            for name, each in index.files.items()
        },
        "row_problems": [[problem.code, problem.where, problem.what] for problem in index.row_problems],
        "left_out": index.left_out,
    }
    (folder / "index.json").write_text(json.dumps(about), encoding="utf-8")
    if index.rewritten:
        (folder / "rows.jsonl").write_bytes(index.content)


_PARTS = ("size", "mtime", "side", "animated", "milliseconds", "digest")  # of looks


def _looks_as_arrays(each: InFiles) -> dict[str, Array]:
    return {
        "number": each.number_S,
        "size": np.array([look.size for look in each.looks], dtype=np.int64),
        "mtime": np.array([look.mtime for look in each.looks], dtype=np.int64),
        "side": np.array([(look.width, look.height) for look in each.looks], dtype=np.int64).reshape(-1, 2),
        "animated": np.array([look.animated for look in each.looks], dtype=bool),
        "milliseconds": np.array([look.milliseconds for look in each.looks], dtype=np.int64),
        "digest": np.array([look.digest.ljust(16, b"\0") for look in each.looks], dtype="S16"),
    }


def _looks(part: dict[str, Array], names: list[str], bad: dict[str, list[str]]) -> InFiles:
    looks = [
        Look(size, mtime, width, height, animated, took, digest, *bad.get(str(i), ()))
        for i, (size, mtime, (width, height), animated, took, digest) in enumerate(
            zip(*(part[name].tolist() for name in _PARTS), strict=True)
        )
    ]
    return InFiles(part["number"], names, looks)


def _facts(index: Index, roots: Sequence[Path]) -> dict[str, Any]:
    return {"digest": index.digest, "split": index.split, "root": str(roots[0]), "rows": len(index.lines_S)}


def _load(key: str, table: Table) -> Index | None:
    found = cache.find("index", key)
    if found is None:
        return None
    folder, facts = found
    about = read_json(folder / "index.json")
    with np.load(folder / "rows.npz", allow_pickle=False) as arrays:
        part = {name: arrays[name] for name in arrays.files}
    values: dict[str, InRows | InFiles] = {}
    for name in about["modalities"]:
        own = {key.removeprefix(f"{name}."): array for key, array in part.items() if key.startswith(f"{name}.")}
        is_file = name in about["files"]
        values[name] = (
            _looks(own, about["files"][name], about["bad_files"][name]) if is_file else InRows(own["key"], own["alike"])
        )
    return Index(
        facts["split"],
        table.file,
        facts["digest"],
        (folder / "rows.jsonl").read_bytes() if table.content is None else table.content,
        table.content is None,
        part["places"],
        part["lines"],
        values,
        Labels(about["labels"], part["label_starts"], part["labels"]),
        part["list"],
        about["ids"],
        [Problem(*row) for row in about["row_problems"]],
        about["left_out"],
    )
