"""The store through which the processes of torchrun find each other, without what earlier attempts left in it.

torchrun keeps one store for all restarts. A process would find the addresses there that the processes before it had, try to
connect to them, and fail, which causes the next restart. Each attempt therefore gets a part of the store with a new name, which
the main process hands out in reply to a token that the requesting process has just drawn, so that no reply is mistaken for
that of an earlier attempt.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from uuid import uuid4

from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

_PAUSE = 0.02  # seconds between two looks for requests


def is_reused() -> bool:
    """Whether the store of this process outlives it, as torchrun's does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def join(timeout: timedelta) -> tuple[Store, int, int]:
    """A part of torchrun's store that only the processes of this attempt use; with rank and number of processes.

    Raises:
        RuntimeError: not all processes have joined, or the main process has not replied, before the timeout.
    """
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    token = uuid4().hex
    if rank == 0:
        _reply(store, token, world, timeout)
        return PrefixStore(token, store), rank, world
    store.set(_request(rank), token)
    name = store.get(f"mopefuse/reply/{token}").decode()
    store.add(_received(name), 1)
    return PrefixStore(name, store), rank, world


def _reply(store: Store, name: str, world: int, timeout: timedelta) -> None:
    """Reply `name` to all requests, also those of earlier attempts, until all other processes have received it."""
    ends = time.monotonic() + timeout.total_seconds()
    while store.add(_received(name), 0) < world - 1:
        if time.monotonic() > ends:
            raise RuntimeError(f"some of {world} processes did not join within {timeout}")
        for rank in range(1, world):
            if store.check([_request(rank)]):
                store.set(f"mopefuse/reply/{store.get(_request(rank)).decode()}", name)
        time.sleep(_PAUSE)


def _request(rank: int) -> str:
    return f"mopefuse/request/{rank}"


def _received(name: str) -> str:
    return f"mopefuse/received/{name}"
