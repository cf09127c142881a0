"""The section of a run's page on what is lost where samples lack a modality, as ``eval --missing`` kept it."""

from __future__ import annotations

from mopefuse.core.formatting import percent, share
from mopefuse.report import planes
from mopefuse.report.facts import RunFacts
from mopefuse.report.pages import Section, fragment
from mopefuse.report.run_answers import main_metric


def missing(facts: RunFacts) -> Section | None:
    """The metric by the share of samples that lack something; None where nobody asked."""
    found = facts.missing
    if not found:
        return None
    name = main_metric(facts)
    cells = sorted(found["cells"], key=lambda cell: ([*cell["missing"]], [*cell["missing"].values()]))
    whole = next((cell["metrics"][name] for cell in cells if not cell["missing"]), None)
    lines = []
    for what in dict.fromkeys(next(iter(cell["missing"])) for cell in cells if len(cell["missing"]) == 1):
        mine = [(cell["missing"][what], cell["metrics"][name]) for cell in cells if [*cell["missing"]] == [what]]
        begin = [] if whole is None or found["natural"] else [(0.0, whole)]
        points = [*begin, *(point for point in mine if point[0] > 0)]
        lines.append(planes.Curve(what.replace("+", " and "), points))
    columns = ["", "samples that lack it", name, *([] if whole is None else ["points"])]
    rows = [
        [cell["words"], cell["lacking"], percent(cell["metrics"][name])]
        + ([] if whole is None else [f"{100 * (cell['metrics'][name] - whole):+.1f}"])
        for cell in cells
    ]
    told = [f"All {found['samples']:,} samples of {found['split']}; of a larger share, those of a smaller one are a part."]
    if not found["learned"]:
        told.append("Training never met samples that lack something: they are answered as an average one.")
    title, table = "Where a modality is missing", fragment("table", columns, rows, 1, told)
    if any(len(line.points) > 1 for line in lines):
        label = f"{name} by the share of samples that lack a modality"
        drawing = planes.curves("missing", label, lines, across="share of samples that lack it", shown=share)
        return Section("missing", title, fragment("figures", [(drawing.svg(), label)]) + table, (drawing,))
    return Section("missing", title, table)
