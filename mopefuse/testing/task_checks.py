"""The checks of `mopefuse.testing.check_task`, one method for each part of the contract.

Shapes: S samples, N outputs of a model for a sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from mopefuse.data.labels import Labels, Targets
from mopefuse.tasks.base import Task, task_from_facts

_STEPS, _RATE = 200, 0.1


class _Row(NamedTuple):
    id: str
    labels: Sequence[str]


class TaskChecks:
    """Checks of a task with some rows.

    Args:
        rows: labels of each row, as they are written in data. known: the labels of a model.
    """

    def __init__(self, name: str, task: Task, rows: Sequence[Sequence[str]], known: Sequence[str]) -> None:
        self.name, self.task, self.rows, self.known = name, task, [tuple(row) for row in rows], tuple(known)
        self.targets = Targets(Labels.from_rows(self.rows), self.known, task)
        self.count = task.outputs(self.known)
        draw = torch.Generator().manual_seed(0)
        self.outputs_SN = torch.randn(len(self.rows), self.count, generator=draw)

    def _refuse(self, what: str) -> NoReturn:
        raise AssertionError(f"{self.name}: {what}")

    def attributes(self) -> None:
        """The names of a task and of its metrics."""
        if self.task.name != self.name:
            self._refuse(f"its name is {self.task.name!r}, and its entry point is {self.name!r}")
        if not self.task.metrics or self.task.metric != self.task.metrics[0]:
            self._refuse("the metric that selects checkpoints is not the first of its metrics")
        for what in (self.task.metric_title, self.task.linear_name, self.task.describe(self.known)):
            if not (isinstance(what, str) and what):
                self._refuse("metric_title, linear_name or describe() is not a text")

    def facts(self) -> None:
        """A task is made again from what a run saves of it."""
        again = task_from_facts(json.loads(json.dumps(self.task.facts())))
        if again != self.task:
            self._refuse(f"facts() gives {self.task.facts()}, from which from_facts() makes {again.facts()}")

    def encoding(self) -> None:
        """Targets of a batch are those of its samples."""
        whole = self.targets.dense()
        if len(whole) != len(self.rows):
            self._refuse(f"targets() of {len(self.rows)} samples has the length {len(whole)}")
        for number in range(len(self.rows)):
            if not torch.equal(self.targets[torch.tensor([number])][0], whole[number]):
                self._refuse(f"the target of sample {number} depends on its batch")
        numbers = dict(zip(names := sorted({label for row in self.rows for label in row}), self._encode(names), strict=True))
        labels = [self.task.as_written([numbers[label] for label in row]) for row in self.rows]
        for number, label in enumerate(labels):
            self.task.check_label(label, self.count, f"sample {number}")
        if not torch.equal(self.task.stack_labels(labels, self.count).to(whole.dtype), whole):
            self._refuse("stack_labels() of rows differs from targets()")
        if self.task.unknown_labels(names, self.known):
            self._refuse(f"unknown_labels() lists {self.task.unknown_labels(names, self.known)}, which encode() accepts")

    def _encode(self, names: Sequence[str]) -> list[Any]:
        return list(self.task.encode(names, self.known).tolist())

    def loss(self) -> None:
        """A loss per sample, which an optimizer can lower; it depends on others only if the task compares samples."""
        targets = self.targets.dense()
        loss_S = self.task.loss(self.outputs_SN, targets)
        wanted = (len(self.rows),)
        if loss_S.shape != wanted or loss_S.dtype != torch.float32 or not loss_S.isfinite().all():
            found = f"{loss_S.dtype} of shape {tuple(loss_S.shape)}"
            self._refuse(f"loss() is {found}, expected finite float32 of shape {wanted}")
        if not self.task.compares_samples:
            self._require_independent(loss_S, targets)
        before, after = self.task.compute(self.outputs_SN, targets), self.task.compute(self._optimised(targets), targets)
        if not after["loss"] < before["loss"] or not after[self.task.metric] >= before[self.task.metric]:
            self._refuse(f"outputs that lower the loss from {before['loss']:.3g} to {after['loss']:.3g} lower the metric")

    def _require_independent(self, loss_S: Tensor, targets: Tensor) -> None:
        alone = torch.stack([self.task.loss(self.outputs_SN[i : i + 1], targets[i : i + 1])[0] for i in range(len(self.rows))])
        if not torch.allclose(alone, loss_S, atol=1e-6):
            self._refuse("the loss of a sample depends on its batch")

    def _optimised(self, targets: Tensor) -> Tensor:
        outputs_SN = self.outputs_SN.clone().requires_grad_()
        optimizer = torch.optim.Adam([outputs_SN], lr=_RATE)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            self.task.loss(outputs_SN, targets).mean().backward()
            optimizer.step()
        return outputs_SN.detach()

    def metrics(self) -> None:
        """Metrics do not depend on how samples are divided into batches or among processes."""
        targets, whole = self.targets.dense(), self.task.count(self.outputs_SN, self.targets.dense())
        found = whole.metrics()
        if missing := [name for name in (*self.task.metrics, "loss") if not isinstance(found.get(name), int | float)]:
            self._refuse(f"metrics() lacks {missing[0]}")
        parts = [self.task.tally(len(self.rows), self.count) for _ in range(2)]
        for index_B in torch.arange(len(self.rows)).flip(0).split(3):
            parts[int(index_B[0]) % 2].add(index_B, self.outputs_SN[index_B], targets[index_B])
        for mine, theirs in zip(parts[0].sums(), parts[1].sums(), strict=True):
            mine += theirs
        if parts[0].metrics() != found:
            self._refuse(f"metrics of batches are {parts[0].metrics()}, those of the whole split {found}")
        if whole.by_sample().shape != (len(self.rows),):
            self._refuse("by_sample() has no score for each sample")
        outcome = self.task.outcome(self.outputs_SN, targets)
        for name in self.task.metrics:
            if not np.isclose(outcome.measure(name, np.ones((1, len(self.rows))))[0], found[name], atol=1e-6):
                self._refuse(f"the outcome for a bootstrap has another {name} than metrics()")

    def averages(self) -> None:
        """The average of equal outputs predicts the same."""
        average_SN = self.task.average([self.outputs_SN] * 3)
        if not np.allclose(self.task.decode(average_SN.numpy()), self.task.decode(self.outputs_SN.numpy()), atol=1e-5):
            self._refuse("average() of equal outputs predicts something else")
        words, constant_N = self.task.constant(Labels.from_rows(self.rows).counts(), self.known)
        if constant_N.shape != (self.count,) or not constant_N.isfinite().all() or not words:
            self._refuse(f"constant() has no finite outputs of shape ({self.count},) and a description")

    def predictions(self) -> None:
        """Predictions can be written as JSON and as a table, and read again."""
        thresholds = [0.5] * len(self.known)
        for decoded_N in self.task.decode(self.outputs_SN.numpy()).tolist():
            one = self.task.predict(decoded_N, self.known, thresholds)
            json.dumps(one, allow_nan=False)
            for row in (one, {"error": {"message": "x"}}):
                if len(self.task.table_cells(row, self.known)) != len(self.task.table_header(self.known)):
                    self._refuse("table_cells() and table_header() have different lengths")
        targets, index_S = self.targets.dense(), torch.arange(len(self.rows))
        halves = [index_S[1::2], index_S[::2]]
        parts = [self.task.collect(index_B, self.outputs_SN[index_B], targets[index_B]) for index_B in halves]
        rows = [_Row(str(number), labels) for number, labels in enumerate(self.rows)]
        lines = [json.loads(line) for line in self.task.prediction_lines(parts, rows, self.known)]
        if [line["id"] for line in lines] != [row.id for row in rows]:
            self._refuse("prediction_lines() is not in the order of the split")
        read = self.task.read_outcome(enumerate(lines), len(rows), self.known)
        outcome, once = self.task.outcome(self.outputs_SN, targets), np.ones((1, len(rows)))
        for name in self.task.metrics:
            if not np.isclose(read.measure(name, once)[0], outcome.measure(name, once)[0], atol=1e-4):
                self._refuse(f"the {name} of predictions that were written and read differs")
