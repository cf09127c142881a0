"""Options and arguments that several commands share and that do not correspond to a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Set any other setting, such as train.clip=0.5. Repeatable."),
]
SetData = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Set any other data setting, such as data.allow_missing_text=true."),
]


def read_data_path(text: str) -> Path:
    """The path of data, local or remote."""
    if ":" not in text:
        return Path(text)
    from mopefuse.data.storage.paths import data_path

    return data_path(text)


_DATA_HELP = "Folder with train, val and test (tables, shards or folders of images), one table, or shards; local or remote."
DataPath = Annotated[Path, typer.Argument(metavar="DATA", help=_DATA_HELP, parser=read_data_path)]
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Run, adapter or exported bundle: a folder, or hf-hub:repo/name.")
]
Trained = Annotated[Path, typer.Argument(metavar="RUN", help="Run or adapter: a folder, or hf-hub:repo/name.")]
Checkpoint = Annotated[str, typer.Option("--checkpoint", help="Checkpoint to use: best, last or step-N.")]
Device = Annotated[str, typer.Option("--device", help="Device to compute on: auto, cpu, cuda, cuda:N or mps.")]
Split = Annotated[str, typer.Option("--split", help="Split of the data: train, val or test.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Random seed.")]
Rerank = Annotated[
    Path | None,
    typer.Option(metavar="MATCHER", help="Retrieval: run that re-ranks the best candidates, see mopefuse data candidates."),
]
OtherMain = Annotated[
    str | None,
    typer.Option("--main", metavar="SPEC", help="Location of the main encoder's weights, if they moved since training."),
]
OtherComp = Annotated[
    list[str] | None,
    typer.Option("--comp", metavar="SPEC", help="The same for the complementary encoder; 2=SPEC selects one of several."),
]
