"""``mopefuse demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the data and the runs.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(min=1, max=10**9, help="Train so many steps only: a look, not a result.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier runs in it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Fuse real images with text, offline and in minutes.

    Conditional prompts against five simpler ways.
    """
    from mopefuse.cli._render import duration, err, percent, print_json, table
    from mopefuse.cli._train_display import Display
    from mopefuse.training.demo import demo as run_demo

    console = err()

    def announce(title: str) -> Display:
        console.print()
        console.print(title, style="bold", markup=False)
        return Display(out, json=json)

    rows = run_demo(out, listener=announce, steps=steps, overwrite=overwrite)
    if json:
        print_json({"ok": True, "rows": [vars(row) for row in rows]})
        return
    console.print()
    cells = [[row.title, percent(row.accuracy), f"{row.trainable:,}", duration(row.seconds)] for row in rows]
    table("digit questions, test split", ["method", "accuracy", "trainable parameters", "time"], cells, bold=0)
