"""Options of ``mopefuse serve``; `mopefuse.serving.server_settings` and `mopefuse.serving.engine.engine` have defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=]MODEL...", help="Runs, adapters or exported bundles: folders, or hf-hub:repo/name."),
]
Adapters = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder whose subfolders are models, added and removed while serving.")
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")]
Workers = Annotated[int, typer.Option(min=1, max=256, help="Processes that predict, each with all models.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of each worker; by default all CPUs, shared.")]
Resident = Annotated[int, typer.Option(min=1, help="Models whose weights each worker keeps in memory.")]
CacheMb = Annotated[int, typer.Option(min=0, help="Cache of encoder features of each worker, in MB; 0 for none.")]
MaxBatch = Annotated[int, typer.Option(min=1, max=65536, help="Rows predicted together, at most.")]
MaxWaitMs = Annotated[float, typer.Option(min=0, max=60_000, help="Milliseconds that a row waits for others to join it.")]
Queue = Annotated[int, typer.Option(min=1, help="Rows that may wait; requests beyond that are refused.")]
QueueMb = Annotated[float, typer.Option(min=1, help="MB that waiting requests may hold.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds until a request is given up.")]
MaxBodyMb = Annotated[float, typer.Option(min=0.001, help="Largest body of a request, in MB.")]
MaxRows = Annotated[int, typer.Option(min=1, help="Rows in one request, at most.")]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="Pixels of an image, at most.")]
MaxConnections = Annotated[int, typer.Option(min=0, help="Open connections, at most; 0 for no limit.")]
ReadTimeout = Annotated[
    float, typer.Option(min=0.001, help="Seconds for the headers of a request, and between pieces of its body.")
]
DrainTimeout = Annotated[float, typer.Option(min=0, help="Seconds to answer accepted requests before exiting.")]
Cors = Annotated[
    list[str] | None, typer.Option(metavar="ORIGIN", help="Website that may send requests from browsers. Repeatable.")
]
AllowUrls = Annotated[
    list[str] | None, typer.Option(metavar="HOST", help="Host from which images are read by URL. Repeatable.")
]
LogFormat = Annotated[str, typer.Option(metavar="text|json", help="Form of the log on stderr.")]
