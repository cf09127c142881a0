"""Regression: each sample has one or several numbers.

A model predicts numbers in standard deviations from the mean of the training split, so that no setting depends on units.
Losses: squared error, absolute error, Huber's (Annals of Mathematical Statistics 35, 1964), and that of quantiles (Koenker and
Bassett , Econometrica 46, 1978), with which a model predicts several quantiles, and so an interval.

Shapes: B samples of a batch, S of a split, T targets, Q quantiles, N = T Q outputs of a model, target by target.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import floor, isfinite, log10
from numbers import Real
from typing import TYPE_CHECKING, Any
from unicodedata import category

import numpy as np

from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.core.formatting import json_text
from mopefuse.errors import ConfigError, DataError
from mopefuse.metrics.names import value_metrics
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds
from mopefuse.tasks.base import Array, Labelled, Task, TrainingTargets

if TYPE_CHECKING:
    from torch import Tensor

    from mopefuse.config.schema import RunConfig
    from mopefuse.metrics.bootstrap import Outcome
    from mopefuse.metrics.values import ValueTally

_NUMBER = re.compile(r"(?:(?:\d+|\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_ZERO_GROUP = re.compile(r"0+[, ]")  # 0,125 is a decimal comma
_SIGN = re.compile(r"[-+]")
_LARGEST = 1e30  # squares and their sums must be finite
_LOSSES = ("mse", "mae", "huber", "quantile")
_DIGITS = 7  # digits of written values, from the first of the standard deviation; models compute in float32


def parse_number(label: str) -> float | None:
    """Parse a number as it is written in English, such as ``12.5``, ``1,299``, ``-$5`` or ``€ 3``; None if it is not one.

    A comma or a space separates thousands. A decimal comma is not read, as 1,299 would be ambiguous.
    """
    text = "".join(" " if character.isspace() else character for character in label.strip().replace("\N{MINUS SIGN}", "-"))
    signs = "".join(_SIGN.findall(text[:2]))
    body = "".join(character for character in text if category(character) != "Sc").strip().removeprefix(signs).strip("% ")
    if len(signs) > 1 or not any(map(str.isdecimal, body)) or not body.isascii():
        return None
    if not _NUMBER.fullmatch(body) or _ZERO_GROUP.match(body):
        return None
    value = float(signs + body.replace(",", "").replace(" ", ""))
    return value if abs(value) < _LARGEST else None


class Regression(Task):
    """One or several numbers; targets are numbers (B, T) in standard deviations from their mean in training, float32.

    Statistics and conversions are computed in float64, so that a large offset, as of dates, costs no digits.

    Args:
        mean, deviation: mean and standard deviation of each target in training (T); empty before training.
        loss: "mse", "mae", "huber" or "quantile". delta: error from which Huber's loss is linear, in standard deviations.
        quantiles: the quantiles that a model with the quantile loss predicts, ascending, with 0.5 among them.
    """

    name, metric, metric_title = "regression", "r2", "R²"
    metrics: tuple[str, ...] = ("r2", "mae", "rmse", "mae_sd", "rmse_sd", "spearman")
    label_kind = "number"
    linear_name = "ridge regression"

    def __init__(
        self,
        mean: Sequence[float] = (),
        deviation: Sequence[float] = (),
        *,
        loss: str = "mse",
        delta: float = 1.0,
        quantiles: Sequence[float] = (0.5,),
    ) -> None:
        self.mean, self.deviation, self.loss_name, self.delta = tuple(mean), tuple(deviation), loss, delta
        self.quantiles = tuple(quantiles) if loss == "quantile" else (0.5,)
        self.metrics = value_metrics(max(1, len(self.deviation)))

    def facts(self) -> dict[str, Any]:
        """See `Task.facts`."""
        how = {"loss": self.loss_name, "delta": self.delta, "quantiles": list(self.quantiles)}
        return {"name": self.name, "mean": list(self.mean), "deviation": list(self.deviation), **how}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Regression:
        """See `Task.from_facts`."""
        loss, delta, quantiles = facts["loss"], float(facts["delta"]), [float(level) for level in facts["quantiles"]]
        mean, deviation = ([float(value) for value in facts[key]] for key in ("mean", "deviation"))
        known = loss in _LOSSES and 0.5 in quantiles and len(mean) == len(deviation)
        if not known or not all(map(isfinite, (*mean, *deviation, delta))) or any(value <= 0 for value in deviation):
            raise ValueError("its loss, quantiles, mean and deviation do not fit each other")
        return cls(mean, deviation, loss=loss, delta=delta, quantiles=quantiles)

    def fitted(self, targets: TrainingTargets, config: RunConfig) -> Regression:
        """See `Task.fitted`."""
        if config.train.class_weights == "balanced":
            what = "labels are numbers, so there are no classes to balance"
            raise ConfigError(ConfigCode.SETTING_OF_OTHER_TASK, what, where="--class-weights", fix="remove --class-weights")
        how = config.regression
        task = Regression(loss=how.loss, delta=how.delta, quantiles=how.quantiles)
        return task.with_statistics(targets.numbers())

    def with_statistics(self, numbers_ST: Array) -> Regression:
        """The same task with the mean and the standard deviation of some numbers (S, T).

        Raises:
            DataError: all numbers of a target are equal.
        """
        same = np.flatnonzero(numbers_ST.min(axis=0) == numbers_ST.max(axis=0))
        if len(same):
            which = f", number {same[0] + 1} of {numbers_ST.shape[1]}" if numbers_ST.shape[1] > 1 else ""
            what = f"all training rows have the same number as label{which}, so there is nothing to learn"
            raise DataError(DataCode.ONE_CLASS, what, where="train", fix="specify the label column with --label-col")
        how: dict[str, Any] = {"loss": self.loss_name, "delta": self.delta, "quantiles": self.quantiles}
        return Regression(numbers_ST.mean(axis=0).tolist(), numbers_ST.std(axis=0).tolist(), **how)

    def describe(self, labels: Sequence[str]) -> str:
        """See `Task.describe`."""
        return f"the number {labels[0]}" if len(labels) == 1 else f"{len(labels)} numbers"

    def outputs(self, labels: Sequence[str]) -> int:
        """N, one output for each quantile of each target."""
        return len(labels) * len(self.quantiles)

    # -- data

    def encode(self, names: Sequence[str], known: Sequence[str]) -> Array:
        """The numbers (U,) float64 that labels are."""
        values = [parse_number(name) for name in names]
        if None in values:
            raise KeyError(names[values.index(None)])
        return np.array(values, dtype=np.float64)

    def unknown_labels(self, names: Iterable[str], known: Sequence[str]) -> list[str]:
        """Those of some labels that are not numbers."""
        return [name for name in names if parse_number(name) is None]

    def targets(self, start_B1: Array, number_Z: Array, count: int) -> Tensor:
        """The standardised numbers (B, T), float32."""
        return self._standardised(number_Z.reshape(len(start_B1) - 1, -1))

    def as_written(self, labels: Sequence[Any]) -> Any:
        """The only number, or a list of several; labels from a table are parsed."""
        values = [parse_number(label) if isinstance(label, str) else label for label in labels]
        return values[0] if len(values) == 1 else values

    def check_label(self, label: Any, count: int, where: str) -> None:
        """See `Task.check_label`."""
        values = list(label) if isinstance(label, Sequence) and not isinstance(label, str) else [label]
        numbers = all(isinstance(value, Real) and not isinstance(value, bool) and isfinite(value) for value in values)
        wanted = count // len(self.quantiles) or len(values)
        if not numbers or len(values) != wanted:
            expected = "a number" if wanted == 1 else f"a list of {wanted} numbers"
            what, fix = f"the label is {label!r:.60}, expected {expected}", f"pass {expected}; mopefuse.PairDataset does this"
            raise DataError(DataCode.INVALID_LABEL_VALUE, what, where=where, fix=fix)

    def stack_labels(self, labels: Sequence[Any], count: int) -> Tensor:
        """The standardised numbers (B, T), float32."""
        return self._standardised(np.array(labels, dtype=np.float64).reshape(len(labels), -1))

    def _standardised(self, numbers_BT: Array) -> Tensor:
        import torch

        mean_T, deviation_T = (np.array(each) for each in (self.mean or 0.0, self.deviation or 1.0))
        return torch.from_numpy(((numbers_BT - mean_T) / deviation_T).astype(np.float32))

    # -- training

    def loss(self, outputs_BN: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss (B,) of standardised numbers, averaged over targets and quantiles, in float32."""
        import torch
        from torch.nn import functional as F

        outputs_BTQ = outputs_BN.float().unflatten(-1, (-1, len(self.quantiles)))
        wanted_BTQ = targets.float().unsqueeze(-1).expand_as(outputs_BTQ)
        if self.loss_name == "quantile":
            error_BTQ = wanted_BTQ - outputs_BTQ
            level_Q = torch.tensor(self.quantiles, device=error_BTQ.device)
            loss_BTQ = torch.maximum(level_Q * error_BTQ, (level_Q - 1) * error_BTQ)
        elif self.loss_name == "huber":
            loss_BTQ = F.huber_loss(outputs_BTQ, wanted_BTQ, reduction="none", delta=self.delta)
        elif self.loss_name == "mae":
            loss_BTQ = (outputs_BTQ - wanted_BTQ).abs()
        else:
            loss_BTQ = (outputs_BTQ - wanted_BTQ).square()
        return loss_BTQ.flatten(1).mean(dim=-1)

    def average(self, each: Sequence[Tensor]) -> Tensor:
        """The mean of outputs."""
        import torch

        return torch.stack([*each]).mean(dim=0)

    # -- evaluation

    def tally(self, samples: int, outputs: int) -> ValueTally:
        """See `Task.tally`."""
        import torch

        from mopefuse.metrics.values import ValueTally

        targets = outputs // len(self.quantiles)
        deviation_T = torch.from_numpy(self._units(targets))
        interval = self.interval if len(self.quantiles) > 1 else None
        return ValueTally(samples, targets, self.values, self.in_units, self.loss, deviation_T, interval)

    def _units(self, targets: int) -> Array:
        """The standard deviation of each target in training (T,); 1 before training."""
        return np.array(self.deviation or [1.0] * targets)

    def interval(self, outputs_SN: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest quantile (S, T), in units of the targets."""
        low_ST, high_ST = outputs_SN.unflatten(-1, (-1, len(self.quantiles))).aminmax(dim=-1)
        return self.in_units(low_ST), self.in_units(high_ST)

    def values(self, outputs_SN: Tensor) -> Tensor:
        """The numbers (S, T) that outputs predict, in their own units: of several quantiles the median.

        Quantiles that cross are sorted first (Chernozhukov, Fernández-Val and Galichon, Econometrica 78, 2010).
        """
        return self.in_units(self._middle(outputs_SN))

    def in_units(self, standardised_ST: Tensor) -> Tensor:
        """Standardised numbers (S, T) in their own units, float64."""
        known = ((0.0,), (1.0,)) if not self.mean else (self.mean, self.deviation)
        mean_T, deviation_T = (standardised_ST.double().new_tensor(each) for each in known)
        return standardised_ST.double() * deviation_T + mean_T

    def outcome(self, outputs_SN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD) -> Outcome:
        """See `Task.outcome`."""
        from mopefuse.metrics.values import ValueOutcome

        predicted_ST, actual_ST = self.values(outputs_SN).numpy(), self.in_units(targets).numpy()
        return ValueOutcome(predicted_ST, actual_ST, self._units(actual_ST.shape[1]))

    def changed(self, before_SN: Tensor, after_SN: Tensor, thresholds: Thresholds = THRESHOLD) -> Tensor:
        """Whether (S,) a number changes by more than a tenth of the standard deviation in training."""
        return ((self._middle(before_SN) - self._middle(after_SN)).abs() > 0.1).any(dim=-1)

    def constant(self, counts: Mapping[str, int], labels: Sequence[str]) -> tuple[str, Tensor]:
        """The mean of the training split, see `Task.constant`."""
        import torch

        return "always the mean of the training labels", torch.zeros(self.outputs(labels))

    # -- predictions

    def decode(self, outputs_BN: Array) -> Array:
        """The numbers (B, N) in their own units, float64."""
        mean_N, deviation_N = (np.repeat(each, len(self.quantiles)) for each in (self.mean or 0.0, self.deviation or 1.0))
        return np.asarray(outputs_BN.astype(np.float64) * deviation_N + mean_N)

    def predict(
        self, decoded_N: Sequence[float], labels: Sequence[str], thresholds: Sequence[float], top: int | None = None
    ) -> dict[str, Any]:
        """``{"value": number}``, with several targets ``{"value": {name: number}}``; with quantiles also ``"quantiles"``."""
        count = len(self.quantiles)
        scales = self.deviation or [1.0] * len(labels)
        each = [
            sorted(_rounded(value, scale) for value in decoded_N[count * number : count * (number + 1)])
            for number, scale in enumerate(scales)
        ]
        values = [quantiles[self.quantiles.index(0.5)] for quantiles in each]
        found: dict[str, Any] = {"value": _by_target(labels, values)}
        if count > 1:
            levels = [f"{level:g}" for level in self.quantiles]
            found["quantiles"] = _by_target(labels, [dict(zip(levels, one, strict=True)) for one in each])
        return found

    def table_header(self, labels: Sequence[str]) -> list[str]:
        """See `Task.table_header`."""
        levels = [f"q{level:g}" for level in self.quantiles] if len(self.quantiles) > 1 else []
        names = [""] if len(labels) == 1 else [f"({label})" for label in labels]
        return [f"{what}{name}" for name in names for what in ("value", *levels)]

    def table_cells(self, prediction: Mapping[str, Any], labels: Sequence[str]) -> list[Any]:
        """See `Task.table_cells`."""
        if "value" not in prediction:
            return [""] * len(self.table_header(labels))
        cells: list[Any] = []
        for label in labels:
            value, quantiles = (_of_target(prediction.get(key), label, len(labels)) for key in ("value", "quantiles"))
            cells += [value, *(quantiles or {}).values()]
        return cells

    def collect(
        self, index_B: Tensor, outputs_BN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD
    ) -> tuple[Tensor, ...]:
        """Positions of the samples (B,), and their outputs, sample by sample (B N,)."""
        return index_B, outputs_BN.double().flatten()

    def prediction_lines(
        self, parts: Iterable[Sequence[Tensor]], rows: Sequence[Labelled], labels: Sequence[str]
    ) -> Iterator[str]:
        """``{"id", "value", "true"}``; see `Task.prediction_lines`."""
        found: list[tuple[int, list[float]]] = []
        for index_B, outputs_Z in parts:
            decoded_BN = self.decode(outputs_Z.reshape(len(index_B), self.outputs(labels)).numpy())
            found += zip(index_B.tolist(), decoded_BN.tolist(), strict=True)
        for index, decoded_N in sorted(found):
            row = rows[index]
            true = _by_target(labels, [parse_number(label) for label in row.labels])
            yield json_text({"id": row.id, **self.predict(decoded_N, labels, ()), "true": true}) + "\n"

    def read_outcome(self, lines: Iterable[tuple[int, Mapping[str, Any]]], samples: int, labels: Sequence[str]) -> Outcome:
        """See `Task.read_outcome`."""
        from mopefuse.metrics.values import ValueOutcome

        both = np.zeros((2, samples, len(labels)))
        for sample, line in lines:
            for number, key in enumerate(("value", "true")):
                both[number, sample] = [float(_of_target(line[key], label, len(labels))) for label in labels]
        return ValueOutcome(both[0], both[1], self._units(len(labels)))

    def _middle(self, outputs_SN: Tensor) -> Tensor:
        """The standardised number (S, T) that outputs predict."""
        sorted_STQ: Tensor = outputs_SN.unflatten(-1, (-1, len(self.quantiles))).sort(dim=-1)[0]
        return sorted_STQ[..., self.quantiles.index(0.5)]


def _rounded(value: float, scale: float) -> float:
    """Round a value to `_DIGITS` digits relative to a scale."""
    return round(value, _DIGITS - 1 - floor(log10(scale)))


def _by_target(labels: Sequence[str], values: Sequence[Any]) -> Any:
    """The only value, or values by the name of their target."""
    return values[0] if len(labels) == 1 else dict(zip(labels, values, strict=True))


def _of_target(values: Any, label: str, count: int) -> Any:
    return values if count == 1 or values is None else values[label]
