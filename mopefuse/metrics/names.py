"""Which metrics are errors, and how metrics are written."""

from __future__ import annotations

from mopefuse.core.formatting import percent

ERRORS = frozenset(("loss", "mae", "rmse"))
"""Metrics in units of their own. All others are at most 1."""
LOWER_IS_BETTER = ERRORS | {"calibration_error"}
"""Metrics of which less is better."""


def write_metric(name: str, value: float | None) -> str:
    """Format a metric: in per cent, or with four digits if it is an error or a count."""
    if value is None or value != value:
        return "-"
    return f"{value:.4g}" if name in ERRORS or name == "absent_labels" else percent(value)


def write_number(name: str, value: float, *, signed: bool = False) -> str:
    """Format a metric, or with `signed` a difference of it, for tables that give the unit elsewhere."""
    sign = "+" if signed else ""
    return f"{value:{sign}.4g}" if name in ERRORS else f"{100 * value:{sign}.1f}"
