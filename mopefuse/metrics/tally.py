"""Metrics of a split, accumulated batch by batch in memory proportional to samples plus labels.

Shapes: S samples of the split, B of them in a batch, N labels, n some of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mopefuse.metrics.ranking import TOP, KeptLogits, in_top
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds, predicted_labels


class Tally(ABC):
    """Numbers from which metrics are computed, accumulated over batches of a split in any order.

    Counts are integers, and everything else is stored per sample, so that metrics do not depend on how samples are divided
    into batches or among processes.
    """

    @abstractmethod
    def add(
        self, index_B: Tensor, outputs_Bn: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD, *, first: int = 0
    ) -> None:
        """Count a batch; every sample, and for multi-label data every label of it, must be added exactly once.

        Args:
            index_B: indices of the samples in the split.
            targets: of these samples.
            thresholds: one for all labels, or one for each of the n labels; without meaning for other tasks.
            first: label of the first column; all tasks but multi-label need all columns at once.
        """

    @abstractmethod
    def sums(self) -> tuple[Tensor, ...]:
        """Tensors to sum, in place, over processes that have counted different samples."""

    @abstractmethod
    def metrics(self, *, ranking: bool = True) -> dict[str, float]:
        """Compute the metrics of the split, and the mean loss.

        Args:
            ranking: also those of `mopefuse.metrics.ranking`, which take longer.
        """

    @abstractmethod
    def by_sample(self) -> Tensor:
        """Score each sample (S,), larger for a better prediction."""

    def per_label(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Compute metrics of each label, or of each target."""
        return []


class _LabelTally(Tally):
    """Counts of correctly predicted, predicted and true labels."""

    def __init__(self, samples: int, labels: int) -> None:
        self.right_N, self.predicted_N, self.actual_N = (torch.zeros(labels, dtype=torch.long) for _ in range(3))
        self.right_S = torch.zeros(samples, dtype=torch.long)
        self.loss_S = torch.zeros(samples, dtype=torch.double)

    def _macro(self) -> tuple[float, int]:
        """Macro F1, the mean over labels that occur in the split (0 if none do), and the number of the others."""
        right_N, actual_N = self.right_N.numpy(), self.actual_N.numpy()
        present = actual_N > 0
        f1_N = _ratio(2 * right_N, self.predicted_N.numpy() + actual_N)
        return float(f1_N[present].mean()) if present.any() else 0.0, int((~present).sum())

    def per_label(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Compute precision, recall, F1 and support of each label; 0 / 0 counts as 0."""
        right_N, predicted_N, actual_N = (each_N.numpy() for each_N in (self.right_N, self.predicted_N, self.actual_N))
        scores = (_ratio(right_N, predicted_N), _ratio(right_N, actual_N), _ratio(2 * right_N, predicted_N + actual_N))
        rows = zip(labels, *(score_N.tolist() for score_N in scores), actual_N.tolist(), strict=True)
        return [{"label": label, "precision": p, "recall": r, "f1": f, "support": s} for label, p, r, f, s in rows]


class SingleLabelTally(_LabelTally):
    """The tally of data in which every sample has one label."""

    def __init__(self, samples: int, labels: int) -> None:
        super().__init__(samples, labels)
        self.target_S, self.in_top_S = (torch.zeros(samples, dtype=torch.long) for _ in range(2))
        self.kept = KeptLogits(samples, labels)

    def add(
        self, index_B: Tensor, outputs_Bn: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD, *, first: int = 0
    ) -> None:
        """See `Tally.add`; `targets` are class indices (B,)."""
        logits_BN = outputs_Bn.float()
        predicted_B = logits_BN.argmax(dim=-1)
        right_B = predicted_B == targets
        for sum_N, label_B in ((self.right_N, targets[right_B]), (self.predicted_N, predicted_B), (self.actual_N, targets)):
            sum_N += torch.bincount(label_B, minlength=len(sum_N))
        self.right_S[index_B] += right_B.long()
        self.target_S[index_B] += targets
        self.in_top_S[index_B] += in_top(logits_BN, targets).long()
        self.kept.add(index_B, logits_BN)
        self.loss_S[index_B] += F.cross_entropy(logits_BN, targets, reduction="none").double()

    def sums(self) -> tuple[Tensor, ...]:
        """See `Tally.sums`."""
        by_sample = (self.right_S, self.target_S, self.in_top_S, self.loss_S)
        return (self.right_N, self.predicted_N, self.actual_N, *by_sample, *self.kept.sums())

    def metrics(self, *, ranking: bool = True) -> dict[str, float]:
        """Compute accuracy and macro F1 (over labels that occur; `absent_labels` counts the others), and the mean loss.

        Also top-5 accuracy, if there are more than five labels, and the metrics of `KeptLogits`.
        """
        macro, absent = self._macro()
        accuracy, loss = float(self.right_S.double().mean()), float(self.loss_S.mean())
        found = {"accuracy": accuracy, "f1_macro": macro, "absent_labels": absent, "loss": loss}
        if len(self.right_N) > TOP:
            found["top5_accuracy"] = float(self.in_top_S.double().mean())
        if not ranking or self.kept.logits_SN is None:
            return found
        actual_SN = F.one_hot(self.target_S, len(self.right_N)).bool()
        return found | self.kept.metrics(lambda logits_SN: logits_SN.softmax(dim=-1), actual_SN, self.target_S)

    def by_sample(self) -> Tensor:
        """Return 1 for each sample (S,) whose class is right, and 0 for the others."""
        return self.right_S.double()


class MultiLabelTally(_LabelTally):
    """The tally of data in which a sample may have several labels."""

    def __init__(self, samples: int, labels: int) -> None:
        super().__init__(samples, labels)
        self.predicted_S, self.actual_S = (torch.zeros(samples, dtype=torch.long) for _ in range(2))
        self.kept = KeptLogits(samples, labels)
        self.actual_SN = torch.zeros(samples, labels if self.kept.sums() else 0, dtype=torch.uint8)

    def add(
        self, index_B: Tensor, outputs_Bn: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD, *, first: int = 0
    ) -> None:
        """See `Tally.add`; `targets` are zeros and ones (B, n)."""
        logits_Bn = outputs_Bn.float()
        predicted_Bn, actual_Bn = predicted_labels(logits_Bn.sigmoid(), thresholds), targets > 0
        last = first + logits_Bn.shape[1]
        by_label = (self.right_N[first:last], self.predicted_N[first:last], self.actual_N[first:last])
        by_sample = (self.right_S, self.predicted_S, self.actual_S)
        flags = (predicted_Bn & actual_Bn, predicted_Bn, actual_Bn)
        for sum_n, sum_S, flag_Bn in zip(by_label, by_sample, flags, strict=True):
            sum_n += flag_Bn.sum(dim=0)
            sum_S[index_B] += flag_Bn.sum(dim=1)
        self.kept.add(index_B, logits_Bn, first)
        if self.kept.sums():
            self.actual_SN[index_B, first:last] += actual_Bn.byte()
        loss_B = F.binary_cross_entropy_with_logits(logits_Bn, targets, reduction="none").sum(dim=-1)
        self.loss_S[index_B] += loss_B.double()

    def sums(self) -> tuple[Tensor, ...]:
        """See `Tally.sums`."""
        by_label = (self.right_N, self.predicted_N, self.actual_N)
        by_sample = (self.right_S, self.predicted_S, self.actual_S, self.actual_SN, self.loss_S)
        return (*by_label, *by_sample, *self.kept.sums())

    def metrics(self, *, ranking: bool = True) -> dict[str, float]:
        """Compute micro, macro and per-sample F1, the mean loss, and the metrics of `KeptLogits`.

        Macro F1 is over labels that occur in the split (`absent_labels` counts the others). For F1 over samples, a sample
        without labels counts 1 if none is predicted, else 0.
        """
        macro, absent = self._macro()
        both = self.predicted_N.sum() + self.actual_N.sum()
        return {
            "f1_micro": float(_ratio(2 * self.right_N.sum().numpy(), both.numpy())),
            "f1_macro": macro,
            "f1_samples": float(self.by_sample().mean()),
            "absent_labels": absent,
            "loss": float(self.loss_S.mean()) / len(self.right_N),
            **(self.kept.metrics(torch.sigmoid, self.actual_SN.bool(), self.actual_SN) if ranking else {}),
        }

    def by_sample(self) -> Tensor:
        """Compute the F1 of each sample (S,), see `metrics`."""
        both_S = self.predicted_S + self.actual_S
        return torch.where(both_S > 0, 2 * self.right_S.double() / both_S.clamp(min=1), torch.ones((), dtype=torch.double))


def _ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    """Divide `part` by `whole`; 0 / 0 is 0."""
    return np.asarray(part / np.maximum(whole, 1), dtype=np.float64)
