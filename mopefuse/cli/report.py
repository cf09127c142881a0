"""``mopefuse report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mopefuse.cli.shared_options import Json, read_data_path
from mopefuse.core.error_codes import ConfigCode

if TYPE_CHECKING:
    from mopefuse.report.run_report import Reported
    from mopefuse.report.study_report import StudyReported

_OF_RUN, _OF_STUDY = ("device", "data", "audit"), ("against", "metric")


def report(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN|STUDY", help="Folder of a run or of a study.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Page to write. Default: report.html in the folder.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the figures to this folder, as SVG and PNG.")
    ] = None,
    device: Annotated[str, typer.Option(help="For a run: device to compute on: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="For a run: its data, if they have moved.", parser=read_data_path)
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit/--no-audit", help="For a run: measure what each modality and the prompts contribute.")
    ] = True,
    against: Annotated[
        str | None, typer.Option(metavar="ROW", help="For a study: baseline that the other rows are compared with.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="For a study: metric to compare: accuracy, f1_macro, ... Default: that of the study.")
    ] = None,
    json: Json = False,
) -> None:
    """Write an HTML report on a run or a study.

    The report of a run shows its predictions and mistakes, training curves, routing, and whether it uses both modalities.

    \b
    Example:
      mopefuse report runs/first
    """
    from mopefuse.cli._compare_display import as_dict
    from mopefuse.cli._render import err
    from mopefuse.report.study_report import is_study, report_study

    study = is_study(run)
    _refuse(context, _OF_RUN if study else _OF_STUDY, "study" if study else "run")
    if study:
        done = report_study(run, out=out, figures=figures, against=against, metric=metric)
        compared = as_dict(done.comparison) if done.comparison else None
        _show(done, {"comparison": compared}, json=json)
        return
    from mopefuse.report.run_report import report as report_run

    with err().status("loading") as status:
        advance = lambda what, number, total: status.update(f"{what}: {number}/{total}")  # noqa: E731
        of_run = report_run(run, out=out, figures=figures, device=device, data=data, audit=audit, advance=advance)
    _show(of_run, {}, json=json, verdict=of_run.audit.verdict if of_run.audit else "")


def _refuse(context: typer.Context, names: tuple[str, ...], kind: str) -> None:
    """Refuse options that do not apply.

    Raises:
        ConfigError: one of `names` was given for a `kind`, a run or a study.
    """
    from mopefuse.errors import ConfigError

    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        raise ConfigError(
            ConfigCode.REPORT_OPTION_NOT_APPLICABLE,
            f"--{given[0]} does not apply to a {kind}",
            where=f"--{given[0]}",
            fix=f"remove --{given[0]}",
        )


def _show(done: Reported | StudyReported, more: dict[str, object], *, json: bool, verdict: str = "") -> None:
    from mopefuse.cli._render import err, out, print_json

    if json:
        print_json({"ok": True, **done.as_dict(), **more})
        return
    console = out()
    for note in done.notes:
        err().print(f"notice: {note}", markup=False)
    if verdict:
        console.print(verdict, markup=False)
    console.print(f"page: {done.page} ({done.page.stat().st_size / 1e6:.2f} MB)", markup=False)
    if done.figures:
        console.print(f"figures: {len(done.figures)} files in {done.figures[0].parent}", markup=False)
