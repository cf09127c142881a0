"""Print the results of ``mopefuse eval --missing``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mopefuse.cli._render import err, table
from mopefuse.metrics.names import in_per_cent, write_metric, write_number

if TYPE_CHECKING:
    from mopefuse.evaluation.missing_modalities import Missing


def show(run: str, found: Missing) -> None:
    """Print a row for each modality and share of the samples that lack it."""
    name = found.metric
    plain = next((cell.metrics[name] for cell in found.cells if not cell.missing), None)
    rows = []
    for cell in found.cells:
        row = [cell.words, cell.lacking, write_metric(name, cell.metrics[name])]
        rows.append([*row, *([] if plain is None else [write_number(name, cell.metrics[name] - plain, signed=True)])])
    first = f"missing ({found.cells[0].samples:,} {found.split} samples)"
    change = "change in points" if in_per_cent(name) else "change"
    table(run, [first, "samples without it", name, *([] if plain is None else [change])], rows)
    if not found.learned:
        text = "trained on complete samples only, so mean features replace missing ones; see --modality-dropout"
        err().print(f"notice: {text}", markup=False)
