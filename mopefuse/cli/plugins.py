"""``mopefuse plugins``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mopefuse.cli.shared_options import Json

app = typer.Typer(help="List installed plugins, or create one.", no_args_is_help=True)


@app.command("list")
def list_(json: Json = False) -> None:
    """List installed plugins, without importing them.

    Shows every entry point that other packages add, and whether its name clashes with another.
    """
    from mopefuse.cli._render import out, print_json, table
    from mopefuse.core.new_plugin import Plugin, installed

    found = installed()
    if json:
        print_json({"ok": True, "plugins": [plugin._asdict() for plugin in found]})
        return
    if not found:
        out().print("no plugin is installed; create one with mopefuse plugins new NAME", markup=False)
        return
    table("plugins", list(Plugin._fields), found, left=range(len(Plugin._fields)))
    if any(plugin.state in ("clash", "shadowed by built-in") for plugin in found):
        out().print()
        out().print("if a name is taken, add the distribution: DIST:NAME, or DIST:SCHEME:NAME for an encoder")


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Scheme of its encoders. The package is called mopefuse-NAME.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder in which to create mopefuse-NAME.")] = Path(),
    json: Json = False,
) -> None:
    """Create a plugin package with a small encoder and its test.

    \b
    Example:
      mopefuse plugins new toy
    """
    from mopefuse.cli._render import lines, print_json
    from mopefuse.cli._render import out as console
    from mopefuse.core.new_plugin import new as write

    folder = write(name, out)
    if json:
        print_json({"ok": True, "folder": str(folder)})
        return
    steps = f"{folder}\n\npip install -e {folder}\nmopefuse encoders inspect {name}:small\npython -m pytest {folder}"
    console().print(lines(steps))
