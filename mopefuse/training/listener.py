"""What training reports while it runs: its progress, and the callbacks of a display or a log. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """The state of training that a checkpoint holds in addition to tensors."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0  # validations since the last that improved
    highest: float | None = None  # score of a validation since training began; step 0 does not count
    lowest_loss: float | None = None  # likewise
    seconds: float = 0.0
    thresholds: list[float] | None = None  # tuned at the last validation
    validated: int | None = None  # step of the last validation
    over_start: list[float] = field(default_factory=list)  # last validations against step 0 of a warm start, in standard errors


class Listener:
    """Callbacks of training, to be overridden. These do nothing."""

    def on_notice(self, text: str) -> None:
        """Called with a message for the user."""

    def on_task(self, text: str) -> None:
        """Called first, with a description of the task."""

    def on_rows(self, counts: dict[str, int]) -> None:
        """Called when the data were read, with the number of rows of each split."""

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """Called with the progress of preparing data, such as computing features."""

    def on_step(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        """Called after each optimizer step; `total` is the number of steps of the run."""

    def on_validation(self, progress: Progress, found: dict[str, float], *, best: bool) -> None:
        """Called after each validation with its metrics, the one that selects checkpoints first."""

    def should_stop(self, progress: Progress, total: int) -> bool:
        """Called after each step; True ends training as early stopping does: the last step is validated."""
        return False
