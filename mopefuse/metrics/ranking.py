"""Metrics of probabilities rather than of predicted labels; those that compare samples are macro averages over labels.

Shapes: S samples of a split, N labels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mopefuse.metrics.classification import calibration

MOST = 1_000_000
"""The largest S times N for which logits are kept; beyond it, such metrics are not computed."""
TOP = 5


class KeptLogits:
    """The logits of every sample, if they are few enough to keep.

    Probabilities are computed from all of them at once, as the last digit of a vectorised function depends on the batch.

    Attributes:
        logits_SN: float32; None if they are too many.
    """

    def __init__(self, samples: int, labels: int) -> None:
        self.logits_SN = torch.zeros(samples, labels) if samples * labels <= MOST else None

    def add(self, index_B: Tensor, logits_Bn: Tensor, first: int = 0) -> None:
        """Keep the logits of a batch, of the labels from `first` on."""
        if self.logits_SN is not None:
            self.logits_SN[index_B, first : first + logits_Bn.shape[1]] += logits_Bn

    def sums(self) -> tuple[Tensor, ...]:
        """See `mopefuse.metrics.tally.Tally.sums`."""
        return () if self.logits_SN is None else (self.logits_SN,)

    def metrics(self, activation: Callable[[Tensor], Tensor], actual_SN: Tensor, targets: Tensor) -> dict[str, float]:
        """Compute area under the ROC curve, average precision and calibration error; empty without logits.

        The first two are scikit-learn's, averaged over labels that some samples have and others lack; NaN without such labels.

        Args:
            activation: maps logits (S, N) to probabilities. actual_SN: whether a sample has a label.
            targets: as `mopefuse.metrics.classification.calibration` takes them.
        """
        if self.logits_SN is None:
            return {}
        p_SN = activation(self.logits_SN)
        from sklearn.metrics import average_precision_score, roc_auc_score  # slow to import

        varies_N = (actual_SN.any(dim=0) & ~actual_SN.all(dim=0)).numpy()
        actual, p = actual_SN.numpy()[:, varies_N], p_SN.double().numpy()[:, varies_N]
        pairs = list(zip(actual.T, p.T, strict=True))
        found = {
            "auroc": [float(roc_auc_score(*pair)) for pair in pairs],
            "average_precision": [float(average_precision_score(*pair)) for pair in pairs],
        }
        means = {name: float(np.mean(each)) if each else float("nan") for name, each in found.items()}
        return {**means, "calibration_error": calibration(p_SN, targets).error}


def in_top(logits_BN: Tensor, targets_B: Tensor, count: int = TOP) -> Tensor:
    """Whether (B,) fewer than `count` labels are more probable than the true one; of equal ones, the first counts as such."""
    true_B1 = logits_BN.gather(1, targets_B.unsqueeze(1))
    earlier_BN = torch.arange(logits_BN.shape[1]) < targets_B.unsqueeze(1)
    above_BN = (logits_BN > true_B1) | ((logits_BN == true_B1) & earlier_BN)
    return above_BN.sum(dim=1) < count
