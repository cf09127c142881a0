"""Helpers for tests of pages that read charts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mopefuse.report.chart import Chart


def layers_of(chart: Chart) -> list[dict[str, Any]]:
    """Return the layers of a chart."""
    found = chart.spec.get("layer", [chart.spec])
    return list(found)


def rows_of(chart: Chart, key: str) -> list[dict[str, Any]]:
    """Return the rows of its data that have a value named `key`, without duplicates and in order."""
    return list({str(row): row for row in _rows(chart.spec) if key in row}.values())


def tips(chart: Chart) -> list[str]:
    """Return the fields of its tooltips."""
    return [row["tip"] for row in rows_of(chart, "tip")]


def _rows(spec: Any) -> Iterator[dict[str, Any]]:
    for rows in spec.get("datasets", {}).values():
        yield from rows
    for part in (spec, *spec.get("layer", [])):
        yield from part.get("data", {}).get("values", [])


def encodings(chart: Chart, channel: str) -> list[dict[str, Any]]:
    """Return how its layers encode a channel."""
    found = (layer.get("encoding", {}).get(channel) for layer in (chart.spec, *layers_of(chart)))
    return [encoding for encoding in found if encoding]
