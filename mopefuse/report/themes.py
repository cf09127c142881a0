"""Colours and fonts of charts, as Vega-Lite configurations: for a light page, for a dark one, and for files on white."""

from __future__ import annotations

from typing import Any


def _theme(
    *, ink: str, soft: str, line: str, well: str, card: str, bad: str, good: str, series: tuple[str, ...]
) -> dict[str, Any]:
    """A configuration for charts of one set of colours.

    Args:
        ink, soft: strong and faint text. line: grid lines. well: an empty cell. card: background of the chart.
        bad, good: wrong and correct predictions. series: colours of series; a single series has the first.
    """
    accent = series[0]
    text = {"labelColor": soft, "titleColor": soft, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "aria": False,  # the page has a label and a table of numbers for each chart
        "mark": {"color": accent, "aria": False},
        "view": {"stroke": None},
        "axis": {**text, "domainColor": line, "gridColor": line, "tickColor": line, "labelLimit": 190, "labelPadding": 6},
        "legend": {**text, "labelLimit": 330, "symbolStrokeWidth": 3, "symbolOpacity": 1},
        "text": {"color": soft, "fontSize": 12},
        "range": {
            "category": list(series),
            "ramp": [well, accent],
            "heatmap": [well, accent],
            "diverging": [bad, well, accent],
        },
        "style": {
            "reference": {"color": ink, "strokeDash": [4, 3], "strokeWidth": 1.2},
            "spread": {"color": accent},
            "strong": {"color": ink},
            "on-colour": {"color": card},
            "over": {"color": bad},
            "under": {"color": good},
        },
    }


THEMES = {
    "light": _theme(
        ink="#1b2230", soft="#5c6675", line="#dfe4ec", well="#eef1f5", card="#ffffff", bad="#c5322a", good="#1f7a4a",
        series=("#3566d6", "#c77d1a", "#1f9d8a", "#8b4fd0", "#c43d86", "#6f7a2a"),
    ),
    "dark": _theme(
        ink="#e7eaf0", soft="#a3adbc", line="#333b49", well="#252b36", card="#12151b", bad="#ff8d85", good="#6fd39d",
        series=("#7ba2ff", "#e6a952", "#4fc9b6", "#b99af5", "#f08cc0", "#b9c46a"),
    ),
}  # fmt: skip
FILE_THEME = {**THEMES["light"], "background": "#ffffff", "font": "sans-serif"}
SERIES = len(THEMES["light"]["range"]["category"])
"""Series that one chart can tell apart by colour."""
