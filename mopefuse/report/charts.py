"""Charts as shapes that a template draws as inline SVG. Places are in units of a plot that is `WIDTH` x `HEIGHT`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 400.0, 170.0
_BARS = 32
_STEPS = 40  # of a scatter's axis, where there are many points
_MOST_POINTS = 400


@dataclass(frozen=True)
class Tick:
    """A number on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram, from the bottom up."""

    x: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """How often values of a range come."""

    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    limit: float | None  # where a limit is, if it is in sight


@dataclass(frozen=True)
class Dot:
    """What a scatter has in one place."""

    x: float
    y: float
    radius: float
    title: str


@dataclass(frozen=True)
class Scatter:
    """Sizes of images, both axes logarithmic."""

    dots: tuple[Dot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def histogram(values: Sequence[int], *, unit: str, limit: int = 0) -> Histogram:
    """Whole numbers from 0; the last bar has all that is beyond the 99th percentile.

    Args:
        limit: a value to mark, 0 for none.
    """
    if not values:
        return Histogram((), (), None)
    high = max(1, math.ceil(float(np.percentile(values, 99))))
    if limit and high < limit <= 2 * high:
        high = limit
    step = max(1, math.ceil((high + 1) / _BARS))
    count = math.ceil((high + 1) / step)
    heights = Counter(min(value // step, count - 1) for value in values)
    peak, width = max(heights.values()), WIDTH / count
    bars = []
    for number in range(count):
        first, last = number * step, (number + 1) * step - 1
        range_ = f"{first} or more" if number == count - 1 and max(values) > last else _range(first, last)
        title = f"{range_} {unit}: {heights[number]:,} texts"
        bars.append(Bar(number * width + 0.5, max(0.5, width - 1), HEIGHT * heights[number] / peak, title))
    scale = WIDTH / (count * step)
    ticks = tuple(Tick(value * scale, f"{value:,}") for value in _nice(count * step))
    return Histogram(tuple(bars), ticks, limit * scale if limit and limit <= count * step else None)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _nice(end: int) -> list[int]:
    rough = max(1.0, end / 5)
    power = 10 ** math.floor(math.log10(rough))
    step = next(int(power * factor) for factor in (1, 2, 5, 10) if power * factor >= rough)
    return list(range(0, end, step))


def scatter(sizes: Iterable[tuple[int, int]]) -> Scatter:
    """Widths and heights in pixels; a larger dot stands for more images."""
    counts = Counter(sizes)
    if not counts:
        return Scatter((), (), ())
    x_low, x_high = _bounds([width for width, _ in counts])
    y_low, y_high = _bounds([height for _, height in counts])
    many = len(counts) > _MOST_POINTS
    places: Counter[tuple[float, float]] = Counter()
    named: dict[tuple[float, float], str] = {}
    for (width, height), number in counts.items():
        x, y = _place(width, x_low, x_high), _place(height, y_low, y_high)
        at = (round(x * _STEPS) / _STEPS, round(y * _STEPS) / _STEPS) if many else (x, y)
        places[at] += number
        named.setdefault(at, f"{'about ' if many else ''}{width} x {height} pixels")
    most = max(places.values())
    dots = tuple(
        Dot(x * WIDTH, HEIGHT - y * HEIGHT, 2 + 6 * math.sqrt(number / most), f"{named[x, y]}: {number:,} images")
        for (x, y), number in sorted(places.items(), key=lambda item: -item[1])
    )
    x_ticks = tuple(Tick(_place(value, x_low, x_high) * WIDTH, str(value)) for value in _logarithmic(x_low, x_high))
    y_ticks = tuple(Tick(HEIGHT - _place(value, y_low, y_high) * HEIGHT, str(value)) for value in _logarithmic(y_low, y_high))
    return Scatter(dots, x_ticks, y_ticks)


def _bounds(values: Sequence[int]) -> tuple[float, float]:
    return min(values) / 1.4, max(values) * 1.4


def _place(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _logarithmic(low: float, high: float) -> list[int]:
    """1, 2 and 5 of each power of ten in a range; fewer where there are many, and the middle where there are none."""
    every = [factor * 10**power for power in range(8) for factor in (1, 2, 5) if low <= factor * 10**power <= high]
    if len(every) > 6:
        every = [value for value in every if str(value)[0] == "1"]
    return every if len(every) > 1 else [round(math.sqrt(low * high))]
