"""Progress of ``mopefuse fit``: a live line on a terminal, plain lines elsewhere, each with the budget."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from mopefuse.autofit.budget import Budget
from mopefuse.autofit.listener import FitListener
from mopefuse.autofit.scores import Estimate
from mopefuse.autofit.state import Entry
from mopefuse.cli._render import duration, err
from mopefuse.training.listener import Progress

_LINE_EVERY = 10.0  # seconds between plain lines


class FitDisplay(FitListener):
    """A listener that shows progress on stderr; with `json` it only keeps the notices."""

    def __init__(self, *, json: bool) -> None:
        self.notices: list[str] = []
        self._console, self._silent = err(), json
        self._stack = ExitStack()
        self._status: Any = None
        self._printed_at = time.monotonic()
        self._began: tuple[str, int, float] = ("", 0, 0.0)
        self._phase, self._budget = "", Budget(0.0)

    def __enter__(self) -> FitDisplay:
        if self._console.is_terminal and not self._silent:
            self._status = self._stack.enter_context(self._console.status("starting"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def on_notice(self, text: str) -> None:
        """Print a notice on stderr, or keep it for ``notices`` of the JSON object."""
        self.notices.append(text)
        self._print(text)

    def on_phase(self, what: str, budget: Budget) -> None:
        """Print the phase and how much of the budget is spent."""
        self._phase, self._budget = what, budget
        self._print(f"[{budget}] {what}")

    def on_entry(self, entry: Entry, score: Estimate | None, budget: Budget, *, metric: str) -> None:
        """Print the score of a candidate, or why it has none."""
        what = f"{' and '.join(entry.reads)}: {entry.title}"
        if score is None:
            self._print(f"[{budget}] {what}: {entry.state}: {entry.note}")
        else:
            note = f" ({entry.note})" if entry.note else ""
            self._print(f"[{budget}] {what}: {score.written(metric)}{note}")

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """Show the progress of a preparation, with its estimated end."""
        self._show(what, done, total)

    def on_step(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        """Show the progress of training, with its estimated end."""
        self._show(f"{self._phase}, step", progress.step, total)

    def _show(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._began[0] or done < self._began[1]:
            self._began = (what, done, now)
        if self._silent or (self._status is None and now - self._printed_at < _LINE_EVERY):
            return
        self._printed_at = now
        _, first, began = self._began
        eta = f", {duration((now - began) / (done - first) * (total - done))} left" if done > first else ""
        text = f"[{self._budget}] {what} {done:,} of {total:,}{eta}"
        if self._status is not None:
            self._status.update(text)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        if not self._silent:
            self._console.print(text, markup=False)
