"""Options that say how a table is read: the same for every command that reads data."""

from __future__ import annotations

from typing import Annotated, Any

import typer

TextCol = Annotated[str | None, typer.Option("--text-col", help="Column with the text; default text.")]
ImageCol = Annotated[str | None, typer.Option("--image-col", help="Column with the image's path; default img.")]
LabelCol = Annotated[str | None, typer.Option("--label-col", help="Column with the label; default label.")]
IdCol = Annotated[str | None, typer.Option("--id-col", help="Column with the id; default id.")]
SplitCol = Annotated[str | None, typer.Option("--split-col", help="Column that names the split, in one table.")]
LabelSep = Annotated[str | None, typer.Option("--label-sep", help="Separates several labels in a cell.")]
ImageRoot = Annotated[list[str] | None, typer.Option("--image-root", help="Another folder that images may be in.")]
Labels = Annotated[str | None, typer.Option("--labels", help="File with all labels, one a line.")]


def settings(
    *,
    text: str | None,
    image: str | None,
    label: str | None,
    identity: str | None,
    split: str | None,
    separator: str | None,
    roots: list[str] | None,
    labels: str | None,
) -> dict[str, Any]:
    """The settings that these options stand for, by path; None where one is not given."""
    return {
        "data.text_col": text,
        "data.img_col": image,
        "data.label_col": label,
        "data.id_col": identity,
        "data.split_col": split,
        "data.label_sep": separator,
        "data.image_roots": roots or None,
        "data.labels": labels,
    }
