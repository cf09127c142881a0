"""Formatting of text and numbers for terminals, files and pages.

All output of text from data, files or other people's models goes through `visible`, directly or through another function
here: otherwise a terminal would execute escape sequences in a label, and a line break in a label could fake a line.
"""

from __future__ import annotations

import json
import re
from typing import Any

_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
"""Control characters, characters that reorder a line (such as U+202E), and noncharacters."""

_MARKDOWN = re.compile(r"[|`]|<(?=[A-Za-z/!?])")


def visible(text: object, *, lines: bool = False) -> str:
    """Escape control and reordering characters: ``\\x1b[31m``, ``\\x0a``, ``\\u202e``.

    Args:
        lines: keep line breaks and tabs.
    """
    return _HIDDEN.sub(_layout if lines else _spelt, str(text))


def _spelt(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _layout(found: re.Match[str]) -> str:
    return found[0] if found[0] in "\n\t" else _spelt(found)


def json_text(value: Any, **options: Any) -> str:
    """Serialise to JSON, with control and reordering characters as JSON escapes and other characters unescaped."""
    text = json.dumps(value, **{"ensure_ascii": False, **options})
    return _HIDDEN.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def spreadsheet_cell(value: object) -> object:
    """Format a cell of CSV; an apostrophe is prepended to text that a spreadsheet would interpret as a formula."""
    if not isinstance(value, str):
        return value
    return f"'{visible(value)}" if value[:1] in tuple("=+-@\t\r") else visible(value)


def markdown(text: object) -> str:
    """Escape a text for a line or table cell of Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text))


def percent(value: float | None) -> str:
    """Format 0.8123 as 81.2 %."""
    return "-" if value is None or value != value else f"{100 * value:.1f} %"


def share(value: float) -> str:
    """Format 0.8 as 80 %, 0.8123 as 81.23 %."""
    return f"{100 * value:.4g} %"


def count(number: int) -> str:
    """Format 1234567 as 1.23 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def size(length: int) -> str:
    """Format 1536 as 1.54 kB."""
    return f"{count(length)}{'' if length >= 1000 else ' '}B"


def duration(seconds: float) -> str:
    """Format 75.2 seconds as 1:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def several(number: int, what: str, plural: str = "") -> str:
    """Format a number with a noun: 1 row, 2 rows, 1,000 rows; `plural` is for irregular nouns."""
    return f"{number:,} {what if number == 1 else plural or f'{what}s'}"
