"""``mopefuse swap-encoder``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mopefuse.training.swap import Swap

_STAGES = {"before": "before the swap", "after": "right after it", "tuned": "after tuning", "scratch": "trained from scratch"}


def swap_encoder(
    run: Annotated[Path, typer.Argument(help="Run or adapter: a folder, or hf-hub:repo/name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new run.")],
    main: Annotated[str | None, typer.Option(help="New main encoder: timm:deit_base")] = None,
    comp: Annotated[
        list[str] | None, typer.Option(help="New complementary encoder: hf:roberta-base; of several 2=SPEC or text=SPEC.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Another data set, perhaps with other labels.")] = None,
    epochs: Annotated[int, typer.Option(min=0, max=10**9, help="Tune for so many epochs; 0 leaves the model as it is.")] = 0,
    warm_up: Annotated[int, typer.Option(min=0, max=10**9, help="Of these, epochs in which only what is new learns.")] = 0,
    scratch: Annotated[bool, typer.Option(help="With --epochs, also train from scratch to compare.")] = True,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting of the new run.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Change an encoder of a trained run, or its data.

    What was learned is kept where it can be, and what was kept is printed.
    """
    from mopefuse.cli._train_display import Display
    from mopefuse.config.recipe import parse_set
    from mopefuse.runs.locate import trained

    settings = parse_set(set_ or ())
    trained(run).config()
    from mopefuse.core import distributed
    from mopefuse.training.swap import swap_encoder as run_swap

    with Display(out, json=json) as display:
        swap = run_swap(
            run,
            out,
            main=main,
            comp=comp,
            data=data,
            settings=settings,
            epochs=epochs,
            warm_up=warm_up,
            scratch=scratch,
            listener=display,
        )
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

    groups: dict[tuple[str, str], list[int]] = {}
    for entry in swap.inherited:
        group = groups.setdefault((_group(entry.name), entry.fate), [0, 0, 0])
        size = 1
        for side in entry.shape:
            size *= side
        for place, number in enumerate((1, size, entry.kept)):
            group[place] += number
    rows = [[name, fate, str(count), f"{size:,}", f"{kept:,}"] for (name, fate), (count, size, kept) in groups.items()]
    table("what became of the trained tensors", ["group", "", "tensors", "values", "from the run"], rows)
    out().print(f"{percent(swap.share_kept)} of the new run's own values come from the trained one", markup=False)
    name = next(key for key in ("accuracy", "f1_macro") if key in (swap.metrics["after"]["val"] or {}))
    shown = [
        [_STAGES[stage], *(percent((splits.get(split) or {}).get(name)) for split in ("val", "test"))]
        for stage, splits in swap.metrics.items()
    ]
    table(name, ["", "val", "test"], shown)
    if not tuned:
        err().print("not tuned: with a new encoder the metric is expected to be poor; tune with --epochs", markup=False)
    out().print(f"run folder: {folder}", markup=False)


def _group(name: str) -> str:
    """A tensor's name without the number of its layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
