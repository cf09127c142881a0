"""How many processes fit into memory side by side, judged by what the running ones report."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple


class MemoryReport(NamedTuple):
    """What a running process reports.

    Args:
        share: fraction of its work that is done, from 0 to 1.
        peak: its peak memory, in bytes.
        free: memory that is free on its device, in bytes; None if the system does not report it.
    """

    share: float
    peak: int
    free: int | None


class MemoryBudget:
    """Decides whether one more process fits. It is expected to need as much memory as the largest one so far."""

    def __init__(self) -> None:
        self.largest_peak = 0  # bytes, of any process so far
        self.free: int | None = None  # bytes
        self.peaks: dict[Hashable, int] = {}  # bytes, of each running process

    def update(self, process: Hashable, report: MemoryReport) -> None:
        """Record the memory report of a running process."""
        self.peaks[process] = report.peak
        self.largest_peak, self.free = max(self.largest_peak, report.peak), report.free

    def release(self, process: Hashable) -> None:
        """Remove a process that has ended: its memory counts as free again."""
        released = self.peaks.pop(process, 0)
        self.free = None if self.free is None else self.free + released

    def fits(self, running: int) -> bool:
        """Whether one more process fits beside `running` others, each of which may still grow to the largest peak."""
        if not running:
            return True
        if not self.largest_peak:
            return False  # no report yet; the first one comes soon
        if self.free is None:
            return True
        growth = self.largest_peak * running - sum(self.peaks.values())
        return self.free - growth >= self.largest_peak
