"""How many processes memory allows beside one another, by what they tell of theirs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple


class Told(NamedTuple):
    """What a process tells on its way: its share of the work done, its peak, and what is free on its device, in bytes."""

    share: float
    peak: int
    free: int | None  # None where the system does not say


class Room:
    """Whether one more process fits, which is taken to need what the largest so far did."""

    def __init__(self) -> None:
        self.largest = 0
        self.free: int | None = None
        self.peaks: dict[Hashable, int] = {}  # of those under way

    def hear(self, process: Hashable, told: Told) -> None:
        """One that is under way tells how it stands."""
        self.peaks[process] = told.peak
        self.largest, self.free = max(self.largest, told.peak), told.free

    def leave(self, process: Hashable) -> None:
        """One is at its end, and what it had is free again."""
        gone = self.peaks.pop(process, 0)
        self.free = None if self.free is None else self.free + gone

    def fits(self, running: int) -> bool:
        """Beside so many, of which those that did not reach the largest peak may still grow to it."""
        if not running:
            return True
        if not self.largest:
            return False  # the first of them tells soon
        if self.free is None:
            return True
        growth = self.largest * running - sum(self.peaks.values())
        return self.free - growth >= self.largest
