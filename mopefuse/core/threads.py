"""Thread-local values, so that one model can serve several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class PerThread(threading.local):
    """A thread-local value, None until it is set. Copies and unpickled objects start with None in every thread.

    Unlike a `contextvars.ContextVar` it can be copied, and set within a graph of torch.compile.
    """

    def __init__(self) -> None:
        self.value: Any = None  # runs once in each thread

    @contextmanager
    def set(self, value: Any) -> Iterator[None]:
        """Set the value in this thread within the context."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        return PerThread()

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return PerThread, ()
