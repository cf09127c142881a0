"""Find files by name among millions, in 16 bytes for each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mopefuse.modalities.base import digest


def name_key(name: str) -> int:
    """The number that stands for the name of a file: 64 bits of a digest."""
    return int.from_bytes(digest(name)[:8], "little")


class NameTable:
    """Places of names; of equal names, the first place.

    Args:
        key_M: the `name_key` of the name at each place.
    """

    def __init__(self, key_M: NDArray[np.uint64]) -> None:
        self._order_M = np.argsort(key_M, kind="stable")
        self._key_M = key_M[self._order_M]

    def find(self, name: str) -> int | None:
        """The place of a name; None if it has none."""
        key = np.uint64(name_key(name))
        number = int(np.searchsorted(self._key_M, key))
        return int(self._order_M[number]) if number < len(self._key_M) and self._key_M[number] == key else None
