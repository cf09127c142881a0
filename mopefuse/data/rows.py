"""What a row is: MMBT's ``{"id": .., "text": .., "img": "relative/path.jpg", "label": "x" | ["x", "y"]}``.

Columns may have other names (`data.text_col`, ...). Nothing of a row's content is echoed in a message.

Shapes: S rows of a split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from mopefuse.config import Data as DataConfig
from mopefuse.data._base import Row

_SURROGATE = re.compile("[\ud800-\udfff]")  # cannot be written to a file
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
_MEANT = {  # names that columns have elsewhere
    "text": ("caption", "title", "name", "sentence", "description", "content", "plot", "review", "body"),
    "img": ("image", "image_path", "img_path", "filename", "file_name", "file", "path", "photo", "picture"),
    "label": ("labels", "category", "class", "target", "genre", "genres", "y"),
}
_FLAGS = {"text": "--text-col", "img": "--image-col", "label": "--label-col", "id": "--id-col"}


class Checked(NamedTuple):
    """A row that is one."""

    id: str
    text: str
    img: str
    labels: tuple[str, ...]
    is_list: bool  # labels were written as a list


class NoRow(ValueError):
    """What is wrong with a row."""


def check_row(value: Mapping[str, Any], line: int, split: str, config: DataConfig) -> Checked:
    """A row's fields, of the right kinds.

    Raises:
        NoRow: a column is missing, or a value of another kind.
    """
    columns = columns_of(config)
    _require(("text", "img", "label"), columns, value)
    text, img = _text_and_image(value, columns, config)
    identity = _identity(value, columns, f"{split}-{line}")
    labels, is_list = _labels(value[columns["label"]], columns["label"], config.label_sep)
    _refuse_half_characters({"id": identity, "img": img, "label": "".join(labels)}, columns)
    return Checked(identity, text, img, labels, is_list)


def check_pair(value: Mapping[str, Any], line: int, config: DataConfig) -> tuple[str, str, str]:
    """(id, text, image) of a row without a label, as in what is to be predicted.

    Raises:
        NoRow: a column is missing, or a value of another kind.
    """
    columns = columns_of(config)
    _require(("text", "img"), columns, value)
    text, img = _text_and_image(value, columns, config)
    identity = _identity(value, columns, str(line))
    _refuse_half_characters({"id": identity, "img": img}, columns)
    return identity, text, img


def _require(kinds: Sequence[str], columns: Mapping[str, str], value: Mapping[str, Any]) -> None:
    missing = [kind for kind in kinds if columns[kind] not in value]
    if missing:
        raise NoRow(_no_column(missing, columns, value))


def _text_and_image(value: Mapping[str, Any], columns: Mapping[str, str], config: DataConfig) -> tuple[str, str]:
    text, img = value[columns["text"]], value[columns["img"]]
    if text is None and config.allow_missing_text:
        text = ""
    if not isinstance(text, str):
        hint = " (set data.allow_missing_text=true to take it as empty)" if text is None else ""
        raise NoRow(f"{columns['text']} is {_kind(text)}, expected a string{hint}")
    if not isinstance(img, str):
        raise NoRow(f"{columns['img']} is {_kind(img)}, expected a string")
    return text, img


def _identity(value: Mapping[str, Any], columns: Mapping[str, str], default: str) -> str:
    identity = value.get(columns["id"], default)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise NoRow(f"{columns['id']} is {_kind(identity)}, expected a string")
    return str(identity)


def _refuse_half_characters(said: Mapping[str, str], columns: Mapping[str, str]) -> None:
    for kind, text in said.items():
        if _SURROGATE.search(text):
            raise NoRow(f"{columns[kind]} has half a character (a lone surrogate)")


def columns_of(config: DataConfig) -> dict[str, str]:
    """The name of each column."""
    return {"id": config.id_col, "text": config.text_col, "img": config.img_col, "label": config.label_col}


def _labels(value: Any, name: str, separator: str | None) -> tuple[tuple[str, ...], bool]:
    if isinstance(value, str) and separator:
        return tuple(dict.fromkeys(part.strip() for part in value.split(separator) if part.strip())), True
    if isinstance(value, str):
        if not value:
            raise NoRow(f"{name} is empty")
        return (value,), False
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        if "" in value:
            raise NoRow(f"{name} has an empty label")
        return tuple(dict.fromkeys(value)), True
    raise NoRow(f"{name} is {_kind(value)}, expected a string or a list of strings (quote it)")


def _no_column(missing: Sequence[str], columns: Mapping[str, str], value: Mapping[str, Any]) -> str:
    hints = [f"{_FLAGS[kind]} {name}" for kind in missing for name in _MEANT[kind] if name in value][: len(missing)]
    meant = f"; did you mean {' '.join(hints)}?" if hints else ""
    absent = " or ".join(columns[kind] for kind in missing)
    return f"has no {absent}; found {', '.join(sorted(map(str, value))) or 'nothing'}{meant}"


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
        config: DataConfig,
    ) -> None:
        self._content, self._places_S2, self._lines_S, self._labels = content, places_S2, lines_S, labels
        self._split, self._columns = split, columns_of(config)

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
        value, line = json.loads(bytes(self._content[start:stop])), int(self._lines_S[index])
        identity = str(value.get(self._columns["id"], f"{self._split}-{line}"))
        text = value[self._columns["text"]] or ""
        return Row(identity, text, value[self._columns["img"]], self._labels[index], line)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))
