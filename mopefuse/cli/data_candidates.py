"""``mopefuse data candidates``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mopefuse.cli.shared_options import Checkpoint, Device, Json, Seed, Trained


def candidates(
    run: Trained,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    *,
    count: Annotated[int, typer.Option(min=1, max=1000, help="Rows with the label other for each pair.")] = 1,
    among: Annotated[int, typer.Option(min=1, max=10**6, help="Best candidates from which these are drawn.")] = 20,
    seed: Seed = 0,
    checkpoint: Checkpoint = "best",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write the training data of a matcher for re-ranking.

    A matcher re-ranks what a run for retrieval finds. Each pair of the run's data becomes a row with the label match. Rows
    with the label other have the text or image of another pair, drawn from those that the run ranks highest for it. Prints
    the command that trains the matcher.

    \b
    Example:
      mopefuse data candidates runs/search candidates
    """
    import shlex

    from mopefuse.cli._prepare_display import PrepareDisplay
    from mopefuse.cli._render import out as console
    from mopefuse.cli._render import print_json, table
    from mopefuse.evaluation.candidates import Draw, write_candidates

    with PrepareDisplay(silent=json) as display:
        counts, command = write_candidates(
            run, out, how=Draw(count, among, seed), checkpoint=checkpoint, device=device, advance=display.advance
        )
    if json:
        print_json({"ok": True, "folder": str(out), "rows": counts, "train": command})
        return
    labels = next(iter(counts.values()))
    rows = [[split, *(f"{number:,}" for number in of_split.values())] for split, of_split in counts.items()]
    table(str(out), ["split", *labels], rows)
    console().print(f"train a matcher: {shlex.join(command)}", markup=False)
