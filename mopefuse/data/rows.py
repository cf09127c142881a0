"""What a row is: MMBT's ``{"id": .., "text": .., "img": "relative/path.jpg", "label": "x" | ["x", "y"]}``, with a column
for each modality of the data set (see `mopefuse.data.columns`). Nothing of a row's content is echoed in a message.

Shapes: S rows of a split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from mopefuse.data.base import Problem, Row
from mopefuse.data.columns import EXPECTED, Layout
from mopefuse.data.label_cells import is_blank, normalised, split_cell

_SURROGATE = re.compile("[\ud800-\udfff]")  # cannot be written to a file
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
_OR_WITHOUT = "--on-missing skip or absent"


class Checked(NamedTuple):
    """A row that is one."""

    id: str
    values: dict[str, str | None]  # by modality
    labels: tuple[str, ...]
    is_list: bool  # labels were written as a list


class NoRow(ValueError):
    """What is wrong with a row."""


class LeftOut(Exception):
    """A row that is left out, as it has nothing of some modalities."""

    def __init__(self, missing: Sequence[str]) -> None:
        super().__init__(" and ".join(missing))


def check_row(row: Mapping[str, Any], line: int, split: str, layout: Layout) -> Checked:
    """A row's fields, of the right kinds.

    Raises:
        NoRow: a column is missing, or a value of another kind. LeftOut: a value is missing, and such rows are skipped.
    """
    values = _values(row, layout, label=True)
    identity = _identity(row, layout.identity, f"{split}-{line}")
    labels, is_list = _labels(row[layout.label], layout.label, layout.separator)
    if layout.fold_labels:
        labels = tuple(dict.fromkeys(map(normalised, labels)))
    _refuse_half_characters(identity, values, layout)
    if _SURROGATE.search("".join(labels)):
        raise NoRow(_half(layout.label))
    _leave_out(values, layout)
    return Checked(identity, values, labels, is_list)


def check_input(row: Mapping[str, Any], line: int, layout: Layout) -> tuple[str, dict[str, str | None]]:
    """(id, values) of a row without a label, as in what is to be predicted.

    Raises:
        NoRow: a column is missing, or a value of another kind.
    """
    values = _values(row, layout, label=False)
    identity = _identity(row, layout.identity, str(line))
    _refuse_half_characters(identity, values, layout)
    return identity, values


def _values(row: Mapping[str, Any], layout: Layout, *, label: bool) -> dict[str, str | None]:
    lenient = layout.on_missing != "error"
    missing = [] if lenient else [name for name, column in layout.columns.items() if column not in row]
    no_label = label and layout.label not in row
    if missing or no_label:
        raise NoRow(_no_column(missing, no_label, row, layout))
    values: dict[str, str | None] = {}
    for name, column in layout.columns.items():
        said = layout.said(name, row)
        if isinstance(said, str) or (said is None and lenient):
            values[name] = said
            continue
        kind = "empty" if isinstance(row.get(column), str) else _kind(said)
        hint = _hint(name, layout) if said is None and label else ""  # what is to be predicted has no settings
        raise NoRow(f"{column} is {kind}, expected a string{hint}")
    if all(value is None for value in values.values()) and layout.on_missing != "skip":
        found = ", ".join(sorted(map(str, row))) or "nothing"
        raise NoRow(f"has none of {', '.join(layout.columns.values())}; found {found}{_meant([*values], False, row, layout)}")
    return values


def _hint(name: str, layout: Layout) -> str:
    if name in layout.in_rows:
        return f" (set data.allow_missing_text=true to take it as empty, or {_OR_WITHOUT})"
    unread = "" if name in EXPECTED else f", or leave {name} out of data.modalities if no encoder reads it"
    return f" (use {_OR_WITHOUT} to go on without{unread})"


def _leave_out(values: Mapping[str, str | None], layout: Layout) -> None:
    missing = [name for name, value in values.items() if value is None]
    if missing and layout.on_missing == "skip":
        raise LeftOut(missing)


def _identity(row: Mapping[str, Any], column: str, default: str) -> str:
    identity = row.get(column, default)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise NoRow(f"{column} is {_kind(identity)}, expected a string")
    return str(identity)


def _refuse_half_characters(identity: str, values: Mapping[str, str | None], layout: Layout) -> None:
    """In what names files; a text in a row may have them."""
    if _SURROGATE.search(identity):
        raise NoRow(_half(layout.identity))
    for name, value in values.items():
        if value is not None and name not in layout.in_rows and _SURROGATE.search(value):
            raise NoRow(_half(layout.columns[name]))


def _half(column: str) -> str:
    return f"{column} has half a character (a lone surrogate)"


def _labels(value: Any, name: str, separator: str | None) -> tuple[tuple[str, ...], bool]:
    if isinstance(value, str) and separator:
        return split_cell(value, separator), True
    if isinstance(value, str):
        if is_blank(value):
            raise NoRow(f"{name} is empty")
        return (value,), False
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        if any(map(is_blank, value)):
            raise NoRow(f"{name} has an empty label")
        return tuple(dict.fromkeys(value)), True
    raise NoRow(f"{name} is {_kind(value)}, expected a string or a list of strings (quote it)")


def _no_column(missing: Sequence[str], no_label: bool, row: Mapping[str, Any], layout: Layout) -> str:
    absent = " or ".join([*(layout.columns[name] for name in missing), *([layout.label] if no_label else [])])
    found = ", ".join(sorted(map(str, row))) or "nothing"
    return f"has no {absent}; found {found}{_meant(missing, no_label, row, layout)}"


def exceptions(problems: Sequence[Problem], layout: Layout) -> list[Problem]:
    """Problems of a table that has good rows, so that a row without some column is one without a value, which may be meant."""
    columns = "|".join(map(re.escape, layout.columns.values()))
    pattern = re.compile(rf"has no (?:{columns})(?: or (?:{columns}))*; found [^;]*")
    hint = f" (use {_OR_WITHOUT} to go on without)"
    return [replace(each, what=each.what + hint) if pattern.fullmatch(each.what) else each for each in problems]


def _meant(missing: Sequence[str], no_label: bool, row: Mapping[str, Any], layout: Layout) -> str:
    hints = layout.hints(missing, no_label, row)
    return f"; did you mean {' '.join(hints)}?" if hints else ""


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a string" if isinstance(value, str) else f"a {type(value).__name__}")


class Rows(Sequence[Row]):
    """Rows read from where they stand, when they are asked for: half a million cost no more than their places.

    Args:
        content: JSON lines. places_S2: first byte and end of each row in it. lines_S: line numbers, from 1.
        labels: of each row.
    """

    def __init__(
        self,
        content: Any,
        places_S2: NDArray[np.int64],
        lines_S: NDArray[np.int64],
        labels: Sequence[tuple[str, ...]],
        split: str,
        layout: Layout,
    ) -> None:
        self._content, self._places_S2, self._lines_S, self._labels = content, places_S2, lines_S, labels
        self._split, self._layout = split, layout

    def __len__(self) -> int:
        return len(self._places_S2)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, stop = self._places_S2[index]
        row, line = json.loads(bytes(self._content[start:stop])), int(self._lines_S[index])
        identity = str(row.get(self._layout.identity, f"{self._split}-{line}"))
        values = {name: self._layout.said(name, row) for name in self._layout.columns}
        return Row(identity, values, self._labels[index], line)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))
