"""The format of a row: MMBT's ``{"id": .., "text": .., "img": "relative/path.jpg", "label": "x" | ["x", "y"]}``, with a column
for each modality of the data set (see `mopefuse.data.columns`). Messages never repeat the content of a row.

Shapes: S rows of a split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mopefuse.core.lazy_sequence import LazySequence
from mopefuse.data.base import Problem, Row
from mopefuse.data.columns import EXPECTED, Layout
from mopefuse.data.label_cells import is_blank, normalise, split_cell
from mopefuse.data.row_store import RowStore

_SURROGATE = re.compile("[\ud800-\udfff]")  # cannot be written to a file
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
EXPECTED_LABEL = "a string or a list of strings (quote it)"
_WITHOUT = "add --on-missing skip or absent"


class ValidRow(NamedTuple):
    """A row that passed all checks."""

    id: str
    values: dict[str, str | None]  # by modality
    labels: tuple[str, ...]
    is_list: bool  # whether the labels are written as a list
    is_number: bool  # whether they are numbers, not texts


class InvalidRow(ValueError):
    """The row is not valid; the message gives the reason."""


class RowSkipped(Exception):
    """The row is skipped because it lacks some modalities; the message names them."""

    def __init__(self, missing: Sequence[str]) -> None:
        super().__init__(" and ".join(missing))


def check_row(row: Mapping[str, Any], line: int, split: str, layout: Layout) -> ValidRow:
    """Check the fields of a row.

    Args:
        line, split: used to form the id of a row that has none.

    Raises:
        InvalidRow: a column is missing, or a value has the wrong type.
        RowSkipped: a value is missing, and settings say to skip such rows.
    """
    values = _values(row, layout, label=bool(layout.label))
    identity = _identity(row, layout.identity, f"{split}-{line}")
    labels, is_list, is_number = _labels(row, layout) if layout.label else ((), False, False)
    if layout.fold_labels:
        labels = tuple(dict.fromkeys(map(normalise, labels)))
    _reject_lone_surrogates(identity, values, layout)
    if _SURROGATE.search("".join(labels)):
        raise InvalidRow(_half_character_message(layout.label))
    _leave_out(values, layout)
    return ValidRow(id=identity, values=values, labels=labels, is_list=is_list, is_number=is_number)


def check_input(row: Mapping[str, Any], line: int, layout: Layout) -> tuple[str, dict[str, str | None]]:
    """Check a row that is to be predicted, which needs no label.

    Returns:
        Its id, and its values by modality.

    Raises:
        InvalidRow: a column is missing, or a value has the wrong type.
    """
    values = _values(row, layout, label=False)
    identity = _identity(row, layout.identity, str(line))
    _reject_lone_surrogates(identity, values, layout)
    return identity, values


def _values(row: Mapping[str, Any], layout: Layout, *, label: bool) -> dict[str, str | None]:
    lenient = layout.on_missing != "error"
    missing = [] if lenient else [name for name, column in layout.columns.items() if column not in row]
    no_label = label and layout.label not in row
    if missing or no_label:
        raise InvalidRow(_no_column(missing, no_label, row, layout))
    values: dict[str, str | None] = {}
    for name, column in layout.columns.items():
        value = layout.value_of(name, row)
        if isinstance(value, str) or (value is None and lenient):
            values[name] = value
            continue
        kind = "empty" if isinstance(row.get(column), str) else _kind(value)
        hint = _hint(name, layout) if value is None and label else ""  # these settings do not apply to prediction
        raise InvalidRow(f"{column} is {kind}, expected a string{hint}")
    if all(value is None for value in values.values()) and layout.on_missing != "skip":
        found = ", ".join(sorted(map(str, row))) or "nothing"
        suggestions = _suggestions([*values], False, row, layout)
        raise InvalidRow(f"has none of {', '.join(layout.columns.values())}; found {found}{suggestions}")
    return values


def _hint(name: str, layout: Layout) -> str:
    if name in layout.in_rows:
        return f" (to treat it as empty, set data.allow_missing_text=true; to accept rows without it, {_WITHOUT})"
    unread = "" if name in EXPECTED else f", or leave {name} out of data.modalities if no encoder reads it"
    return f" (to accept such rows, {_WITHOUT}{unread})"


def _leave_out(values: Mapping[str, str | None], layout: Layout) -> None:
    missing = [name for name, value in values.items() if value is None]
    if missing and layout.on_missing == "skip":
        raise RowSkipped(missing)


def _identity(row: Mapping[str, Any], column: str, default: str) -> str:
    identity = row.get(column, default)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise InvalidRow(f"{column} is {_kind(identity)}, expected a string")
    return str(identity)


def _reject_lone_surrogates(identity: str, values: Mapping[str, str | None], layout: Layout) -> None:
    """Refuse lone surrogates in ids and file names; a text may contain them."""
    if _SURROGATE.search(identity):
        raise InvalidRow(_half_character_message(layout.identity))
    for name, value in values.items():
        if value is not None and name not in layout.in_rows and _SURROGATE.search(value):
            raise InvalidRow(_half_character_message(layout.columns[name]))


def _half_character_message(column: str) -> str:
    return f"{column} contains a lone surrogate (half of a character)"


def _labels(row: Mapping[str, Any], layout: Layout) -> tuple[tuple[str, ...], bool, bool]:
    """Labels as texts, whether they are written as a list, and whether as numbers."""
    value, name, separator = row[layout.label], layout.label, layout.separator
    if isinstance(value, str) and separator:
        return split_cell(value, separator), True, False
    if isinstance(value, str):
        if is_blank(value):
            raise InvalidRow(f"{name} is empty")
        return (value,), False, False
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        if any(map(is_blank, value)):
            raise InvalidRow(f"{name} has an empty label")
        return tuple(dict.fromkeys(value)), True, False
    if _is_number(value):
        return (repr(value),), False, True
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return tuple(map(repr, value)), True, True
    if value is None:
        raise InvalidRow(f"{name} is null: the row has no label")
    raise InvalidRow(f"{name} is {_kind(value)}, expected {EXPECTED_LABEL}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _no_column(missing: Sequence[str], no_label: bool, row: Mapping[str, Any], layout: Layout) -> str:
    absent = " or ".join([*(layout.columns[name] for name in missing), *([layout.label] if no_label else [])])
    found = ", ".join(sorted(map(str, row))) or "nothing"
    return f"has no {absent}; found {found}{_suggestions(missing, no_label, row, layout)}"


def add_missing_hints(problems: Sequence[Problem], layout: Layout) -> list[Problem]:
    """Add a hint to rows that lack a column: in a table with valid rows, the value may be missing on purpose."""
    columns = "|".join(map(re.escape, layout.columns.values()))
    pattern = re.compile(rf"has no (?:{columns})(?: or (?:{columns}))*; found [^;]*")
    hint = f" (to accept such rows, {_WITHOUT})"
    return [replace(problem, what=problem.what + hint) if pattern.fullmatch(problem.what) else problem for problem in problems]


def _suggestions(missing: Sequence[str], no_label: bool, row: Mapping[str, Any], layout: Layout) -> str:
    hints = layout.suggest_flags(missing, no_label, row)
    return f"; did you mean {' '.join(hints)}?" if hints else ""


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a string" if isinstance(value, str) else f"a {type(value).__name__}")


@dataclass(frozen=True, eq=False)
class Rows(LazySequence[Row]):
    """Rows that are parsed when they are accessed.

    Args:
        store: the rows as they are written. lines_S: line numbers, from 1.
        labels: labels of each row.
    """

    store: RowStore
    lines_S: NDArray[np.int64]
    labels: Sequence[tuple[str, ...]]
    split: str
    layout: Layout

    def __len__(self) -> int:
        return len(self.store)

    def at(self, number: int) -> Row:
        """See `LazySequence.at`."""
        row, line = self.store.row(number), int(self.lines_S[number])
        identity = str(row.get(self.layout.identity, f"{self.split}-{line}"))
        values = {name: self.layout.value_of(name, row) for name in self.layout.columns}
        return Row(id=identity, values=values, labels=self.labels[number], line=line)
