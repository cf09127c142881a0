"""Calibration and confusion of classifiers.

Shapes: S samples of a split, N labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Calibration(NamedTuple):
    """Calibration of probabilities.

    Attributes:
        error: expected calibration error, 0..1.
        bins: mean confidence, accuracy and number of predictions of each bin.
    """

    error: float
    bins: list[tuple[float, float, int]]


def calibration(probabilities_SN: Tensor, targets: Tensor, *, bins: int = 15) -> Calibration:
    """Compute the expected calibration error: |accuracy - confidence| of bins of equal width, weighted by predictions.

    Guo et al. 2017, "On Calibration of Modern Neural Networks" (equation 3). The prediction for a sample is its most
    probable label, with that probability as confidence. For multi-label data each label of each sample is a prediction with
    the label's probability as confidence; it is correct if the sample has the label.

    Args:
        targets: class indices (S,), or zeros and ones (S, N) for multi-label data.
    """
    if targets.ndim == 1:
        confidence_A, predicted_A = probabilities_SN.double().max(dim=-1)
        right_A = (predicted_A == targets).double()
    else:
        confidence_A, right_A = probabilities_SN.double().flatten(), targets.double().flatten()
    bin_A = (confidence_A * bins).ceil().long().clamp(1, bins) - 1  # a bin includes its upper edge
    count_M = torch.zeros(bins, dtype=torch.double).index_add_(0, bin_A, torch.ones_like(confidence_A))
    sums_2M = [torch.zeros(bins, dtype=torch.double).index_add_(0, bin_A, value_A) for value_A in (confidence_A, right_A)]
    mean_2M = [sum_M / count_M.clamp(min=1) for sum_M in sums_2M]
    error = float(((mean_2M[1] - mean_2M[0]).abs() * count_M).sum() / len(confidence_A))
    rows = zip(mean_2M[0].tolist(), mean_2M[1].tolist(), count_M.long().tolist(), strict=True)
    return Calibration(error, list(rows))


def confusion(predicted_S: Tensor, targets_S: Tensor, labels: int) -> Tensor:
    """Confusion matrix (N, N): numbers of samples by true class (rows) and predicted class (columns)."""
    return torch.bincount(targets_S * labels + predicted_S, minlength=labels * labels).reshape(labels, labels)


def most_confused(predicted_S: Tensor, targets_S: Tensor, labels: int, *, most: int) -> list[tuple[int, int, int]]:
    """Pairs of classes that are confused most often, as (samples, true class, predicted class), most frequent first."""
    wrong_S = predicted_S != targets_S
    pairs, counts = (targets_S * labels + predicted_S)[wrong_S].unique(return_counts=True)  # ascending
    order = counts.argsort(descending=True, stable=True)[:most]
    return [(int(counts[i]), *divmod(int(pairs[i]), labels)) for i in order]
