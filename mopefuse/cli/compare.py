"""``mopefuse compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_FORMATS = ("table", "markdown", "csv", "json", "latex")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN... | STUDY", help="Folders of finished runs, or of one study.")],
    against: Annotated[str | None, typer.Option(help="Row, or run, that significance is computed against.")] = None,
    metric: Annotated[str | None, typer.Option(help="accuracy, f1_macro, ...; default as the study says.")] = None,
    val: Annotated[bool, typer.Option("--val", help="Metrics on validation too.")] = False,
    format_: Annotated[str, typer.Option("--format", help="table, markdown, csv, json or latex.")] = "table",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; default stdout.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare runs in one table.

    Mean and deviation over seeds, parameters, time, memory, significance by paired bootstrap.
    """
    from mopefuse.core.artifact import check_file, write_atomically
    from mopefuse.errors import ConfigError, did_you_mean

    if format_ not in _FORMATS:
        raise ConfigError(88, f"there is no format {format_!r}", where="--format", fix=did_you_mean(format_, _FORMATS))
    if out is not None:
        check_file(out)
    from mopefuse.cli._comparison import WRITERS, as_dict, show
    from mopefuse.cli._render import print_json
    from mopefuse.studies.compare import compare as run_comparison

    found = run_comparison(runs, against=against, metric=metric)
    splits = ("val", "test") if val else ("test",)
    if out is not None:
        write_atomically(out, WRITERS[format_](found, splits))
    if json or (format_ == "json" and out is None):
        print_json({"ok": True, **as_dict(found)})
    elif out is None and format_ == "table":
        show(found, f"test split, {found.samples} samples", splits)
    elif out is None:
        print(WRITERS[format_](found, splits), end="")
