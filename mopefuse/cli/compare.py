"""``mopefuse compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mopefuse.cli.options import Json
from mopefuse.core.error_codes import ConfigCode

_FORMATS = ("table", "markdown", "csv", "json", "latex")


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN|STUDY", help="Folders of finished runs, or the folder of one study.")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="ROW|RUN", help="Baseline for differences and their significance.")
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
    With --against, differences to a baseline are tested by paired bootstrap. If runs were tested on different data, those of
    the largest group are compared, and a notice names the others.

    \b
    Example:
      mopefuse compare runs/* --against runs/linear
    """
    from dataclasses import replace

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
    from mopefuse.cli._comparison import WRITERS, as_dict, show
    from mopefuse.cli._render import print_json
    from mopefuse.studies.compare import compare as run_comparison

    chosen, notices = _on_the_same_data(runs, against)
    found = run_comparison(chosen, against=against, metric=metric)
    found = replace(found, notices=(*notices, *found.notices))
    splits = ("val", "test") if val else ("test",)
    if out is not None:
        write_atomically(out, WRITERS[format_](found, splits))
    if json or (format_ == "json" and out is None):
        print_json({"ok": True, **as_dict(found)})
    elif out is None and format_ == "table":
        show(found, f"test split, {found.samples} samples", splits)
    elif out is None:
        print(WRITERS[format_](found, splits), end="")


def _on_the_same_data(paths: list[Path], against: str | None) -> tuple[list[Path], list[str]]:
    """The largest group of runs that were tested on the same samples and labels, or the group of the run `against`.

    Returns:
        Those paths, with all that are not finished runs, and a notice for each run that is left out. All paths where no two
        runs were tested on the same data, which is an error of the comparison.
    """
    from mopefuse.runs.folder import RunFolder

    groups: dict[tuple[str, ...], list[Path]] = {}
    for path in dict.fromkeys(paths):
        run = RunFolder(path)
        if run.exists() and run.metrics_file.is_file():
            facts = run.manifest()
            groups.setdefault((str(facts["labels"]), str(facts["data"].get("test"))), []).append(path)
    largest = max(groups.values(), key=len, default=[])
    kept = next((group for group in groups.values() if against is not None and Path(against) in group), largest)
    if len(groups) < 2 or len(kept) < 2:
        return paths, []
    labels, _ = next(key for key, group in groups.items() if group is kept)
    notices = [
        f"left out: {path} was tested on different {'labels' if key[0] != labels else 'samples'} from {kept[0]}"
        for key, group in groups.items()
        if group is not kept
        for path in group
    ]
    left_out = {path for group in groups.values() if group is not kept for path in group}
    return [path for path in paths if path not in left_out], notices
