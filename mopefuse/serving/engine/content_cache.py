"""Features of values that were seen before, by a digest of their content, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

_OVERHEAD = 200  # bytes that an entry takes besides its tensor


class ContentCache:
    """The least recently used entries make room for others. Several threads may share one.

    Args:
        limit: bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.hits, self.misses = limit, 0, 0, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get_all(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Tensor]) -> list[Tensor]:
        """The value of each key.

        Args:
            compute: computes values from their positions in `keys`, (number of positions, ...); each distinct key once.
        """
        with self._lock:
            found = {key: self._kept[key] for key in keys if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
            needed = {key: at for at, key in enumerate(keys) if key not in found}
            self.hits += len(keys) - len(needed)
            self.misses += len(needed)
        if needed:
            computed = dict(zip(needed, compute(list(needed.values())), strict=True))
            found |= computed
            self._keep(computed)
        return [found[key] for key in keys]

    def _keep(self, values: dict[Hashable, Tensor]) -> None:
        for key, value in values.items() if self.limit else ():
            own = value.clone()  # not the whole batch that it is part of
            with self._lock:
                if key in self._kept or _size(own) > self.limit:
                    continue
                self._kept[key] = own
                self.bytes += _size(own)
                while self.bytes > self.limit:
                    _, removed = self._kept.popitem(last=False)
                    self.bytes -= _size(removed)


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size() + _OVERHEAD
