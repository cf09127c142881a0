"""Charts with two axes: curves and points with their spread, and a dot for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mopefuse.core.formatting import share
from mopefuse.report.chart import Chart, data_of, make_chart, plain, readable, short_names, zoom

MAX_NAMED = 15  # points of a scatter that have a legend
_NAME = 44  # characters of a name in a legend
_FEW = 40  # points of a curve that are marked
_ZOOM_FROM = 8  # distinct places of a curve that are worth a zoom
_HEIGHT = 240


@dataclass(frozen=True)
class Curve:
    """Points to be joined; `spread` is the half-width of the error bar of each (a deviation, an interval)."""

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = ()

    def spreads(self) -> list[float]:
        """The spread of each point, 0 if there is none."""
        return [*self.spread, *[0.0] * (len(self.points) - len(self.spread))]


def spans_decades(values: Sequence[float]) -> bool:
    """Whether an axis with these values should be logarithmic."""
    return min(values) > 0 and max(values) / min(values) >= 10


def curves(
    name: str,
    label: str,
    lines: Sequence[Curve],
    *,
    across: str,
    up: str,
    mark: float | None = None,
    low: float | None = None,
    high: float | None = None,
    percent: bool = False,
    log: bool = False,
    bands: bool = False,
) -> Chart:
    """Curves in one chart, with a legend if there are several.

    Args:
        across, up: titles of the horizontal and of the vertical axis. mark: position of the selected step.
        low, high: limits of the vertical axis; None to derive them from the values. percent: write values as percentages.
        log: the horizontal axis is logarithmic. bands: the spread is one area, not a bar at each point.
    """
    import altair as alt

    shown = share if percent else plain
    names = short_names([line.name for line in lines], _NAME)
    rows = [row for line, short in zip(lines, names, strict=True) for row in _points(line, short, across, shown)]
    xs = sorted({row["x"] for row in rows})
    x = alt.X("x:Q", scale=_across_scale(log), axis=_across_axis(across, xs if log and len(xs) <= 8 else None))
    if low is not None and high is None:
        high = low + 1.06 * (max(row["high"] for row in rows) - low)
    scale, axis = _up_scale(low, high), _up_axis(up, percent)
    y = alt.Y("y:Q", scale=scale, axis=axis)
    base = alt.Chart(data_of(rows)).encode(x=x, **({} if len(lines) == 1 else {"color": _colour(names)}))
    layers = []
    if any(row["low"] < row["high"] for row in rows):
        spread = base.mark_area(opacity=0.12) if bands and len(xs) > 1 else base.mark_rule(strokeWidth=1.4)
        layers.append(spread.encode(y=alt.Y("low:Q", scale=scale, axis=axis), y2="high:Q"))
    layers.append(base.mark_line(strokeWidth=2).encode(y=y))
    few = max(len(line.points) for line in lines) <= _FEW
    dots = base.mark_circle(size=42 if few else 90, opacity=1 if few else 0).encode(y=y, tooltip=alt.Tooltip("tip:N"))
    layers.append(dots.add_params(zoom()) if len(xs) >= _ZOOM_FROM else dots)
    if mark is not None and xs[0] <= mark <= xs[-1]:
        layers += _selected(mark, near_end=mark > (xs[0] + 2 * xs[-1]) / 3)
    return make_chart(name, label, layers, *_table(lines, across, up, shown), height=_HEIGHT)


def scatter(name: str, label: str, points: Sequence[Curve], *, across: str, up: str, percent: bool = False) -> Chart:
    """Points (curves with a single point), with their numbers and spread; a horizontal axis over decades is logarithmic.

    A legend has their names, unless there are many.
    """
    import altair as alt

    shown = share if percent else plain
    named = len(points) <= MAX_NAMED
    names = short_names([f"{number} {point.name}" for number, point in enumerate(points, 1)], _NAME)
    rows = []
    for number, (point, short) in enumerate(zip(points, names, strict=True), 1):
        tip = f"{point.name}: {_value(point, 0, shown)}, {across} {plain(point.points[0][0])}"
        rows.append({**_points(point, short, across, shown)[0], "number": str(number), "tip": tip})
    log = spans_decades([row["x"] for row in rows])
    scale, axis = alt.Scale(zero=False, padding=14), _up_axis(up, percent)
    x = alt.X("x:Q", scale=_across_scale(log, padding=20), axis=_across_axis(across, None))
    y = alt.Y("y:Q", scale=scale, axis=axis)
    base = alt.Chart(data_of(rows)).encode(x=x)
    tint = {"color": _colour(names)} if named else {}
    layers = [
        base.mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q", scale=scale, axis=axis), y2="high:Q", **tint),
        base.mark_circle(size=90, opacity=1).encode(y=y, tooltip=alt.Tooltip("tip:N"), **tint).add_params(zoom()),
        base.mark_text(style="strong", dx=11, dy=-7).encode(y=y, text="number:N"),
    ]
    columns = ["", "row", across, up]
    table = [
        [str(number), point.name, plain(point.points[0][0]), _value(point, 0, shown)] for number, point in enumerate(points, 1)
    ]
    return make_chart(name, label, layers, columns, table, height=_HEIGHT)


def dots(name: str, label: str, points: Sequence[Curve], *, across: str, percent: bool = False) -> Chart:
    """A line for each point (a curve with a single point), with its spread; `x` of the points is not used."""
    import altair as alt

    shown = share if percent else plain
    names = short_names([point.name for point in points], 30)
    rows = [_points(point, short, "", shown)[0] for point, short in zip(points, names, strict=True)]
    for row, point in zip(rows, points, strict=True):
        row["tip"] = f"{point.name}: {_value(point, 0, shown)}"
    scale = alt.Scale(zero=False, padding=10)
    axis = alt.Axis(title=readable(across), format=_number_format(percent), tickCount=5, labelOverlap=True)
    y = alt.Y("series:N", sort=None, axis=alt.Axis(title=None, ticks=False, domain=False))
    base = alt.Chart(data_of(rows)).encode(y=y)
    layers = [
        base.mark_rule(style="spread", strokeWidth=1.6).encode(x=alt.X("low:Q", scale=scale, axis=axis), x2="high:Q"),
        base.mark_circle(size=80, opacity=1).encode(x=alt.X("y:Q", scale=scale, axis=axis), tooltip=alt.Tooltip("tip:N")),
    ]
    table = [[point.name, _value(point, 0, shown)] for point in points]
    return make_chart(name, label, layers, ["row", across], table, height=24 * len(rows))


# -- parts


def _points(line: Curve, short: str, across: str, shown: Callable[[float], str]) -> list[dict[str, Any]]:
    found = []
    for place, ((x, y), d) in enumerate(zip(line.points, line.spreads(), strict=True)):
        tip = f"{line.name}, {across} {plain(x)}: {_value(line, place, shown)}"
        found.append({"x": x, "y": y, "low": y - d, "high": y + d, "series": short, "tip": tip})
    return found


def _value(line: Curve, place: int, shown: Callable[[float], str]) -> str:
    d = line.spreads()[place]
    return shown(line.points[place][1]) + (f" ± {shown(d)}" if d else "")


def _table(
    lines: Sequence[Curve], across: str, up: str, shown: Callable[[float], str]
) -> tuple[list[str], list[list[str]]]:
    """One row for each place on the horizontal axis, one column for each curve."""
    xs = sorted({x for line in lines for x, _ in line.points})
    values = [{x: _value(line, place, shown) for place, (x, _) in enumerate(line.points)} for line in lines]
    columns = [across, *([up] if len(lines) == 1 else [line.name for line in lines])]
    return columns, [[plain(x), *(found.get(x, "") for found in values)] for x in xs]


def _colour(names: Sequence[str]) -> Any:
    import altair as alt

    columns = 1 if max(map(len, names)) > 20 or len(names) < 2 else 2
    legend = alt.Legend(title=None, orient="bottom", direction="vertical", columns=columns)
    return alt.Color("series:N", scale=alt.Scale(domain=[readable(name) for name in names]), legend=legend)


def _number_format(percent: bool) -> str:
    return ".1~%" if percent else ",.6~r"


def _across_scale(log: bool, padding: int = 6) -> Any:
    import altair as alt

    if log:
        return alt.Scale(type="log", nice=False, padding=padding)
    return alt.Scale(nice=False, zero=False, padding=padding)


def _across_axis(title: str, ticks: Sequence[float] | None) -> Any:
    import altair as alt

    at = {} if ticks is None else {"values": list(ticks)}
    return alt.Axis(title=readable(title), format=_number_format(False), grid=False, tickCount=6, labelOverlap=True, **at)


def _up_scale(low: float | None, high: float | None) -> Any:
    import altair as alt

    ends = {name: end for name, end in (("domainMin", low), ("domainMax", high)) if end is not None}
    return alt.Scale(zero=False, nice=high is None, **ends)


def _up_axis(title: str, percent: bool) -> Any:
    import altair as alt

    return alt.Axis(title=readable(title), format=_number_format(percent), tickCount=5, domain=False, ticks=False)


def _selected(step: float, *, near_end: bool) -> list[Any]:
    import altair as alt

    base = alt.Chart(data_of([{"x": step, "shown": "selected"}])).encode(x="x:Q")
    align, dx = ("right", -5) if near_end else ("left", 5)
    text = base.mark_text(style="strong", align=align, dx=dx, dy=-7).encode(y=alt.value(0), text="shown:N")
    return [base.mark_rule(style="reference"), text]
