"""What all phases of a fit share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mopefuse.autofit.budget import Budget
from mopefuse.autofit.candidates import CANDIDATES, Candidate
from mopefuse.autofit.features import Features
from mopefuse.autofit.listener import FitListener
from mopefuse.autofit.scores import Judge, Predictions, choose, choose_leader
from mopefuse.autofit.state import CROSS_VALIDATED, SKIPPED, VALIDATED, Entry, FitFolder
from mopefuse.data.base import DataSet


@dataclass(frozen=True)
class Context:
    """A fit whose data and encoders are known.

    Args:
        values: settings of all candidates, nested. choices: a line for each column, split and encoder that was found.
        modality_of: modality by side. judge: scores predictions for train followed by val.
    """

    folder: FitFolder
    budget: Budget
    listener: FitListener
    values: dict[str, Any]
    choices: Sequence[str]
    device: torch.device
    data: DataSet
    modality_of: dict[str, str]
    features: Features
    judge: Judge

    def reads(self, candidate: Candidate) -> list[str]:
        """The modalities that a candidate reads, in a fixed order."""
        sides = [side for side in self.modality_of if candidate.reads in (side, "both")]
        return sorted({self.modality_of[side] for side in sides}, key=self.data.modalities.index)

    def is_done(self, candidate: Candidate) -> bool:
        """Whether an earlier attempt has scored a candidate, or it failed for a reason that stays."""
        entry = self.folder.entries.get(candidate.name)
        return entry is not None and entry.state != SKIPPED

    def record(self, entry: Entry, found: Predictions | None = None) -> None:
        """Record and report what became of a candidate."""
        self.folder.record(entry, self.budget.elapsed, found)
        score = None if found is None else self.judge.score(found)
        self.listener.on_entry(entry, score, self.budget, metric=self.judge.metric)

    def predictions(self, *states: str) -> dict[str, Predictions]:
        """The predictions of the candidates in some state, from cheap to expensive."""
        entries = [self.folder.entries[name] for name in CANDIDATES if name in self.folder.entries]
        return {entry.name: self.folder.predictions(entry.name) for entry in entries if entry.state in states}

    def leader(self) -> str:
        """The candidate that cross-validation chooses."""
        return choose_leader(self.judge, self.predictions(CROSS_VALIDATED))

    def on_val(self, leader: str) -> Predictions:
        """The predictions of the leader's run for validation; see `mopefuse.autofit.tryouts.train_leader`."""
        return self.folder.predictions(f"{leader}-val")

    def choose(self, leader: str) -> str:
        """The leader, or the candidate that is better on validation."""
        return choose(self.judge, leader, self.on_val(leader), self.predictions(VALIDATED))
