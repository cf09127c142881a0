"""The server: listens, starts the workers, and on a signal answers what it accepted before it ends. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn

from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import MopefuseError, RequestError
from mopefuse.serving.engine.catalogue import Catalogue
from mopefuse.serving.engine.engine import EngineSettings
from mopefuse.serving.http.app import create_app
from mopefuse.serving.http.connections import make_protocol
from mopefuse.serving.http.service import Service
from mopefuse.serving.server_settings import ServerSettings
from mopefuse.serving.workers.batching import Batcher
from mopefuse.serving.workers.worker_pool import COMMAND, WorkerPool

_GRACE = 0.3  # seconds in which requests that are on their way are still refused politely, before it stops listening
_LAST_GRACE = 1.0  # seconds for connections that were made until then
_KEEP_ALIVE = 75  # seconds, more than those of common proxies
_BACKLOG = 2048
_MOST_FILES = 65536


def serve(engine: EngineSettings, settings: ServerSettings, command: Sequence[str] = COMMAND) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        command: starts a worker, see `mopefuse.serving.workers.worker_pool.WorkerPool`.

    Raises:
        RequestError, CheckpointError: there is nothing to serve, or the port is in use.
        MopefuseError: no worker can load the models.
    """
    catalogue = engine.catalogue()
    with listen(settings.host, settings.port) as listener:
        failure = asyncio.run(_Server(catalogue, engine, settings, command).run(listener))
    if failure is not None:
        raise failure


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        RequestError: the address cannot be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        why = "is in use" if in_use else f"cannot be used: {error.strerror or error}"
        fix = "stop the other program, or use --port 0 to find a free one" if in_use else "use another --host or --port"
        raise RequestError(RequestCode.PORT_IN_USE, f"{host}:{port} {why}", where="--port", fix=fix) from None
    return listener


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `_Server`."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Do nothing; see above."""

    async def stop_listening(self, listener: socket.socket) -> None:
        """Close the listener, after accepting connections that wait for it, which would be reset; let clients close them."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                loop.create_task(loop.connect_accepted_socket(self._protocol, connection))  # noqa: RUF006 (ends at once)
        for one in self.servers:
            one.close()
        until = loop.time() + _LAST_GRACE
        while self.server_state.connections and loop.time() < until:
            await asyncio.sleep(0.02)

    def _protocol(self) -> asyncio.Protocol:
        protocol: Any = self.config.http_protocol_class
        made: asyncio.Protocol = protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return made


class _Server:
    """The application, the workers behind it and uvicorn in front of it."""

    def __init__(
        self, catalogue: Catalogue, engine: EngineSettings, settings: ServerSettings, command: Sequence[str]
    ) -> None:
        self._catalogue, self._engine, self._settings, self._command = catalogue, engine, settings, command

    async def run(self, listener: socket.socket) -> MopefuseError | None:
        """Serve until a signal; return why the workers cannot work, if they cannot."""
        settings = self._settings
        _allow_many_files()
        pool = WorkerPool(self._engine.as_dict(), settings.workers, self._command)
        batcher = Batcher(
            pool,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            queue=settings.queue,
            timeout=settings.timeout,
        )
        app = create_app(self._catalogue, batcher, settings)
        service: Service = app.state.service
        server = _Uvicorn(_uvicorn_config(app, settings))
        pool.on_batch = service.metrics.count_batch
        batcher.count_connections = lambda: len(server.server_state.connections)
        _announce(listener, self._catalogue, settings)
        pool.begin()
        serving = asyncio.create_task(server.serve([listener]))
        await asyncio.sleep(0)  # uvicorn sets its own handlers of signals first
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        stopped = asyncio.ensure_future(stop.wait())
        ends: list[asyncio.Future[Any]] = [stopped, serving, pool.failure]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not pool.failure.done():
            stop.clear()
            await self._drain(service, batcher, pool.failure, stop)
            await server.stop_listening(listener)
        server.should_exit = True
        await serving
        await pool.close()
        return pool.failure.result() if pool.failure.done() else None

    async def _drain(
        self, service: Service, batcher: Batcher, failure: asyncio.Future[MopefuseError], again: asyncio.Event
    ) -> None:
        """Refuse new requests, and wait for those that were accepted, unless a second signal says not to."""
        service.draining = True
        _print("shutting down: answering the requests that were accepted")
        finish, hurry = asyncio.ensure_future(batcher.finish()), asyncio.ensure_future(again.wait())
        ends: list[asyncio.Future[Any]] = [finish, hurry, failure]
        await asyncio.wait(ends, timeout=self._settings.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        if not finish.done():
            _print("shutting down, although not all requests were answered")
        finish.cancel()
        hurry.cancel()
        await asyncio.sleep(_GRACE)


def _uvicorn_config(app: Any, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=make_protocol(settings.read_timeout, settings.max_connections),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.read_timeout)),
        backlog=_BACKLOG,
    )


def _allow_many_files() -> None:
    """Raise the number of files that this process may open, of which each connection is one."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _announce(listener: socket.socket, catalogue: Catalogue, settings: ServerSettings) -> None:
    """Print where the server listens, what it serves, and how to try it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    names = sorted(catalogue.entries())
    some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    _print(f"serving {some or 'no model yet'} on {url} (to try it, open that in a browser); documentation: {url}/docs")
    key = ' -H "Authorization: Bearer $MOPEFUSE_API_KEY"' if settings.api_key else ""
    name = f" -F model={names[0]}" if len(names) > 1 else ""
    _print(f"try: curl {url}/predict{key}{name} {_fields(catalogue, names)}")


def _fields(catalogue: Catalogue, names: Sequence[str]) -> str:
    """The fields of a form for curl, of what the first model reads."""
    from mopefuse.modalities.base import get_modality

    try:
        modalities = catalogue.find(names[0]).facts["modalities"] if names else []
    except MopefuseError:
        modalities = []
    return " ".join(f"-F {name}=@FILE" if get_modality(name).is_file else f'-F {name}="..."' for name in modalities)


def _print(line: str) -> None:
    from mopefuse.core.formatting import visible

    print(visible(line), file=sys.stderr, flush=True)
