"""``mopefuse report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mopefuse.report.run import Reported
    from mopefuse.report.study import StudyReported

_OF_RUN, _OF_STUDY = ("device", "data", "audit"), ("against", "metric")


def report(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN | STUDY", help="Folder of a run, or of a study.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Page to write; default: report.html in the folder.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures of the page, as SVG and PNG.")] = None,
    device: Annotated[str, typer.Option(help="Of a run: auto, cpu, cuda, cuda:N or mps.")] = "auto",
    data: Annotated[Path | None, typer.Option(help="Of a run: where its data are now.")] = None,
    audit: Annotated[bool, typer.Option("--audit/--no-audit", help="Of a run: ask with inputs and prompts taken away.")] = True,
    against: Annotated[str | None, typer.Option(help="Of a study: row that significance is computed against.")] = None,
    metric: Annotated[str | None, typer.Option(help="Of a study: accuracy, f1_macro, ...; default as it says.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write one HTML page about a run or a study.

    Of a run: its answers, learning, router, and whether it uses both modalities.
    """
    from mopefuse.cli._comparison import as_dict
    from mopefuse.cli._render import err
    from mopefuse.report.study import is_study, report_study

    study = is_study(run)
    _refuse(context, _OF_RUN if study else _OF_STUDY, "study" if study else "run")
    if study:
        done = report_study(run, out=out, figures=figures, against=against, metric=metric)
        compared = as_dict(done.comparison) if done.comparison else None
        _show(done, {"comparison": compared}, json=json)
        return
    from mopefuse.report.run import report as report_run

    with err().status("loading") as status:
        advance = lambda what, number, total: status.update(f"{what}: {number}/{total}")  # noqa: E731
        of_run = report_run(run, out=out, figures=figures, device=device, data=data, audit=audit, advance=advance)
    _show(of_run, {}, json=json, verdict=of_run.audit.verdict if of_run.audit else "")


def _refuse(context: typer.Context, names: tuple[str, ...], kind: str) -> None:
    """Options that have no meaning here."""
    from mopefuse.errors import ConfigError

    said = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if said:
        raise ConfigError(120, f"a {kind} has no --{said[0]}", where=f"--{said[0]}", fix="leave it out")


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
