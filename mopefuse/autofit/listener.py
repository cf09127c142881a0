"""What a fit reports while it runs, and when it ends the training of a candidate."""

from __future__ import annotations

import time

from mopefuse.autofit.budget import Budget
from mopefuse.autofit.scores import BEYOND_NOISE, Estimate
from mopefuse.autofit.state import Entry
from mopefuse.core.formatting import duration
from mopefuse.metrics.names import write_metric
from mopefuse.training.listener import Listener, Progress

_MEASURED_SECONDS = 2.0  # of a preparation, after which its pace is known
_MEASURED_STEPS = 5  # steps after which the pace of training is known


class OutOfTime(Exception):
    """A candidate cannot be prepared within the budget."""


class FitListener(Listener):
    """Callbacks of a fit, to be overridden. These do nothing."""

    def on_phase(self, what: str, budget: Budget) -> None:
        """Called when a phase begins."""

    def on_entry(self, entry: Entry, score: Estimate | None, budget: Budget, *, metric: str) -> None:
        """Called when a candidate was scored by a metric, skipped or failed."""


class CandidateListener(Listener):
    """Passes progress on, and ends training when time is up or the candidate cannot win any more.

    Args:
        metric: the metric of scores. to_beat: score of the leader on validation, with its standard error.
        tested_share: rows of the test split for each row of validation; the final test must fit into the budget, too.
    """

    def __init__(
        self, shown: FitListener, budget: Budget, *, metric: str, to_beat: Estimate, tested_share: float
    ) -> None:
        self._shown, self._budget, self._to_beat = shown, budget, to_beat
        self._metric, self._tested_share = metric, tested_share
        self._preparation: tuple[str, int, float] = ("", 0, 0.0)  # what is prepared, and where and when it began
        self._first: tuple[int, float] | None = None  # first step of this attempt and its time
        self._last_step_at = time.monotonic()
        self._validation_seconds = 0.0
        self._validated = 0
        self.reason = ""

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """See `Listener.on_data_progress`.

        Raises:
            OutOfTime: this preparation would not be finished in time.
        """
        self._shown.on_data_progress(what, done, total)
        now = time.monotonic()
        if what != self._preparation[0] or done < self._preparation[1]:
            self._preparation = (what, done, now)
        _, first, began = self._preparation
        needed = (now - began) / (done - first) * (total - done) if done > first else 0.0
        left = self._budget.left
        if left <= 0 or (now - began >= _MEASURED_SECONDS and needed > left):
            raise OutOfTime(f"{what}: {duration(needed)} more, {duration(max(0.0, left))} left")

    def on_step(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        """See `Listener.on_step`."""
        self._last_step_at = time.monotonic()
        self._first = self._first or (progress.step, self._last_step_at)
        self._shown.on_step(progress, total, loss, lr)

    def on_validation(self, progress: Progress, found: dict[str, float], *, best: bool) -> None:
        """See `Listener.on_validation`."""
        if self._first is not None:  # before the first step, features are prepared
            self._validation_seconds = time.monotonic() - self._last_step_at
            self._validated += 1
        self._shown.on_validation(progress, found, best=best)

    def should_stop(self, progress: Progress, total: int) -> bool:
        """Whether time is up, or the best validation so far is clearly worse than the leader at half of the steps."""
        self.reason = self._why_stop(progress, total)
        return bool(self.reason)

    def _why_stop(self, progress: Progress, total: int) -> str:
        left = self._budget.left - self._validation_seconds * (1 + self._tested_share)
        if left <= 0:
            return f"stopped at step {progress.step} of {total}: the budget is spent"
        assert self._first is not None
        steps = progress.step - self._first[0]
        if steps >= _MEASURED_STEPS and not self._validated and progress.best is None:
            per_step = (time.monotonic() - self._first[1]) / steps
            if per_step * (total - progress.step) > 20 * left:
                return f"stopped at step {progress.step} of {total}: all steps take {duration(per_step * total)}"
        behind = (progress.best or 0.0) + BEYOND_NOISE * self._to_beat.error < self._to_beat.value
        if 2 * progress.step >= total and self._validated and behind:
            best, leader = (write_metric(self._metric, score) for score in (progress.best, self._to_beat.value))
            return f"stopped at step {progress.step} of {total}: {best} on validation cannot reach {leader}"
        return ""
