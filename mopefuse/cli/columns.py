"""Options that say how a table is read: the same for every command that reads data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

TextCol = Annotated[str | None, typer.Option("--text-col", help="Column with the text; default text.")]
ImageCol = Annotated[str | None, typer.Option("--image-col", help="Column with the image's path; default img.")]
Column = Annotated[
    list[str] | None, typer.Option("--column", metavar="MODALITY=NAME", help="Column of another modality: audio=clip.")
]
LabelCol = Annotated[str | None, typer.Option("--label-col", help="Column with the label; default label.")]
IdCol = Annotated[str | None, typer.Option("--id-col", help="Column with the id; default id.")]
SplitCol = Annotated[str | None, typer.Option("--split-col", help="Column that names the split, in one table.")]
LabelSep = Annotated[str | None, typer.Option("--label-sep", help='Separates labels in a cell; list: cells are ["a", "b"].')]
ImageRoot = Annotated[list[str] | None, typer.Option("--image-root", help="Another folder that images may be in.")]
FoldLabels = Annotated[
    bool | None, typer.Option("--fold-labels", help="Labels that differ in case or spaces are one, in lower case.")
]
AllowOddLabels = Annotated[
    bool | None, typer.Option("--allow-odd-labels", help="Labels that look wrong, as lists in cells, are meant.")
]
Labels = Annotated[str | None, typer.Option("--labels", help="File with all labels, one a line.")]


def settings(
    *,
    text: str | None = None,
    image: str | None = None,
    others: list[str] | None = None,
    label: str | None = None,
    identity: str | None = None,
    split: str | None = None,
    separator: str | None = None,
    roots: list[str] | None = None,
    labels: str | None = None,
) -> dict[str, Any]:
    """The settings that these options stand for, by path; None where one is not given.

    Raises:
        ConfigError: ``--column`` cannot be read, or names another column than ``--text-col`` or ``--image-col``; or there is
            no folder of one of `roots`.
    """
    for root in roots or ():
        _require_folder(root)
    from mopefuse.config.recipe import flag_of
    from mopefuse.config.schema import COLUMN_SETTINGS
    from mopefuse.errors import ConfigError

    columns, own = named(others) or {}, {"text_col": text, "img_col": image}
    for modality, setting in COLUMN_SETTINGS.items():
        other = columns.pop(modality, None)
        if other is not None and own[setting] not in (None, other):
            flag = flag_of(f"data.{setting}")
            what = f"{flag} {own[setting]} and --column {modality}={other} name two columns for one modality"
            raise ConfigError(230, what, where=f"{flag}, --column", fix="leave one of them out")
        own[setting] = other or own[setting]
    return {
        **{f"data.{setting}": column for setting, column in own.items()},
        "data.columns": columns or None,
        "data.label_col": label,
        "data.id_col": identity,
        "data.split_col": split,
        "data.label_sep": separator,
        "data.image_roots": roots or None,
        "data.labels": labels,
    }


def _require_folder(root: str) -> None:
    from mopefuse.errors import ConfigError

    if not Path(root).is_dir():
        raise ConfigError(301, f"there is no folder {root}", where="--image-root", fix="check the path")


def named(others: list[str] | None) -> dict[str, str] | None:
    """``MODALITY=NAME`` as a dictionary; None where nothing is said.

    Raises:
        ConfigError: one is not written so, or a modality is named twice.
    """
    from mopefuse.errors import ConfigError

    found: dict[str, str] = {}
    for text in others or ():
        modality, _, name = (part.strip() for part in text.partition("="))
        if not (modality and name) or modality in found:
            fix = "write each once, as --column MODALITY=NAME, for example --column audio=clip"
            raise ConfigError(135, f"cannot read the column {text!r}", where="--column", fix=fix)
        found[modality] = name
    return found or None
