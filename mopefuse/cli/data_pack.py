"""``mopefuse data pack``."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mopefuse.cli.settings import Settings
from mopefuse.cli.shared_options import DataPath, Json, SetData
from mopefuse.core.error_codes import ConfigCode


def pack(
    folder: DataPath,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to write.")],
    *,
    kind: Annotated[str, typer.Option("--format", metavar="tar|parquet", help="Format of the shards.")] = "tar",
    shard_mb: Annotated[int, typer.Option(min=1, max=1_000_000, help="Size of a shard, in MB.")] = 256,
    set_: SetData = None,
    json: Json = False,
    settings: Settings,
) -> None:
    """Pack a data set into shards.

    Disks and networks are slow with many small files. Training on the shards gives the same rows in the same order, and the
    same results, as on the folder. Tar files follow WebDataset, Parquet files Hugging Face's images.

    \b
    Example:
      mopefuse data pack products products-shards
      mopefuse train --data products-shards ...
    """
    from mopefuse.cli._prepare_display import PrepareDisplay
    from mopefuse.cli._render import out, print_json, table
    from mopefuse.config.flags import flag_of
    from mopefuse.config.recipe import data_settings
    from mopefuse.core.formatting import size
    from mopefuse.data.storage.pack import FORMATS
    from mopefuse.data.storage.pack import pack as run
    from mopefuse.errors import ConfigError, did_you_mean

    if kind not in FORMATS:
        fix = did_you_mean(kind, FORMATS)
        raise ConfigError(ConfigCode.UNKNOWN_TABLE_FORMAT, f"unknown format {kind!r}", where="--format", fix=fix)
    config = data_settings({"data.path": str(folder), **settings}, set_ or ())
    with PrepareDisplay(silent=json) as display:
        packed = run(config, dest, kind=kind, shard_bytes=shard_mb * 10**6, advance=partial(display.advance, "rows"))
    if json:
        print_json({"ok": True, "folder": str(dest), "rows": packed.rows, "shards": packed.shards, "bytes": packed.size})
        return
    rows = [[split, f"{count:,}", f"{packed.shards[split]:,}"] for split, count in packed.rows.items()]
    table(f"{dest} ({size(packed.size)})", ["split", "rows", "shards"], rows)
    columns = [f"{flag_of(path)} {shlex.quote(str(value))}" for path, value in settings.items() if path.endswith("_col")]
    out().print(f"next: mopefuse train {' '.join(['--data', str(dest), *columns])} ...", markup=False)
