"""Values that each thread has for itself, so that one model can serve several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class PerThread(threading.local):
    """A value of its own for each thread, None until it is set. A copy and an unpickled object begin with None everywhere.

    Not a `contextvars.ContextVar`, which can be neither copied nor set within a graph of torch.compile.
    """

    def __init__(self) -> None:
        self.value: Any = None  # runs once in each thread

    @contextmanager
    def set(self, value: Any) -> Iterator[None]:
        """Have this value in this thread for as long as the context lasts, then the one before."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        return PerThread()

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return PerThread, ()
