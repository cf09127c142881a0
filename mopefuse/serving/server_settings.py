"""The limits and options of a server; plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """How a server takes requests.

    Attributes:
        host, port: where it listens; port 0 for a free one.
        workers: processes that hold the models.
        max_batch: requests in one batch. max_wait_ms: how long the first of them waits for others, in milliseconds.
        queue: requests that may wait; further ones are refused. queue_mb: the same in megabytes of their bodies.
        timeout: seconds until a request is given up.
        max_body_mb: megabytes of one body. max_rows: rows of one body.
        read_timeout: seconds for a client to send its headers, and again for its body.
        max_connections: open connections; 0 for no limit.
        api_key: the key that clients have to send; empty for none.
        cors: origins of pages in browsers that may call the server.
        allow_urls: hosts from which images may be read by URL.
        drain_timeout: seconds for accepted requests after a signal to stop.
        log_format: "text" or "json".
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    max_batch: int = 32
    max_wait_ms: float = 5.0
    queue: int = 1024
    queue_mb: float = 512.0
    timeout: float = 30.0
    max_body_mb: float = 20.0
    max_rows: int = 64
    read_timeout: float = 10.0
    max_connections: int = 0
    api_key: str = ""
    cors: tuple[str, ...] = ()
    allow_urls: tuple[str, ...] = ()
    drain_timeout: float = 30.0
    log_format: str = "text"

    @property
    def max_body(self) -> int:
        """`max_body_mb` in bytes."""
        return int(self.max_body_mb * 2**20)

    @property
    def queue_bytes(self) -> int:
        """`queue_mb` in bytes."""
        return int(self.queue_mb * 2**20)
