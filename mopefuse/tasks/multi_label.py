"""Multi-label classification: each sample has any number of N labels.

Shapes: B samples of a batch, S of a split, N labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mopefuse.metrics.thresholds import THRESHOLD, Thresholds, predicted_labels
from mopefuse.tasks.base import Array
from mopefuse.tasks.classification import Classification
from mopefuse.tasks.single_label import check_indices

if TYPE_CHECKING:
    from torch import Tensor

    from mopefuse.metrics.tally import MultiLabelTally


class MultiLabel(Classification):
    """Any number of labels: a sigmoid and binary cross-entropy for each; targets are zeros and ones (B, N)."""

    name, metric, metric_title = "multi-label", "f1_macro", "macro-F1"
    metrics = ("f1_macro", "f1_micro", "f1_samples")
    more_metrics = ("auroc", "average_precision", "calibration_error")
    uses_thresholds = True
    key = "labels"

    def describe(self, labels: Sequence[str]) -> str:
        """See `Task.describe`."""
        return f"any number of {len(labels):,} labels"

    def targets(self, start_B1: Array, number_Z: Array, count: int) -> Tensor:
        """Zeros and ones (B, N) float32."""
        import torch

        targets_BN = torch.zeros(len(start_B1) - 1, count)
        rows = np.repeat(np.arange(len(start_B1) - 1), np.diff(start_B1))
        targets_BN[torch.from_numpy(rows), torch.from_numpy(number_Z)] = 1.0
        return targets_BN

    def check_label(self, label: Any, count: int, where: str) -> None:
        """See `Task.check_label`."""
        is_list = isinstance(label, Sequence) and not isinstance(label, str)
        wanted = "a list of indices, because the model is multi-label"
        check_indices(label if is_list else [None], label, wanted, count, where)

    def stack_labels(self, labels: Sequence[Any], count: int) -> Tensor:
        """Zeros and ones (B, N) float32."""
        import torch

        targets_BN = torch.zeros(len(labels), count)
        for number, indices in enumerate(labels):
            targets_BN[number, list(indices)] = 1.0
        return targets_BN

    def loss(self, outputs_BN: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Binary cross-entropy averaged over labels, of each sample (B,), in float32."""
        import torch
        from torch.nn import functional as F

        loss_BN = F.binary_cross_entropy_with_logits(outputs_BN.float(), targets, reduction="none")
        if weights is not None:
            loss_BN = loss_BN * torch.where(targets > 0, weights[0], weights[1])
        return loss_BN.mean(dim=-1)

    def class_weights(self, counts_N: Tensor, samples: int) -> Tensor:
        """S / (2 * their number) for the positives and the negatives of each label, (2, N); 1 if there are none."""
        import torch

        counts_2N = torch.stack([counts_N.float(), samples - counts_N.float()])
        return torch.where(counts_2N > 0, samples / (2 * counts_2N.clamp(min=1)), 1.0)

    def average(self, each: Sequence[Tensor]) -> Tensor:
        """Logits whose sigmoid is the mean of the sigmoids of `each`."""
        import torch
        from torch.nn import functional as F

        yes_BN = torch.stack([F.logsigmoid(one_BN) for one_BN in each]).logsumexp(dim=0)
        return yes_BN - torch.stack([F.logsigmoid(-one_BN) for one_BN in each]).logsumexp(dim=0)

    def tally(self, samples: int, outputs: int) -> MultiLabelTally:
        """See `Task.tally`."""
        from mopefuse.metrics.tally import MultiLabelTally

        return MultiLabelTally(samples, outputs)

    def probabilities(self, logits_SN: Tensor) -> Tensor:
        """A sigmoid for each label (S, N)."""
        return logits_SN.float().sigmoid()

    def chosen(self, logits_SN: Tensor, thresholds: Thresholds = THRESHOLD) -> Tensor:
        """Whether the probability of a label reaches its threshold (S, N)."""
        return predicted_labels(self.probabilities(logits_SN), thresholds)

    def actual(self, targets: Tensor, labels: int) -> Tensor:
        """Whether a sample has a label (S, N)."""
        return targets > 0

    def decode(self, outputs_BN: Array) -> Array:
        """A sigmoid for each label, in float64."""
        logits_BN = outputs_BN.astype(np.float64)
        small_BN = np.exp(-np.abs(logits_BN))
        return np.asarray(np.where(logits_BN >= 0, 1, small_BN) / (1 + small_BN))

    def _predicted(self, p_N: Sequence[float], likeliest: Sequence[int], thresholds: Sequence[float]) -> list[int]:
        return [i for i, (p, least) in enumerate(zip(p_N, thresholds, strict=True)) if p >= least]
