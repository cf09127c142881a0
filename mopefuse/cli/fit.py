"""``mopefuse fit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mopefuse.cli.settings import Settings
from mopefuse.cli.shared_options import DataPath, Json, Set

if TYPE_CHECKING:
    from mopefuse.autofit.fit import FitResult


def fit(
    data: DataPath,
    settings: Settings,
    out: Annotated[Path | None, typer.Option(help="Run folder to write. Default: runs/<date>-<time>.")] = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="Wall time that may be spent, such as 90s, 10m or 2h.")] = "10m",
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the fit in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the fit in --out.")] = False,
    json: Json = False,
) -> None:
    """Find the best model for a table, within a time budget.

    Columns and splits that you do not name are detected, and printed; without --main and --comp, a small default pair of
    encoders is used. Tries logistic regressions, MLPs and conditional prompts, chooses by cross-validation where possible,
    calibrates the probabilities, and tests once. The folder is an ordinary run, with a leaderboard.

    \b
    Example:
      mopefuse fit products.csv --budget 5m --out runs/products
    """
    from mopefuse.autofit.budget import parse_budget
    from mopefuse.errors import ConfigError
    from mopefuse.runs.folder import default_path

    if resume and out is None:
        from mopefuse.core.error_codes import ConfigCode

        what = "--resume needs the folder of the fit"
        raise ConfigError(ConfigCode.RESUME_WITHOUT_RUN, what, where="--resume", fix="add --out RUN")
    seconds = parse_budget(budget)
    from mopefuse.autofit.fit import fit as run_fit
    from mopefuse.cli._fit_display import FitDisplay

    with FitDisplay(json=json) as display:
        folder, sets = out or default_path(), tuple(set_ or ())
        fitted = run_fit(
            data, folder, budget=seconds, settings=settings, sets=sets, resume=resume, overwrite=overwrite, listener=display
        )
    _show(fitted, display.notices, json=json)


def _show(fitted: FitResult, notices: list[str], *, json: bool) -> None:
    from mopefuse.cli._render import out, percent, print_json, table

    board = fitted.leaderboard
    if json:
        print_json({"ok": True, "run": str(fitted.run), **board.as_dict(), "metrics": board.test, "notices": notices})
        return
    console, rows = out(), board.rows()
    console.print(board.headline, markup=False)
    table(str(fitted.run), board.HEADS, rows, bold=[line.chosen for line in board.lines].index(True), left=(0, 1))
    if board.test_score is not None:
        score, name = board.test_score, board.metric.replace("_", " ")
        console.print(f"test {name}: {score.written(board.metric)} ({score.rows:,} rows)", markup=False)
    if (found := board.calibration) is not None:
        before, after = percent(found.error_before), percent(found.error_after)
        console.print(f"calibration error: {before} before, {after} after temperature {found.temperature:.2f}", markup=False)
    console.print(f"leaderboard: {fitted.run / 'leaderboard.md'}", markup=False)
    console.print(f"next: mopefuse predict {fitted.run} NEW.csv -o answers.csv", markup=False)
