"""Timing of several calls, alternating so that other load on the machine affects all of them equally."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Advance = Callable[[str, int, int], None]
"""Progress callback: takes a description, the number of calls done and the total number."""

CALM = 0.05
"""Rounds in which other machines on the same host take a larger fraction of the processors' time are not counted."""


@dataclass(frozen=True)
class Times:
    """Times of one call.

    Attributes:
        by_round: seconds by the number of the round.
        stolen: by round, the fraction of the processors' time during the call that a virtual machine's host gave to other
            machines. Rounds with more than `CALM` are not counted, unless all exceed it.
    """

    by_round: Mapping[int, float]
    stolen: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def from_seconds(cls, seconds: Sequence[float]) -> Times:
        """Create from one time for each round."""
        return cls(dict(enumerate(seconds)))

    @property
    def seconds(self) -> tuple[float, ...]:
        """Seconds of each repetition that is counted."""
        return tuple(self.by_round[number] for number in self._counted(self.by_round))

    def _counted(self, rounds: Iterable[int]) -> list[int]:
        return [number for number in rounds if self.stolen.get(number, 0.0) <= CALM] or list(rounds)

    @property
    def median(self) -> float:
        """Median of the counted repetitions, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range as a fraction of the median; 0 for a single repetition."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def ratio_to(self, other: Times) -> float:
        """Ratio to another call: the median over the rounds in which both were timed."""
        both = [number for number in self.by_round if number in other.by_round]
        calm = [number for number in both if max(self.stolen.get(number, 0.0), other.stolen.get(number, 0.0)) <= CALM]
        return statistics.median(self.by_round[number] / other.by_round[number] for number in calm or both)


@dataclass(frozen=True)
class Turns:
    """Times calls in rounds; the order rotates by one each round, and the device is synchronised before reading the clock.

    Attributes:
        often, more: groups of calls whose ratios matter most, and the number of further rounds of these groups, alternating,
            after each round.
        warm_up: initial rounds that are not counted.
    """

    device: torch.device
    rounds: int
    often: Sequence[Sequence[str]] = ()
    more: int = 0
    warm_up: int = 0

    def time(
        self, calls: Mapping[str, Callable[[], object]], advance: Advance = lambda what, done, total: None
    ) -> dict[str, Times]:
        """Time every call; the result has the same keys."""
        if not calls:
            return {}
        names = list(calls)
        groups = [group for group in self.often if all(name in calls for name in group)]
        plan = [names] * self.warm_up
        for number in range(self.rounds):
            turn = number % len(names)
            plan.append(names[turn:] + names[:turn])
            for extra in range(self.more if groups else 0):
                group = list(groups[extra % len(groups)])
                plan.append(group[:: 1 if number % 2 else -1])
        by_round: dict[str, dict[int, float]] = {name: {} for name in names}
        stolen: dict[str, dict[int, float]] = {name: {} for name in names}
        done, total = 0, sum(map(len, plan))
        for number, order in enumerate(plan):
            for name in order:
                advance(name, done, total)
                done += 1
                _finish(self.device)
                start, stolen_before = time.perf_counter(), _stolen_seconds()
                calls[name]()
                _finish(self.device)
                elapsed = time.perf_counter() - start
                if number >= self.warm_up:
                    by_round[name][number] = elapsed
                    stolen[name][number] = (_stolen_seconds() - stolen_before) / elapsed
        return {name: Times(each, stolen[name]) for name, each in by_round.items()}


def _stolen_seconds() -> float:
    """Steal time since boot in seconds, averaged over processors; 0 if unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            values = file.readline().split()
        return int(values[8]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)
    except (OSError, IndexError, ValueError):
        return 0.0


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
