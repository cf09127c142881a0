"""A comparison as cells of text: the same in a terminal, in a file and on a page. All numbers are rounded here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mopefuse.core.formatting import count, duration, size, visible
from mopefuse.metrics.names import ERRORS, RANKS, in_per_cent, write_number
from mopefuse.studies.compare import Comparison, Row, Spread

Splits = Sequence[str]
Mark = Callable[[str], str]


def cells(comparison: Comparison, splits: Splits, mark: Mark = str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows; `mark` is put on the best number of a metric."""
    metrics = [(split, metric) for split in splits for metric in comparison.metrics]
    compared = comparison.against is not None
    names = [metric if split == "test" else f"{split} {metric}" for split, metric in metrics]
    columns = ["method", "n", *names, "trainable", "share", "time", "memory"]
    columns += [f"Δ {comparison.metric} vs {visible(comparison.against)}", "p"] if compared else []
    rows = []
    for row in comparison.rows:
        found = [visible(row.label), str(len(row.runs))]
        for split, metric in metrics:
            text = _spread(metric, row.metrics[split].get(metric))
            found.append(mark(text) if metric in row.metrics[split] and row.label in comparison.best(split, metric) else text)
        share = f"{100 * row.trainable / row.total:.2f} %"
        found += [f"{row.trainable:,}", share, duration(row.seconds.mean), size(row.peak_memory)]
        rows.append(found + (_versus(comparison.metric, row) if compared else []))
    return columns, rows


def _spread(metric: str, spread: Spread | None) -> str:
    """0.812 and 0.803 as 80.8 ± 0.6, if the metric is written in per cent."""
    if spread is None or spread.mean != spread.mean:
        return "-"
    deviation = "" if spread.std is None else f" ± {write_number(metric, spread.std)}"
    return write_number(metric, spread.mean) + deviation


def _versus(metric: str, row: Row) -> list[str]:
    if row.versus is None:
        return ["-", "-"]
    numbers = (row.versus.value, row.versus.low, row.versus.high)
    value, low, high = (write_number(metric, number, signed=True) for number in numbers)
    return [f"{value} [{low}, {high}]", "<0.001" if row.versus.p < 0.001 else f"{row.versus.p:.3f}"]


def notes(comparison: Comparison) -> list[str]:
    """Explain the numbers, and list what the comparison leaves out."""
    several = any(len(row.runs) > 1 for row in comparison.rows)
    errors = " and ".join(name for name in comparison.metrics if name in ERRORS - RANKS)
    unit = "standard deviations of the training labels" if "_sd" in errors else "the units of the labels"
    units = ["Metrics in per cent" if any(map(in_per_cent, comparison.metrics)) else "Metrics as decimals"]
    units += [f"{errors} in {unit}"] if errors else []
    units += ["except ranks"] if RANKS & {*comparison.metrics} else []
    units += ["mean ± standard deviation over n seeds"] if several else []
    remarks = ["; ".join([", ".join(units), "time is the mean of a run."])]
    if comparison.against is not None:
        remarks.append(
            "Differences with 95 % interval and p-value for no difference, from a paired bootstrap over the "
            f"{count(comparison.samples)} test samples, 10,000 resamples, of the mean over seeds."
        )
    return [*remarks, *(visible(" ".join(notice.split())) for notice in comparison.notices)]
