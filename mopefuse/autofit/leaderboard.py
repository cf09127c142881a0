"""The leaderboard of a fit: the score of every candidate, which one was chosen, and what each modality contributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from mopefuse.autofit.calibration import Calibration
from mopefuse.autofit.candidates import NETWORKS, REGRESSIONS, TRAINED, Candidate
from mopefuse.autofit.scores import BEYOND_NOISE, SIMPLER_WITHIN, Estimate
from mopefuse.autofit.state import CROSS_VALIDATED, Entry
from mopefuse.core.artifact import dump_json
from mopefuse.core.atomic_files import write_atomically
from mopefuse.core.formatting import duration, markdown, percent
from mopefuse.metrics.names import write_change, write_metric, write_number

JSON_FILE, PAGE = "leaderboard.json", "leaderboard.md"


@dataclass(frozen=True)
class Line:
    """One candidate.

    Args:
        score: on the samples that it predicted out of sample; None if it has no predictions.
        gain: its score less that of the leader, on the samples that both predicted.
        leader: whether cross-validation chose it; it is chosen unless one that was trained is better on validation.
        over_regression: of an MLP, its score less that of the best regression on all modalities.
    """

    entry: Entry
    score: Estimate | None = None
    gain: Estimate | None = None
    chosen: bool = False
    leader: bool = False
    over_regression: Estimate | None = None

    @property
    def value(self) -> float:
        """The score without its uncertainty; 0 if there is none."""
        return self.score.value if self.score else 0.0

    @property
    def lead(self) -> float:
        """The gain without its uncertainty; 0 if there is none."""
        return self.gain.value if self.gain else 0.0

    @property
    def verdict(self) -> str:
        """Whether it was chosen."""
        return "selected" if self.chosen else "not selected"

    @property
    def name(self) -> str:
        """What it reads, and the method."""
        return f"{reading(self.entry.reads)}: {self.entry.title}"

    def as_dict(self) -> dict[str, Any]:
        """For leaderboard.json."""
        entry = self.entry
        facts = {"name": entry.name, "title": entry.title, "reads": entry.reads, "state": entry.state, "note": entry.note}
        numbers = {"score": self.score and self.score._asdict(), "gain": self.gain and self.gain._asdict()}
        return {**facts, **numbers, "seconds": entry.seconds, "trainable": entry.trainable, "selected": self.chosen}


@dataclass(frozen=True)
class Leaderboard:
    """Everything that a fit reports.

    Args:
        lines: candidates from cheap to expensive. metric: the metric of their scores.
        choices: columns, splits and encoders, a line for each.
        ensemble: gain of the mean of several candidates over the chosen one, by their names; empty if there are fewer than two.
        test: metrics of the chosen candidate on the test split, and the uncertainty of the first.
    """

    HEADS: ClassVar = ("", "candidate", "score", "scored on", "vs leader", "trainable", "time")

    lines: Sequence[Line]
    metric: str
    choices: Sequence[str]
    elapsed: float
    budget: float
    calibration: Calibration | None = None
    ensemble: dict[str, Estimate] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    test_score: Estimate | None = None

    @property
    def chosen(self) -> Line:
        """The chosen candidate."""
        return next(line for line in self.lines if line.chosen)

    @property
    def headline(self) -> str:
        """What each modality alone, regressions on all of them, an MLP, and prompts contributed."""
        scored = [line for line in self.lines if line.score is not None]
        alone = sorted((line for line in scored if len(line.entry.reads) == 1), key=lambda line: -line.value)
        shown = partial(write_metric, self.metric)
        parts = [f"{reading(line.entry.reads)} {shown(line.value)}{' (selected)' if line.chosen else ''}" for line in alone]
        together = [line for line in scored if len(line.entry.reads) > 1]
        regression, network, trained = (_best_of(kind, together) for kind in (REGRESSIONS, NETWORKS, TRAINED))
        if regression is not None:
            chosen = ", selected" if regression.chosen else ""
            parts.append(f"{reading(regression.entry.reads)} {shown(regression.value)} ({regression.entry.title}{chosen})")
        if network is not None and network.over_regression is not None:
            gain = write_change(self.metric, network.over_regression.value)
            parts.append(f"{network.entry.title} {gain} ({network.verdict})")
        if trained is not None:
            lead = write_change(self.metric, trained.lead)
            parts.append(f"{trained.entry.title} {lead} ({trained.verdict})")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """For leaderboard.json and ``--json``."""
        return {
            "headline": self.headline,
            "metric": self.metric,
            "selected": self.chosen.entry.name,
            "candidates": [line.as_dict() for line in self.lines],
            "ensemble": {names: estimate._asdict() for names, estimate in self.ensemble.items()},
            "calibration": self.calibration.as_dict() if self.calibration else None,
            "test": self.test or None,
            "test_error": self.test_score.error if self.test_score else None,
            "choices": list(self.choices),
            "budget_seconds": self.budget,
            "seconds": round(self.elapsed, 1),
        }

    def write(self, folder: Path) -> None:
        """Write leaderboard.json and leaderboard.md."""
        write_atomically(folder / JSON_FILE, dump_json(self.as_dict()))
        write_atomically(folder / PAGE, self.page(folder))

    def page(self, folder: Path) -> str:
        """The leaderboard as Markdown; its first line is the headline."""
        parts = [f"# {markdown(self.headline)}", self._summary(), self._table(), *self._notes()]
        parts.append("\n".join(f"- {markdown(line)}" for line in self.choices))
        parts.append(f"Next: `mopefuse predict {folder} NEW.csv -o answers.csv`, or `mopefuse report {folder}` for a page.")
        return "\n\n".join(parts) + "\n"

    def _summary(self) -> str:
        name = self.metric.replace("_", " ")
        test = self.test_score
        tested = f" Test {name}: {test.written(self.metric)} ({test.rows:,} rows)." if test else ""
        return f"Selected: **{markdown(self.chosen.name)}**.{tested} Time: {duration(self.elapsed)} of {duration(self.budget)}."

    def _table(self) -> str:
        rows = [[*self.HEADS], ["---"] * len(self.HEADS), *([*map(markdown, row)] for row in self.rows())]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def rows(self) -> list[list[str]]:
        """The cells of the table, a row for each candidate."""
        return [
            [
                "*" if line.chosen else "",
                line.name,
                self._plus_minus(line.score, signed=False) or line.entry.state,
                _basis(line),
                self._plus_minus(line.gain, signed=True),
                f"{line.entry.trainable:,}" if line.entry.trainable is not None else "",
                duration(line.entry.seconds),
            ]
            for line in self.lines
        ]

    def _notes(self) -> list[str]:
        notes = [
            "± is one standard error over samples; differences are paired, on the samples that both predicted. The leader is "
            f"the simplest cross-validated candidate within {SIMPLER_WITHIN:g} standard error of the best. A candidate that "
            f"selected its step on validation must be better there by more than {BEYOND_NOISE:g}."
        ]
        noted = [(line.name, "" if line.score else f"{line.entry.state}, ", line.entry.note) for line in self.lines]
        notes += [f"{name}: {state}{note}." for name, state, note in noted if note]
        for names, gain in self.ensemble.items():
            verdict = "better" if gain.exceeds(SIMPLER_WITHIN) else "not better beyond noise"
            notes.append(
                f"The average of {markdown(names)} would score {self._plus_minus(gain, signed=True)} against the selected "
                f"candidate: {verdict}. It is not saved, because a run contains a single model."
            )
        if (found := self.calibration) is not None:
            notes.append(
                f"Calibration: temperature {found.temperature:.2f}, chosen on {found.rows:,} rows ({found.basis}): calibration "
                f"error {percent(found.error_before)} before, {percent(found.error_after)} after; log-loss "
                f"{found.loss_before:.3f} before, {found.loss_after:.3f} after. It is part of the saved weights."
            )
        return notes

    def _plus_minus(self, estimate: Estimate | None, *, signed: bool) -> str:
        if estimate is None:
            return ""
        return f"{write_number(self.metric, estimate.value, signed=signed)} ± {write_number(self.metric, estimate.error)}"


def reading(modalities: Sequence[str]) -> str:
    """``text alone``, ``both``, or the names of three and more."""
    if len(modalities) == 1:
        return f"{modalities[0]} alone"
    return "both" if len(modalities) == 2 else " and ".join(modalities)


def _best_of(candidates: Sequence[Candidate], lines: Sequence[Line]) -> Line | None:
    """The chosen one of some candidates, or else the best."""
    names = {candidate.name for candidate in candidates}
    found = [line for line in lines if line.entry.name in names]
    return max(found, key=lambda line: (line.chosen, line.lead), default=None)


def _basis(line: Line) -> str:
    if line.score is None:
        return ""
    how = "cross-validation" if line.entry.state == CROSS_VALIDATED else "validation"
    return f"{line.score.rows:,} rows, {how}"
