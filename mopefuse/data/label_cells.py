"""Parse labels in the cells of a table: one label, several with a separator, or a list as JSON or Python prints it."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from contextlib import suppress

from mopefuse.tasks.regression import parse_number

LIST = "list"
"""The value of `data.label_sep` for cells that contain lists."""

_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_ITEM = rf"(?:{_QUOTED}|-?\d+(?:\.\d+)?)"
_ITEMS = re.compile(rf"{_ITEM}(?:(?:\s*,\s*|\s+){_ITEM})*\s*,?", re.DOTALL)  # numpy prints lists without commas
_ONE_ITEM = re.compile(_ITEM, re.DOTALL)
_NESTED = re.compile(r"[\[\](){}\"']")
_BLANK = frozenset(("Zs", "Zl", "Zp", "Cc", "Cf"))  # Unicode categories
_MAX_LENGTH = 100_000  # characters of a cell that is parsed


def split_cell(cell: str, separator: str) -> tuple[str, ...]:
    """Split a cell into labels, without repetitions unless all are numbers; a blank cell has none.

    Args:
        separator: separator of labels, or `LIST`; then a cell that is not a list is one label.
    """
    parts = parse_list(cell) if separator == LIST else cell.split(separator)
    labels = [part.strip() for part in ([cell] if parts is None else parts) if not is_blank(part)]
    are_numbers = all(parse_number(label) is not None for label in labels)
    return tuple(labels if are_numbers else dict.fromkeys(labels))


def parse_list(text: str) -> list[str] | None:
    """Parse a flat list such as ``["a", "b"]``, ``['a' 'b']``, ``('a',)`` or ``[a, b]``; None if `text` is not a list.

    A single word in brackets, such as ``[other]`` or ``(1)``, is not a list.
    """
    text = text.strip()
    if len(text) > _MAX_LENGTH or text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return None
    inner, square = text[1:-1].strip(), text[0] == "["
    if not inner:
        return [] if square else None
    if _ITEMS.fullmatch(inner) and (square or "," in inner or inner[0] in "'\""):
        return [_unquoted(item) for item in _ONE_ITEM.findall(inner)]
    if square and "," in inner and not _NESTED.search(inner):
        return [part.strip() for part in inner.split(",")]
    return None


def _unquoted(item: str) -> str:
    if item[0] not in "'\"":
        return item
    if "\\" not in item and "\n" not in item:
        return item[1:-1]
    if item[0] == '"':
        with suppress(ValueError):
            return str(json.loads(item))
    try:
        return str(ast.literal_eval(item))
    except (ValueError, SyntaxError):  # an invalid escape
        return item[1:-1]


def is_blank(label: str) -> bool:
    """Whether a label has no visible characters."""
    if label.isascii() and label.isprintable():
        return not label.strip()
    return all(unicodedata.category(character) in _BLANK for character in label)


def normalise(label: str) -> str:
    """Remove differences in case, spaces, Unicode form and invisible characters."""
    if not label.isascii():
        composed = unicodedata.normalize("NFKC", label)
        label = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return " ".join(label.casefold().split())
