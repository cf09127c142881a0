"""Logistic regression on standardised features: the rival that is hard to beat on small data, and a place to start from.

Shapes: S samples, C width of one side's feature, F of all features side by side, N labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mopefuse.config.schema import Linear
from mopefuse.core.precision import exact
from mopefuse.data.collate import Table
from mopefuse.errors import NumericError
from mopefuse.fusion._design import Design, Side, row_blocks, statistics
from mopefuse.fusion._logistic import LogisticRegression, Sigmoids, Softmax
from mopefuse.metrics import classification as metrics
from mopefuse.metrics.gates import selected_metric

_NEVER = 30.0  # logit of what training has never, or always: a probability of 1e-13

Advance = Callable[[str, float], None]
"""Called with what is being fitted and the estimated share of all work that is done."""


def _silent(what: str, share: float) -> None:
    return None


class Targets(Protocol):
    """Class indices or rows of zeros and ones by row: a tensor, or what looks like one."""

    def __len__(self) -> int:
        """S."""

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """(B,) or (B, N)."""


class Fold(NamedTuple):
    """Pooled features (S, C) of a split by side, its targets: (S,) class indices, or (S, N) zeros and ones; and by side which
    samples (S,) lack it."""

    features: Mapping[str, Table]
    targets: Targets
    missing: Mapping[str, Tensor] = {}

    def statistics(self, side: str) -> dict[str, Tensor]:
        """The buffers of `Standard`, of the samples that have the side.

        Raises:
            NumericError: a feature is not finite.
        """
        every_S = torch.arange(len(self.targets))
        present_S = every_S[~self.missing[side]] if side in self.missing else every_S
        found = statistics(self.features[side], present_S)
        if not all(buffer_C.isfinite().all() for buffer_C in found.values()):
            what = f"a feature of the {side} encoder is not finite on the training split"
            raise NumericError(310, what, fix="add --set train.precision=fp32, or use another encoder")
        return found

    def design(self, known: Mapping[str, Mapping[str, Tensor]], labels: int) -> Design:
        """The standardised features of the sides in `known`, which has the buffers of `Standard` for each."""
        sides = [Side(self.features[side], buffers, self.missing.get(side)) for side, buffers in known.items()]
        return Design(sides, len(self.targets), labels)


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


def fit_heads(
    heads: Mapping[str, Sequence[str]], train: Fold, val: Fold, how: How, advance: Advance = _silent
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A regression for each head on the sides that it takes, their features standardised and side by side.

    Returns:
        ``standard.<side>.*``, ``<head>.weight`` and ``<head>.bias``, and the C of each, by the names of its sides.
    """
    state: dict[str, Tensor] = {}
    chosen: dict[str, float] = {}
    sides = dict.fromkeys(side for group in heads.values() for side in group)
    known = {side: train.statistics(side) for side in sides}
    for side, found in known.items():
        state |= {f"standard.{side}.{name}": tensor for name, tensor in found.items()}
    for number, (name, group) in enumerate(heads.items()):
        on, own = " and ".join(group), {side: known[side] for side in group}

        def report(what: str, share: float, begun: int = number, on: str = on) -> None:
            advance(f"logistic regression on {on}, {what}", (begun + share) / len(heads))

        designs = train.design(own, how.labels), val.design(own, how.labels)
        regression = fit_regression(designs[0], train.targets, designs[1], val.targets, how, report)
        state |= {f"{name}.weight": regression.weight_NF, f"{name}.bias": regression.bias_N}
        chosen[on] = regression.strength
    return state, chosen


def fit_regression(
    train: Design, targets: Targets, val: Design, val_targets: Targets, how: How, advance: Advance = _silent
) -> Regression:
    """The regression whose C does best on validation; the smallest such C.

    Args:
        targets, val_targets: (S,) class indices, or (S, N) zeros and ones.
    """
    best: Regression | None = None
    strengths = sorted(how.settings.strengths)
    actual = val_targets[torch.arange(val.rows)]
    fitted = (_of_labels if how.multi_label else _of_classes)(train, targets, how)
    for number, strength in enumerate(strengths):

        def report(share: float, begun: int = number, strength: float = strength) -> None:
            advance(f"C {strength:g}", (begun + share) / len(strengths))

        weight_NF, bias_N = fitted.solve(strength, how.settings.max_iter, report)
        logits_SN = val.logits(weight_NF, bias_N)
        thresholds = _thresholds(logits_SN, actual, how)
        found = metrics.compute(logits_SN, actual, multi_label=how.multi_label, thresholds=thresholds)
        score = found[selected_metric(multi_label=how.multi_label)]
        if best is None or score > best.score:
            best = Regression(weight_NF, bias_N, strength, score)
    assert best is not None
    return best


def _thresholds(logits_SN: Tensor, val: Tensor, how: How) -> metrics.Thresholds:
    if how.multi_label and how.threshold == "tuned":
        return metrics.tuned_thresholds(logits_SN, val)
    return metrics.THRESHOLD if isinstance(how.threshold, str) else how.threshold


class _Fitted(NamedTuple):
    """Regressions of the labels that the training split tells apart, among all labels.

    Args:
        regression: None where there is nothing to tell apart.
        index_A: labels that are fitted; of two classes both, though their regression has one row.
        bias_N: of all labels where no feature says more.
        width: F.
    """

    regression: LogisticRegression | None
    index_A: Tensor
    bias_N: Tensor
    width: int

    def solve(self, strength: float, max_iter: int, advance: Callable[[float], None]) -> tuple[Tensor, Tensor]:
        """Weight (N, F) and bias (N,) for a C, in float32."""
        weight_NF, bias_N = torch.zeros(len(self.bias_N), self.width), self.bias_N.clone()
        if self.regression is not None:
            rows_AF, row_biases_A = self.regression.solve(strength, max_iter, advance)
            if len(rows_AF) < len(self.index_A):  # of the second of two classes: half of it each way gives the same softmax
                rows_AF, row_biases_A = torch.cat([-rows_AF, rows_AF]) / 2, torch.cat([-row_biases_A, row_biases_A]) / 2
            weight_NF[self.index_A], bias_N[self.index_A] = rows_AF.float(), row_biases_A.float()
        return weight_NF, bias_N


def _of_labels(train: Design, targets_SN: Targets, how: How) -> _Fitted:
    """A binary regression for each label that some, but not all, samples have."""
    with_N = torch.zeros(how.labels, dtype=torch.double)
    for rows in row_blocks(train.rows, how.labels):
        with_N += targets_SN[torch.arange(rows.start, rows.stop)].sum(dim=0, dtype=torch.double)
    bias_N = torch.where(with_N > 0, _NEVER, -_NEVER).float()
    index_A = ((with_N > 0) & (with_N < train.rows)).nonzero()[:, 0]
    if not len(index_A):
        return _Fitted(None, index_A, bias_N, train.width)
    count_2A = torch.stack([train.rows - with_N, with_N])[:, index_A]
    weight_2A = train.rows / (2 * count_2A) if how.balanced else None
    start_A = torch.zeros(len(index_A)) if how.balanced else (count_2A[1] / count_2A[0]).log()
    regression = LogisticRegression(train, Sigmoids(targets_SN, index_A, weight_2A), start_A)
    return _Fitted(regression, index_A, bias_N, train.width)


def _of_classes(train: Design, targets: Targets, how: How) -> _Fitted:
    """A multinomial regression of the classes that some sample has; a binary one where there are two."""
    targets_S = targets[torch.arange(train.rows)]
    count_N = torch.bincount(targets_S, minlength=how.labels).double()
    bias_N = torch.where(count_N > 0, 0.0, -_NEVER).float()
    index_A = count_N.nonzero()[:, 0]
    if len(index_A) == 1:
        return _Fitted(None, index_A, bias_N, train.width)
    count_A = count_N[index_A]
    weight_A = train.rows / (len(index_A) * count_A) if how.balanced else None
    start_A = torch.zeros(len(index_A)) if how.balanced else count_A.log()
    place_N = torch.zeros(how.labels, dtype=torch.long)
    place_N[index_A] = torch.arange(len(index_A))
    classes_S = place_N[targets_S]
    if len(index_A) == 2:
        weight_21 = None if weight_A is None else weight_A[:, None]
        loss: Sigmoids | Softmax = Sigmoids(classes_S[:, None], torch.zeros(1, dtype=torch.long), weight_21)
        start_A = start_A.diff()
    else:
        loss = Softmax(classes_S, weight_A)
    return _Fitted(LogisticRegression(train, loss, start_A), index_A, bias_N, train.width)
