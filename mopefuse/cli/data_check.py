"""``mopefuse data check`` and ``mopefuse data preview``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopefuse.cli import columns
from mopefuse.core.formatting import several

if TYPE_CHECKING:
    from mopefuse.config.schema import Data

Folder = Annotated[Path, typer.Argument(help="Folder with train, val and test (.jsonl, .csv, ...), or one table.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
MaxPixels = Annotated[int | None, typer.Option("--max-pixels", help="Images with more pixels are refused unread.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting of the data: --set data.allow_missing_text=true")]


def check(
    folder: Folder,
    encoder: Annotated[str | None, typer.Option(help="Count tokens as it does, and how many texts it cuts.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures of what is wrong.")] = None,
    most: Annotated[int, typer.Option(min=0, max=10**9, help="Problems to list in --json; all are counted.")] = 1000,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors: exit code 4.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Look at everything again, whatever is in the cache.")] = False,
    text_col: columns.TextCol = None,
    image_col: columns.ImageCol = None,
    column: columns.Column = None,
    label_col: columns.LabelCol = None,
    id_col: columns.IdCol = None,
    split_col: columns.SplitCol = None,
    label_sep: columns.LabelSep = None,
    image_root: columns.ImageRoot = None,
    labels: columns.Labels = None,
    fold_labels: columns.FoldLabels = None,
    allow_odd_labels: columns.AllowOddLabels = None,
    val_fraction: Annotated[float | None, typer.Option(help="As in train: val need not be there.")] = None,
    test_fraction: Annotated[float | None, typer.Option(help="As in train: test need not be there.")] = None,
    on_missing: Annotated[str | None, typer.Option(help="As in train: error, skip or absent.")] = None,
    max_pixels: MaxPixels = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Find everything that is wrong with a data set.

    Only reads it; exit code 4 if training would refuse it.
    Warnings are what training accepts: the same image in train and test, tiny images, texts that are empty.
    """
    flags = columns.settings(
        text=text_col,
        image=image_col,
        others=column,
        label=label_col,
        identity=id_col,
        split=split_col,
        separator=label_sep,
        roots=image_root,
        labels=labels,
    )
    flags |= {"data.val_fraction": val_fraction, "data.test_fraction": test_fraction}
    flags |= {"data.fold_labels": fold_labels, "data.allow_odd_labels": allow_odd_labels}
    flags |= {"data.on_missing": on_missing, "data.max_pixels": max_pixels}
    config = _config(folder, flags, set_)
    if html is not None:
        from mopefuse.report.pages import check_place

        check_place(html, folder)
    from mopefuse.cli import _check_display as display
    from mopefuse.cli._prepare_display import PrepareDisplay
    from mopefuse.data.check import check as run_check
    from mopefuse.errors import DataError

    tokens = None
    if encoder is not None:
        from mopefuse.report.tokens import tokens_of

        tokens = tokens_of(encoder)
    with PrepareDisplay(silent=json) as progress:
        report = run_check(config, tokens=tokens, fresh=fresh, advance=progress.advance)
    error = None
    if report.errors:
        fix = "correct what is listed" if json else "correct what is listed above"
        error = DataError(80, f"{several(report.errors, 'error')} in {folder}", fix=fix)
    elif strict and report.warnings:
        fix = "correct what is listed, or leave --strict out"
        error = DataError(81, f"{several(report.warnings, 'warning')} in {folder}, and they count", where="--strict", fix=fix)
    if html is not None:
        display.write_page(report, folder, html)
    if not json:
        display.show(report, folder, html)
        if error is not None:
            raise error
        return
    from mopefuse.cli._render import print_json

    body = {"error": error.as_dict()} if error is not None else {}
    page = {"html": str(html)} if html is not None else {}
    print_json({"ok": error is None, **body, **report.as_dict(most), **page})
    if error is not None:
        raise typer.Exit(error.exit_code)


def preview(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="Page to write.")] = Path("preview.html"),
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    rows: Annotated[int, typer.Option(min=1, max=100_000, help="Rows to show.")] = 48,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of which rows are shown.")] = 0,
    text_col: columns.TextCol = None,
    image_col: columns.ImageCol = None,
    column: columns.Column = None,
    label_col: columns.LabelCol = None,
    id_col: columns.IdCol = None,
    split_col: columns.SplitCol = None,
    label_sep: columns.LabelSep = None,
    image_root: columns.ImageRoot = None,
    max_pixels: MaxPixels = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Write a contact sheet of a split as one HTML page.

    Pictures, texts and labels, every class in turn.
    """
    flags = columns.settings(
        text=text_col,
        image=image_col,
        others=column,
        label=label_col,
        identity=id_col,
        split=split_col,
        separator=label_sep,
        roots=image_root,
        labels=None,
    )
    config = _config(folder, flags | {"data.max_pixels": max_pixels}, set_)
    from mopefuse.cli._render import out as results
    from mopefuse.cli._render import print_json
    from mopefuse.data.check import read_split
    from mopefuse.report.data_preview import preview_page
    from mopefuse.report.pages import check_place, write

    check_place(out, folder)
    index, roots = read_split(config, split)
    html, shown = preview_page(index, roots, config, name=str(folder), rows=rows, seed=seed)
    write(out, html)
    if json:
        print_json({"ok": True, "path": str(out), "rows": shown})
    else:
        results().print(f"{several(shown, 'row')} of {split}: {out}", markup=False)


def _config(folder: Path, flags: dict[str, Any], sets: list[str] | None) -> Data:
    from mopefuse.config.recipe import data_settings

    return data_settings({"data.path": str(folder), **flags}, sets or ())
