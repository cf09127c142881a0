"""Numbers as people read them, in a terminal and on a page."""

from __future__ import annotations


def percent(value: float | None) -> str:
    """0.8123 as 81.2 %."""
    return "-" if value is None or value != value else f"{100 * value:.1f} %"


def share(value: float) -> str:
    """0.8 as 80 %, 0.8123 as 81.23 %."""
    return f"{100 * value:.4g} %"


def count(number: int) -> str:
    """1234567 as 1.23 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def size(length: int) -> str:
    """1536 as 1.54 kB."""
    return f"{count(length)}{'' if length >= 1000 else ' '}B"


def duration(seconds: float) -> str:
    """75.2 as 1:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def several(number: int, what: str, plural: str = "") -> str:
    """1 row, 2 rows, 1,000 rows; `plural` of words that have another."""
    return f"{number:,} {what if number == 1 else plural or f'{what}s'}"
