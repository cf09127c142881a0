"""How long a run trains, and after which steps it is validated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mopefuse.config.schema import Train


@dataclass(frozen=True)
class Duration:
    """The number of optimizer steps of a run: whichever of ``--epochs`` and ``--steps`` ends first.

    Args:
        per_epoch: steps of an epoch.
        max_steps: None for no limit other than `epochs`.
    """

    per_epoch: int
    epochs: int
    max_steps: int | None = None

    @classmethod
    def from_config(cls, config: Train, samples: int) -> Duration:
        """The duration of training on a number of samples."""
        return cls(math.ceil(samples / config.batch_size), config.epochs, config.max_steps)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return min(limit for limit in (self.epochs * self.per_epoch, self.max_steps) if limit is not None)

    @property
    def limits(self) -> tuple[str, ...]:
        """The flags that must be raised for the run to make more steps."""
        limits = {"--epochs": self.epochs * self.per_epoch, "--steps": self.max_steps}
        return tuple(flag for flag, steps in limits.items() if steps == self.total)

    @property
    def notice(self) -> str:
        """A warning that ``--steps`` has no effect because ``--epochs`` ends first; empty if ``--steps`` has an effect."""
        if self.max_steps is None or self.max_steps <= self.total:
            return ""
        what = f"--steps {self.max_steps:,} is never reached: --epochs {self.epochs:,} ends after {self.total:,} steps"
        return f"{what}; raise --epochs to {math.ceil(self.max_steps / self.per_epoch):,}"


def evaluation_steps(total: int, per_epoch: int, evaluations: int) -> set[int]:
    """Steps after which to validate: `evaluations` evenly within each epoch, and after the last step."""
    at = {
        epoch * per_epoch + math.ceil(per_epoch * (k + 1) / evaluations)
        for epoch in range(math.ceil(total / per_epoch))
        for k in range(evaluations)
    }
    return {step for step in at if step <= total} | ({total} if total else set())
