"""Metrics of predicted masks: intersection over union of predicted and true pixels (Jaccard, 1912).

If masks have class ids, mean IoU is the mean over the classes that occur in the true masks of the split, each from the pixels
of all samples (as in PASCAL VOC, Everingham et al., IJCV 111, 2015). If masks mark an object, it is the mean over samples of
the object's IoU, as is usual for referring segmentation (Yu et al., https://arxiv.org/abs/1608.00272); `overall_iou` is that of
the pixels of all samples.

Shapes: S samples of the split, B of them in a batch, N classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mopefuse.metrics.names import IGNORED
from mopefuse.metrics.tally import Tally
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds

Floats = NDArray[np.float64]


def count_pixels(predicted: Tensor, true: Tensor, classes: int) -> Tensor:
    """Count the correctly predicted, predicted and true pixels of each class (B, 3, N), of pixels that count.

    Args:
        predicted, true: class of each pixel (B, H, W); 255 in `true` for pixels that do not count.
    """
    valid = (true != IGNORED).flatten(1)
    predicted, true = predicted.flatten(1).long(), true.flatten(1).long()
    kinds = (valid & (predicted == true), valid, valid)
    found = []
    for values, counted in zip((predicted, predicted, true), kinds, strict=True):
        sums = torch.zeros(len(values), classes + 1, dtype=torch.long)
        sums.scatter_add_(1, torch.where(counted, values, classes), torch.ones_like(values))
        found.append(sums[:, :classes])
    return torch.stack(found, dim=1)


class MaskTally(Tally):
    """Numbers of pixels of each sample and class.

    Args:
        classes: N. decode: maps outputs and targets to the predicted class of each pixel.
        loss: maps outputs and targets to the loss of each sample (B,).
        marks_object: whether masks mark an object, class 1, instead of having class ids.
    """

    def __init__(
        self,
        samples: int,
        classes: int,
        decode: Callable[[Tensor, Tensor], Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        marks_object: bool,
    ) -> None:
        self.counts_S3N = torch.zeros(samples, 3, classes, dtype=torch.long)
        self.loss_S = torch.zeros(samples, dtype=torch.double)
        self._decode, self._loss, self._marks_object = decode, loss, marks_object

    def add(
        self, index_B: Tensor, outputs_Bn: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD, *, first: int = 0
    ) -> None:
        """See `Tally.add`; outputs are maps (B, N, h, w), `targets` are masks (B, H, W)."""
        if len(index_B):
            self.counts_S3N[index_B] = count_pixels(self._decode(outputs_Bn, targets), targets, self.counts_S3N.shape[2])
            self.loss_S[index_B] = self._loss(outputs_Bn, targets).double()

    def sums(self) -> tuple[Tensor, ...]:
        """See `Tally.sums`."""
        return self.counts_S3N, self.loss_S

    def outcome(self) -> MaskOutcome:
        """What a bootstrap needs."""
        return MaskOutcome(self.counts_S3N.numpy().astype(np.float64), marks_object=self._marks_object)

    def metrics(self, *, ranking: bool = True) -> dict[str, float]:
        """Compute mean IoU and pixel accuracy, the overall IoU of objects, and the mean loss.

        `absent_labels` counts the classes that do not occur in the true masks, which mean IoU leaves out.
        """
        outcome, once = self.outcome(), np.ones((1, len(self.loss_S)))
        names = ("miou", "overall_iou", "pixel_accuracy") if self._marks_object else ("miou", "pixel_accuracy")
        found = {name: float(outcome.measure(name, once)[0]) for name in names}
        absent = 0 if self._marks_object else int((self.counts_S3N[:, 2].sum(dim=0) == 0).sum())
        return {**found, "absent_labels": absent, "loss": float(self.loss_S.mean())}

    def by_sample(self) -> Tensor:
        """The IoU of each sample (S,): that of the object, or the mean over the classes of its mask."""
        return torch.from_numpy(self.outcome().iou_S)

    def per_label(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Compute IoU, precision and recall of the pixels of each class, and the number of true ones; 0 / 0 counts as 0."""
        right_N, predicted_N, true_N = self.counts_S3N.sum(dim=0).numpy().astype(np.float64)
        iou_N = right_N / np.maximum(predicted_N + true_N - right_N, 1)
        scores = (iou_N, right_N / np.maximum(predicted_N, 1), right_N / np.maximum(true_N, 1))
        rows = zip(labels, *(score_N.tolist() for score_N in scores), true_N.astype(int).tolist(), strict=True)
        return [{"label": label, "iou": i, "precision": p, "recall": r, "support": s} for label, i, p, r, s in rows]


@dataclass(frozen=True)
class MaskOutcome:
    """Numbers of correctly predicted, predicted and true pixels of each sample and class (S, 3, N)."""

    counts_S3N: Floats
    marks_object: bool

    @property
    def shape(self) -> tuple[int, int]:
        """See `mopefuse.metrics.bootstrap.Outcome.shape`."""
        return self.counts_S3N.shape[0], self.counts_S3N.shape[2]

    @property
    def iou_S(self) -> Floats:
        """See `MaskTally.by_sample`; a mask without an object has 1 if none is predicted."""
        right_SN, predicted_SN, true_SN = self.counts_S3N.transpose(1, 0, 2)
        union_SN = predicted_SN + true_SN - right_SN
        iou_SN = np.where(union_SN > 0, right_SN / np.maximum(union_SN, 1), 1.0)
        if self.marks_object:
            return np.asarray(iou_SN[:, 1])
        present_SN = true_SN > 0
        return np.asarray((iou_SN * present_SN).sum(axis=1) / np.maximum(present_SN.sum(axis=1), 1))

    def measure(self, metric: str, weights_RS: Floats) -> Floats:
        """See `mopefuse.metrics.bootstrap.Outcome.measure`."""
        if metric == "miou" and self.marks_object:
            return np.asarray(weights_RS @ self.iou_S / weights_RS.sum(axis=1))
        right_RN, predicted_RN, true_RN = (weights_RS @ each_SN for each_SN in self.counts_S3N.transpose(1, 0, 2))
        if metric == "pixel_accuracy":
            return np.asarray(right_RN.sum(axis=1) / np.maximum(true_RN.sum(axis=1), 1))
        iou_RN = right_RN / np.maximum(predicted_RN + true_RN - right_RN, 1)
        if metric == "overall_iou":
            return np.asarray(iou_RN[:, 1])
        present_RN = true_RN > 0
        return np.asarray((iou_RN * present_RN).sum(axis=1) / np.maximum(present_RN.sum(axis=1), 1))
