"""``mopefuse data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mopefuse.cli import data_cache, data_check

app = typer.Typer(help="Check, preview, make and prepare data sets.", no_args_is_help=True)


app.command("check")(data_check.check)
app.command("preview")(data_check.preview)
app.command("cache")(data_cache.cache)


@app.callback()
def group() -> None:
    """Check, preview, make and prepare data sets."""


@app.command("make")
def make(
    name: Annotated[str, typer.Argument(help="digit-questions, or a data set of a plugin.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same files.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write a data set that needs no download.

    It is in the native row format.
    """
    from mopefuse.cli._render import print_json, table
    from mopefuse.core.registry import DATASETS, load
    from mopefuse.errors import DataError

    maker = load(DATASETS, name)
    if _is_source(maker):
        fix = f"mopefuse data prepare {name} SOURCE DEST"
        raise DataError(72, f"{name} is not made, it is prepared from the files of its owners", where=name, fix=fix)
    counts = maker(folder, seed=seed)
    if json:
        print_json({"ok": True, "folder": str(folder), "rows": counts})
        return
    table(str(folder), ["split", "rows"], [[split, f"{number:,}"] for split, number in counts.items()])


@app.command("prepare")
def prepare(
    name: Annotated[str, typer.Argument(help="food101, mm-imdb, snli-ve, or a data set of a plugin.")],
    source: Annotated[Path, typer.Argument(help="Folder with the files as their owners distribute them.")],
    dest: Annotated[Path, typer.Argument(help="Folder to write.")],
    text: Annotated[str | None, typer.Option(help="food101: page or title; default the only one there.")] = None,
    clean: Annotated[bool, typer.Option("--clean", help="food101: texts as lower-case words only.")] = False,
    premise: Annotated[bool, typer.Option("--premise", help="snli-ve: the caption before the hypothesis.")] = False,
    val: Annotated[int | None, typer.Option(min=1, help="food101: pairs to hold out; default 5000, of few a fifth.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="food101: of the held-out pairs; default 0.")] = None,
    images: Annotated[str, typer.Option(help="link (hard links where possible) or copy.")] = "link",
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write a data set that you downloaded.

    It is in the native row format, and needs no network.
    """
    from mopefuse.cli._prepare_display import PrepareDisplay, show
    from mopefuse.cli._render import print_json
    from mopefuse.core.registry import DATASETS, load
    from mopefuse.data.prepare import prepare as run
    from mopefuse.errors import DataError

    kind = load(DATASETS, name)
    if not _is_source(kind):
        fix = f"mopefuse data make {name} {dest}"
        raise DataError(71, f"{name} is not prepared from files, it is made", where=name, fix=fix)
    said = {"text": text, "clean": clean or None, "premise": premise or None, "val": val, "seed": seed}
    options = {key: value for key, value in said.items() if value is not None}
    with PrepareDisplay(silent=json) as display:
        about = run(kind, source, dest, options, images=images, advance=display.advance)
    if json:
        print_json({"ok": True, "folder": str(dest), **about})
    else:
        show(about, dest)


def _is_source(kind: object) -> bool:
    """Whether an entry point is a data set that is prepared from files; else it is a function that makes one."""
    from mopefuse.data.prepare import Source

    return isinstance(kind, type) and issubclass(kind, Source)
