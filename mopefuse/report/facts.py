"""What a page of a run is made of: nothing here is computed by a model.

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
from mopefuse.report.data_pictures import Picture
from mopefuse.report.row_values import picture_of


@dataclass(frozen=True)
class RunFacts:
    """A run, and what its model says of one split.

    Args:
        name: of the run. step: of the checkpoint that answered.
        manifest, result, log: manifest.json, metrics.json (empty before a run ends) and the lines of metrics.jsonl.
        split: that was asked. logits_SN, routing_SLK: what was said of it.
        audit: `mopefuse.evaluation.audit.Audit.as_dict`, or None where none was made.
        missing: `mopefuse.evaluation.missing.Missing.as_dict` of this split and step; empty where nobody asked.
        notes: what a reader must know first.
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
    thresholds: measures.Thresholds
    routing_SLK: Tensor | None = None
    audit: Mapping[str, Any] | None = None
    missing: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits."""
        return self.data.labels

    @property
    def multi_label(self) -> bool:
        """Whether a sample may have several labels."""
        return self.data.multi_label

    @cached_property
    def targets(self) -> Tensor:
        """See `DataSet.targets`."""
        return self.data.targets(self.split)

    @cached_property
    def p_SN(self) -> Tensor:
        """Probabilities of the labels."""
        return measures.probabilities(self.logits_SN, multi_label=self.multi_label)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Of the split."""
        return measures.compute(self.logits_SN, self.targets, multi_label=self.multi_label, thresholds=self.thresholds)

    @cached_property
    def calibration(self) -> measures.Calibration:
        """Of the split."""
        return measures.calibration(self.p_SN, self.targets)

    def row(self, number: int) -> Row:
        """A row of the split."""
        return self.data.splits[self.split].rows[number]

    def picture(self, row: Row) -> Picture:
        """Its image, or what is wrong with it."""
        where = self.data.splits[self.split].where(row)
        return picture_of(row, self.data.image_roots, max_pixels=self.config.data.max_pixels, place=where)

    def given(self, number: int) -> tuple[str, ...]:
        """The labels that the model gives a sample."""
        p_N = self.p_SN[number]
        if not self.multi_label:
            return (self.labels[int(p_N.argmax())],)
        chosen = measures.over(p_N.unsqueeze(0), self.thresholds)[0].tolist()
        return tuple(label for label, yes in zip(self.labels, chosen, strict=True) if yes)
