"""``mopefuse data check`` and ``mopefuse data preview``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopefuse.cli.settings import Settings
from mopefuse.cli.shared_options import DataPath, Json, Seed, SetData, Split
from mopefuse.core.error_codes import DataCode
from mopefuse.core.formatting import several

if TYPE_CHECKING:
    from mopefuse.config.schema import Data
    from mopefuse.data.check import Report
    from mopefuse.data.index import Index
    from mopefuse.errors import DataError


def check(
    folder: DataPath,
    *,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 4 for warnings, too.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with the problems and their images.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Text encoder to use for counting tokens and truncated texts.")
    ] = None,
    most: Annotated[int, typer.Option(min=0, max=10**9, help="With --json: list at most N problems, but count all.")] = 1000,
    fresh: Annotated[bool, typer.Option("--fresh", help="Read every file again instead of using the cache.")] = False,
    set_: SetData = None,
    json: Json = False,
    settings: Settings,
) -> None:
    """Check a data set before training.

    Reads every row and image, changes nothing, and exits with code 4 if training would reject the data. Warnings mark
    problems that training accepts, such as an image that is in both train and test, or labels that look misspelt.

    \b
    Example:
      mopefuse data check reviews.csv --text-col review --label-col stars
    """
    config = _config(folder, settings, set_)
    if html is not None:
        from mopefuse.report.pages import check_place

        check_place(html, folder)
    from mopefuse.cli import _check_display as display
    from mopefuse.cli._prepare_display import PrepareDisplay
    from mopefuse.data.check import check as run_check

    tokens = None
    if encoder is not None:
        from mopefuse.report.tokens import tokens_of

        tokens = tokens_of(encoder)
    with PrepareDisplay(silent=json) as progress:
        report = run_check(config, tokens=tokens, fresh=fresh, advance=progress.advance)
    if config.on_bad == "skip":
        report = _skip_bad_rows(report)
    error = _verdict(report, folder, strict=strict)
    if html is not None:
        display.write_page(report, folder, html)
    if not json:
        display.show(report, folder, html)
        if error is not None:
            raise error
        return
    _print_json(report, error, most, html)


def _verdict(report: Report, folder: Path, *, strict: bool) -> DataError | None:
    """The error that the command ends with, if any."""
    from mopefuse.errors import DataError

    if report.errors:
        fix = "correct the problems listed"
        if report.config.on_bad == "skip":
            fix += (
                "; --on-bad skip leaves out at most data.max_bad_fraction of a split's rows, and never accepts unsafe paths"
            )
        return DataError(DataCode.CHECK_FOUND_ERRORS, f"{several(report.errors, 'error')} in {folder}", fix=fix)
    if strict and report.warnings:
        what = f"{several(report.warnings, 'warning')} in {folder}"
        return DataError(
            DataCode.CHECK_FOUND_WARNINGS, what, where="--strict", fix="correct the problems listed, or remove --strict"
        )
    return None


def _print_json(report: Report, error: DataError | None, most: int, html: Path | None) -> None:
    from mopefuse.cli._render import print_json

    body = {"error": error.as_dict()} if error is not None else {}
    page = {"html": str(html)} if html is not None else {}
    print_json({"ok": error is None, **body, **report.as_dict(most), **page})
    if error is not None:
        raise typer.Exit(error.exit_code)


def _skip_bad_rows(report: Report) -> Report:
    """The report with a warning instead of an error for each row that ``--on-bad skip`` leaves out of training.

    Training still refuses a split with more of them than `data.max_bad_fraction`, and paths that leave the data folder.
    """
    from dataclasses import replace

    from mopefuse.data.findings import Finding

    class Skipped(Finding):
        severity = "warning"

    codes = {
        (name, problem.code)
        for name, index in report.indexes.items()
        if _can_skip(index, report.config.max_bad_fraction)
        for problem in index.problems()
    }
    findings = [
        Skipped(**vars(finding)) if (finding.split, finding.code) in codes else finding for finding in report.findings
    ]
    return replace(report, findings=sorted(findings, key=lambda finding: finding.severity))


def _can_skip(index: Index, fraction: float) -> bool:
    """Whether training leaves out the bad rows of a split rather than refuse it."""
    problems, rows = index.problems(), len(index.lines_S) + len(index.row_problems)
    unsafe = any(problem.code.startswith("MF-SEC") for problem in problems)
    return not unsafe and len(problems) <= fraction * rows and not any(each.all_missing() for each in index.files.values())


def preview(
    folder: DataPath,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Page to write.")] = Path("preview.html"),
    split: Split = "train",
    rows: Annotated[int, typer.Option(min=1, max=100_000, help="Number of rows to show.")] = 48,
    seed: Seed = 0,
    set_: SetData = None,
    json: Json = False,
    settings: Settings,
) -> None:
    """Write a page with sample rows of a data set.

    Shows images, texts and labels, taking one row of each class in turn.
    """
    config = _config(folder, settings, set_)
    from mopefuse.cli._render import out as results
    from mopefuse.cli._render import print_json
    from mopefuse.data.check import read_split
    from mopefuse.report.data_preview import preview_page
    from mopefuse.report.pages import check_place, write

    check_place(out, folder)
    index, files = read_split(config, split)
    html, shown = preview_page(index, files, config, name=str(folder), rows=rows, seed=seed)
    write(out, html)
    if json:
        print_json({"ok": True, "path": str(out), "rows": shown})
    else:
        results().print(f"{several(shown, 'row')} of {split}: {out}", markup=False)


def _config(folder: Path, settings: dict[str, Any], sets: list[str] | None) -> Data:
    from mopefuse.config.recipe import data_settings

    return data_settings({"data.path": str(folder), **settings}, sets or ())
