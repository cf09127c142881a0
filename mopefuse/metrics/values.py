"""Metrics of predicted numbers.

Shapes: S samples of the split, B of them in a batch, T targets, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from mopefuse.metrics.names import value_metrics
from mopefuse.metrics.tally import Tally
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds

Floats = NDArray[np.float64]
Decode = Callable[[Tensor], Tensor]


class ValueTally(Tally):
    """Predicted and true values of each sample.

    Args:
        targets: T.
        values: maps the outputs of a model (B, N) to the values (B, T) that they predict.
        in_units: maps targets (B, T), as a model is trained on them, to true values.
        loss: maps outputs (B, N) and targets (B, T) to the loss of each sample (B,).
        deviation_T: standard deviation of each target in training, a unit for errors of several targets.
        interval: maps outputs (B, N) to the lower and the upper bound (B, T) of an interval, of a model that predicts one.
    """

    def __init__(
        self,
        samples: int,
        targets: int,
        values: Decode,
        in_units: Decode,
        loss: Callable[[Tensor, Tensor], Tensor],
        deviation_T: Tensor,
        interval: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.predicted_ST, self.actual_ST = (torch.zeros(samples, targets, dtype=torch.double) for _ in range(2))
        self.loss_S, self.inside_S = (torch.zeros(samples, dtype=torch.double) for _ in range(2))
        self._interval = interval
        self._values, self._in_units, self._loss, self._deviation_T = values, in_units, loss, deviation_T

    def add(
        self, index_B: Tensor, outputs_Bn: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD, *, first: int = 0
    ) -> None:
        """See `Tally.add`; `targets` are (B, T)."""
        self.predicted_ST[index_B] = self._values(outputs_Bn)
        self.actual_ST[index_B] = self._in_units(targets)
        self.loss_S[index_B] = self._loss(outputs_Bn, targets).double()
        if self._interval is not None:
            low_BT, high_BT = self._interval(outputs_Bn)
            actual_BT = self.actual_ST[index_B]
            self.inside_S[index_B] = ((low_BT <= actual_BT) & (actual_BT <= high_BT)).double().mean(dim=1)

    def sums(self) -> tuple[Tensor, ...]:
        """See `Tally.sums`."""
        return self.predicted_ST, self.actual_ST, self.loss_S, self.inside_S

    def metrics(self, *, ranking: bool = True) -> dict[str, float]:
        """Compute R², mean absolute and root mean squared error, and Spearman's rank correlation, averaged over targets.

        The errors of several targets are in standard deviations. Also the share of true values within the interval, of a
        model that predicts one.
        """
        outcome = ValueOutcome(self.predicted_ST.numpy(), self.actual_ST.numpy(), self._deviation_T.numpy())
        samples, targets = outcome.shape
        found = {name: float(outcome.measure(name, np.ones((1, samples)))[0]) for name in value_metrics(targets)}
        if self._interval is not None:
            found["interval_coverage"] = float(self.inside_S.mean())
        return found | {"loss": float(self.loss_S.mean())}

    def by_sample(self) -> Tensor:
        """The negative squared error of each sample (S,), in standard deviations of the training targets."""
        return -((self.predicted_ST - self.actual_ST) / self._deviation_T).square().mean(dim=1)

    def per_label(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Compute the metrics of each target in its own units, and the range of its true values."""
        pairs = zip(labels, self.predicted_ST.T.numpy(), self.actual_ST.T.numpy(), strict=True)
        once = np.ones((1, len(self.loss_S)))
        return [
            {"label": label, **{name: float(measure(predicted_S, actual_S, once)[0]) for name, measure in _MEASURES.items()}}
            | {"lowest": float(actual_S.min()), "highest": float(actual_S.max()), "support": len(actual_S)}
            for label, predicted_S, actual_S in pairs
        ]


@dataclass(frozen=True)
class ValueOutcome:
    """Predicted and true values of the test samples in one run; see `mopefuse.metrics.bootstrap.Outcome`.

    Args:
        deviation_T: standard deviation of each target in training, the unit of the metrics that end in ``_sd``.
    """

    predicted_ST: Floats
    actual_ST: Floats
    deviation_T: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """(S, T)."""
        samples, targets = self.actual_ST.shape
        return samples, targets

    def measure(self, metric: str, weights_RS: Floats) -> Floats:
        """The metric (R,) of resamples, averaged over targets."""
        measure, unit_T = _MEASURES[metric.removesuffix("_sd")], self.deviation_T if metric.endswith("_sd") else 1.0
        pairs = zip((self.predicted_ST / unit_T).T, (self.actual_ST / unit_T).T, strict=True)
        return np.asarray(np.mean([measure(*pair, weights_RS) for pair in pairs], axis=0), np.float64)


def _r2(predicted_S: Floats, actual_S: Floats, weights_RS: Floats) -> Floats:
    """Coefficient of determination, the share of the variance that is explained; for equal true values 1 if all are right.

    The same as scikit-learn's `r2_score`.
    """
    count_R = weights_RS.sum(axis=1)
    centred_S = actual_S - actual_S.mean()  # large values with a small variance lose no digits
    total_R = weights_RS @ np.square(centred_S) - np.square(weights_RS @ centred_S) / count_R
    left_R = weights_RS @ np.square(actual_S - predicted_S)
    varies_R = total_R > 1e-12 * count_R * np.square(centred_S).max(initial=0.0)
    return np.asarray(np.where(varies_R, 1 - left_R / np.where(varies_R, total_R, 1), np.where(left_R > 0, 0.0, 1.0)))


def _mae(predicted_S: Floats, actual_S: Floats, weights_RS: Floats) -> Floats:
    return np.asarray(weights_RS @ np.abs(actual_S - predicted_S) / weights_RS.sum(axis=1))


def _rmse(predicted_S: Floats, actual_S: Floats, weights_RS: Floats) -> Floats:
    return np.asarray(np.sqrt(weights_RS @ np.square(actual_S - predicted_S) / weights_RS.sum(axis=1)))


def _spearman(predicted_S: Floats, actual_S: Floats, weights_RS: Floats) -> Floats:
    """Spearman's rank correlation, with mean ranks for ties; 0 if all predictions, or all true values, are equal."""
    return np.array([_rank_correlation(predicted_S, actual_S, weights_S) for weights_S in weights_RS])


def _rank_correlation(predicted_S: Floats, actual_S: Floats, weights_S: Floats) -> float:
    repeats_S = weights_S.astype(np.int64)
    both = np.stack([rankdata(np.repeat(values_S, repeats_S)) for values_S in (predicted_S, actual_S)])
    both -= both.mean(axis=1, keepdims=True)
    norm = np.sqrt((both[0] @ both[0]) * (both[1] @ both[1]))
    return float(both[0] @ both[1] / norm) if norm > 0 else 0.0


_MEASURES: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "r2": _r2,
    "mae": _mae,
    "rmse": _rmse,
    "spearman": _spearman,
}
