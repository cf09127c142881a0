"""Print the results of ``mopefuse eval --missing``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mopefuse.cli._render import err, table
from mopefuse.metrics.names import write_metric

if TYPE_CHECKING:
    from mopefuse.evaluation.missing_modalities import Missing


def show(run: str, found: Missing) -> None:
    """Print a row for each modality and share of the samples that lack it."""
    name = found.metric
    plain = next((cell.metrics[name] for cell in found.cells if not cell.missing), None)
    rows = []
    for cell in found.cells:
        row = [cell.words, cell.lacking, write_metric(name, cell.metrics[name])]
        rows.append([*row, *([] if plain is None else [f"{100 * (cell.metrics[name] - plain):+.1f}"])])
    first = f"missing ({found.cells[0].samples:,} {found.split} samples)"
    table(run, [first, "samples without it", name, *([] if plain is None else ["change in points"])], rows)
    if not found.learned:
        text = "trained on complete samples only, so mean features replace missing ones; see --modality-dropout"
        err().print(f"notice: {text}", markup=False)
