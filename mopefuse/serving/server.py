"""The server: listens, starts the workers, and on a signal answers what it accepted before it ends. Imports no torch."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import MopefuseError, RequestError
from mopefuse.serving.app import create_app
from mopefuse.serving.batching import Batcher
from mopefuse.serving.catalogue import Catalogue
from mopefuse.serving.engine import EngineSettings
from mopefuse.serving.server_settings import ServerSettings
from mopefuse.serving.worker_pool import COMMAND, WorkerPool

_GRACE = 0.3  # seconds in which requests that are on their way are still refused politely


def serve(engine: EngineSettings, settings: ServerSettings, command: Sequence[str] = COMMAND) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        command: starts a worker, see `mopefuse.serving.worker_pool.WorkerPool`.

    Raises:
        RequestError, CheckpointError: there is nothing to serve, or the port is in use.
        MopefuseError: no worker can load the models.
    """
    catalogue = engine.catalogue()
    listener = listen(settings.host, settings.port)
    with listener:
        failure = asyncio.run(_serve(catalogue, engine, settings, listener, command))
    if failure is not None:
        raise failure


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        RequestError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "is in use" if in_use else f"cannot be used: {getattr(error, 'strerror', None) or error}"
        fix = "stop the other program, or use --port 0 to find a free one" if in_use else "use another --host or --port"
        raise RequestError(RequestCode.PORT_IN_USE, f"{host}:{port} {why}", where="--port", fix=fix) from None
    return listener


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `_serve`."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Do nothing; see above."""


async def _serve(
    catalogue: Catalogue, engine: EngineSettings, settings: ServerSettings, listener: socket.socket, command: Sequence[str]
) -> MopefuseError | None:
    """Serve until a signal; return why the workers cannot work, if they cannot."""
    pool = WorkerPool(engine.as_dict(), settings.workers, command)
    batcher = Batcher(
        pool,
        max_batch=settings.max_batch,
        max_wait=settings.max_wait_ms / 1000,
        queue=settings.queue,
        timeout=settings.timeout,
    )
    app = create_app(catalogue, batcher, settings)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", ws="none", server_header=False, timeout_keep_alive=75
    )
    server = _Uvicorn(config)
    stop = asyncio.Event()
    _announce(listener, catalogue, settings)
    pool.begin()
    serving = asyncio.create_task(server.serve([listener]))
    await asyncio.sleep(0)  # uvicorn sets its own handlers first
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    stopped = asyncio.ensure_future(stop.wait())
    ends: list[asyncio.Future[Any]] = [stopped, serving, pool.failure]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if not pool.failure.done():
        await _drain(app.state.service, batcher, settings.drain_timeout)
    server.should_exit = True
    await serving
    await pool.close()
    return pool.failure.result() if pool.failure.done() else None


async def _drain(service: Any, batcher: Batcher, timeout: float) -> None:
    """Refuse new requests, and wait for those that were accepted."""
    service.draining = True
    print("shutting down: answering the requests that were accepted", file=sys.stderr, flush=True)
    try:
        await asyncio.wait_for(batcher.finish(), timeout)
    except asyncio.TimeoutError:
        print(f"not all requests were answered within {timeout:g} seconds", file=sys.stderr, flush=True)
    await asyncio.sleep(_GRACE)


def _announce(listener: socket.socket, catalogue: Catalogue, settings: ServerSettings) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    names = sorted(catalogue.entries())
    some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    print(f"serving {some or 'no model yet'} on {url} (process {os.getpid()})", file=sys.stderr, flush=True)
