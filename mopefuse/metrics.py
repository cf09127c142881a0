"""Metrics of a split, from logits and targets of all its samples: nothing is averaged over batches.

Shapes: S samples of the split, N labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

THRESHOLD = 0.5
"""Multi-label: a label is predicted from this probability on, unless thresholds are given."""

Thresholds = Sequence[float] | float


def tuned_thresholds(logits_SN: Tensor, targets_SN: Tensor) -> list[float]:
    """For each label the threshold with the best F1 on a split (the validation split), midway between two samples.

    A label that the split does not have keeps 0.5.
    """
    found = []
    for p_S, y_S in zip(probabilities(logits_SN, multi_label=True).double().T, targets_SN.T, strict=True):
        p_S, order = p_S.sort(descending=True)
        right_S = y_S[order].double().cumsum(0)
        chosen_S = torch.arange(1, len(p_S) + 1, dtype=torch.double)
        f1_S = 2 * right_S / (chosen_S + right_S[-1])
        next_S = torch.cat([p_S[1:], p_S[-1:] * 0])
        f1_S[p_S == next_S] = -1  # no threshold lies between equals
        best = int(f1_S.argmax())
        found.append(float((p_S[best] + next_S[best]) / 2) if right_S[-1] > 0 else THRESHOLD)
    return found


def over(probabilities_SN: Tensor, thresholds: Thresholds) -> Tensor:
    """Which labels are predicted (S, N)."""
    return probabilities_SN.double() >= torch.as_tensor(thresholds, dtype=torch.double)


def probabilities(logits_SN: Tensor, *, multi_label: bool) -> Tensor:
    """Softmax over labels, or a sigmoid each for multi-label data."""
    return logits_SN.float().sigmoid() if multi_label else logits_SN.float().softmax(dim=-1)


def compute(
    logits_SN: Tensor, targets: Tensor, *, multi_label: bool, thresholds: Thresholds = THRESHOLD
) -> dict[str, float]:
    """Metrics of a split, each in 0..1, and the mean loss.

    F1 macro is over the labels that the split has (`absent_labels` counts the others), and 0 if it has none; F1 samples
    counts a sample without labels as 1 if none is predicted, else as 0.
    """
    from sklearn.metrics import f1_score  # a second to import: what has no answers to judge does without

    logits_SN = logits_SN.float()
    if multi_label:
        return _multi_label(logits_SN, targets, thresholds)
    predicted, actual = logits_SN.argmax(dim=-1).numpy(), targets.numpy()
    present = np.unique(actual)
    return {
        "accuracy": float((predicted == actual).mean()),
        "f1_macro": float(f1_score(actual, predicted, labels=present, average="macro", zero_division=0)),
        "absent_labels": logits_SN.shape[1] - len(present),
        "loss": float(torch.nn.functional.cross_entropy(logits_SN, targets)),
    }


def _multi_label(logits_SN: Tensor, targets_SN: Tensor, thresholds: Thresholds) -> dict[str, float]:
    from sklearn.metrics import f1_score

    predicted = over(probabilities(logits_SN, multi_label=True), thresholds).int().numpy()
    actual = targets_SN.int().numpy()
    present = np.flatnonzero(actual.any(axis=0))
    empty = ~actual.any(axis=1)
    samples = f1_score(actual[~empty], predicted[~empty], average="samples", zero_division=0) if (~empty).any() else 0.0
    macro = f1_score(actual, predicted, labels=present, average="macro", zero_division=0) if len(present) else 0.0
    right_empty = float((~predicted[empty].any(axis=1)).sum())
    return {
        "f1_micro": float(f1_score(actual, predicted, average="micro", zero_division=0)),
        "f1_macro": float(macro),
        "f1_samples": float((samples * (~empty).sum() + right_empty) / len(actual)),
        "absent_labels": int(logits_SN.shape[1] - len(present)),
        "loss": float(torch.nn.functional.binary_cross_entropy_with_logits(logits_SN, targets_SN)),
    }


def per_label(
    logits_SN: Tensor,
    targets: Tensor,
    labels: tuple[str, ...],
    *,
    multi_label: bool,
    thresholds: Thresholds = THRESHOLD,
) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each label."""
    from sklearn.metrics import precision_recall_fscore_support

    if multi_label:
        predicted = over(probabilities(logits_SN, multi_label=True), thresholds).int().numpy()
        scores = precision_recall_fscore_support(targets.int().numpy(), predicted, zero_division=0)
    else:
        scores = precision_recall_fscore_support(
            targets.numpy(), logits_SN.argmax(dim=-1).numpy(), labels=range(len(labels)), zero_division=0
        )
    rows = zip(labels, *scores, strict=True)
    return [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for label, p, r, f, s in rows
    ]


class Calibration(NamedTuple):
    """How far confidence is from being right.

    Args:
        error: expected calibration error, 0..1. bins: (mean confidence, share that is right, answers) of each.
    """

    error: float
    bins: list[tuple[float, float, int]]


def calibration(probabilities_SN: Tensor, targets: Tensor, *, bins: int = 15) -> Calibration:
    """Expected calibration error over bins of equal width: sum over bins of |right - confidence| times their share of answers.

    Guo et al. 2017, "On Calibration of Modern Neural Networks" (equation 3). The answer to a sample is its most probable
    label, and its confidence that probability. With several labels each label of each sample is an answer, its confidence
    the label's probability, and it is right if the sample has the label.

    Args:
        targets: class indices (S,), or zeros and ones (S, N) for multi-label data.
    """
    if targets.ndim == 1:
        confidence_A, predicted_A = probabilities_SN.double().max(dim=-1)
        right_A = (predicted_A == targets).double()
    else:
        confidence_A, right_A = probabilities_SN.double().flatten(), targets.double().flatten()
    bin_A = (confidence_A * bins).ceil().long().clamp(1, bins) - 1  # a bin has its upper edge
    count_M = torch.zeros(bins, dtype=torch.double).index_add_(0, bin_A, torch.ones_like(confidence_A))
    sums_2M = [torch.zeros(bins, dtype=torch.double).index_add_(0, bin_A, value_A) for value_A in (confidence_A, right_A)]
    mean_2M = [sum_M / count_M.clamp(min=1) for sum_M in sums_2M]
    error = float(((mean_2M[1] - mean_2M[0]).abs() * count_M).sum() / len(confidence_A))
    rows = zip(mean_2M[0].tolist(), mean_2M[1].tolist(), count_M.long().tolist(), strict=True)
    return Calibration(error, list(rows))


def confusion(predicted_S: Tensor, targets_S: Tensor, labels: int) -> Tensor:
    """How many samples of each class (N, N; rows) were given each label (columns)."""
    return torch.bincount(targets_S * labels + predicted_S, minlength=labels * labels).reshape(labels, labels)


def sample_losses(logits_SN: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample (S,); with several labels the mean over them."""
    if targets.ndim == 1:
        return torch.nn.functional.cross_entropy(logits_SN.float(), targets, reduction="none")
    return torch.nn.functional.binary_cross_entropy_with_logits(logits_SN.float(), targets, reduction="none").mean(dim=-1)
