"""``mopefuse push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mopefuse.cli.shared_options import Json


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run (its adapter is uploaded), adapter or exported bundle.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO/NAME", help="Repository on the Hugging Face Hub. Created if it does not exist.")
    ],
    checkpoint: Annotated[str, typer.Option(help="Checkpoint of a run to use: best, last or step-N.")] = "best",
    public: Annotated[bool, typer.Option("--public", help="Use a public repository. Default: private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, and upload nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Upload without asking.")] = False,
    json: Json = False,
) -> None:
    """Upload a trained model to the Hugging Face Hub.

    Everyone with read access to the repository can then use hf-hub:REPO/NAME in place of a run.

    \b
    Example:
      mopefuse push runs/first my-name/my-model --dry-run
    """
    from mopefuse.cli._render import err, out, print_json, size
    from mopefuse.export.push import prepare_upload, send

    with prepare_upload(run, repo, checkpoint=checkpoint, public=public, offline=dry_run) as parcel:
        seen = "private" if parcel.private else "public"
        console = err()
        state = {True: "", False: ", new", None: "; the hub cannot be reached to see whether it exists"}[parcel.there]
        console.print(f"to {parcel.repo} ({seen}{state}):", markup=False)
        for name, length in parcel.files.items():
            console.print(f"  {name}  {size(length)}", markup=False)
        for spec in parcel.local:
            console.print(f"{spec} is a local folder: other users must pass their own copy with --main or --comp", markup=False)
        if not (dry_run or yes) and sys.stdin.isatty() and not typer.confirm("upload these files?", err=True):
            raise typer.Exit(1)
        url = None if dry_run else send(parcel)
        if json:
            print_json({"ok": True, "repo": parcel.repo, "private": parcel.private, "files": parcel.files, "url": url})
        elif url is not None:
            out().print(f"pushed: hf-hub:{parcel.repo}")
