"""``mopefuse compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mopefuse.cli.shared_options import Json
from mopefuse.core.error_codes import ConfigCode

_FORMATS = ("table", "markdown", "csv", "json", "latex")


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN|STUDY", help="Folders of finished runs, or the folder of one study.")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="ROW|RUN", help="Baseline: test the difference of each row from it.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric to compare: accuracy, f1_macro, ... Default: that of the study or task.")
    ] = None,
    val: Annotated[bool, typer.Option("--val", help="Also show metrics on validation.")] = False,
    format_: Annotated[str, typer.Option("--format", metavar="|".join(_FORMATS), help="Format of the table.")] = "table",
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="File to write. Default: stdout.")] = None,
    json: Json = False,
) -> None:
    """Compare runs in one table.

    Runs that differ only in their seed form one row: mean and standard deviation of metrics, parameters, time and memory.
    With --against, differences from a baseline are tested with a paired bootstrap. If runs were tested on different data,
    those of the largest group are compared, and a notice names the others.

    \b
    Example:
      mopefuse compare runs/* --against runs/linear
    """
    from mopefuse.core.atomic_files import check_file, write_atomically
    from mopefuse.errors import ConfigError, did_you_mean

    if format_ not in _FORMATS:
        raise ConfigError(
            ConfigCode.UNKNOWN_TABLE_FORMAT,
            f"unknown format {format_!r}",
            where="--format",
            fix=did_you_mean(format_, _FORMATS),
        )
    if out is not None:
        check_file(out)
    from mopefuse.cli._compare_display import WRITERS, as_dict, show
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
