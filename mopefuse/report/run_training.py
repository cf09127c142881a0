"""Sections of a run's page about its training: curves from metrics.jsonl, time, memory and parameters."""

from __future__ import annotations

from typing import Any

from mopefuse.core.formatting import percent, several
from mopefuse.metrics.names import in_per_cent
from mopefuse.report.bars import bars
from mopefuse.report.chart import Chart
from mopefuse.report.curves import Curve, curves
from mopefuse.report.pages import Section, fragment
from mopefuse.report.run_data import RunFacts


def training(facts: RunFacts) -> Section | None:
    """Loss of training and validation, and the validation metric, by step."""
    trained = _curve(facts, lambda line: line.get("loss"))
    validated = _curve(facts, lambda line: (line.get("val") or {}).get("loss"))
    name = facts.main_metric
    scores = _curve(facts, lambda line: (line.get("val") or {}).get(name))
    mark, charts = float(facts.step), list[Chart]()
    lines = [Curve(title, points) for title, points in (("training", trained), ("validation", validated)) if points]
    if lines:
        charts.append(curves("loss", "loss by step", lines, across="step", up="loss", mark=mark, low=0.0))
    if scores:
        title = f"validation {name} by step"
        line = Curve(name, scores)
        charts.append(curves("validation", title, [line], across="step", up=name, mark=mark, percent=in_per_cent(name)))
    if not charts:
        return None
    captions = [f"{chart.label}; the dashed line marks the checkpoint that this page shows" for chart in charts]
    body = fragment("figures", list(zip(charts, captions, strict=True)))
    return Section("training", "Training", body, tuple(charts))


def _curve(facts: RunFacts, value: Any) -> list[tuple[float, float]]:
    found = ((line["step"], value(line)) for line in facts.log)
    return [(float(step), float(number)) for step, number in found if isinstance(number, int | float)]


def resources(facts: RunFacts) -> Section | None:
    """Time, memory, machine, and the trained parameters by part."""
    result = facts.result
    if not result:
        return None
    rows: list[tuple[str, str]] = []
    if "seconds" in result:
        rows.append(("time", f"{_duration(result['seconds'])}, {result.get('steps', 0):,} steps"))
    if result.get("peak_memory_bytes"):
        rows.append(("peak memory", f"{result['peak_memory_bytes'] / 1e6:,.0f} MB"))
    if "device" in result:
        rows.append(("device", result["device"]))
        rows.append(("processes", f"{result.get('processes', 1)}, each with {several(result.get('threads', 1), 'thread')}"))
    parameters = result.get("parameters", {})
    if parameters:
        trained = f"{parameters['trainable']:,} ({percent(parameters['trainable'] / max(1, parameters['total']))})"
        rows.append(("parameters", f"{parameters['total']:,}, of which {trained} are trained"))
    rows.append(("software", ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())))
    charts: tuple[Chart, ...] = ()
    if parts := list(parameters.get("by_part", {}).items()):
        most = max(count for _, count in parts)
        label = "trained parameters by part"
        charts = (bars("parameters", label, parts, across="parameters", top=most, shown=lambda value: f"{value:,.0f}"),)
    return Section("resources", "Resources", fragment("resources", rows, charts), charts, half=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
