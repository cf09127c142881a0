"""Cross-validation of the candidates on frozen features.

Shapes: S samples of train followed by val, K of them, N labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mopefuse.autofit.budget import Budget
from mopefuse.autofit.features import FOLDS, Features
from mopefuse.autofit.scores import Judge, Predictions
from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.data.base import DataSet
from mopefuse.data.collate import derive_seed, epoch_batches
from mopefuse.fusion.build import build_model
from mopefuse.fusion.linear import mean_of_sigmoids, mean_of_softmaxes
from mopefuse.fusion.regression import FitSettings, regression_path
from mopefuse.training.listener import Listener
from mopefuse.training.losses import balanced_weights, classification_loss
from mopefuse.training.optim import factor, make_optimizer, set_learning_rate
from mopefuse.training.plan import resolved

_MEASURED_STEPS = 20  # of a network, after which its pace is known
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


def cross_validate_regressions(
    features: Features, data: DataSet, config: RunConfig, groups: dict[str, tuple[str, ...]], clock: FoldClock
) -> dict[str, Regressed]:
    """Cross-validate a logistic regression on each group of sides; C is chosen by the predictions of all folds together.

    The first fold tries every C, the others the best one of the first fold and its neighbours.

    Args:
        groups: by name, the sides whose features are concatenated.
    """
    labels, judge = len(data.labels), Judge(features.targets, len(data.labels))
    balanced = config.train.class_weights == "balanced"
    how = FitSettings(labels, data.multi_label, config.train.threshold, balanced, config.linear)
    settings = dict.fromkeys(groups, how)
    held: list[Tensor] = []
    found: dict[str, dict[float, list[Tensor]]] = {name: {} for name in groups}
    for number, (train_rows, held_rows) in enumerate(features.folds()):
        train, test = features.fold(train_rows), features.fold(held_rows)
        for name, sides in groups.items():
            known = {side: train.statistics(side) for side in sides}
            design, held_design = train.design(known, labels), test.design(known, labels)
            for strength, weight_NF, bias_N in regression_path(design, train.targets, settings[name]):
                found[name].setdefault(strength, []).append(held_design.logits(weight_NF, bias_N))
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


def average(predictions: list[Predictions], *, multi_label: bool) -> Predictions:
    """The mean of the probabilities of several candidates for the same samples, as logits."""
    mean = mean_of_sigmoids if multi_label else mean_of_softmaxes
    return Predictions(predictions[0].rows_K, mean(*(one.logits_KN for one in predictions)))


class Trained(NamedTuple):
    """The predictions of a network for the folds that there was time for, and the epochs that there was time for."""

    predictions: Predictions
    epochs: int


def cross_validate_network(
    features: Features, data: DataSet, config: RunConfig, device: torch.device, clock: FoldClock
) -> Trained | None:
    """Cross-validate a method that reads nothing but frozen features, each fold trained to its last step.

    Returns:
        None if there is no time for the first fold, not even with fewer epochs.
    """
    held: list[Tensor] = []
    logits: list[Tensor] = []
    for number, (train_rows, held_rows) in enumerate(features.folds()):
        training = _Training(features, train_rows, config, device, len(data.labels))
        if not number:
            config = with_epochs(config, training.affordable_epochs(clock))
            training = _Training(features, train_rows, config, device, len(data.labels))
        if not (config.train.epochs and training.run(clock)):
            break
        with torch.no_grad():
            logits.append(training.model.eval()(features.batch(held_rows).to(device)).logits.float().cpu())
        held.append(held_rows)
        if not clock.has_time(number + 1, FOLDS):
            break
    return Trained(join(held, logits), config.train.epochs) if held else None


def with_epochs(config: RunConfig, epochs: int) -> RunConfig:
    """`config` with another number of epochs."""
    return config.model_copy(update={"train": config.train.model_copy(update={"epochs": epochs})})


class _Training:
    """The training of a new model on features of some samples, as `mopefuse.training.trainer.Trainer` would train it."""

    def __init__(self, features: Features, rows: Tensor, config: RunConfig, device: torch.device, labels: int) -> None:
        self.features, self.rows, self.device = features, rows, device
        self.model = build_model(config, labels)
        self.config = resolved(config, self.model)
        train, targets = features.fold(rows), features.targets[rows]
        for side, standard in (self.model.standard or {}).items():
            standard.load_state_dict(train.statistics(side))
        devices.move_to_device(self.model, device)
        self.multi_label, self.weights = targets.ndim == 2, None
        if config.train.class_weights == "balanced":
            counts_N = targets.sum(dim=0) if self.multi_label else torch.bincount(targets, minlength=labels)
            self.weights = balanced_weights(counts_N, len(rows), multi_label=self.multi_label).to(device)
        self.optimizer = make_optimizer(self.model.train(), self.config.train)
        self.parameters = self.model.trainable_parameters()
        self.total = config.train.epochs * -(-len(rows) // config.train.batch_size)

    def affordable_epochs(self, clock: FoldClock) -> int:
        """How many epochs, of those that are configured, one fold may take; 0 if these are too few to be useful."""
        began = time.monotonic()
        measured = 0
        for step, numbers in zip(range(_MEASURED_STEPS), self._batches(), strict=False):
            self._step(step, numbers)
            measured = step + 1
        per_epoch = (time.monotonic() - began) / max(1, measured) * self.total / max(1, self.config.train.epochs)
        epochs = min(self.config.train.epochs, int(clock.seconds_left / per_epoch))
        return epochs if epochs >= min(_LEAST_EPOCHS, self.config.train.epochs) else 0

    def run(self, clock: FoldClock) -> bool:
        """Make all steps; returns whether there was time for them."""
        for step, numbers in enumerate(self._batches()):
            if clock.seconds_left < 0:
                return False
            self._step(step, numbers)
        return True

    def _batches(self) -> Iterator[list[int]]:
        train = self.config.train
        for epoch in range(train.epochs):
            yield from epoch_batches(self.config.seed, epoch, len(self.rows), train.batch_size)

    def _step(self, step: int, numbers: list[int]) -> None:
        train = self.config.train
        set_learning_rate(self.optimizer, factor(train, step, self.total))
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(derive_seed(self.config.seed, step, 0))
        batch = self.features.batch(self.rows[torch.tensor(numbers)]).to(self.device)
        loss = classification_loss(self.model(batch), batch, multi_label=self.multi_label, weights=self.weights)
        (loss / len(numbers)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, train.clip)
        self.optimizer.step()
