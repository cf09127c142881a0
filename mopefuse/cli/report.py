"""``mopefuse report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Page to write; default: report.html in the run.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures of the page, as SVG and PNG.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    data: Annotated[Path | None, typer.Option(help="Where the run's data are now.")] = None,
    audit: Annotated[bool, typer.Option("--audit/--no-audit", help="Ask with inputs and prompts taken away, too.")] = True,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write one HTML page about a run: what it answers, how it learned, its router, and whether it uses both modalities."""
    from mopefuse.cli._render import err, print_json
    from mopefuse.cli._render import out as results
    from mopefuse.reporting import report as write_report

    with err().status("loading") as status:
        done = write_report(
            run,
            out=out,
            figures=figures,
            device=device,
            data=data,
            audit=audit,
            advance=lambda what, number, total: status.update(f"{what}: {number}/{total}"),
        )
    if json:
        print_json({"ok": True, **done.as_dict()})
        return
    console = results()
    for note in done.notes:
        err().print(f"notice: {note}", markup=False)
    if done.audit is not None:
        console.print(done.audit.verdict, markup=False)
    console.print(f"page: {done.page} ({done.page.stat().st_size / 1e6:.2f} MB)", markup=False)
    if done.figures:
        console.print(f"figures: {len(done.figures)} files in {figures}", markup=False)
