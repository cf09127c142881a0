"""``mopefuse serve``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mopefuse.cli import _serve_options as options
from mopefuse.cli.shared_options import Device
from mopefuse.core.error_codes import ConfigCode, RequestCode


def serve(
    models: options.Models = None,
    adapters: options.Adapters = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    workers: options.Workers = 1,
    device: Device = "auto",
    threads: options.Threads = None,
    resident: options.Resident = 256,
    cache_mb: options.CacheMb = 256,
    max_batch: options.MaxBatch = 32,
    max_wait_ms: options.MaxWaitMs = 5.0,
    queue: options.Queue = 1024,
    queue_mb: options.QueueMb = 512.0,
    timeout: options.Timeout = 30.0,
    max_body_mb: options.MaxBodyMb = 20.0,
    max_rows: options.MaxRows = 64,
    max_pixels: options.MaxPixels = None,
    max_connections: options.MaxConnections = 0,
    read_timeout: options.ReadTimeout = 10.0,
    drain_timeout: options.DrainTimeout = 30.0,
    cors: options.Cors = None,
    allow_urls: options.AllowUrls = None,
    log_format: options.LogFormat = "text",
) -> None:
    """Serve models over HTTP.

    A request names its model; those for adapters with the same encoders are predicted together. The server documents itself at
    /docs. Set MOPEFUSE_API_KEY to require a key.

    \b
    Examples:
      mopefuse serve runs/first
      mopefuse serve --adapters adapters --port 8080 --workers 2
    """
    _check(adapters, log_format)
    from mopefuse.modalities.files import processor_count
    from mopefuse.modalities.image import MAX_PIXELS
    from mopefuse.serving.engine.engine import EngineSettings
    from mopefuse.serving.server import serve as run_server
    from mopefuse.serving.server_settings import ServerSettings

    folder, key = None if adapters is None else str(adapters), os.environ.get("MOPEFUSE_API_KEY", "")
    if threads is None and workers > 1:
        threads = max(1, processor_count() // workers)
    engine = EngineSettings(tuple(models or ()), folder, device, threads, resident, cache_mb, max_pixels or MAX_PIXELS)
    limits = {"queue": queue, "queue_mb": queue_mb, "max_body_mb": max_body_mb, "max_rows": max_rows}
    times = {"max_wait_ms": max_wait_ms, "timeout": timeout, "read_timeout": read_timeout, "drain_timeout": drain_timeout}
    access = {"api_key": key, "cors": tuple(cors or ()), "allow_urls": tuple(allow_urls or ())}
    rest = {"host": host, "port": port, "workers": workers, "max_batch": max_batch, "max_connections": max_connections}
    settings = ServerSettings(**limits, **times, **access, **rest, log_format=log_format)  # type: ignore[arg-type]
    if not key and not _is_loopback(host):
        print("notice: anyone who can reach the port can send requests; set MOPEFUSE_API_KEY to require a key", file=sys.stderr)
    run_server(engine, settings)


def _check(adapters: Path | None, log_format: str) -> None:
    """Refuse a missing package or folder, or an unknown format, before anything is imported."""
    from mopefuse.core.dependencies import require
    from mopefuse.errors import ConfigError, RequestError

    packages = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client", "httpx")
    require(*packages, extra="serve", what="mopefuse serve")
    if adapters is not None and not adapters.is_dir():
        fix = "create it, or pass the folder that contains the folders of the adapters"
        raise RequestError(RequestCode.NOTHING_TO_SERVE, f"there is no folder {adapters}", where="--adapters", fix=fix)
    if log_format not in ("text", "json"):
        what = f"unknown format {log_format!r}"
        raise ConfigError(ConfigCode.UNKNOWN_NAME, what, where="--log-format", fix="use text or json")


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
