"""Single-label classification: each sample has exactly one of N classes.

Shapes: B samples of a batch, S of a split, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mopefuse.core.error_codes import DataCode
from mopefuse.errors import DataError
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds
from mopefuse.tasks.base import Array
from mopefuse.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import Tensor

    from mopefuse.metrics.tally import SingleLabelTally


class SingleLabel(Classification):
    """One of several classes: softmax and cross-entropy; targets are class indices (B,)."""

    name, metric, metric_title = "single-label", "accuracy", "accuracy"
    metrics = ("accuracy", "f1_macro")
    more_metrics = ("auroc", "average_precision", "top5_accuracy", "calibration_error")
    key = "label"

    def describe(self, labels: Sequence[str]) -> str:
        """See `Task.describe`."""
        return f"one of {len(labels):,} labels"

    def targets(self, start_B1: Array, number_Z: Array, count: int) -> Tensor:
        """Class indices (B,) int64."""
        import torch

        return torch.from_numpy(number_Z)

    def check_label(self, label: Any, count: int, where: str) -> None:
        """See `Task.check_label`."""
        check_indices([label], label, "one index from 0", count, where)

    def stack_labels(self, labels: Sequence[Any], count: int) -> Tensor:
        """Class indices (B,) int64."""
        import torch

        return torch.tensor(labels, dtype=torch.int64)

    def loss(self, outputs_BN: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy of each sample (B,), in float32."""
        from torch.nn import functional as F

        return F.cross_entropy(outputs_BN.float(), targets, weight=weights, reduction="none")

    def class_weights(self, counts_N: Tensor, samples: int) -> Tensor:
        """S / (number of classes * samples of the class), (N,); 1 for a class without samples."""
        import torch

        counts_N = counts_N.float()
        present = int((counts_N > 0).sum())
        return torch.where(counts_N > 0, samples / (present * counts_N.clamp(min=1)), 1.0)

    def average(self, each: Sequence[Tensor]) -> Tensor:
        """Logits whose softmax is the mean of the softmaxes of `each`."""
        import torch

        return torch.stack([one_BN.log_softmax(dim=-1) for one_BN in each]).logsumexp(dim=0)

    def tally(self, samples: int, outputs: int) -> SingleLabelTally:
        """See `Task.tally`."""
        from mopefuse.metrics.tally import SingleLabelTally

        return SingleLabelTally(samples, outputs)

    def probabilities(self, logits_SN: Tensor) -> Tensor:
        """Softmax over the labels (S, N)."""
        return logits_SN.float().softmax(dim=-1)

    def chosen(self, logits_SN: Tensor, thresholds: Thresholds = THRESHOLD) -> Tensor:
        """Whether a label is the most probable (S, N)."""
        return self.actual(logits_SN.argmax(dim=-1), logits_SN.shape[-1])

    def actual(self, targets: Tensor, labels: int) -> Tensor:
        """Whether a label is that of the sample (S, N)."""
        import torch

        return torch.zeros(len(targets), labels, dtype=torch.bool).scatter_(1, targets.unsqueeze(1), True)

    def decode(self, outputs_BN: Array) -> Array:
        """Softmax over the labels, in float64."""
        logits_BN = outputs_BN.astype(np.float64)
        odds_BN = np.exp(logits_BN - logits_BN.max(axis=-1, keepdims=True))
        return np.asarray(odds_BN / odds_BN.sum(axis=-1, keepdims=True))

    def as_written(self, labels: Sequence[Any]) -> Any:
        """The only label."""
        return labels[0]

    def _predicted(self, p_N: Sequence[float], likeliest: Sequence[int], thresholds: Sequence[float]) -> list[int]:
        return [likeliest[0]]


def check_indices(indices: Sequence[Any], label: Any, wanted: str, count: int, where: str) -> None:
    """Refuse a label whose parts are not indices from 0 to N - 1.

    Args:
        label, wanted: the label as it was given, and what was expected, for the message. count: N, or 0 if it is not known.

    Raises:
        DataError: a part is not such an index.
    """
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
        what, fix = f"the label is {label!r:.60}, expected {wanted}", f"pass {wanted}; mopefuse.PairDataset does this"
        raise DataError(DataCode.INVALID_LABEL_VALUE, what, where=where, fix=fix)
    wrong = [i for i in indices if not 0 <= i < (count or i + 1)]
    if wrong:
        what, fix = f"the label is {wrong[0]}, and the model has {count} labels", f"use indices from 0 to {count - 1}"
        raise DataError(DataCode.LABEL_INDEX_OUT_OF_RANGE, what, where=where, fix=fix)
