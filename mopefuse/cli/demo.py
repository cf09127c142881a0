"""``mopefuse demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mopefuse.cli.shared_options import Json


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the data and the runs.")] = Path("demo"),
    steps: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Stop each training run after N steps: a quick look, not a result.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing runs in the folder.")] = False,
    json: Json = False,
) -> None:
    """Train on a small bundled data set, offline.

    Compares conditional prompts with six other methods on questions about images of digits. Takes a few minutes on a CPU.
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
