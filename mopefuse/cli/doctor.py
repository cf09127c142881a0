"""``mopefuse doctor``."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """Say what is installed, and whether it fits together.

    Versions, devices, mismatched torch and torchvision, caches, plugins; exit code 5 if something must be mended.
    """
    from mopefuse.cli._render import out, print_json, table
    from mopefuse.core.doctor import examine

    found = examine()
    if json:
        print_json({"ok": not found.problems, **found.as_dict()})
    else:
        table("versions", ["package", "version"], [[name, said] for name, said in found.versions.items()])
        print()
        table("machine", ["what", "found"], [[name, said] for name, said in found.machine.items()])
        print()
        table("plugins", ["entry point", "distribution"], [[name, said] for name, said in found.plugins.items()])
        for problem in found.problems:
            print()
            out().print(f"problem: {problem}", style="bold red", markup=False)
        if not found.problems:
            print("\nall is well")
    if found.problems:
        raise typer.Exit(5)
