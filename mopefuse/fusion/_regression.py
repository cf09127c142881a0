"""Logistic regression on standardised features: the rival that is hard to beat on small data, and a place to start from.

Shapes: S samples, C width of one side's feature, F of all features side by side, N labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mopefuse import metrics
from mopefuse.config import Linear
from mopefuse.gates import selected_metric
from mopefuse.precision import exact

_NEVER = 30.0  # logit of what training has never, or always: a probability of 1e-13


class Fold(NamedTuple):
    """Pooled features (S, C) of a split by side, its targets: (S,) class indices, or (S, N) zeros and ones; and by side which
    samples (S,) lack it."""

    features: Mapping[str, Tensor]
    targets: Tensor
    missing: Mapping[str, Tensor] = {}

    def there(self, side: str) -> Tensor:
        """Features (S, C) of the samples that have them."""
        return self.features[side][~self.missing[side]] if side in self.missing else self.features[side]

    def standardised(self, side: str, known: Mapping[str, Tensor]) -> Tensor:
        """Features (S, C) less their mean by their deviation; 0 of samples that lack them."""
        ready_SC = (self.features[side] - known["mean_C"]) / known["deviation_C"]
        return ready_SC.masked_fill(self.missing[side][:, None], 0.0) if side in self.missing else ready_SC


class How(NamedTuple):
    """What a regression is fitted for.

    threshold: of multi-label predictions, a probability, or "tuned" for each label on validation. balanced: every class
    counts the same, however rare.
    """

    labels: int
    multi_label: bool
    threshold: float | str
    balanced: bool
    settings: Linear


class Regression(NamedTuple):
    """A linear head on standardised features; `strength` is its C, `score` the selected metric on validation."""

    weight_NF: Tensor
    bias_N: Tensor
    strength: float
    score: float


class Standard(nn.Module):
    """Features less their mean over the training split, by their deviation. Constants: saved, but they do not learn."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_C", torch.zeros(width))
        self.register_buffer("deviation_C", torch.ones(width))
        self.mean_C: Tensor
        self.deviation_C: Tensor

    def forward(self, feature_BC: Tensor) -> Tensor:
        """(B, C), in float32."""
        return (exact(feature_BC) - self.mean_C) / self.deviation_C


def statistics(feature_SC: Tensor) -> dict[str, Tensor]:
    """The buffers of `Standard` for a training split; what never changes, or is not there, keeps a deviation of 1."""
    if not len(feature_SC):
        return {"mean_C": torch.zeros(feature_SC.shape[1]), "deviation_C": torch.ones(feature_SC.shape[1])}
    wide_SC = feature_SC.double()
    deviation_C = wide_SC.std(dim=0, correction=0)
    constant_C = deviation_C <= 1e-6 * wide_SC.abs().mean(dim=0).clamp(min=1e-6)
    return {"mean_C": wide_SC.mean(dim=0).float(), "deviation_C": deviation_C.masked_fill(constant_C, 1.0).float()}


def fit_heads(
    heads: Mapping[str, Sequence[str]], train: Fold, val: Fold, how: How
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A regression for each head on the sides that it takes, their features standardised and side by side.

    Returns:
        ``standard.<side>.*``, ``<head>.weight`` and ``<head>.bias``, and the C of each, by the names of its sides.
    """
    state: dict[str, Tensor] = {}
    chosen: dict[str, float] = {}
    sides = dict.fromkeys(side for group in heads.values() for side in group)
    known = {side: statistics(train.there(side)) for side in sides}
    for side, found in known.items():
        state |= {f"standard.{side}.{name}": tensor for name, tensor in found.items()}

    def ready(fold: Fold, group: Sequence[str]) -> Tensor:
        return torch.cat([fold.standardised(side, known[side]) for side in group], dim=1)

    for name, group in heads.items():
        regression = fit_regression(ready(train, group), train.targets, ready(val, group), val.targets, how)
        state |= {f"{name}.weight": regression.weight_NF, f"{name}.bias": regression.bias_N}
        chosen[" and ".join(group)] = regression.strength
    return state, chosen


def fit_regression(train_SF: Tensor, train: Tensor, val_SF: Tensor, val: Tensor, how: How) -> Regression:
    """The regression whose C does best on validation; the smallest such C.

    Args:
        train_SF, val_SF: standardised features. train, val: targets.
    """
    best: Regression | None = None
    for strength in sorted(how.settings.strengths):
        weight_NF, bias_N = _fit(train_SF, train, strength, how)
        logits_SN = val_SF @ weight_NF.T + bias_N
        thresholds = _thresholds(logits_SN, val, how)
        found = metrics.compute(logits_SN, val, multi_label=how.multi_label, thresholds=thresholds)
        score = found[selected_metric(multi_label=how.multi_label)]
        if best is None or score > best.score:
            best = Regression(weight_NF, bias_N, strength, score)
    assert best is not None
    return best


def _thresholds(logits_SN: Tensor, val: Tensor, how: How) -> metrics.Thresholds:
    if how.multi_label and how.threshold == "tuned":
        return metrics.tuned_thresholds(logits_SN, val)
    return metrics.THRESHOLD if isinstance(how.threshold, str) else how.threshold


def _fit(train_SF: Tensor, targets: Tensor, strength: float, how: How) -> tuple[Tensor, Tensor]:
    """Weight (N, F) and bias (N,): multinomial, or one regression for each label of multi-label data."""
    x_SF = train_SF.double().numpy()
    weight_NF, bias_N = np.zeros((how.labels, x_SF.shape[1])), np.full(how.labels, -_NEVER)
    if how.multi_label:
        for label, y_S in enumerate(targets.int().T.numpy()):
            if y_S.min() == y_S.max():
                bias_N[label] = _NEVER if y_S[0] else -_NEVER
            else:
                rows, biases = _one(x_SF, y_S, strength, how)
                weight_NF[label], bias_N[label] = rows[0], biases[0]
    else:
        y_S = targets.numpy()
        present = np.unique(y_S)
        if len(present) == 1:
            bias_N[present] = 0.0
        else:
            rows, biases = _one(x_SF, y_S, strength, how)
            if len(present) == 2:  # one row, of the second class: half of it each way gives the same softmax
                rows, biases = np.concatenate([-rows, rows]) / 2, np.concatenate([-biases, biases]) / 2
            weight_NF[present], bias_N[present] = rows, biases
    return torch.from_numpy(weight_NF).float(), torch.from_numpy(bias_N).float()


def _one(
    x_SF: NDArray[np.float64], y_S: NDArray[np.int64], strength: float, how: How
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    from sklearn.exceptions import ConvergenceWarning  # seconds to import, and only needed here
    from sklearn.linear_model import LogisticRegression

    weights = "balanced" if how.balanced else None
    model = LogisticRegression(C=strength, class_weight=weights, max_iter=how.settings.max_iter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a regression cut short is a regularised one; validation judges
        model.fit(x_SF, y_S)
    return model.coef_, model.intercept_
