"""``mopefuse push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def push(
    run: Annotated[Path, typer.Argument(help="Run, adapter or exported bundle; of a run, its adapter is pushed.")],
    repo: Annotated[str, typer.Argument(metavar="REPO/NAME", help="Repository on the hub; made if it is not there.")],
    checkpoint: Annotated[str, typer.Option(help="Of a run: best, last or step-N.")] = "best",
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; default: private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Put a trained model on the hub.

    There hf-hub:repo/name is a run for everybody who may read it. Private by default.
    """
    from mopefuse.cli._render import err, out, print_json, size
    from mopefuse.export.push import pack, send

    with pack(run, repo, checkpoint=checkpoint, public=public, offline=dry_run) as parcel:
        seen = "private" if parcel.private else "public"
        console = err()
        state = {True: "", False: ", new", None: "; the hub cannot be reached, so whether it exists is not known"}[parcel.there]
        console.print(f"to {parcel.repo} ({seen}{state}):", markup=False)
        for name, length in parcel.files.items():
            console.print(f"  {name}  {size(length)}", markup=False)
        for spec in parcel.local:
            console.print(f"{spec} is a folder of this machine: others give their own with --main or --comp", markup=False)
        if not (dry_run or yes) and sys.stdin.isatty() and not typer.confirm("upload these files?", err=True):
            raise typer.Exit(1)
        url = None if dry_run else send(parcel)
        if json:
            print_json({"ok": True, "repo": parcel.repo, "private": parcel.private, "files": parcel.files, "url": url})
        elif url is not None:
            out().print(f"pushed: hf-hub:{parcel.repo}")
