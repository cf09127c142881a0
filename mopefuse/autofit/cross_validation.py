"""Cross-validation of the candidates on frozen features.

Shapes: S samples of train followed by val, K of them, N labels.
"""

from __future__ import annotations

import time
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
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model
from mopefuse.fusion.linear import mean_of_sigmoids, mean_of_softmaxes
from mopefuse.fusion.regression import FitSettings, regression_path
from mopefuse.training.listener import Listener
from mopefuse.training.losses import balanced_weights, classification_loss
from mopefuse.training.optim import factor, make_optimizer, set_learning_rate
from mopefuse.training.plan import resolved


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
    def is_over(self) -> bool:
        """Whether no time is left, not even for the rest of a fold."""
        return self.seconds > self._limit

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

    Args:
        groups: by name, the sides whose features are concatenated.
    """
    multi, labels = data.multi_label, len(data.labels)
    how = FitSettings(labels, multi, config.train.threshold, config.train.class_weights == "balanced", config.linear)
    held: list[Tensor] = []
    found: dict[str, dict[float, list[Tensor]]] = {name: {} for name in groups}
    for number, (train_rows, held_rows) in enumerate(features.folds()):
        train, test = features.fold(train_rows), features.fold(held_rows)
        for name, sides in groups.items():
            known = {side: train.statistics(side) for side in sides}
            design, held_design = train.design(known, labels), test.design(known, labels)
            for strength, weight_NF, bias_N in regression_path(design, train.targets, how):
                found[name].setdefault(strength, []).append(held_design.logits(weight_NF, bias_N))
        held.append(held_rows)
        if not clock.has_time(number + 1, FOLDS):
            break
    judge = Judge(features.targets, labels)
    return {name: _best_strength(judge, held, by_strength) for name, by_strength in found.items()}


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


def cross_validate_network(
    features: Features, data: DataSet, config: RunConfig, device: torch.device, clock: FoldClock
) -> Predictions | None:
    """Cross-validate a method that reads nothing but frozen features, each fold trained to its last step.

    Returns:
        None if there was no time for the first fold.
    """
    held: list[Tensor] = []
    logits: list[Tensor] = []
    for number, (train_rows, held_rows) in enumerate(features.folds()):
        model = build_model(config, len(data.labels))
        if not _train(model, features, train_rows, resolved(config, model), device, clock):
            break
        with torch.no_grad():
            logits.append(model.eval()(features.batch(held_rows).to(device)).logits.float().cpu())
        held.append(held_rows)
        if not clock.has_time(number + 1, FOLDS):
            break
    return join(held, logits) if held else None


def _train(
    model: Fusion, features: Features, rows: Tensor, config: RunConfig, device: torch.device, clock: FoldClock
) -> bool:
    """Train a model on some samples; returns whether it was finished."""
    train, multi = features.fold(rows), features.targets.ndim == 2
    for side, standard in (model.standard or {}).items():
        standard.load_state_dict(train.statistics(side))
    devices.move_to_device(model, device)
    weights = None
    if config.train.class_weights == "balanced":
        targets = features.targets[rows]
        counts_N = targets.sum(dim=0) if multi else torch.bincount(targets, minlength=model.num_labels)
        weights = balanced_weights(counts_N, len(rows), multi_label=multi).to(device)
    optimizer, parameters = make_optimizer(model.train(), config.train), model.trainable_parameters()
    per_epoch = -(-len(rows) // config.train.batch_size)
    total, step = config.train.epochs * per_epoch, 0
    for epoch in range(config.train.epochs):
        if clock.is_over:
            return False
        for numbers in epoch_batches(config.seed, epoch, len(rows), config.train.batch_size):
            set_learning_rate(optimizer, factor(config.train, step, total))
            optimizer.zero_grad(set_to_none=True)
            torch.manual_seed(derive_seed(config.seed, step, 0))
            batch = features.batch(rows[torch.tensor(numbers)]).to(device)
            (classification_loss(model(batch), batch, multi_label=multi, weights=weights) / len(numbers)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.train.clip)
            optimizer.step()
            step += 1
    return True
