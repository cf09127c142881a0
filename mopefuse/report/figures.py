"""Figures without a plane of two axes (see `planes`): heat maps, bars and a reliability diagram, from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mopefuse.report.drawing import Drawing, Line, Rect, Shape, Text

LETTER = 6.0  # width of one, about
_NAME = 16  # letters of a name beside a heat map


def short(text: str, most: int = _NAME) -> str:
    """A text that is cut where it is longer."""
    return text if len(text) <= most else text[: most - 1] + "…"


def middling(text: str, most: int) -> str:
    """A text that is cut in its middle where it is longer: names of rows often differ at their ends."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most about `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def plain(value: float) -> str:
    """A number with four digits that count, without an exponent where that is readable."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def heat_map(
    name: str,
    label: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    top: float | None = None,
    across: str = "",
    titles: Callable[[int, int], str] | None = None,
    written: Callable[[float], str] | None = None,
    colour: Callable[[int, int], str] = lambda row, column: "a",
) -> Drawing:
    """A table of shades: 0 (and what is no number) is no colour, `top` or the largest value the full one.

    Args:
        rows, columns: names. across: what the columns are.
        titles: of a cell. written: a number in a cell; nothing for None.
    """
    most = max((value for row in values for value in row if value == value), default=0.0) if top is None else top
    upright = max((len(short(column)) for column in columns), default=1) > 3
    side = max(13.0, min(34.0, 340.0 / max(1, len(columns))))
    tall = max(13.0, min(side, 24.0))
    left = 10 + LETTER * max((len(short(row)) for row in rows), default=1)
    above = 8 + (LETTER * max(len(short(column)) for column in columns) if upright else 12)
    shapes: list[Shape] = []
    for number, row in enumerate(rows):
        shapes.append(Text(left - 6, above + (number + 0.5) * tall + 4, short(row), "end", title=row))
    for number, column in enumerate(columns):
        x = left + (number + 0.5) * side
        shapes.append(
            Text(x + 4, above - 5, short(column), upright=True, title=column)
            if upright
            else Text(x, above - 5, column, "middle")
        )
    for i, row_values in enumerate(values):
        for j, value in enumerate(row_values):
            share = 0.0 if value != value or most <= 0 else min(1.0, max(0.0, value / most))
            x, y = left + j * side, above + i * tall
            title = titles(i, j) if titles else f"{rows[i]}, {columns[j]}: {plain(value)}"
            shapes.append(Rect(x, y, side - 1, tall - 1, "axis", 0.35))
            shapes.append(Rect(x, y, side - 1, tall - 1, colour(i, j), max(share, 0.0), title))
            if written is not None and (text := written(value)):
                strong = "paper" if share > 0.65 else "strong"
                shapes.append(Text(x + (side - 1) / 2, y + tall / 2 + 3.5, text, "middle", strong))
    height = above + len(rows) * tall + (16 if across else 2)
    if across:
        shapes.append(Text(left + len(columns) * side - 1, height - 2, across, "end"))
    return Drawing(name, label, max(120.0, left + len(columns) * side + 2), height, tuple(shapes))


def bars(
    name: str,
    label: str,
    values: Sequence[tuple[str, float]],
    *,
    top: float = 1.0,
    shown: Callable[[float], str] = plain,
    against: float | None = None,
    errors: Sequence[float] = (),
) -> Drawing:
    """Bars from the left, one under another, with their names and values.

    Args:
        top: the value of a full bar. against: a value to mark. errors: half the length of a line at the end of each.
    """
    left = 12 + LETTER * max((len(short(text, 26)) for text, _ in values), default=1)
    width, tall = 420.0, 22.0
    full = width - left - 52
    shapes: list[Shape] = []
    for number, (text, value) in enumerate(values):
        y, share = number * tall, min(1.0, max(0.0, value / top)) if top > 0 else 0.0
        shapes += [
            Text(left - 8, y + 15, short(text, 26), "end", "strong", title=text),
            Rect(left, y + 4, full, tall - 8, "axis", 0.35),
            Rect(left, y + 4, max(1.0, full * share), tall - 8, "a", 1.0, f"{text}: {shown(value)}"),
            Text(left + full + 6, y + 15, shown(value)),
        ]
        if number < len(errors) and errors[number]:
            shares = (min(1.0, max(0.0, (value + sign * errors[number]) / top)) for sign in (-1, 1))
            ends = tuple((left + full * share, y + tall / 2) for share in shares)
            shapes.append(Line(ends, "strong", 1.2))
    if against is not None and 0 <= against <= top:
        x = left + full * against / top
        shapes.append(Line(((x, 0), (x, tall * len(values))), "bad", 1, dashed=True))
    return Drawing(name, label, width, tall * len(values) + 2, tuple(shapes))


def reliability(name: str, label: str, bins: Sequence[tuple[float, float, int]]) -> Drawing:
    """How often answers of a confidence are right; the diagonal is perfect calibration, and below are counts.

    Args:
        bins: (mean confidence, share that is right, how many) of each bin of equal width, in order; 0 of an empty one.
    """
    left, top, side, low = 40.0, 8.0, 250.0, 46.0
    width, height = 420.0, top + side * 0.72 + low + 40
    plane = height - top - low - 36
    right = width - 8
    across, step = right - left, (right - left) / max(1, len(bins))
    shapes: list[Shape] = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = top + plane * (1 - share)
        shapes += [Line(((left, y), (right, y)), "axis", 1), Text(left - 6, y + 4, f"{100 * share:.0f} %", "end")]
        shapes.append(Text(left + across * share, height - 16, f"{100 * share:.0f} %", "end" if share == 1 else "middle"))
    most = max((count for _, _, count in bins), default=1) or 1
    base = height - 32
    for number, (confidence, right_share, count) in enumerate(bins):
        x = left + number * step
        if not count:
            continue
        title = f"{count:,} answers, confidence {100 * confidence:.1f} %, right {100 * right_share:.1f} %"
        low_, high = sorted((confidence, right_share))
        shapes.append(Rect(x + 1, top + plane * (1 - low_), step - 2, plane * low_, "a", 1.0, title))
        gap = "bad" if confidence > right_share else "b"
        shapes.append(Rect(x + 1, top + plane * (1 - high), step - 2, max(0.5, plane * (high - low_)), gap, 0.6, title))
        grown = max(1.0, (low - 12) * count / most)
        shapes.append(Rect(x + 1, base - grown, step - 2, grown, "text", 0.6, title))
    shapes.append(Line(((left, top + plane), (right, top)), "strong", 1, dashed=True))
    shapes.append(Line(((left, base), (right, base)), "axis", 1))
    shapes.append(Text(left - 6, base - 6, "answers", "end"))
    shapes.append(Text(right, height - 3, "confidence", "end"))
    return Drawing(name, label, width, height, tuple(shapes))
