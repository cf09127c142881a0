"""The lines of ``predictions.jsonl``: predicted and true labels of each sample, with probabilities.

With up to `MAX_LABELS` labels a line has the probability of every label. With more labels it has those of the `KEPT` most
probable, the predicted and the true labels, most probable first. Accuracy, F1 and the log-likelihood of the true labels can
still be computed from that, and a million lines with 10,000 labels take about 1 GB instead of 200 GB.

Shapes: B samples of a batch, N labels, Z (sample, label) pairs to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopefuse.core.formatting import json_text
from mopefuse.data.base import Row
from mopefuse.metrics import classification as metrics

MAX_LABELS, KEPT = 100, 20


class Predicted(NamedTuple):
    """The (sample, label) pairs of a batch, on the CPU, in the form that processes exchange.

    Args:
        index_B: positions of the samples in the split.
        count_B: number of pairs of each sample.
        label_Z: label indices, sample by sample. p_Z: their probabilities. chosen_Z: whether they are predicted.
    """

    index_B: Tensor
    count_B: Tensor
    label_Z: Tensor
    p_Z: Tensor
    chosen_Z: Tensor


def collect_predictions(
    index_B: Tensor, logits_BN: Tensor, targets: Tensor, *, multi_label: bool, thresholds: metrics.Thresholds
) -> Predicted:
    """The pairs to write for a batch.

    Args:
        targets: class indices (B,), or zeros and ones (B, N) of multi-label data.
    """
    p_BN = metrics.probabilities(logits_BN, multi_label=multi_label)
    if multi_label:
        chosen_BN = metrics.predicted_labels(p_BN, thresholds)
    else:
        chosen_BN = torch.zeros_like(p_BN, dtype=torch.bool).scatter_(1, logits_BN.argmax(dim=-1, keepdim=True), True)
    kept_BN = torch.ones_like(chosen_BN)
    if p_BN.shape[1] > MAX_LABELS:
        true_BN = targets > 0 if multi_label else torch.zeros_like(chosen_BN).scatter_(1, targets.unsqueeze(1), True)
        kept_BN = (chosen_BN | true_BN).scatter_(1, p_BN.topk(KEPT, dim=-1).indices, True)
    label_Z = kept_BN.nonzero()[:, 1].int()
    return Predicted(
        index_B=index_B, count_B=kept_BN.sum(dim=1), label_Z=label_Z, p_Z=p_BN[kept_BN], chosen_Z=chosen_BN[kept_BN]
    )


def to_json_lines(
    parts: Iterable[Predicted], rows: Sequence[Row], labels: Sequence[str], *, multi_label: bool
) -> Iterator[str]:
    """``{"id", "label" | "labels", "probabilities": {label: p}, "true"}`` as lines of JSON, in the order of the split.

    Args:
        parts: one batch of each process. rows: all rows of the split.
    """
    for index, pairs in sorted(pair for part in parts for pair in _pairs_by_sample(part)):
        row = rows[index]
        chosen = [labels[number] for number, _, yes in pairs if yes]
        predicted: dict[str, Any] = {"labels": chosen} if multi_label else {"label": chosen[0]}
        if len(labels) > MAX_LABELS:
            pairs = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
        probabilities = {labels[number]: round(p, 6) for number, p, _ in pairs}
        true: Any = list(row.labels) if multi_label else row.labels[0]
        yield json_text({"id": row.id, **predicted, "probabilities": probabilities, "true": true}) + "\n"


def _pairs_by_sample(part: Predicted) -> Iterator[tuple[int, list[tuple[int, float, bool]]]]:
    """(position in the split, [(label index, probability, whether predicted), ...]) of each sample."""
    pairs = list(zip(part.label_Z.tolist(), part.p_Z.tolist(), part.chosen_Z.tolist(), strict=True))
    first = 0
    for index, count in zip(part.index_B.tolist(), part.count_B.tolist(), strict=True):
        yield index, pairs[first : first + count]
        first += count
