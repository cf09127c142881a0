"""Sections of a study's page that are charts: learning, a metric against a setting, rows, and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from markupsafe import Markup

from mopefuse.metrics.names import in_per_cent
from mopefuse.report.chart import Chart
from mopefuse.report.curves import MAX_NAMED, Curve, curves, dots, scatter, spans_decades
from mopefuse.report.pages import Section, fragment
from mopefuse.report.study_data import StudyFacts
from mopefuse.report.sweeps import Sweep, sweeps
from mopefuse.report.themes import SERIES
from mopefuse.studies.compare import Comparison, Row, Spread

_MAX_CURVES = SERIES  # curves of one chart
_ROWS = 60  # maximum number of rows in a dot chart
T = TypeVar("T")


def sections(facts: StudyFacts, comparison: Comparison) -> list[Section]:
    """All charts that the finished runs allow."""
    rows = [row for row in comparison.rows if facts.score(row).mean == facts.score(row).mean]
    if not rows:
        return []
    found = sweeps(rows)
    parts = [_against_setting(facts, comparison, sweep) for sweep in found]
    on_a_line = {row.label for sweep in found for series in sweep.series for _, row in series.rows}
    if not {row.label for row in rows} <= on_a_line:
        parts.append(_rows(facts, comparison, rows))
    parts.append(_parameters(facts, comparison, rows))
    return [*parts, _learning(facts, comparison, rows)]


def deviation(rows: Iterable[Row]) -> str:
    """Explain the error bars, as the end of a sentence."""
    several = sorted({len(row.runs) for row in rows})
    if several[-1] == 1:
        return "one run each, so there are no error bars"
    n = f"{several[0]}" if len(several) == 1 else f"{several[0]} to {several[-1]}"
    return f"mean and sample deviation over {n} seeds"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _point(name: str, spread: Spread, x: float = 0.0) -> Curve:
    return Curve(name, [(x, spread.mean)], [spread.std or 0.0])


def _section(key: str, title: str, charts: Sequence[Chart], captions: Sequence[str], *, half: bool = False) -> Section:
    body = fragment("figures", list(zip(charts, captions, strict=True)))
    return Section(key, title, body, tuple(charts), half=half)


def _against_setting(facts: StudyFacts, comparison: Comparison, sweep: Sweep) -> Section:
    key = f"against-{sweep.path.replace('.', '-')}"
    charts, captions = [], []
    log = spans_decades([value for series in sweep.series for value, _ in series.rows])
    for number, part in enumerate(_parts(sweep.series), 1):
        lines = []
        for series in part:
            scores = [(value, facts.score(row)) for value, row in series.rows]
            points = [(value, score.mean) for value, score in scores]
            lines.append(Curve(series.name, points, [score.std or 0.0 for _, score in scores]))
        label = f"{comparison.metric} on test against {sweep.path}"
        name = key if number == 1 else f"{key}-{number}"
        up, percent = comparison.metric, in_per_cent(comparison.metric)
        charts.append(curves(name, label, lines, across=sweep.path, up=up, percent=percent, log=log))
        shown = [row for series in part for _, row in series.rows]
        names = f" of {lines[0].name}" if len(lines) == 1 and lines[0].name != sweep.path else ""
        axis = " The setting is on a logarithmic axis." if log else ""
        captions.append(f"{_sentence(label)}{names}: {deviation(shown)}.{axis}")
    return _section(key, f"Against {sweep.path}", charts, captions, half=len(charts) == 1)


def _rows(facts: StudyFacts, comparison: Comparison, rows: Sequence[Row]) -> Section:
    points = [_point(row.label, facts.score(row)) for row in rows[:_ROWS]]
    label = f"{comparison.metric} on test of each row"
    across, percent = f"test {comparison.metric}", in_per_cent(comparison.metric)
    chart = dots("rows", label, points, across=across, percent=percent)
    left = f" {len(rows) - _ROWS:,} more are only in the table." if len(rows) > _ROWS else ""
    return _section("rows", "Row by row", [chart], [f"{_sentence(label)}: {deviation(rows)}.{left}"], half=True)


def _parameters(facts: StudyFacts, comparison: Comparison, rows: Sequence[Row]) -> Section:
    points = [_point(row.label, facts.score(row), float(row.trainable)) for row in rows[:_ROWS]]
    label = f"{comparison.metric} on test against trainable parameters"
    across, up = "trainable parameters", comparison.metric
    chart = scatter("parameters", label, points, across=across, up=up, percent=in_per_cent(up))
    caption = f"{_sentence(label)}: {deviation(rows)}."
    if len(points) > MAX_NAMED:
        caption += " Numbers refer to the rows of the table, counted from the top."
    return _section("parameters", "Score and parameters", [chart], [caption], half=True)


def _learning(facts: StudyFacts, comparison: Comparison, rows: Sequence[Row]) -> Section:
    """The validation metric by step: all rows in one chart if they are few, else in several charts with the same axes."""
    lines = []
    for row in rows:
        found = facts.learning(row)
        if len(found) > 1:
            points = [(float(step), spread.mean) for step, spread in found]
            lines.append(Curve(row.label, points, [spread.std or 0.0 for _, spread in found]))
    if not lines:
        return Section("learning", "Learning", Markup("<p>There are no curves: no row was validated more than once.</p>"))
    values = [y + sign * d for line in lines for (_, y), d in zip(line.points, line.spread, strict=True) for sign in (-1, 1)]
    low, high = min(values), max(values)
    label = f"validation {comparison.metric} by step"
    charts, captions = [], []
    for number, part in enumerate(_parts(lines), 1):
        name = "validation" if number == 1 else f"validation-{number}"
        ends = (low, high) if high > low else (None, None)
        up, percent = comparison.metric, in_per_cent(comparison.metric)
        chart = curves(name, label, part, across="step", up=up, low=ends[0], high=ends[1], percent=percent, bands=True)
        charts.append(chart)
        of = f" of {part[0].name}" if len(part) == 1 else ""
        captions.append(f"{_sentence(label)}{of}: {deviation(rows)}.")
    without = [row.label for row in rows if row.label not in {line.name for line in lines}]
    if without:
        captions[-1] += f" No curve for rows that were validated only once, or never at the same steps: {', '.join(without)}."
    return _section("learning", "Learning", charts, captions)


def _parts(items: Sequence[T]) -> list[Sequence[T]]:
    """As few parts of about equal size as possible, none larger than one chart can show."""
    count = -(-len(items) // _MAX_CURVES)
    return [items[len(items) * part // count : len(items) * (part + 1) // count] for part in range(count)]
