"""The native row format, MMBT's: one JSON object a line, one file a split.

``{"id": .., "text": .., "img": "relative/path.jpg", "label": "x" | ["x", "y"]}``. Every problem of a file is found at
once, with its line; nothing of a row's content is echoed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mopefuse.data._base import SPLITS, DataSet, Row, Split
from mopefuse.errors import DataError

_MOST_LISTED = 20
_SURROGATE = re.compile("[\ud800-\udfff]")  # cannot be written to a file


class _Problem(Exception):
    pass


def load_data(root: Path, *, require: tuple[str, ...] = ("train", "val")) -> DataSet:
    """The data set in a folder.

    Args:
        require: splits that must be there; others are read if they are.

    Raises:
        DataError: no such folder or split, rows that cannot be read, labels that training does not define.
    """
    if not root.is_dir():
        raise DataError(1, f"there is no data folder {root}", fix="name a folder with train.jsonl, val.jsonl and test.jsonl")
    splits = {}
    for name in SPLITS:
        path = root / f"{name}.jsonl"
        if path.exists():
            splits[name] = read_split(path)
        elif name in require:
            there = ", ".join(sorted(p.name for p in root.glob("*.jsonl"))) or "no .jsonl file"
            raise DataError(2, f"the {name} split is missing", where=str(path), fix=f"provide it (the folder has {there})")
    multi = _is_multi_label(splits)
    labels = _labels(root, splits)
    return DataSet(root, splits, labels, multi)


def read_split(path: Path) -> Split:
    """The rows of one file.

    Raises:
        DataError: every problem of the file (up to 20 listed, all counted).
    """
    content = _read(path)
    _refuse_other_formats(content, path)
    rows: list[Row] = []
    problems: list[str] = []
    lines_of: dict[str, int] = {}
    for number, line in _lines(content):
        try:
            row = _row(line, number, path.stem)
            if row.id in lines_of:
                raise _Problem(f"the id {row.id!r} is there already, in line {lines_of[row.id]}")
            lines_of[row.id] = number
            rows.append(row)
        except _Problem as problem:
            problems.append(f"{path.name}:{number} {problem}")
    if problems:
        listed = "; ".join(problems[:_MOST_LISTED])
        more = f"; and {len(problems) - _MOST_LISTED} more" if len(problems) > _MOST_LISTED else ""
        plural = "s" if len(problems) > 1 else ""
        raise DataError(3, f"{len(problems)} bad row{plural}: {listed}{more}", where=str(path), fix="correct or remove them")
    if not rows:
        raise DataError(4, f"the {path.stem} split has no rows", where=str(path), fix="provide at least one row")
    return Split(path.stem, path.parent, tuple(rows), hashlib.sha256(content).hexdigest())


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would block
            raise DataError(16, f"{path.name} is not a regular file", where=str(path), fix="provide a file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(16, f"{path.name} cannot be read: {error.strerror}", where=str(path), fix="make it readable") from None


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _row(line: bytes, number: int, split: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _Problem(
            f"is not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1}); convert the file with iconv -t utf-8"
        ) from None
    except json.JSONDecodeError as error:
        raise _Problem(f"is not JSON (column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise _Problem("is nested too deeply") from None
    except ValueError:
        raise _Problem("has a number with too many digits") from None
    if not isinstance(value, dict):
        raise _Problem(f"is a {type(value).__name__}, expected an object")
    missing = [key for key in ("text", "img", "label") if key not in value]
    if missing:
        raise _Problem(f"has no {' or '.join(missing)}; found {', '.join(sorted(value)) or 'nothing'}")
    for key in ("text", "img"):
        if not isinstance(value[key], str):
            raise _Problem(f"{key} is {_kind(value[key])}, expected a string")
    identity = value.get("id", f"{split}-{number}")
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise _Problem(f"id is {_kind(identity)}, expected a string")
    labels = _label(value["label"])
    for key, said in (("id", str(identity)), ("img", value["img"]), ("label", "".join(labels))):
        if _SURROGATE.search(said):
            raise _Problem(f"{key} has half a character (a lone surrogate)")
    return Row(str(identity), value["text"], value["img"], labels, number)


def _label(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _MultiLabel(dict.fromkeys(value))
    raise _Problem(f"label is {_kind(value)}, expected a string or a list of strings (quote it)")


class _MultiLabel(tuple[str, ...]):
    """Labels that were written as a list."""


def _is_multi_label(splits: dict[str, Split]) -> bool:
    kinds = {isinstance(row.labels, _MultiLabel): (split, row) for split in splits.values() for row in split.rows}
    if len(kinds) == 2:
        split, row = kinds[True]
        raise DataError(
            5, "some labels are strings and some are lists", where=f"{split.file}:{row.line}", fix="write all one way"
        )
    return True in kinds


def _labels(root: Path, splits: dict[str, Split]) -> tuple[str, ...]:
    listed = root / "labels.txt"
    if listed.exists():
        labels = _listed_labels(listed)
    else:
        labels = tuple(sorted({label for row in splits["train"].rows for label in row.labels})) if "train" in splits else ()
    known = set(labels)
    for split in splits.values() if labels else ():
        unknown = Counter(label for row in split.rows for label in row.labels if label not in known)
        if unknown:
            shown = ", ".join(f"{label} ({count})" for label, count in unknown.most_common(_MOST_LISTED))
            raise DataError(
                6, f"labels that training does not know: {shown}", where=split.file, fix="list all labels in labels.txt"
            )
    if "train" in splits and len(labels) < 2:
        found = f"only the label {labels[0]!r}" if labels else "no label at all"
        raise DataError(7, f"{found}: there is nothing to learn", where="train.jsonl", fix="add another class")
    return labels


def _listed_labels(path: Path) -> tuple[str, ...]:
    try:
        lines = _read(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        fix = "convert it with iconv -t utf-8"
        raise DataError(10, f"labels.txt is not UTF-8: {error}", where=str(path), fix=fix) from None
    labels = [line.rstrip("\r") for line in lines if line.strip()]
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise DataError(10, f"labels.txt has {twice[0]!r} twice", where=str(path), fix="list each label once")
    return tuple(labels)


def _refuse_other_formats(content: bytes, path: Path) -> None:
    magic = {b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK\x03\x04": "a zip"}
    for start, name in magic.items():
        if content.startswith(start):
            raise DataError(8, f"this is {name}, not JSON lines", where=str(path), fix="convert it to UTF-8 JSON lines")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _Problem("has a key twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise _Problem(f"has {name}, which is not JSON")


def _kind(value: Any) -> str:
    return {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}.get(
        type(value), "a string"
    )
