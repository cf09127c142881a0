"""``mopefuse data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make data sets.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Make data sets."""


@app.command("make")
def make(
    name: Annotated[str, typer.Argument(help="digit-questions, or a data set of a plugin.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same files.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write a data set that needs no download, in the native row format."""
    from mopefuse.cli._render import print_json, table
    from mopefuse.registry import DATASETS, load

    counts = load(DATASETS, name)(folder, seed=seed)
    if json:
        print_json({"ok": True, "folder": str(folder), "rows": counts})
        return
    table(str(folder), ["split", "rows"], [[split, f"{number:,}"] for split, number in counts.items()])
