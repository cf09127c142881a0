"""The section of a run's page on the loss in the metric if samples lack a modality, measured by ``eval --missing``."""

from __future__ import annotations

from mopefuse.metrics.names import in_per_cent, write_metric, write_number
from mopefuse.report.curves import Curve, curves
from mopefuse.report.pages import Section, fragment
from mopefuse.report.run_data import RunFacts


def missing(facts: RunFacts) -> Section | None:
    """The metric by the share of samples that lack a modality; None if it was not measured."""
    found = facts.missing
    if not found:
        return None
    name = facts.main_metric
    cells = sorted(found["cells"], key=lambda cell: ([*cell["missing"]], [*cell["missing"].values()]))
    whole = next((cell["metrics"][name] for cell in cells if not cell["missing"]), None)
    lines = []
    for what in dict.fromkeys(next(iter(cell["missing"])) for cell in cells if len(cell["missing"]) == 1):
        mine = [(cell["missing"][what], cell["metrics"][name]) for cell in cells if [*cell["missing"]] == [what]]
        begin = [] if whole is None or found["natural"] else [(0.0, whole)]
        points = [(100 * share, score) for share, score in (*begin, *(point for point in mine if point[0] > 0))]
        lines.append(Curve(what.replace("+", " and "), points))
    change = "change in points" if in_per_cent(name) else "change"
    columns = ["missing", "samples without it", name, *([] if whole is None else [change])]
    rows = [
        [cell["words"], cell["lacking"], write_metric(name, cell["metrics"][name])]
        + ([] if whole is None else [write_number(name, cell["metrics"][name] - whole, signed=True)])
        for cell in cells
    ]
    notes = [f"All {found['samples']:,} samples of {found['split']}; a larger fraction includes the samples of a smaller one."]
    if not found["learned"]:
        notes.append("The model was trained on complete samples; mean features replace what is missing.")
    title, table = "Where a modality is missing", fragment("table", columns, rows, 1, notes)
    if any(len(line.points) > 1 for line in lines):
        label = f"{name} by the share of samples that lack a modality"
        across = "samples that lack it, in percent"
        chart = curves("missing", label, lines, across=across, up=name, percent=in_per_cent(name))
        return Section("missing", title, fragment("figure", chart, label, numbers=False) + table, (chart,))
    return Section("missing", title, table)
