"""Times of several calls, taken in turns so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Advance = Callable[[str, int, int], None]  # what is done, how often so far, how often in all


CALM = 0.05
"""Largest share of the processors' time that may go to other machines on the same host in a round that counts."""


@dataclass(frozen=True)
class Times:
    """Seconds of one call, by the number of the round in which it was made.

    stolen: share of the processors' time, while the call ran, that a virtual machine's host gave to others. Rounds with more
        than `CALM` of it do not count, unless all are so.
    """

    by_round: Mapping[int, float]
    stolen: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """One call in each round."""
        return cls(dict(enumerate(seconds)))

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each repetition that counts."""
        return tuple(self.by_round[number] for number in self._counted(self.by_round))

    def _counted(self, rounds: Iterable[int]) -> list[int]:
        return [number for number in rounds if self.stolen.get(number, 0.0) <= CALM] or list(rounds)

    @property
    def median(self) -> float:
        """Of the repetitions."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median; 0 of a single repetition."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def over(self, other: Times) -> float:
        """Ratio to another call: the median over the rounds in which both were made."""
        both = [number for number in self.by_round if number in other.by_round]
        calm = [number for number in both if max(self.stolen.get(number, 0.0), other.stolen.get(number, 0.0)) <= CALM]
        return statistics.median(self.by_round[number] / other.by_round[number] for number in calm or both)


@dataclass(frozen=True)
class Turns:
    """How calls are timed: in rounds, the order turned by one each round; the device has finished when a clock is read.

    often, more: after each round so many further ones, of these groups of calls in turn, whose ratios are asked for most.
    warm_up: rounds ahead that do not count.
    """

    device: torch.device
    rounds: int
    often: Sequence[Sequence[str]] = ()
    more: int = 0
    warm_up: int = 0

    def time(
        self, calls: Mapping[str, Callable[[], object]], advance: Advance = lambda what, done, total: None
    ) -> dict[str, Times]:
        """Seconds of every call."""
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
                began, before = time.perf_counter(), _taken_by_others()
                calls[name]()
                _finish(self.device)
                taken = time.perf_counter() - began
                if number >= self.warm_up:
                    by_round[name][number] = taken
                    stolen[name][number] = (_taken_by_others() - before) / taken
        return {name: Times(each, stolen[name]) for name, each in by_round.items()}


def _taken_by_others() -> float:
    """Seconds, mean of all processors, in which a virtual machine wanted to run and could not; 0 where that is not told."""
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
