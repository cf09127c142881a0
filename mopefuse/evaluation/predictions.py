"""What ``predictions.jsonl`` holds: a line for each sample, with what was predicted, what is true, and probabilities.

With up to `MOST_LABELS` labels a line has the probability of each. With more it has those of the `KEPT` most probable
labels, of the predicted and of the true ones, most probable first: accuracy, F1 and the log-likelihood of true labels can
still be computed from it, and a million lines of 10,000 labels take about 1 GB instead of 200.

Shapes: B samples of a batch, N labels, Z pairs of a sample and a label that are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopefuse.core.formatting import json_text
from mopefuse.data.base import Row
from mopefuse.metrics import classification as metrics

MOST_LABELS, KEPT = 100, 20


class Predicted(NamedTuple):
    """What is written of a batch, sparse and on the CPU, as processes hand it over.

    Args:
        index_B: places of the samples in the split. count_B: of each sample, how many pairs follow.
        label_Z: labels by number, sample by sample. p_Z: their probabilities. chosen_Z: whether they are predicted.
    """

    index_B: Tensor
    count_B: Tensor
    label_Z: Tensor
    p_Z: Tensor
    chosen_Z: Tensor


def predicted(
    index_B: Tensor, logits_BN: Tensor, targets: Tensor, *, multi_label: bool, thresholds: metrics.Thresholds
) -> Predicted:
    """What is written of the logits of a batch.

    Args:
        targets: class indices (B,), or zeros and ones (B, N).
    """
    p_BN = metrics.probabilities(logits_BN, multi_label=multi_label)
    if multi_label:
        chosen_BN = metrics.over(p_BN, thresholds)
    else:
        chosen_BN = torch.zeros_like(p_BN, dtype=torch.bool).scatter_(1, logits_BN.argmax(dim=-1, keepdim=True), True)
    kept_BN = torch.ones_like(chosen_BN)
    if p_BN.shape[1] > MOST_LABELS:
        true_BN = targets > 0 if multi_label else torch.zeros_like(chosen_BN).scatter_(1, targets.unsqueeze(1), True)
        kept_BN = (chosen_BN | true_BN).scatter_(1, p_BN.topk(KEPT, dim=-1).indices, True)
    label_Z = kept_BN.nonzero()[:, 1].int()
    return Predicted(index_B, kept_BN.sum(dim=1), label_Z, p_BN[kept_BN], chosen_BN[kept_BN])


def lines(parts: Iterable[Predicted], rows: Sequence[Row], labels: Sequence[str], *, multi_label: bool) -> Iterator[str]:
    """``{"id", "label" | "labels", "probabilities": {label: p}, "true"}`` as lines of JSON, by place in the split.

    Args:
        parts: of one batch of each process. rows: of the split.
    """
    found = sorted(pair for part in parts for pair in _rows(part))
    for index, pairs in found:
        row = rows[index]
        chosen = [labels[number] for number, _, yes in pairs if yes]
        answer: dict[str, Any] = {"labels": chosen} if multi_label else {"label": chosen[0]}
        if len(labels) > MOST_LABELS:
            pairs = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
        said = {labels[number]: round(p, 6) for number, p, _ in pairs}
        true: Any = list(row.labels) if multi_label else row.labels[0]
        yield json_text({"id": row.id, **answer, "probabilities": said, "true": true}) + "\n"


def _rows(part: Predicted) -> Iterator[tuple[int, list[tuple[int, float, bool]]]]:
    pairs = list(zip(part.label_Z.tolist(), part.p_Z.tolist(), part.chosen_Z.tolist(), strict=True))
    last = 0
    for index, count in zip(part.index_B.tolist(), part.count_B.tolist(), strict=True):
        yield index, pairs[last : last + count]
        last += count
