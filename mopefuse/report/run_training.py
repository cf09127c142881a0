"""Sections of a run's page that look at how it was trained: curves from metrics.jsonl, time, memory and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mopefuse.core.formatting import percent, share
from mopefuse.report import figures, planes
from mopefuse.report.drawing import Drawing
from mopefuse.report.facts import RunFacts
from mopefuse.report.pages import Section, fragment
from mopefuse.report.run_answers import main_metric


def training(facts: RunFacts) -> Section | None:
    """Loss of training and validation, and the validation metric, by step."""
    trained = _curve(facts, lambda line: line.get("loss"))
    validated = _curve(facts, lambda line: (line.get("val") or {}).get("loss"))
    name = main_metric(facts)
    scores = _curve(facts, lambda line: (line.get("val") or {}).get(name))
    mark, drawings = float(facts.step), list[Drawing]()
    lines = [planes.Curve(title, points) for title, points in (("training", trained), ("validation", validated)) if points]
    if lines:
        drawings.append(planes.curves("loss", "loss by step", lines, across="step", mark=mark, low=0.0))
    if scores:
        score = planes.Curve(name, scores)
        title = f"validation {name} by step"
        drawings.append(planes.curves("validation", title, [score], across="step", mark=mark, shown=share))
    if not drawings:
        return None
    told = [f"{drawing.label}; the line is at the step whose weights answered on this page" for drawing in drawings]
    body = fragment("figures", [(drawing.svg(), text) for drawing, text in zip(drawings, told, strict=True)])
    return Section("training", "Training", body, tuple(drawings))


def _curve(facts: RunFacts, value: Any) -> list[tuple[float, float]]:
    found = ((line["step"], value(line)) for line in facts.log)
    return [(float(step), float(number)) for step, number in found if isinstance(number, int | float)]


def resources(facts: RunFacts) -> Section | None:
    """Time, memory, where, and the trained parameters by part."""
    result = facts.result
    if not result:
        return None
    rows: list[tuple[str, str]] = []
    if "seconds" in result:
        rows.append(("time", f"{_duration(result['seconds'])}, {result.get('steps', 0):,} steps"))
    if result.get("peak_memory_bytes"):
        rows.append(("most memory", f"{result['peak_memory_bytes'] / 1e6:,.0f} MB"))
    if "device" in result:
        rows.append(("on", result["device"]))
        rows.append(("processes", f"{result.get('processes', 1)}, threads of each {result.get('threads', 1)}"))
    parameters = result.get("parameters", {})
    if parameters:
        learn = f"{parameters['trainable']:,} ({percent(parameters['trainable'] / max(1, parameters['total']))}) learn"
        rows.append(("parameters", f"{parameters['total']:,}, of which {learn}"))
    rows.append(("software", ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())))
    drawings: Sequence[Drawing] = ()
    if parts := list(parameters.get("by_part", {}).items()):
        most = max(count for _, count in parts)
        drawings = [
            figures.bars("parameters", "trained parameters by part", parts, top=most, shown=lambda value: f"{value:,.0f}")
        ]
    body = fragment("resources", rows, [drawing.svg() for drawing in drawings])
    return Section("resources", "Resources", body, tuple(drawings), half=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
