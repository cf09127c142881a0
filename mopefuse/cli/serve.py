"""``mopefuse serve``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mopefuse.cli.shared_options import Device


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]MODEL...", help="Runs, adapters or exported bundles: folders, or hf-hub:repo/name."),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder whose subfolders are models, added and removed while serving.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that predict, each with all models.")] = 1,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each worker.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=65536, help="Rows predicted together, at most.")] = 32,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, max=60_000, help="Milliseconds that a row waits for others to be predicted with.")
    ] = 5.0,
    queue: Annotated[int, typer.Option(min=1, help="Rows that may wait; requests beyond that are refused.")] = 1024,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a request is given up.")] = 30.0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest body of a request, in MB.")] = 20.0,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows in one request, at most.")] = 64,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds to answer accepted requests before exiting.")] = 30.0,
    log_format: Annotated[str, typer.Option(metavar="text|json", help="Form of the log on stderr.")] = "text",
) -> None:
    """Serve models over HTTP.

    A request names its model; those for adapters with the same encoders are predicted together. The server documents itself at
    /docs. Set MOPEFUSE_API_KEY to require a key.

    \b
    Examples:
      mopefuse serve runs/first
      mopefuse serve --adapters adapters --port 8080 --workers 2
    """
    from mopefuse.core.dependencies import require

    require("fastapi", "uvicorn", "python_multipart", "prometheus_client", extra="serve", what="mopefuse serve")
    from mopefuse.serving.engine import EngineSettings
    from mopefuse.serving.server import serve as run_server
    from mopefuse.serving.server_settings import ServerSettings

    engine = EngineSettings(tuple(models or ()), None if adapters is None else str(adapters), device, threads)
    settings = ServerSettings(
        host=host,
        port=port,
        workers=workers,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        queue=queue,
        timeout=timeout,
        max_body_mb=max_body_mb,
        max_rows=max_rows,
        api_key=os.environ.get("MOPEFUSE_API_KEY", ""),
        drain_timeout=drain_timeout,
        log_format=log_format,
    )
    if host not in ("127.0.0.1", "localhost", "::1") and not settings.api_key:
        print("notice: anyone who can reach the port can send requests; set MOPEFUSE_API_KEY to require a key", file=sys.stderr)
    run_server(engine, settings)
