"""Classification metrics of a split, accumulated batch by batch in memory proportional to samples plus labels.

Shapes: S samples of the split, B of them in a batch, N labels, n some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

THRESHOLD = 0.5
"""Default threshold of multi-label predictions: a label is predicted from this probability on."""

Thresholds = Sequence[float] | float


class Tally:
    """Counts from which metrics are computed, accumulated over batches of a split in any order.

    Everything except the loss is counted in integers, and losses are stored per sample, so that metrics do not depend on
    how samples are divided into batches or among processes.

    Args:
        samples: S.
        labels: N.
    """

    def __init__(self, samples: int, labels: int, *, multi_label: bool) -> None:
        self.multi_label = multi_label
        self.right_N, self.predicted_N, self.actual_N = (torch.zeros(labels, dtype=torch.long) for _ in range(3))
        self.right_S, self.predicted_S, self.actual_S = (torch.zeros(samples, dtype=torch.long) for _ in range(3))
        self.loss_S = torch.zeros(samples, dtype=torch.double)  # for multi-label data, summed over labels

    def add(
        self, index_B: Tensor, logits_Bn: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD, *, first: int = 0
    ) -> None:
        """Count a batch; every sample, and for multi-label data every label of it, must be added exactly once.

        Args:
            index_B: indices of the samples in the split.
            targets: class indices (B,), or zeros and ones (B, n).
            thresholds: one for all, or one for each of the n labels.
            first: label of the first column; single-label data need all columns at once.
        """
        logits_Bn = logits_Bn.float()
        if self.multi_label:
            predicted_Bn = predicted_labels(probabilities(logits_Bn, multi_label=True), thresholds)
            actual_Bn = targets > 0
            right_Bn = predicted_Bn & actual_Bn
            loss_B = torch.nn.functional.binary_cross_entropy_with_logits(logits_Bn, targets, reduction="none").sum(dim=-1)
            last = first + logits_Bn.shape[1]
            by_label = (self.right_N[first:last], self.predicted_N[first:last], self.actual_N[first:last])
            by_sample = (self.right_S, self.predicted_S, self.actual_S)
            for sum_n, sum_S, flag_Bn in zip(by_label, by_sample, (right_Bn, predicted_Bn, actual_Bn), strict=True):
                sum_n += flag_Bn.sum(dim=0)
                sum_S[index_B] += flag_Bn.sum(dim=1)
        else:
            predicted_B = logits_Bn.argmax(dim=-1)
            right_B = predicted_B == targets
            loss_B = torch.nn.functional.cross_entropy(logits_Bn, targets, reduction="none")
            for sum_N, label_B in ((self.right_N, targets[right_B]), (self.predicted_N, predicted_B), (self.actual_N, targets)):
                sum_N += torch.bincount(label_B, minlength=len(sum_N))
            self.right_S[index_B] += right_B.long()
        self.loss_S[index_B] += loss_B.double()

    def sums(self) -> tuple[Tensor, ...]:
        """Tensors to sum, in place, over processes that have counted different samples."""
        by_label = (self.right_N, self.predicted_N, self.actual_N)
        return (*by_label, self.right_S, self.predicted_S, self.actual_S, self.loss_S)

    def metrics(self) -> dict[str, float]:
        """Compute the metrics of the split, each in 0..1, and the mean loss.

        Macro F1 is the mean over labels that occur in the split (`absent_labels` counts the others), 0 if none do. For F1
        over samples, a sample without labels counts 1 if none is predicted, else 0.
        """
        right_N, actual_N = self.right_N.numpy(), self.actual_N.numpy()
        both_N = self.predicted_N.numpy() + actual_N
        present = actual_N > 0
        macro = float(_ratio(2 * right_N, both_N)[present].mean()) if present.any() else 0.0
        absent, loss = int((~present).sum()), float(self.loss_S.mean())
        if not self.multi_label:
            return {"accuracy": float(self.right_S.double().mean()), "f1_macro": macro, "absent_labels": absent, "loss": loss}
        return {
            "f1_micro": float(_ratio(2 * right_N.sum(), both_N.sum())),
            "f1_macro": macro,
            "f1_samples": float(self.by_sample().mean()),
            "absent_labels": absent,
            "loss": loss / len(right_N),
        }

    def by_sample(self) -> Tensor:
        """Score each sample (S,) in 0..1: whether its class is right, or for multi-label data its F1, see `metrics`."""
        if not self.multi_label:
            return self.right_S.double()
        both_S = self.predicted_S + self.actual_S
        return torch.where(both_S > 0, 2 * self.right_S.double() / both_S.clamp(min=1), torch.ones((), dtype=torch.double))

    def per_label(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Compute precision, recall, F1 and support of each label; 0 / 0 counts as 0."""
        right_N, predicted_N, actual_N = (each_N.numpy() for each_N in (self.right_N, self.predicted_N, self.actual_N))
        scores = (_ratio(right_N, predicted_N), _ratio(right_N, actual_N), _ratio(2 * right_N, predicted_N + actual_N))
        rows = zip(labels, *(score_N.tolist() for score_N in scores), actual_N.tolist(), strict=True)
        return [{"label": label, "precision": p, "recall": r, "f1": f, "support": s} for label, p, r, f, s in rows]


def _ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    """Divide `part` by `whole`; 0 / 0 is 0."""
    return np.asarray(part / np.maximum(whole, 1), dtype=np.float64)


def tuned_thresholds(logits_SN: Tensor, targets_SN: Tensor) -> list[float]:
    """Find for each label the threshold with the best F1 on a (validation) split, midway between two samples.

    Labels that do not occur in the split get 0.5.
    """
    found = []
    for p_S, y_S in zip(probabilities(logits_SN, multi_label=True).double().T, targets_SN.T, strict=True):
        p_S, order = p_S.sort(descending=True)
        right_S = y_S[order].double().cumsum(0)
        chosen_S = torch.arange(1, len(p_S) + 1, dtype=torch.double)
        f1_S = 2 * right_S / (chosen_S + right_S[-1])
        next_S = torch.cat([p_S[1:], p_S[-1:] * 0])
        f1_S[p_S == next_S] = -1  # no threshold separates equal probabilities
        best = int(f1_S.argmax())
        found.append(float((p_S[best] + next_S[best]) / 2) if right_S[-1] > 0 else THRESHOLD)
    return found


def predicted_labels(probabilities_SN: Tensor, thresholds: Thresholds) -> Tensor:
    """Labels whose probability reaches the threshold (S, N)."""
    return probabilities_SN.double() >= torch.as_tensor(thresholds, dtype=torch.double)


def probabilities(logits_SN: Tensor, *, multi_label: bool) -> Tensor:
    """Softmax over labels, or a sigmoid for each label of multi-label data."""
    return logits_SN.float().sigmoid() if multi_label else logits_SN.float().softmax(dim=-1)


def tally(logits_SN: Tensor, targets: Tensor, *, multi_label: bool, thresholds: Thresholds = THRESHOLD) -> Tally:
    """Count a whole split at once; see `Tally.add`."""
    found = Tally(*logits_SN.shape, multi_label=multi_label)
    found.add(torch.arange(len(logits_SN)), logits_SN, targets, thresholds)
    return found


def compute(
    logits_SN: Tensor, targets: Tensor, *, multi_label: bool, thresholds: Thresholds = THRESHOLD
) -> dict[str, float]:
    """Compute metrics of a whole split at once; see `Tally.metrics`."""
    return tally(logits_SN, targets, multi_label=multi_label, thresholds=thresholds).metrics()


def per_label(
    logits_SN: Tensor, targets: Tensor, labels: Sequence[str], *, multi_label: bool, thresholds: Thresholds = THRESHOLD
) -> list[dict[str, Any]]:
    """Compute precision, recall, F1 and support of each label of a whole split at once; see `Tally.per_label`."""
    return tally(logits_SN, targets, multi_label=multi_label, thresholds=thresholds).per_label(labels)


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
