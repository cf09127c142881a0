"""A comparison of runs as text: for a terminal, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

from mopefuse.cli._render import err, plain_table, table
from mopefuse.core.artifact import finite
from mopefuse.core.formatting import json_text, markdown, spreadsheet_cell
from mopefuse.report.comparison import Splits, cells, notes
from mopefuse.studies.compare import Comparison, Row

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "·": r"$\cdot$"}
_LATEX |= {character: f"${character}$" for character in "<>|"}
_LATEX |= {character: "\\" + character for character in "&%$#_{}"}


def show(comparison: Comparison, title: str, splits: Splits = ("test",)) -> None:
    """Print the table on stdout with the best row highlighted, and the notes on stderr."""
    best = comparison.best("test", comparison.metric)
    bold = next((number for number, row in enumerate(comparison.rows) if row.label in best), None)
    columns, rows = cells(comparison, splits)
    table(title, columns, rows, bold=bold)
    for line in notes(comparison):
        err().print(line, markup=False)


def as_table(comparison: Comparison, splits: Splits) -> str:
    """The table as on a terminal, without colour, followed by the notes."""
    return "\n".join([plain_table(*cells(comparison, splits)), *notes(comparison)]) + "\n"


def as_markdown(comparison: Comparison, splits: Splits) -> str:
    """A Markdown table with the best numbers in bold, followed by the notes."""
    columns, rows = cells(comparison, splits, lambda text: f"**{text}**")
    lines = [columns, [":--" if number == 0 else "--:" for number in range(len(columns))], *rows]
    body = "\n".join("| " + " | ".join(map(markdown, line)) + " |" for line in lines)
    return "\n".join([body, *(f"\n{line}" for line in notes(comparison))]) + "\n"


def as_latex(comparison: Comparison, splits: Splits) -> str:
    """A LaTeX tabular that needs no packages; the best numbers are bold, notes are comments."""
    columns, rows = cells(comparison, splits, lambda text: f"\0{text}\1")
    body = [" & ".join(map(_escaped, line)) + r" \\" for line in (columns, *rows)]
    remarks = [f"% {' '.join(line.split())}" for line in notes(comparison)]
    shape = f"l{'r' * (len(columns) - 1)}"
    return "\n".join([rf"\begin{{tabular}}{{{shape}}}", body[0], r"\hline", *body[1:], r"\end{tabular}", *remarks]) + "\n"


def as_csv(comparison: Comparison, splits: Splits) -> str:
    """CSV with full precision; a label that a spreadsheet would run as a formula is quoted."""
    names = [f"{split}_{metric}" for split in splits for metric in comparison.metrics]
    columns = ["label", "n", "seeds", *(f"{name}_{what}" for name in names for what in ("mean", "std"))]
    columns += ["trainable", "total", "seconds_mean", "peak_memory_bytes"]
    columns += ["against", "compared", "difference", "low", "high", "p"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in comparison.rows:
        spreads = [row.metrics[split].get(metric) for split in splits for metric in comparison.metrics]
        numbers = [number for spread in spreads for number in ((spread.mean, spread.std) if spread else (None, None))]
        versus: list[Any] = [""] * 6
        if row.versus:
            versus = [spreadsheet_cell(comparison.against or ""), comparison.metric, *vars(row.versus).values()]
        facts = [row.trainable, row.total, row.seconds.mean, row.peak_memory]
        writer.writerow([spreadsheet_cell(row.label), len(row.runs), " ".join(map(str, row.seeds)), *numbers, *facts, *versus])
    return file.getvalue()


def as_json(comparison: Comparison, splits: Splits) -> str:
    """`as_dict` as JSON, with all splits."""
    return json_text(finite(as_dict(comparison)), indent=1) + "\n"


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values, with the value of each seed."""
    return {
        "metric": comparison.metric,
        "against": comparison.against,
        "samples": comparison.samples,
        "notices": list(comparison.notices),
        "rows": [_row(comparison, row) for row in comparison.rows],
    }


def _row(comparison: Comparison, row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "runs": [str(path) for path in row.runs],
        "seeds": list(row.seeds),
        "n": len(row.runs),
        "settings": row.settings,
        "metrics": {
            split: {name: {"mean": s.mean, "std": s.std, "values": list(s.values)} for name, s in found.items()}
            for split, found in row.metrics.items()
        },
        "best": row.label in comparison.best("test", comparison.metric),
        "parameters": {"trainable": row.trainable, "total": row.total, "share": row.trainable / row.total},
        "seconds": {"mean": row.seconds.mean, "std": row.seconds.std, "values": list(row.seconds.values)},
        "peak_memory_bytes": row.peak_memory,
        "versus": None if row.versus is None else vars(row.versus),
    }


WRITERS: dict[str, Callable[[Comparison, Splits], str]] = {
    "table": as_table,
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
    "json": as_json,
}


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text).replace("\0", r"\textbf{").replace("\1", "}")
