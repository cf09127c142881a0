"""The contents of the page of a run; no model is run here.

Shapes: S samples of the split, N labels, L routed layers, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.data.base import DataSet, Row
from mopefuse.metrics import classification as measures
from mopefuse.metrics.thresholds import Thresholds
from mopefuse.report.baselines import Baseline
from mopefuse.report.chart import shorten
from mopefuse.report.data_pictures import Picture
from mopefuse.report.row_values import picture_of, text_of
from mopefuse.report.settings import Derive
from mopefuse.tasks.base import Task
from mopefuse.tasks.classification import Classification

_TEXT = 300  # characters of a text on a card


@dataclass(frozen=True)
class RunFacts:
    """A run, and the predictions of its model for one split.

    Args:
        name: name of the run. step: step of the checkpoint that made the predictions.
        manifest, result, log: manifest.json, metrics.json (empty before a run ends) and the lines of metrics.jsonl.
        split: the split that is predicted. logits_SN, routing_SLK: outputs of the model for it.
        audit: `mopefuse.evaluation.audit.Audit.as_dict`, or None if none was made.
        baselines: simpler methods on the same data, from `find_baselines`.
        derive: fills in settings that are unset, see `mopefuse.report.settings.changed_settings`.
        missing: `mopefuse.evaluation.missing_modalities.Missing.as_dict` of this split and step; empty if it was not measured.
        notes: caveats shown at the top. path: the run's folder as it was given, for commands.
    """

    name: str
    step: int
    config: RunConfig
    manifest: Mapping[str, Any]
    result: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    data: DataSet
    split: str
    logits_SN: Tensor
    thresholds: Thresholds
    routing_SLK: Tensor | None = None
    audit: Mapping[str, Any] | None = None
    missing: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    path: str = ""
    baselines: tuple[Baseline, ...] = ()
    derive: Derive = lambda config: config

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits."""
        return self.data.labels

    @property
    def task(self) -> Task:
        """What a label is."""
        return self.data.task

    @property
    def classes(self) -> Classification:
        """The task of a classifier."""
        assert isinstance(self.task, Classification)
        return self.task

    @property
    def main_metric(self) -> str:
        """The name of the metric that selects checkpoints."""
        return self.task.metric

    @property
    def complementary_unused(self) -> bool:
        """Whether the audit found no sign that the model uses its complementary modalities."""
        if self.audit is None:
            return False
        rows, main = self.audit["conditions"], self.audit["main"]
        exchanged = [row for row in rows if row["name"] == "shuffled" and row["modality"] != main]
        return not self.audit["read"] or not any(row["matters"] for row in exchanged)

    @cached_property
    def targets(self) -> Tensor:
        """See `DataSet.targets`."""
        return self.data.targets(self.split)

    @cached_property
    def p_SN(self) -> Tensor:
        """Probabilities of the labels."""
        return self.classes.probabilities(self.logits_SN)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Metrics on the split."""
        return self.task.compute(self.logits_SN, self.targets, self.thresholds)

    @cached_property
    def calibration(self) -> measures.Calibration:
        """Calibration on the split."""
        return measures.calibration(self.p_SN, self.targets)

    @property
    def calibration_error(self) -> float | None:
        """The expected calibration error of a classifier."""
        return self.calibration.error if self.task.is_classification else None

    def row(self, number: int) -> Row:
        """A row of the split."""
        return self.data.splits[self.split].rows[number]

    def picture(self, row: Row) -> Picture:
        """The image of a row, or a description of its error."""
        where = self.data.splits[self.split].where(row)
        return picture_of(row, self.data.files, max_pixels=self.config.data.max_pixels, place=where)

    def card(self, number: int) -> dict[str, Any]:
        """What every card of a sample shows: its id, its image and the beginning of its text."""
        row = self.row(number)
        return {"id": row.id, "picture": self.picture(row), "text": shorten(text_of(row), _TEXT)}

    def predicted(self, number: int) -> tuple[str, ...]:
        """The labels that the model predicts for a sample."""
        chosen = self.classes.chosen(self.logits_SN[number : number + 1], self.thresholds)[0].tolist()
        return tuple(label for label, yes in zip(self.labels, chosen, strict=True) if yes)
