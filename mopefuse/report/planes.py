"""Figures with two axes: curves and points with their spread, and a table of dots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mopefuse.report.drawing import Area, Dot, Drawing, Line, Rect, Shape, Text
from mopefuse.report.figures import LETTER, middling, plain, ticks

COLOURS = ("a", "b", "c", "d", "e", "f")
MOST_NAMED = 15  # points of a scatter
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT = 420.0, 216.0, 44.0, 34.0, 8.0  # `_HEIGHT` with a legend of one line
_LINE, _NAME = 16.0, 50  # of a legend; letters of a name there
_FEW = 40  # points of a line that are marked


@dataclass(frozen=True)
class Curve:
    """Points to be joined; `spread` is how far to either side of each they may lie (a deviation, an interval)."""

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()


@dataclass(frozen=True)
class _Axis:
    """Where values lie, as a share of its length."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)

    def ticks(self, most: int = 5) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, most)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [factor * 10.0**power for power in powers for factor in factors]
            found = [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]
            if len(found) <= most + 1:
                break
        return found


def spans_decades(values: Sequence[float]) -> bool:
    """Whether an axis of these is better logarithmic."""
    return min(values) > 0 and max(values) / min(values) >= 10


def curves(
    name: str,
    label: str,
    lines: Sequence[Curve],
    *,
    across: str,
    mark: float | None = None,
    low: float | None = None,
    high: float | None = None,
    shown: Callable[[float], str] = plain,
    log: bool = False,
    bands: bool = False,
) -> Drawing:
    """Curves in one plane, with a legend where there are several.

    Args:
        across: what is on the horizontal axis. mark: where to put a dashed line.
        low, high: of the vertical axis; the values decide where None. shown: how a value is written.
        log: the horizontal axis is logarithmic, with ticks at the points where there are few.
        bands: the spread is one area, not a bar at each point.
    """
    xs = sorted({x for line in lines for x, _ in line.points})
    up = _upright(lines, low, high)
    key = _legend([line.name for line in lines] if len(lines) > 1 else [])
    plane = _Plane(_Axis(*_apart(xs[0], xs[-1]), log), up, key)
    shapes = plane.grid(across, shown, xs if log and len(xs) <= 8 else None)
    if mark is not None and xs[0] <= mark <= xs[-1]:
        shapes += plane.mark(mark)
    for number, line in enumerate(lines):
        shapes += _spread(plane, line, COLOURS[number % len(COLOURS)], bands=bands)
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        shapes.append(Line(tuple(plane.at(x, y) for x, y in line.points), colour, 1.8))
        for (x, y), d in zip(line.points, _spreads(line), strict=True):
            if len(line.points) <= _FEW:
                told = shown(y) + (f" ± {shown(d)}" if d else "")
                shapes.append(Dot(*plane.at(x, y), 2.6, colour, f"{line.name}, {across} {plain(x)}: {told}"))
    return Drawing(name, label, _WIDTH, plane.height, tuple(shapes + key))


def scatter(
    name: str, label: str, points: Sequence[Curve], *, across: str, shown: Callable[[float], str] = plain
) -> Drawing:
    """Points, each a curve of one, with their numbers and spread; the horizontal axis is logarithmic over decades.

    Their names are there too, unless there are many.
    """
    xs = [x for point in points for x, _ in point.points]
    log = spans_decades(xs)
    low, high = _apart(min(xs), max(xs))
    room = (high / low) ** 0.06 if log else (high - low) * 0.06
    sides = _Axis(low / room, high * room, log) if log else _Axis(low - room, high + room)
    key = _legend([f"{number} {point.name}" for number, point in enumerate(points, 1)] if len(points) <= MOST_NAMED else [])
    plane = _Plane(sides, _roomy(points), key)
    shapes = plane.grid(across, shown)
    for number, point in enumerate(points):
        colour, (x, y) = COLOURS[number % len(COLOURS)], point.points[0]
        d = _spreads(point)[0]
        told = f"{point.name}: {shown(y)}{f' ± {shown(d)}' if d else ''}, {across} {plain(x)}"
        shapes += _bar(plane, x, y, d, colour)
        at = plane.at(x, y)
        shapes += [Dot(*at, 4, colour, told), Text(at[0] + 7, at[1] + 4, str(number + 1), colour="strong")]
    return Drawing(name, label, _WIDTH, plane.height, tuple(shapes + key))


def dots(name: str, label: str, points: Sequence[Curve], *, across: str, shown: Callable[[float], str] = plain) -> Drawing:
    """A line for each point, a curve of one, with its spread; `x` of the points is left out."""
    tall, left = 22.0, 14 + LETTER * max(len(middling(point.name, 30)) for point in points)
    sides = _roomy(points)
    full, bottom = _WIDTH - left - _RIGHT, tall * len(points)

    def place(value: float) -> float:
        return left + full * sides.place(value)

    shapes: list[Shape] = []
    for tick in sides.ticks(6):
        x = place(tick)
        shapes += [Line(((x, 0), (x, bottom)), "axis", 1), Text(x, bottom + 16, shown(tick), "middle")]
    for number, point in enumerate(points):
        y, value, d = (number + 0.5) * tall, point.points[0][1], _spreads(point)[0]
        told = f"{point.name}: {shown(value)}{f' ± {shown(d)}' if d else ''}"
        shapes.append(Text(left - 8, y + 4, middling(point.name, 30), "end", "strong", title=point.name))
        if d:
            shapes.append(Line(((place(value - d), y), (place(value + d), y)), "a", 1.5, title=told))
        shapes.append(Dot(place(value), y, 4, "a", told))
    shapes.append(Text(_WIDTH - _RIGHT, bottom + 31, across, "end"))
    return Drawing(name, label, _WIDTH, bottom + 34, tuple(shapes))


# -- parts


@dataclass(frozen=True)
class _Plane:
    x: _Axis
    y: _Axis
    legend: Sequence[Shape]

    @property
    def top(self) -> float:
        return 26.0 + max(0.0, max((shape.y for shape in self.legend if isinstance(shape, Text)), default=0.0) - 13)

    @property
    def height(self) -> float:
        return _HEIGHT + self.top - 26

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = _LEFT + self.x.place(x) * (_WIDTH - _LEFT - _RIGHT)
        return across, self.height - _BOTTOM - self.y.place(y) * (self.height - self.top - _BOTTOM)

    def grid(self, across: str, shown: Callable[[float], str], x_ticks: Sequence[float] | None = None) -> list[Shape]:
        shapes: list[Shape] = []
        for tick in self.y.ticks():
            y = self.at(self.x.low, tick)[1]
            ends = ((_LEFT, y), (_WIDTH - _RIGHT, y))
            shapes += [Line(ends, "axis", 1), Text(_LEFT - 6, y + 4, shown(tick), "end")]
        for tick in self.x.ticks(6) if x_ticks is None else x_ticks:
            shapes.append(Text(self.at(tick, self.y.low)[0], self.height - _BOTTOM + 16, plain(tick), "middle"))
        shapes.append(Text(_WIDTH - _RIGHT, self.height - 3, across, "end"))
        return shapes

    def mark(self, value: float) -> list[Shape]:
        x = self.at(value, self.y.low)[0]
        near_end = x > _WIDTH - 80
        ends = ((x, self.top - 4), (x, self.height - _BOTTOM))
        told = Text(x - 4 if near_end else x + 4, self.top - 6, "selected", "end" if near_end else "start", "strong")
        return [Line(ends, "strong", 1, dashed=True, title=f"selected: {plain(value)}"), told]


def _apart(low: float, high: float) -> tuple[float, float]:
    room = abs(low) * 0.1 or 1.0
    return (low, high) if high > low else (low - room, low + room)


def _spreads(line: Curve) -> list[float]:
    return [*line.spread, *[0.0] * (len(line.points) - len(line.spread))]


def _roomy(points: Sequence[Curve]) -> _Axis:
    """An axis that holds all points and their spread, and dots around them."""
    axis = _upright(points, None, None)
    room = (axis.high - axis.low) * 0.06
    return _Axis(axis.low - room, axis.high + room)


def _upright(lines: Sequence[Curve], low: float | None, high: float | None) -> _Axis:
    """A vertical axis that holds all points and their spread."""
    ends = [y + sign * d for line in lines for (_, y), d in zip(line.points, _spreads(line), strict=True) for sign in (-1, 1)]
    return _Axis(*_apart(min(ends) if low is None else low, max(ends) if high is None else high))


def _bar(plane: _Plane, x: float, y: float, d: float, colour: str) -> list[Shape]:
    """A spread with its ends."""
    if not d:
        return []
    (across, top), (_, bottom) = plane.at(x, y + d), plane.at(x, y - d)
    caps = [Line(((across - 3, end), (across + 3, end)), colour, 1) for end in (top, bottom)]
    return [Line(((across, top), (across, bottom)), colour, 1), *caps]


def _spread(plane: _Plane, line: Curve, colour: str, *, bands: bool) -> list[Shape]:
    if not any(line.spread):
        return []
    pairs = list(zip(line.points, _spreads(line), strict=True))
    if not bands or len(pairs) == 1:
        return [shape for (x, y), d in pairs for shape in _bar(plane, x, y, d, colour)]
    edge = [plane.at(x, y + d) for (x, y), d in pairs] + [plane.at(x, y - d) for (x, y), d in reversed(pairs)]
    return [Area(tuple(edge), colour, 0.15, line.name)]


def _legend(names: Sequence[str]) -> list[Shape]:
    """Names with their colours, in as many lines as they need."""
    shapes: list[Shape] = []
    x, y = _LEFT, 4.0
    for number, name in enumerate(names):
        text = middling(name, _NAME)
        needed = 28 + LETTER * len(text)
        if x > _LEFT and x + needed - 14 > _WIDTH:
            x, y = _LEFT, y + _LINE
        title = name if text != name else ""
        shapes += [Rect(x, y, 10, 10, COLOURS[number % len(COLOURS)]), Text(x + 14, y + 9, text, title=title)]
        x += needed
    return shapes
