"""Run or plan a study that searches for settings, and show its trials."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mopefuse.cli._render import err, out, print_json, table
from mopefuse.metrics.names import write_number

if TYPE_CHECKING:
    from mopefuse.studies.search import SearchResult, Trial
    from mopefuse.studies.search_space import Axis
    from mopefuse.studies.study_file import Study


def run(study: Study, folder: Path, *, jobs: int, json: bool) -> None:
    """Run the trials and show them, best first."""
    from mopefuse.cli._study_display import StudyDisplay
    from mopefuse.studies.search import run_search

    with StudyDisplay(study, json=json) as display:
        searched = run_search(study, folder, jobs=jobs, listener=display)
    failed = [status for status in searched.statuses if status.error is not None]
    if json:
        first = {"error": failed[0].error} if failed and searched.best is None else {}
        print_json({"ok": searched.best is not None, **first, **_as_dict(searched, folder)})
    else:
        _show(searched, folder)
        for status in failed:
            error = status.error or {}
            err().print(f"failed: {status.cell.folder}: {error['code']} {error['message']}", markup=False)
        if failed:
            text = f"failed trials are not repeated while their folders are in {folder}, unless memory ran out"
            err().print(text, markup=False)
    if searched.best is None:
        raise typer.Exit(int((failed[0].error or {}).get("exit", 1)) if failed else 8)


def plan(study: Study, folder: Path, *, json: bool) -> None:
    """Show what would be searched, without training."""
    search = study.file.search
    assert search is not None
    if json:
        space = search.model_dump(mode="json")
        print_json({"ok": True, "study": str(folder), "search": space, "seeds": list(study.file.seeds), "runs": study.runs})
        return
    rows = [[path, _axis(axis)] for path, axis in search.space.items()]
    table(study.name, ["setting", "from"], rows, left=(0, 1))
    seeds = ", ".join(map(str, study.file.seeds))
    out().print(f"{study.runs} runs: {search.trials} trials, seeds {seeds}; in {folder}", markup=False)


def _axis(axis: Axis) -> str:
    if isinstance(axis, list):
        return ", ".join(map(str, axis))
    return f"{axis.low} to {axis.high}{', logarithmic' if axis.log else ''}"


def _show(searched: SearchResult, folder: Path) -> None:
    from mopefuse.studies.search import test_metrics, train_command

    best = searched.best
    ranked = sorted(searched.trials, key=lambda t: (-1.0 if t.value is None else t.value, -t.number), reverse=True)
    paths, metric = list(searched.trials[0].settings), searched.metric
    rows = [
        [f"{trial.number}{' *' if trial is best else ''}", *(_value(trial, path) for path in paths), _score(trial, metric)]
        for trial in ranked
    ]
    bold = 0 if best is not None else None
    table(f"{folder}, trials by validation", ["trial", *paths, f"val {metric}"], rows, bold=bold)
    if best is None:
        return
    tested = test_metrics(best, folder).get(metric)
    on_test_too = f" ({write_number(metric, tested)} on test)" if tested is not None else ""
    err().print(f"* best on validation: trial {best.number}{on_test_too}. Train with its settings:", markup=False)
    out().print(train_command(best, folder), markup=False)


def _value(trial: Trial, path: str) -> str:
    value = trial.settings[path]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _score(trial: Trial, metric: str) -> str:
    return "failed" if trial.value is None else write_number(metric, trial.value)


def _as_dict(searched: SearchResult, folder: Path) -> dict[str, Any]:
    from mopefuse.studies.search import test_metrics, train_command

    best = searched.best
    chosen = None
    if best is not None:
        chosen = {**_trial(best), "test": dict(test_metrics(best, folder)), "command": train_command(best, folder)}
    return {
        "study": str(folder),
        "metric": searched.metric,
        "trials": [_trial(trial) for trial in searched.trials],
        "best": chosen,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "settings": trial.settings,
        "value": trial.value,
        "runs": [
            {"run": s.cell.folder, "seed": s.cell.seed, "state": s.state, "error": s.error} for s in trial.statuses
        ],
    }
