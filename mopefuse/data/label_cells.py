"""Labels as cells of a table write them: one, several with a separator, or a list as JSON or Python prints it."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from contextlib import suppress

LIST = "list"
"""The value of `data.label_sep` for cells that are lists."""

_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_ITEM = rf"(?:{_QUOTED}|-?\d+(?:\.\d+)?)"
_ITEMS = re.compile(rf"{_ITEM}(?:(?:\s*,\s*|\s+){_ITEM})*\s*,?", re.DOTALL)  # numpy prints lists without commas
_EACH = re.compile(_ITEM, re.DOTALL)
_NESTED = re.compile(r"[\[\](){}\"']")
_BLANK = frozenset(("Zs", "Zl", "Zp", "Cc", "Cf"))  # categories of characters
_LONGEST = 100_000  # characters of a cell that is looked at


def split_cell(cell: str, separator: str) -> tuple[str, ...]:
    """The labels of a cell, each once, in its order; a cell of blanks has none.

    Args:
        separator: what stands between them, or `LIST`, where a cell that is no list is one label.
    """
    parts = parse_list(cell) if separator == LIST else cell.split(separator)
    stripped = (part.strip() for part in ([cell] if parts is None else parts))
    return tuple(dict.fromkeys(part for part in stripped if not is_blank(part)))


def parse_list(text: str) -> list[str] | None:
    """The items of a flat list such as ``["a", "b"]``, ``['a' 'b']``, ``('a',)`` or ``[a, b]``; None where `text` is none.

    A single word in brackets, such as ``[other]`` or ``(1)``, is no list.
    """
    text = text.strip()
    if len(text) > _LONGEST or text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return None
    inner, square = text[1:-1].strip(), text[0] == "["
    if not inner:
        return [] if square else None
    if _ITEMS.fullmatch(inner) and (square or "," in inner or inner[0] in "'\""):
        return [_unquoted(item) for item in _EACH.findall(inner)]
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
    except (ValueError, SyntaxError):  # an escape that is none
        return item[1:-1]


def is_blank(label: str) -> bool:
    """Whether nothing of a label can be seen: spaces, and characters that have no shape."""
    if label.isascii() and label.isprintable():
        return not label.strip()
    return all(unicodedata.category(character) in _BLANK for character in label)


def normalised(label: str) -> str:
    """What labels have in common that differ only in case, spaces, Unicode form or characters that have no shape."""
    if not label.isascii():
        shaped = unicodedata.normalize("NFKC", label)
        label = "".join(character for character in shaped if unicodedata.category(character) != "Cf")
    return " ".join(label.casefold().split())
