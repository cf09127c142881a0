"""Cross-validation of the candidates on frozen features.

Shapes: S samples of train followed by val, K of them, N labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mopefuse.autofit.budget import Budget
from mopefuse.autofit.features import FOLDS, Features
from mopefuse.autofit.scores import Judge, Predictions
from mopefuse.config.schema import RunConfig
from mopefuse.fusion.mlp_fit import Network, NetworkSettings, epochs_for, fit_network
from mopefuse.fusion.regression import FitSettings, set_up, standard_state
from mopefuse.tasks.base import Task
from mopefuse.tasks.classification import Classification
from mopefuse.training.listener import Listener

_LEAST_EPOCHS = 5


class FoldClock:
    """Decides after each fold whether there is time for another.

    Args:
        what: what is cross-validated, for progress. share: share of the time left that all folds may take; the first fold of a
            regression is always finished.
    """

    def __init__(self, what: str, budget: Budget, listener: Listener, share: float) -> None:
        self._what, self._listener = what, listener
        self._began, self._limit = time.monotonic(), share * max(0.0, budget.left)

    @property
    def seconds(self) -> float:
        """Seconds since the first fold began."""
        return time.monotonic() - self._began

    @property
    def seconds_left(self) -> float:
        """Seconds left for all folds."""
        return self._limit - self.seconds

    def has_time(self, done: int, total: int) -> bool:
        """Whether another fold would be finished in time, after `done` of `total`."""
        self._listener.on_data_progress(f"{self._what}, folds", done, total)
        return done < total and self.seconds * (done + 1) / done <= self._limit


class Regressed(NamedTuple):
    """The predictions of a regression for the folds that there was time for, and its C."""

    predictions: Predictions
    strength: float


def fit_settings(features: Features, labels: int, config: RunConfig) -> FitSettings:
    """The settings of a regression or an MLP."""
    task, targets, balanced = features.task, features.targets, config.train.class_weights == "balanced"
    weights = None
    if balanced and isinstance(task, Classification):
        weights = task.class_weights(task.count_labels(targets, labels), len(targets))
    return FitSettings(labels, task, config.train.threshold, balanced, config.linear, weights)


def cross_validate_regressions(
    features: Features, how: FitSettings, groups: Mapping[str, Sequence[str]], clock: FoldClock
) -> dict[str, Regressed]:
    """Cross-validate a logistic regression on each group of sides; C is chosen by the predictions of all folds together.

    The first fold tries every C, the others the best one of the first fold and its neighbours.

    Args:
        groups: by name, the sides whose features are concatenated.
    """
    labels, judge = how.labels, Judge(features.task, features.targets, how.labels)
    settings = dict.fromkeys(groups, how)
    held: list[Tensor] = []
    found: dict[str, dict[float, list[Tensor]]] = {name: {} for name in groups}
    for number, (train_rows, held_rows) in enumerate(features.folds()):
        train, test = features.fold(train_rows), features.fold(held_rows)
        for name, sides in groups.items():
            known = {side: train.statistics(side) for side in sides}
            design, held_design = train.design(known, labels), test.design(known, labels)
            problem = set_up(design, train.targets, how)
            for strength in sorted(settings[name].settings.strengths):
                weights = problem.solve(strength, how.settings.max_iter, lambda share: None)
                found[name].setdefault(strength, []).append(held_design.logits(*weights))
        held.append(held_rows)
        if not number:
            best = {name: _best_strength(judge, held, found[name]).strength for name in groups}
            settings = {name: _nearby(how, best[name]) for name in groups}
            found = {name: {c: found[name][c] for c in settings[name].settings.strengths} for name in groups}
        if not clock.has_time(number + 1, FOLDS):
            break
    return {name: _best_strength(judge, held, by_strength) for name, by_strength in found.items()}


def _nearby(how: FitSettings, strength: float) -> FitSettings:
    """Settings that try one C and its neighbours only."""
    every = sorted(how.settings.strengths)
    place = every.index(strength)
    few = tuple(every[max(0, place - 1) : place + 2])
    return how._replace(settings=how.settings.model_copy(update={"strengths": few}))


def _best_strength(judge: Judge, held: list[Tensor], by_strength: dict[float, list[Tensor]]) -> Regressed:
    """The C with the best score; the smallest wins ties."""
    every = {strength: join(held, logits) for strength, logits in by_strength.items()}
    best = max(every, key=lambda strength: judge.value(every[strength]))
    return Regressed(every[best], best)


def join(held: list[Tensor], logits: list[Tensor]) -> Predictions:
    """The predictions of all folds, in the order of the samples."""
    rows_K = torch.cat(held)
    order = rows_K.argsort()
    return Predictions(rows_K[order], torch.cat(logits)[order])


def average(predictions: list[Predictions], task: Task) -> Predictions:
    """The mean of the predictions of several candidates for the same samples."""
    return Predictions(predictions[0].rows_K, task.average([one.logits_KN for one in predictions]))


class Trained(NamedTuple):
    """The predictions of an MLP for the folds that there was time for, and the epochs that there was time for."""

    predictions: Predictions
    epochs: int


def cross_validate_network(
    features: Features, how: FitSettings, network: NetworkSettings, clock: FoldClock
) -> Trained | None:
    """Cross-validate an MLP on the features of all sides, each fold trained to its last epoch.

    Returns:
        None if there is no time for the first fold, not even with fewer epochs.
    """
    held: list[Tensor] = []
    logits: list[Tensor] = []
    epochs: int | None = None
    for number, (train_rows, held_rows) in enumerate(features.folds()):
        train, test = features.fold(train_rows), features.fold(held_rows)
        known = {side: train.statistics(side) for side in train.features}
        design, held_design = train.design(known, how.labels), test.design(known, how.labels)
        if epochs is None:
            began = time.monotonic()
            next(fit_network(design, train.targets, how, network))
            epochs = min(epochs_for(design.rows), int(clock.seconds_left / (time.monotonic() - began)))
            if epochs < min(_LEAST_EPOCHS, epochs_for(design.rows)):
                return None
        trained = _finish(fit_network(design, train.targets, how, network, epochs), clock if number else None)
        if trained is None:
            break
        logits.append(trained.logits_of(held_design))
        held.append(held_rows)
        if not clock.has_time(number + 1, FOLDS):
            break
    assert epochs is not None
    return Trained(join(held, logits), epochs)


def fit_on_train(features: Features, how: FitSettings, network: NetworkSettings, epochs: int) -> dict[str, Tensor]:
    """Fit an MLP on train as in cross-validation; returns tensors by their names in the method `mlp`."""
    train = features.fold(torch.arange(features.train_rows))
    known = {side: train.statistics(side) for side in train.features}
    last = _finish(fit_network(train.design(known, how.labels), train.targets, how, network, epochs), None)
    assert last is not None
    names = ("head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias")
    return standard_state(known) | dict(zip(names, last, strict=True))


def _finish(training: Iterator[Network], clock: FoldClock | None) -> Network | None:
    """The network after its last epoch; None if the time of `clock` runs out before."""
    last: Network | None = None
    for network in training:
        last = network
        if clock is not None and clock.seconds_left < 0:
            return None
    return last
