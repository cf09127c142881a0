"""Which processes share a cache folder: those of one machine, or all if the folder is on a file system that machines share."""

from __future__ import annotations

from contextlib import suppress
from uuid import uuid4

from mopefuse.core import cache, distributed


def ranks_that_share() -> tuple[int, ...]:
    """Ranks of the processes that share this process's cache folder, in order, its own included; called by all at once."""
    if distributed.world_size() == 1:
        return (0,)
    name = distributed.broadcast_from_main(f".shared-{uuid4().hex}")
    folder, rank = cache.root(), distributed.rank()
    found, marks = {rank}, [] if folder is None else [folder / f"{name}-{rank}"]  # without a cache, it shares with no other
    for mark in marks:
        with suppress(OSError):
            mark.touch()
    distributed.barrier()
    if folder is not None:
        found |= {int(path.name.rpartition("-")[2]) for path in folder.glob(f"{name}-*")}
    distributed.barrier()
    for mark in marks:
        mark.unlink(missing_ok=True)
    # a network file system may show the mark of another machine late: those that do not see each other do not share
    views = distributed.gather(found)
    return tuple(other for other in sorted(found) if views[other] == found)
