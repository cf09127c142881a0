"""Linear models on standardised features: a strong baseline on small data, and the starting point of a warm start.

Shapes: S samples, C width of one side's feature, F of all features side by side, N labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mopefuse.config.method_settings import Linear
from mopefuse.core.error_codes import NumericCode
from mopefuse.core.precision import to_float32
from mopefuse.data.collate import FeatureTable, TokenSource
from mopefuse.errors import NumericError
from mopefuse.fusion._design_matrix import Design, Side, row_blocks, statistics
from mopefuse.fusion._logistic import LogisticRegression, Sigmoids, Softmax
from mopefuse.fusion._ridge import RidgeProblem
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds, tuned_thresholds
from mopefuse.tasks.base import Task
from mopefuse.tasks.regression import Regression

_NEVER = 30.0  # magnitude of the logit of a label that every or no training sample has: a probability of 1e-13

Advance = Callable[[str, float], None]
"""Progress callback: takes a description of the current fit and the estimated fraction of all work that is done."""


def _ignore_progress(what: str, share: float) -> None:
    return None


class Targets(Protocol):
    """Targets indexed by row: class indices, or rows of zeros and ones. A tensor is one."""

    def __len__(self) -> int:
        """Return S."""

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """Return the targets (B,) or (B, N) of some rows."""


class Fold(NamedTuple):
    """Features and targets of a split.

    Attributes:
        features: pooled features (S, C) by side.
        targets: class indices (S,), or zeros and ones (S, N).
        missing: for each side that some sample lacks, which samples (S,) lack it.
        tokens: normalised output tokens of the main encoder, if they are cached.
    """

    features: Mapping[str, FeatureTable]
    targets: Targets
    missing: Mapping[str, Tensor] = {}
    tokens: TokenSource | None = None

    def rows(self, index_S: Tensor) -> Fold:
        """Select some samples, without their tokens; their features are copied into memory."""
        features = {side: table[index_S] for side, table in self.features.items()}
        missing = {side: missing_S[index_S] for side, missing_S in self.missing.items()}
        return Fold(features, self.targets[index_S], missing)

    def statistics(self, side: str) -> dict[str, Tensor]:
        """Compute the buffers of `Standard` over the samples that have the side.

        Raises:
            NumericError: a feature is not finite.
        """
        every_S = torch.arange(len(self.targets))
        present_S = every_S[~self.missing[side]] if side in self.missing else every_S
        found = statistics(self.features[side], present_S)
        if not all(buffer_C.isfinite().all() for buffer_C in found.values()):
            what = f"a feature of the {side} encoder is not finite on the training split"
            raise NumericError(
                NumericCode.FEATURE_NOT_FINITE, what, fix="add --set train.precision=fp32, or use a different encoder"
            )
        return found

    def design(self, known: Mapping[str, Mapping[str, Tensor]], labels: int) -> Design:
        """Assemble the standardised features of the sides in `known`, which maps each side to its buffers of `Standard`."""
        sides = [Side(self.features[side], buffers, self.missing.get(side)) for side, buffers in known.items()]
        return Design(sides, len(self.targets), labels)


class FitSettings(NamedTuple):
    """Settings of a regression.

    Attributes:
        labels: N. task: what a label is.
        threshold: probability above which a label is predicted (multi-label), or "tuned": one per label, on validation.
        balanced: whether every class has the same total weight, however rare.
        settings: the section `linear` of the configuration.
        class_weights: weights of `Task.class_weights` if `balanced`, used by an MLP.
    """

    labels: int
    task: Task
    threshold: float | str
    balanced: bool
    settings: Linear
    class_weights: Tensor | None = None
    device: torch.device = torch.device("cpu")


class Fitted(NamedTuple):
    """The result of `mopefuse.fusion.base.Fusion.fit`.

    Attributes:
        state: trainable tensors by name.
        notice: for the user: what was fitted and chosen.
        train_from: tensors whose training starts from these values instead of those in `state`, if steps follow.
        facts: plain values to save with the run.
    """

    state: dict[str, Tensor]
    notice: str
    train_from: Mapping[str, Tensor] = {}
    facts: Mapping[str, Any] = {}

    @classmethod
    def of_regressions(cls, found: tuple[dict[str, Tensor], dict[str, float]], task: Task) -> Fitted:
        """Describe what `fit_heads` returned."""
        strengths = ", ".join(f"C {value:g} on {name}" for name, value in found[1].items())
        return cls(found[0], f"{task.linear_name}, chosen on validation: {strengths}")


class LinearHead(NamedTuple):
    """A fitted linear head on standardised features; `strength` is its C, `score` its selected metric on validation."""

    weight_NF: Tensor
    bias_N: Tensor
    strength: float
    score: float


class Standard(nn.Module):
    """Standardises features by their mean and standard deviation over the training split, which are saved as buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_C", torch.zeros(width))
        self.register_buffer("deviation_C", torch.ones(width))
        self.mean_C: Tensor
        self.deviation_C: Tensor

    def forward(self, feature_BC: Tensor) -> Tensor:
        """Return standardised features (B, C), in float32."""
        return (to_float32(feature_BC) - self.mean_C) / self.deviation_C


def standard_state(known: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name the buffers of `Standard` of each side as in the state of a model (`Fusion.standard`)."""
    return {f"standard.{side}.{name}": buffer_C for side, found in known.items() for name, buffer_C in found.items()}


def fit_heads(
    heads: Mapping[str, Sequence[str]], train: Fold, val: Fold, how: FitSettings, advance: Advance = _ignore_progress
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Fit a regression for each head on the concatenated, standardised features of its sides.

    Args:
        heads: sides by the name of the head.

    Returns:
        Tensors ``standard.<side>.*``, ``<head>.weight`` and ``<head>.bias``; and the C of each head, keyed by its sides.
    """
    chosen: dict[str, float] = {}
    sides = dict.fromkeys(side for group in heads.values() for side in group)
    known = {side: train.statistics(side) for side in sides}
    state = standard_state(known)
    for number, (name, group) in enumerate(heads.items()):
        on, buffers = " and ".join(group), {side: known[side] for side in group}

        def report(what: str, share: float, done: int = number, on: str = on) -> None:
            advance(f"{how.task.linear_name} on {on}, {what}", (done + share) / len(heads))

        designs = train.design(buffers, how.labels), val.design(buffers, how.labels)
        regression = fit_regression(designs[0], train.targets, designs[1], val.targets, how, report)
        state |= {f"{name}.weight": regression.weight_NF, f"{name}.bias": regression.bias_N}
        chosen[on] = regression.strength
    return state, chosen


def fit_regression(
    train: Design, targets: Targets, val: Design, val_targets: Targets, how: FitSettings, advance: Advance = _ignore_progress
) -> LinearHead:
    """Fit a regression for each C and return the one with the best score on validation; the smallest C wins ties.

    Args:
        targets, val_targets: (S,) class indices, or (S, N) zeros and ones.
    """
    best: LinearHead | None = None
    strengths = sorted(how.settings.strengths)
    actual = val_targets[torch.arange(val.rows)]
    problem = set_up(train, targets, how)
    for number, strength in enumerate(strengths):

        def report(share: float, done: int = number, strength: float = strength) -> None:
            advance(f"C {strength:g}", (done + share) / len(strengths))

        weight_NF, bias_N = problem.solve(strength, how.settings.max_iter, report)
        found = score(val.logits(weight_NF, bias_N), actual, how)
        if best is None or found > best.score:
            best = LinearHead(weight_NF, bias_N, strength, found)
    assert best is not None
    return best


def score(logits_SN: Tensor, actual: Tensor, how: FitSettings) -> float:
    """Compute the metric by which models are selected.

    Args:
        actual: class indices (S,), or zeros and ones (S, N).
    """
    thresholds = _thresholds(logits_SN, actual, how)
    return how.task.count(logits_SN, actual, thresholds).metrics(ranking=False)[how.task.metric]


def score_by_sample(logits_SN: Tensor, actual: Tensor, how: FitSettings) -> Tensor:
    """Score each sample (S,), see `mopefuse.metrics.tally.Tally.by_sample`."""
    return how.task.count(logits_SN, actual, _thresholds(logits_SN, actual, how)).by_sample()


def _thresholds(logits_SN: Tensor, val: Tensor, how: FitSettings) -> Thresholds:
    if how.task.uses_thresholds and how.threshold == "tuned":
        return tuned_thresholds(logits_SN, val)
    return THRESHOLD if isinstance(how.threshold, str) else how.threshold


class Solvable(Protocol):
    """Linear models of one design that differ in their C."""

    def solve(self, strength: float, max_iter: int, advance: Callable[[float], None]) -> tuple[Tensor, Tensor]:
        """Weight (N, F) and bias (N,) for a C, in float32."""


def set_up(train: Design, targets: Targets, how: FitSettings) -> Solvable:
    """Set up the linear model of a task: a logistic regression, or ridge regression for numbers."""
    if isinstance(how.task, Regression):
        return RidgeProblem(train, targets[torch.arange(train.rows)], how.task)
    return (_binary_problem if how.task.uses_thresholds else _multinomial_problem)(train, targets, how)


class Problem(NamedTuple):
    """The logistic regression of the labels that vary within the training split, embedded in all labels.

    Attributes:
        regression: None if no label varies.
        index_A: labels that are fitted; both of two classes, although their regression has one row.
        bias_N: biases of all labels, used for those that are not fitted.
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
            if len(rows_AF) < len(self.index_A):  # one row for two classes: plus and minus half of it give the same softmax
                rows_AF, row_biases_A = torch.cat([-rows_AF, rows_AF]) / 2, torch.cat([-row_biases_A, row_biases_A]) / 2
            weight_NF[self.index_A], bias_N[self.index_A] = rows_AF.float(), row_biases_A.float()
        return weight_NF, bias_N


def _binary_problem(train: Design, targets_SN: Targets, how: FitSettings) -> Problem:
    """Set up a binary regression for each label that some, but not all, samples have."""
    with_N = torch.zeros(how.labels, dtype=torch.double)
    for rows in row_blocks(train.rows, how.labels):
        with_N += targets_SN[torch.arange(rows.start, rows.stop)].sum(dim=0, dtype=torch.double)
    bias_N = torch.where(with_N > 0, _NEVER, -_NEVER).float()
    index_A = ((with_N > 0) & (with_N < train.rows)).nonzero()[:, 0]
    if not len(index_A):
        return Problem(None, index_A, bias_N, train.width)
    count_2A = torch.stack([train.rows - with_N, with_N])[:, index_A]
    weight_2A = train.rows / (2 * count_2A) if how.balanced else None
    start_A = torch.zeros(len(index_A)) if how.balanced else (count_2A[1] / count_2A[0]).log()
    regression = LogisticRegression(train, Sigmoids(targets_SN, index_A, weight_2A), start_A)
    return Problem(regression, index_A, bias_N, train.width)


def _multinomial_problem(train: Design, targets: Targets, how: FitSettings) -> Problem:
    """Set up a multinomial regression of the classes that occur; a binary one if there are two."""
    targets_S = targets[torch.arange(train.rows)]
    count_N = torch.bincount(targets_S, minlength=how.labels).double()
    bias_N = torch.where(count_N > 0, 0.0, -_NEVER).float()
    index_A = count_N.nonzero()[:, 0]
    if len(index_A) == 1:
        return Problem(None, index_A, bias_N, train.width)
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
    return Problem(LogisticRegression(train, loss, start_A), index_A, bias_N, train.width)
