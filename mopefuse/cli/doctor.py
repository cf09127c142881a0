"""``mopefuse doctor``."""

from __future__ import annotations

import typer

from mopefuse.cli.shared_options import Json


def doctor(json: Json = False) -> None:
    """Check the installation.

    Shows versions, devices, caches and plugins, and packages with incompatible versions, such as torch and torchvision. Exits
    with code 5 if there is a problem.
    """
    from mopefuse.cli._render import out, print_json, table
    from mopefuse.core.doctor import examine

    found = examine()
    if json:
        print_json({"ok": not found.problems, **found.as_dict()})
    else:
        table("versions", ["package", "version"], [[name, version] for name, version in found.versions.items()])
        print()
        table("machine", ["", "found"], [[name, value] for name, value in found.machine.items()])
        print()
        table("plugins", ["entry point", "distribution"], [[name, brought_by] for name, brought_by in found.plugins.items()])
        for problem in found.problems:
            print()
            out().print(f"problem: {problem}", style="bold red", markup=False)
        if not found.problems:
            print("\nno problems found")
    if found.problems:
        raise typer.Exit(5)
