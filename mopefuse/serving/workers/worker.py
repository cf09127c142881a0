"""The process that owns the models: ``python -m mopefuse.serving.workers.worker FD``.

The pool of workers starts it. It reads the settings of its engine from the socket ``FD``, loads the models, reports that it is
ready, and then answers batches in their order. A thread reads the socket, so that the process ends at once when the server
closes it or dies, whatever the models are doing. Signals are left to the server, because a terminal and systemd send them to
all processes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

from mopefuse.core.dependencies import convert_error
from mopefuse.core.error_codes import RequestCode
from mopefuse.errors import MopefuseError, RequestError
from mopefuse.serving.engine.request import Answer, Request
from mopefuse.serving.workers import frames


class Engine(Protocol):
    """What a worker needs of an engine; see `mopefuse.serving.engine.engine.Engine`."""

    def load(self) -> None:
        """Load what the first requests need."""

    def predict(self, requests: Sequence[Request]) -> list[Answer]:
        """The answer to each request."""

    def stats(self) -> dict[str, int]:
        """Counts for monitoring."""


def serve(connection: socket.socket, make_engine: Callable[[dict[str, Any]], Engine]) -> None:
    """Load the models and answer batches until the other end is closed.

    Args:
        make_engine: creates the engine from its settings.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    stream = connection.makefile("rb", buffering=1 << 16)
    first = frames.read_frame(stream.read)
    if first is None:
        return
    batches: SimpleQueue[frames.Frame] = SimpleQueue()
    threading.Thread(target=_receive, args=(stream.read, batches), daemon=True).start()
    try:
        engine = make_engine(first[0]["settings"])
        engine.load()
    except Exception as error:
        _send(connection, {"kind": "failed", "error": _known(error).as_dict()})
        return
    _send(connection, {"kind": "ready", "stats": engine.stats()})
    while True:
        _answer(connection, engine, batches.get())


def _receive(read: Callable[[int], bytes], batches: SimpleQueue[frames.Frame]) -> None:
    """Queue batches as they arrive; end the process at the end of the stream."""
    try:
        while (frame := frames.read_frame(read)) is not None:
            batches.put(frame)
    finally:
        os._exit(0)


def _answer(connection: socket.socket, engine: Engine, frame: frames.Frame) -> None:
    began = time.perf_counter()
    requests = frames.unpack_requests(frame)
    try:
        answers = engine.predict(requests)
    except Exception as error:
        answers = [_known(error)] * len(requests)
    _send(
        connection,
        {
            "kind": "answers",
            "number": frame[0]["number"],
            "answers": [frames.answer_to_json(answer) for answer in answers],
            "seconds": time.perf_counter() - began,
            "stats": engine.stats(),
        },
    )


def _send(connection: socket.socket, header: dict[str, Any]) -> None:
    for piece in frames.pack(header):
        connection.sendall(piece)


def _known(error: Exception) -> MopefuseError:
    """An error as one that can be reported; the details of an unknown one are printed."""
    known = error if isinstance(error, MopefuseError) else convert_error(error)
    if known is None:
        traceback.print_exception(error)
        what = f"internal error: {type(error).__name__}"
        known = RequestError(RequestCode.SERVER_FAILED, what, fix="please report it, with the log of the server")
    return known


def _make_engine(settings: dict[str, Any]) -> Engine:
    from mopefuse.serving.engine.engine import Engine as RealEngine
    from mopefuse.serving.engine.engine import EngineSettings

    return RealEngine(EngineSettings(**settings | {"models": tuple(settings["models"])}))


def main() -> None:
    """Serve the socket whose descriptor is the only argument."""
    os.environ.setdefault("MOPEFUSE_FLUSH_DENORMALS", "1")  # see mopefuse.core.device
    serve(socket.socket(fileno=int(sys.argv[1])), _make_engine)


if __name__ == "__main__":
    main()
