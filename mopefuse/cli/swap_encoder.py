"""``mopefuse swap-encoder``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopefuse.cli.shared_options import Json, Set, Trained

if TYPE_CHECKING:
    from mopefuse.training.swap import Swap

_STAGES = {"before": "before the swap", "after": "right after it", "tuned": "after tuning", "scratch": "trained from scratch"}


def swap_encoder(
    run: Trained,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the new run.")],
    main: Annotated[str | None, typer.Option(metavar="SPEC", help="New main encoder, such as timm:deit_base.")] = None,
    comp: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC", help="New complementary encoder, such as hf:roberta-base; for one of several, 2=SPEC or text=SPEC."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Other data, possibly with other labels: a folder or a table.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, max=10**9, help="Train the new run for N epochs; 0: do not train it.")] = 0,
    warm_up: Annotated[
        int, typer.Option(min=0, max=10**9, help="Train only the new weights for the first N of these epochs.")
    ] = 0,
    scratch: Annotated[bool, typer.Option(help="With --epochs, also train a run from scratch and compare.")] = True,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Replace an encoder or the data set of a trained run.

    Trained weights that fit the new encoder are kept; the command lists them. With a new encoder, expect poor metrics
    until the run is trained with --epochs.

    \b
    Example:
      mopefuse swap-encoder runs/first --comp hf:roberta-base -o runs/new
    """
    from mopefuse.cli._train_display import Display
    from mopefuse.config.encoder_sides import check_weights
    from mopefuse.config.recipe import parse_set
    from mopefuse.runs.locate import find_run

    settings = parse_set(set_ or ())
    find_run(run).config()
    check_weights({**({"main": main} if main else {}), **{f"comp{number}": spec for number, spec in enumerate(comp or ())}})
    from mopefuse.core import distributed
    from mopefuse.training.swap import swap_encoder as run_swap

    changes: dict[str, Any] = {"main": main, "comp": comp, "data": data, "settings": settings}
    with Display(out, json=json) as display:
        swap = run_swap(run, out, **changes, epochs=epochs, warm_up=warm_up, scratch=scratch, listener=display)
    if not distributed.is_main():
        return
    if json:
        from mopefuse.cli._render import print_json

        tuned = swap.metrics.get("tuned", swap.metrics["after"])
        found = {**swap.as_dict(), "metrics": tuned["test"] or tuned["val"], "stages": swap.metrics}
        found["notices"] = display.notices
        print_json({"ok": True, "run": str(out), **found})
        return
    _print(swap, out, tuned=bool(epochs))


def _print(swap: Swap, folder: Path, *, tuned: bool) -> None:
    from mopefuse.cli._render import err, out, percent, table
    from mopefuse.metrics.names import write_metric
    from mopefuse.tasks.base import all_metrics

    groups: dict[tuple[str, str], list[int]] = {}
    for entry in swap.transferred:
        group = groups.setdefault((_group(entry.name), entry.origin), [0, 0, 0])
        size = 1
        for side in entry.shape:
            size *= side
        for place, number in enumerate((1, size, entry.kept)):
            group[place] += number
    rows = [[name, origin, str(count), f"{size:,}", f"{kept:,}"] for (name, origin), (count, size, kept) in groups.items()]
    table("trained tensors", ["group", "", "tensors", "values", "kept from the run"], rows)
    out().print(f"{percent(swap.share_kept)} of the trainable values of the new run are kept from the old one", markup=False)
    found = swap.metrics["after"]["val"] or {}
    name = next((key for key in all_metrics() if key in found), "loss")
    shown = [
        [_STAGES[stage], *(write_metric(name, (splits.get(split) or {}).get(name)) for split in ("val", "test"))]
        for stage, splits in swap.metrics.items()
    ]
    table(name, ["", "val", "test"], shown)
    if not tuned:
        err().print("not trained: with a new encoder, expect poor metrics; train with --epochs", markup=False)
    out().print(f"run folder: {folder}", markup=False)


def _group(name: str) -> str:
    """A tensor's name without the number of its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
