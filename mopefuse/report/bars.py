"""Bar-like charts: bars, heat maps, histograms, sizes of images, and a reliability diagram."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mopefuse.core.formatting import percent, several
from mopefuse.report.chart import Chart, data_of, make_chart, plain, readable, short_names, zoom

_NAME, _BAR_NAME = 18, 28  # characters of a name next to a heat map, and next to a bar
_BINS = 32  # number of bins in a histogram
_PLACES = 20  # in a decade of an axis of image sizes, if there are many distinct ones
_LISTED = 40  # sizes in the table of numbers
_MAX_SIZES = 400


def bars(
    name: str,
    label: str,
    values: Sequence[tuple[str, float]],
    *,
    across: str,
    top: float = 1.0,
    shown: Callable[[float], str] = plain,
    against: float | None = None,
) -> Chart:
    """Bars from 0 to the right, one under another, with their names and values.

    Args:
        across: the quantity that they show. top: the value of a full bar. against: a value to mark with a line.
    """
    import altair as alt

    names = short_names([text for text, _ in values], _BAR_NAME)
    rows = [
        {"name": short, "value": value, "shown": shown(value), "tip": f"{text}: {shown(value)}"}
        for short, (text, value) in zip(names, values, strict=True)
    ]
    x = alt.X("value:Q", scale=alt.Scale(domain=[0, top * 1.18 or 1]), axis=None)
    y = alt.Y("name:N", sort=None, axis=alt.Axis(title=None, ticks=False, domain=False))
    base = alt.Chart(data_of(rows)).encode(x=x, y=y)
    layers = [
        base.mark_bar(cornerRadiusEnd=2, size=14).encode(tooltip=alt.Tooltip("tip:N")),
        base.mark_text(align="right").encode(x=alt.value("width"), text="shown:N"),
    ]
    if against is not None and 0 <= against <= top:
        layers.append(alt.Chart(data_of([{"value": against}])).mark_rule(style="reference").encode(x="value:Q"))
    table = [[text, shown(value)] for text, value in values]
    return make_chart(name, label, layers, ["", across], table, height=22 * len(rows))


def heat_map(
    name: str,
    label: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    across: str,
    down: str,
    top: float = 1.0,
    tips: Callable[[int, int], str],
    written: Callable[[int, int], str] | None = None,
    in_table: Callable[[int, int], str] | None = None,
    signed: bool = False,
) -> Chart:
    """A heat map with shades from none at 0 to full at `top`; NaN counts as 0.

    Args:
        rows, columns: names. across, down: titles of the columns and of the rows.
        tips: text shown when the pointer is on a cell. written: text in a cell. in_table: text in the table of numbers.
        signed: the diagonal has the colour of correct predictions, other cells that of wrong ones.
    """
    import altair as alt

    row_names, column_names = short_names(rows, _NAME), short_names(columns, _NAME)
    cells = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            shade = 0.0 if value != value or top <= 0 else min(1.0, max(0.0, value / top))
            cell: dict[str, Any] = {"row": row_names[i], "column": column_names[j], "tip": tips(i, j)}
            cell |= {"shade": -shade if signed and i != j else shade, "strong": shade > 0.6}
            cells.append(cell | ({"shown": written(i, j)} if written else {}))
    upright = max(map(len, column_names), default=0) > 3
    x_axis = alt.Axis(
        title=readable(across), labelAngle=-90 if upright else 0, ticks=False, domain=False, labelLimit=120, labelOverlap=False
    )
    x = alt.X("column:O", sort=None, axis=x_axis, scale=alt.Scale(padding=0.04))
    y_axis = alt.Axis(title=readable(down), ticks=False, domain=False, labelLimit=130)
    y = alt.Y("row:O", sort=None, axis=y_axis, scale=alt.Scale(padding=0.04))
    base = alt.Chart(data_of(cells)).encode(x=x, y=y)
    domain, colours = ([-1, 0, 1], "diverging") if signed else ([0, 1], "ramp")
    colour = alt.Color("shade:Q", scale=alt.Scale(domain=domain, range=colours, interpolate="rgb"), legend=None)
    layers = [base.mark_rect(cornerRadius=2).encode(color=colour, tooltip=alt.Tooltip("tip:N"))]
    if written:
        for strong, style in ((True, "on-colour"), (False, "strong")):
            texts = base.transform_filter(alt.FieldEqualPredicate(field="strong", equal=strong))
            layers.append(texts.mark_text(style=style).encode(text="shown:N"))
    number = in_table or (lambda i, j: percent(values[i][j]))
    table = [[row, *(number(i, j) for j in range(len(columns)))] for i, row in enumerate(rows)]
    return make_chart(name, label, layers, [f"{down} \\ {across}", *columns], table, height=24 * len(rows))


def reliability(name: str, label: str, bins: Sequence[tuple[float, float, int]]) -> Chart:
    """A reliability diagram: accuracy by confidence; the diagonal is perfect calibration.

    Args:
        bins: (mean confidence, accuracy, number of predictions) of each bin of equal width, in order; 0 if empty.
    """
    import altair as alt

    rows = []
    for confidence, right, count in bins:
        tip = f"{several(count, 'prediction')}, confidence {percent(confidence)}, accuracy {percent(right)}"
        if count:
            rows.append({"confidence": confidence, "right": right, "count": count, "tip": tip, "over": confidence > right})
    scale = alt.Scale(domain=[0, 1])
    x_axis = alt.Axis(title="confidence of the prediction", format=".0%", grid=False, tickCount=5)
    x = alt.X("confidence:Q", scale=scale, axis=x_axis)
    y_axis = alt.Axis(title="accuracy", format=".0%", domain=False, ticks=False)
    size = alt.Size("count:Q", scale=alt.Scale(range=[30, 500]), legend=None)
    ends = data_of([{"confidence": 0, "right": 0}, {"confidence": 1, "right": 1}])
    y = alt.Y("right:Q", scale=scale, axis=y_axis)
    layers: list[Any] = [alt.Chart(ends).mark_line(style="reference").encode(x=x, y=y)]
    for over, style in ((True, "over"), (False, "under")):
        base = alt.Chart(data_of([row for row in rows if row["over"] == over])).encode(x=x, y=y)
        layers.append(base.mark_rule(style=style, strokeWidth=2).encode(y2="confidence:Q"))
        layers.append(base.mark_circle(style=style, opacity=0.85).encode(size=size, tooltip=alt.Tooltip("tip:N")))
    columns = ["mean confidence", "right", "predictions"]
    table = [[percent(confidence), percent(right), f"{count:,}"] for confidence, right, count in bins if count]
    return make_chart(name, label, layers, columns, table, height=250)


def histogram(name: str, label: str, values: Sequence[int], *, unit: str, what: str, limit: int = 0) -> Chart | None:
    """Whole numbers from 0; the last bar has everything beyond the 99th percentile. None if there are no values.

    Args:
        unit: unit of the values. what: what is counted, in the singular. limit: a value to mark, 0 for none.
    """
    import altair as alt

    if not values:
        return None
    high = max(1, math.ceil(float(np.percentile(values, 99))))
    if limit and high < limit <= 2 * high:
        high = limit
    step = max(1, math.ceil((high + 1) / _BINS))
    count = math.ceil((high + 1) / step)
    heights = Counter(min(value // step, count - 1) for value in values)
    rows, table = [], []
    for number in range(count):
        first, last = number * step, (number + 1) * step - 1
        open_ended = number == count - 1 and max(values) > last
        range_ = f"{first:,} or more" if open_ended else f"{first:,}" if first == last else f"{first:,} to {last:,}"
        tip = f"{range_} {unit}: {several(heights[number], what)}"
        rows.append({"first": first + 0.05 * step, "end": first + 0.95 * step, "count": heights[number], "tip": tip})
        table.append([range_, f"{heights[number]:,}"])
    x_axis = alt.Axis(title=unit, format=",d", grid=False)
    x = alt.X("first:Q", scale=alt.Scale(domain=[0, count * step], nice=False), axis=x_axis)
    y = alt.Y("count:Q", axis=alt.Axis(title=f"{what}s", format=",.6~r", tickCount=4, tickMinStep=1, domain=False, ticks=False))
    drawn = alt.Chart(data_of(rows)).mark_rect(cornerRadius=1)
    layers = [drawn.encode(x=x, x2="end:Q", y=y, y2=alt.datum(0), tooltip=alt.Tooltip("tip:N"))]
    if limit and limit <= count * step:
        mark = alt.Chart(data_of([{"first": limit, "shown": "limit of the encoder"}])).encode(x="first:Q")
        layers.append(mark.mark_rule(style="reference"))
        layers.append(mark.mark_text(style="strong", align="right", dx=-5, dy=7).encode(y=alt.value(0), text="shown:N"))
    return make_chart(name, label, layers, [unit, f"{what}s"], table, height=190)


def sizes(name: str, label: str, found: Iterable[tuple[int, int]]) -> Chart | None:
    """Widths and heights in pixels, both axes logarithmic; a larger dot stands for more images. None without images."""
    import altair as alt

    counts = Counter(found)
    if not counts:
        return None
    many = len(counts) > _MAX_SIZES
    groups: Counter[tuple[float, float]] = Counter()
    for (width, height), number in counts.items():
        groups[(_rounded(width), _rounded(height)) if many else (width, height)] += number
    about, rows = "about " if many else "", list[dict[str, Any]]()
    for (wide, high), number in sorted(groups.items(), key=lambda item: -item[1]):
        tip = f"{about}{wide:,.0f} x {high:,.0f} pixels: {number:,} image{'' if number == 1 else 's'}"
        rows.append({"width": wide, "height": high, "count": number, "tip": tip})
    x = alt.X("width:Q", scale=_pixels([row["width"] for row in rows]), axis=_pixel_axis("width"))
    y = alt.Y("height:Q", scale=_pixels([row["height"] for row in rows]), axis=_pixel_axis("height"))
    size = alt.Size("count:Q", scale=alt.Scale(range=[24, 320], domainMin=0), legend=None)
    dots = alt.Chart(data_of(rows)).mark_circle(opacity=0.55).encode(x=x, y=y, size=size, tooltip=alt.Tooltip("tip:N"))
    table = [[f"{about}{row['width']:,.0f} x {row['height']:,.0f}", f"{row['count']:,}"] for row in rows[:_LISTED]]
    return make_chart(name, label, [dots.add_params(zoom())], ["pixels", "images"], table, height=190)


def _rounded(pixels: float) -> float:
    """The nearest of 20 sizes in a decade."""
    return float(10 ** (round(math.log10(pixels) * _PLACES) / _PLACES))


def _pixels(values: Sequence[float]) -> Any:
    import altair as alt

    return alt.Scale(type="log", domain=[min(values) / 1.4, max(values) * 1.4], nice=False)


def _pixel_axis(title: str) -> Any:
    import altair as alt

    return alt.Axis(title=f"{title} in pixels", format=",.0f", tickCount=5, labelOverlap=True, grid=False)
