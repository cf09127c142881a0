"""``mopefuse study``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopefuse.cli.shared_options import Json, Set

if TYPE_CHECKING:
    from mopefuse.studies.study import Status
    from mopefuse.studies.study_file import Study


def study(
    file: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="YAML file of a study, or the name of one in recipes/studies.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the runs. Default: studies/<name of the study>.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, max=256, help="Number of runs to train at once, if memory allows; they share the CPU threads.")
    ] = 1,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and train nothing.")] = False,
    json: Json = False,
) -> None:
    """Train a grid of runs, or search for settings.

    The finished runs are compared in one table. Run the command again to continue: finished runs are not repeated. --set
    changes a setting of all runs.

    \b
    Example:
      mopefuse study grid.yaml --out studies/grid --dry-run
    """
    from mopefuse.studies.study_file import read_study

    chosen = read_study(file, set_ or ())
    folder = out or Path("studies") / chosen.name
    if chosen.file.search is not None:
        from mopefuse.cli import _search_display as search

        search.plan(chosen, folder, json=json) if dry_run else search.run(chosen, folder, jobs=jobs, json=json)
        return
    if dry_run:
        _dry_run(chosen, folder, json=json)
        return
    from mopefuse.cli._compare_display import as_dict, show
    from mopefuse.cli._render import err, print_json
    from mopefuse.cli._study_display import StudyDisplay
    from mopefuse.studies.compare import compare
    from mopefuse.studies.study import FINISHED, run_study

    with StudyDisplay(chosen, json=json) as display:
        statuses = run_study(chosen, folder, jobs=jobs, listener=display)
    failed = [status for status in statuses if status.error is not None]
    comparison = None
    if any(status.state == FINISHED for status in statuses):
        comparison = compare([folder])
    if json:
        facts: dict[str, Any] = {"study": str(folder), "cells": [_as_dict(status) for status in statuses]}
        facts["comparison"] = as_dict(comparison) if comparison else None
        first = {"error": failed[0].error} if failed else {}
        print_json({"ok": not failed, **first, **facts})
    elif comparison:
        show(comparison, f"{folder}, test split")
    if failed:
        if not json:
            text = f"{len(failed)} of {len(statuses)} runs failed; run the same command again to repeat them"
            err().print(text, markup=False)
        raise typer.Exit(int((failed[0].error or {}).get("exit", 1)))


def _as_dict(status: Status) -> dict[str, Any]:
    cell = status.cell
    return {"label": cell.label, "seed": cell.seed, "run": cell.folder, "state": status.state, "error": status.error}


def _dry_run(chosen: Study, folder: Path, *, json: bool) -> None:
    from mopefuse.cli._render import err, out, print_json, table
    from mopefuse.studies.study import count_trainable, is_finished

    found = count_trainable(chosen.cells)
    counts = {label: count for label, count in found.items() if isinstance(count, int)}
    refused = {label: why for label, why in found.items() if isinstance(why, str)}
    finished = {cell.folder for cell in chosen.cells if is_finished(cell, folder)}
    if json:
        listed = [
            {
                "label": cell.label,
                "seed": cell.seed,
                "run": cell.folder,
                "settings": cell.changes,
                "trainable": counts.get(cell.label),
                "finished": cell.folder in finished,
                "refused": refused.get(cell.label),
            }
            for cell in chosen.cells
        ]
        print_json({"ok": True, "study": str(folder), "cells": listed})
        return
    rows = []
    for label in chosen.labels:
        cells = [cell for cell in chosen.cells if cell.label == label]
        changes = ", ".join(f"{path}={value}" for path, value in cells[0].changes.items())
        done = f"{sum(cell.folder in finished for cell in cells)} of {len(cells)}"
        rows.append([label, changes or "-", f"{counts[label]:,}" if label in counts else "-", done])
    table(chosen.name, ["cell", "settings", "trainable parameters", "finished"], rows, left=(0, 1))
    for label, why in refused.items():
        err().print(f"notice: {label} will fail: {why}", markup=False)
    seeds = ", ".join(map(str, chosen.file.seeds))
    out().print(f"{len(chosen.cells)} runs: {len(rows)} cells, seeds {seeds}; in {folder}", markup=False)
