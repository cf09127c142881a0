"""Which metrics are errors, and how metrics are written."""

from __future__ import annotations

from mopefuse.core.formatting import percent

IGNORED = 255
"""Class of the pixels in targets that do not count in any metric."""
RANKS = frozenset(("median_rank", "median_rank_main_to_comp", "median_rank_comp_to_main"))
"""Metrics that are ranks."""
ERRORS = frozenset(("loss", "mae", "rmse", "mae_sd", "rmse_sd")) | RANKS
"""Metrics in units of their own. All others are at most 1."""
DECIMALS = frozenset(("r2", "spearman"))
"""Metrics that are not written in per cent: they can be negative, and a correlation is not a share."""
LOWER_IS_BETTER = ERRORS | {"calibration_error"}
"""Metrics of which less is better."""


def value_metrics(targets: int) -> tuple[str, ...]:
    """The metrics of predicted numbers. Errors of several targets are in standard deviations, as units can differ."""
    return ("r2", "mae", "rmse", "spearman") if targets == 1 else ("r2", "mae_sd", "rmse_sd", "spearman")


def in_per_cent(name: str) -> bool:
    """Whether a metric is a share, which is written in per cent."""
    return name not in ERRORS | DECIMALS | {"absent_labels"}


def write_metric(name: str, value: float | None) -> str:
    """Format a metric: in per cent, as a decimal, or with four digits if it is an error or a count."""
    if value is None or value != value:
        return "-"
    return percent(value) if in_per_cent(name) else write_number(name, value)


def write_number(name: str, value: float, *, signed: bool = False) -> str:
    """Format a metric, or with `signed` a difference of it, for tables that give the unit elsewhere."""
    sign = "+" if signed else ""
    if in_per_cent(name):
        text = f"{100 * value:{sign}.1f}"
    else:
        text = f"{value:{sign}.3f}" if name in DECIMALS else f"{value:{sign}.4g}"
    return text.lstrip("-+") if float(text) == 0 else text


def write_change(name: str, value: float, *, signed: bool = True) -> str:
    """Format a difference of a metric, in percentage points if the metric is written in per cent."""
    return write_number(name, value, signed=signed) + (" points" if in_per_cent(name) else "")
