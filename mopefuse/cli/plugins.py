"""``mopefuse plugins``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List installed plugins, or begin a new one.", no_args_is_help=True)


@app.command("list")
def list_(json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """List what other distributions bring, importing none.

    Every entry point, and whether its name can be used.
    """
    from mopefuse.cli._render import out, print_json, table
    from mopefuse.core.new_plugin import Plugin, installed
    from mopefuse.core.registry import API

    found = installed()
    if json:
        print_json({"ok": True, "api": API, "plugins": [plugin._asdict() for plugin in found]})
        return
    if not found:
        out().print("no plugin is installed; mopefuse plugins new NAME writes one to begin with", markup=False)
        return
    table("plugins", list(Plugin._fields), found, left=range(len(Plugin._fields)))
    if any(plugin.state in ("clash", "shadowed by built-in") for plugin in found):
        out().print()
        out().print("a name that is taken is written with its distribution: DIST:NAME, an encoder DIST:SCHEME:NAME")


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(help="The scheme of its encoders; the package is mopefuse-NAME.")],
    out: Annotated[Path, typer.Option("--out", help="Folder in which the folder mopefuse-NAME is made.")] = Path(),
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write a complete package with a small encoder and its test."""
    from mopefuse.cli._render import lines, print_json
    from mopefuse.cli._render import out as console
    from mopefuse.core.new_plugin import new as write

    folder = write(name, out)
    if json:
        print_json({"ok": True, "folder": str(folder)})
        return
    steps = f"{folder}\n\npip install -e {folder}\nmopefuse encoders inspect {name}:small\npython -m pytest {folder}"
    console().print(lines(steps))
