"""Metrics and predictions from a model's outputs on a split, computed while the outputs arrive.

Shapes: S samples of the split, B samples of a batch, N labels, n labels of a block, L routed layers, K experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopefuse.core import distributed
from mopefuse.core.atomic_files import write_lines
from mopefuse.data.base import DataSet
from mopefuse.evaluation.logit_spool import Spool
from mopefuse.evaluation.outputs import BatchOutput, ModelOutputs, is_nonfinite, require_finite
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds, tuned_thresholds


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a model on a split.

    Args:
        per_label: precision, recall, F1 and counts of each label, or errors of each target.
        score_S: score of each sample, see `mopefuse.metrics.tally.Tally.by_sample`.
        load_LK: expert weights summed over the split, of a model that routes.
        predictions: the file that they were written to.
    """

    split: str
    metrics: dict[str, float]
    per_label: list[dict[str, Any]]
    score_S: Tensor
    load_LK: Tensor | None = None
    predictions: Path | None = None


def score(
    outputs: Iterable[BatchOutput],
    data: DataSet,
    split: str,
    thresholds: Thresholds = THRESHOLD,
    *,
    predictions: Path | None = None,
    distributed_outputs: bool = True,
) -> Evaluation:
    """Metrics from the outputs on a split; predictions are written as outputs arrive, by the main process.

    Args:
        thresholds: decision thresholds of multi-label data.
        predictions: file to write them to, see `Task.prediction_lines`.
        distributed_outputs: whether `outputs` are those of this process's share of the samples; False if every process has
            the outputs of all samples.

    Raises:
        NumericError: a logit is not finite, as after training diverged; no predictions are written then.
        ResourceError: the disk is full or not writable.
    """
    task, targets, rows = data.task, data.sparse_targets(split), data.splits[split].rows
    tally = task.tally(len(targets), data.outputs)
    nonfinite_S = torch.zeros(len(targets), dtype=torch.uint8)
    kept: list[Sequence[Tensor]] = []  # parts of which no lines have been written yet

    def scored_lines() -> Iterator[str]:
        for index_B, logits_BN, _ in outputs:
            targets_of_batch = targets[index_B]
            nonfinite_S[index_B] = is_nonfinite(logits_BN)
            tally.add(index_B, logits_BN, targets_of_batch, thresholds)
            if predictions is not None:
                own = task.collect(index_B, logits_BN, targets_of_batch, thresholds)
                kept.extend(distributed.send_to_main(own) if distributed_outputs else [own])
                if not task.compares_samples:
                    yield from task.prediction_lines(kept, rows, data.labels)
                    kept.clear()
        if distributed_outputs:
            distributed.sum_over_processes(nonfinite_S)
        require_finite(nonfinite_S, data, split)
        if kept:
            yield from task.prediction_lines(kept, rows, data.labels)

    if predictions is not None and distributed.is_main():
        write_lines(predictions, scored_lines())
    else:
        deque(scored_lines(), maxlen=0)
    for sums in tally.sums() if distributed_outputs else ():
        distributed.sum_over_processes(sums)
    load_LK = outputs.load() if isinstance(outputs, ModelOutputs) else None
    return Evaluation(split, tally.metrics(), tally.per_label(data.labels), tally.by_sample(), load_LK, predictions)


def score_tuned(outputs: ModelOutputs, data: DataSet, split: str, folder: Path) -> tuple[Evaluation, list[float]]:
    """Tune the decision threshold of each label for its F1 on a multi-label split; metrics with these, and the thresholds.

    Exact for a split of any size: logits that do not fit the memory budget go through a temporary file.

    Args:
        folder: folder of the temporary file.

    Raises:
        NumericError: a logit is not finite. ResourceError: the disk is full or not writable.
    """
    targets = data.sparse_targets(split)
    count, labels = len(targets), data.outputs
    nonfinite_S = torch.zeros(count, dtype=torch.uint8)
    with Spool(count, labels, folder) as spool:
        for output in outputs:
            nonfinite_S[output.index_B] = is_nonfinite(output.logits_BN)
            parts = distributed.send_to_main((output.index_B, output.logits_BN.flatten()))
            if parts:
                order = torch.cat([index_B for index_B, _ in parts]).argsort()
                spool.add(torch.cat([logits.reshape(-1, labels) for _, logits in parts])[order])
        require_finite(distributed.sum_over_processes(nonfinite_S), data, split)
        load_LK = outputs.load()

        def tune() -> tuple[Evaluation, list[float]]:
            tally, thresholds = data.task.tally(count, labels), []
            for first, logits_Sn in spool.blocks():
                targets_Sn = targets.columns(first, first + logits_Sn.shape[1])
                thresholds += (best := tuned_thresholds(logits_Sn, targets_Sn))
                tally.add(torch.arange(count), logits_Sn, targets_Sn, best, first=first)
            found = Evaluation(split, tally.metrics(), tally.per_label(data.labels), tally.by_sample(), load_LK)
            return found, thresholds

        tuned: tuple[Evaluation, list[float]] = distributed.run_on_main(tune)
    return tuned
