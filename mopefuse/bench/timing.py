"""Times of several calls, taken in turns so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Advance = Callable[[str, int, int], None]  # what is done, how often so far, how often in all


@dataclass(frozen=True)
class Times:
    """Seconds of one call, by the number of the round in which it was made."""

    by_round: Mapping[int, float]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """One call in each round."""
        return cls(dict(enumerate(seconds)))

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each repetition."""
        return tuple(self.by_round.values())

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
        both = self.by_round.keys() & other.by_round.keys()
        return statistics.median(self.by_round[number] / other.by_round[number] for number in both)


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
        done, total = 0, sum(map(len, plan))
        for number, order in enumerate(plan):
            for name in order:
                advance(name, done, total)
                done += 1
                _finish(self.device)
                began = time.perf_counter()
                calls[name]()
                _finish(self.device)
                if number >= self.warm_up:
                    by_round[name][number] = time.perf_counter() - began
        return {name: Times(each) for name, each in by_round.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
