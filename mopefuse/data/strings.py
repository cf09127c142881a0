"""Many strings in two arrays, which can stay on disk: ten million of them are no Python objects until they are used.

Shapes: N strings, Z bytes of all together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mopefuse.core.lazy_sequence import LazySequence

_AT_ONCE = 65_536


class Strings(LazySequence[str]):
    """A sequence of strings.

    Args:
        start_N1: first byte of each string in `content_Z`, and the end of the last.
        content_Z: their bytes in UTF-8.
    """

    def __init__(self, start_N1: NDArray[np.int64], content_Z: NDArray[np.uint8]) -> None:
        self.start_N1, self.content_Z = start_N1, content_Z

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        """Convert strings; lone surrogates are kept."""
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(starts, np.frombuffer(b"".join(encoded), dtype=np.uint8))

    @classmethod
    def join(cls, parts: Sequence[Strings]) -> Strings:
        """Concatenate strings."""
        offsets = np.cumsum([0, *(len(part.content_Z) for part in parts)])
        starts = [part.start_N1[:-1] + offset for part, offset in zip(parts, offsets, strict=False)]
        content = np.concatenate([np.zeros(0, np.uint8), *(part.content_Z for part in parts)])
        return cls(np.concatenate([*starts, offsets[-1:]]).astype(np.int64), content)

    def __len__(self) -> int:
        return len(self.start_N1) - 1

    def at(self, number: int) -> str:
        """See `LazySequence.at`."""
        start, stop = self.start_N1[number], self.start_N1[number + 1]
        return self.content_Z[start:stop].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _AT_ONCE):
            starts = self.start_N1[first : first + _AT_ONCE + 1].tolist()
            content = self.content_Z[starts[0] : starts[-1]].tobytes()
            for start, stop in pairwise(starts):
                yield content[start - starts[0] : stop - starts[0]].decode("utf-8", "surrogatepass")
