"""Scores of candidates with their uncertainty, and the choice between them.

Shapes: S samples of train followed by val, K of them that a candidate predicted, N labels, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mopefuse.metrics import bootstrap
from mopefuse.metrics.names import write_metric
from mopefuse.tasks.base import Task

_RESAMPLES, _SEED = 400, 0
SIMPLER_WITHIN = 1.0
"""Standard errors within which a simpler cross-validated candidate is as good as the best."""
BEYOND_NOISE = 2.0
"""Standard errors by which a candidate that selected its step on validation must be better there than a simpler one."""


class Predictions(NamedTuple):
    """Out-of-sample outputs of a candidate: each sample was predicted by a model that was not trained on it.

    Attributes:
        rows_K: numbers of the samples in train followed by val, ascending.
    """

    rows_K: Tensor
    logits_KN: Tensor


class Estimate(NamedTuple):
    """A number with its standard error and the number of samples that it was computed on."""

    value: float
    error: float
    rows: int

    def written(self, metric: str) -> str:
        """Format the value of a metric with its standard error: 81.2 % ± 1.0 %."""
        return f"{write_metric(metric, self.value)} ± {write_metric(metric, self.error)}"

    def exceeds(self, errors: float) -> bool:
        """Whether the value is positive by more than so many standard errors."""
        return self.value > max(0.0, errors * self.error)


class Judge:
    """Scores predictions against the true labels; standard errors are from a bootstrap over samples, paired for differences.

    Args:
        targets: of all samples. labels: N.
    """

    def __init__(self, task: Task, targets: Tensor, labels: int) -> None:
        self.task, self.targets, self.labels, self.metric = task, targets, labels, task.metric

    def value(self, found: Predictions) -> float:
        """The score of a candidate without its uncertainty."""
        outcome = self._outcome(found.rows_K, found.logits_KN)
        return float(outcome.measure(self.metric, np.ones((1, len(found.rows_K))))[0])

    def score(self, found: Predictions) -> Estimate:
        """The score of a candidate on the samples that it predicted."""
        return self._estimate(found.rows_K, [found.logits_KN])

    def difference(self, ours: Predictions, theirs: Predictions) -> Estimate:
        """Our score less theirs, on the samples that both predicted."""
        in_ours_K, in_theirs_K = torch.isin(ours.rows_K, theirs.rows_K), torch.isin(theirs.rows_K, ours.rows_K)
        both = [ours.logits_KN[in_ours_K], theirs.logits_KN[in_theirs_K]]
        return self._estimate(ours.rows_K[in_ours_K], both)

    def _estimate(self, rows_K: Tensor, logits: Sequence[Tensor]) -> Estimate:
        """The score of the first logits, less that of the second if there are two."""
        outcomes = [self._outcome(rows_K, logits_KN) for logits_KN in logits]
        whole, drawn = np.ones((1, len(rows_K))), []
        for weights_RK in bootstrap.draw_resamples(len(rows_K), _RESAMPLES, _SEED, labels=self.labels):
            each = [outcome.measure(self.metric, weights_RK) for outcome in outcomes]
            drawn.append(each[0] - each[1] if len(each) > 1 else each[0])
        values = [float(outcome.measure(self.metric, whole)[0]) for outcome in outcomes]
        return Estimate(values[0] - sum(values[1:]), float(np.concatenate(drawn).std()), len(rows_K))

    def _outcome(self, rows_K: Tensor, logits_KN: Tensor) -> bootstrap.Outcome:
        return self.task.outcome(logits_KN, self.targets[rows_K])


def choose_leader(judge: Judge, cross_validated: Mapping[str, Predictions]) -> str:
    """Of cross-validated candidates, the simplest whose score is within `SIMPLER_WITHIN` standard errors of the best.

    Args:
        cross_validated: in order of cost, simplest first; they may have been predicted on different numbers of folds.
    """
    reference = next(iter(cross_validated.values()))
    best = max(cross_validated.values(), key=lambda found: judge.difference(found, reference).value)
    as_good = (name for name, found in cross_validated.items() if not judge.difference(best, found).exceeds(SIMPLER_WITHIN))
    return next(as_good)


def choose(judge: Judge, leader: str, on_val: Predictions, validated: Mapping[str, Predictions]) -> str:
    """The leader, unless a candidate that was trained is better on validation by `BEYOND_NOISE` standard errors.

    Args:
        on_val: predictions of the leader's run for validation. validated: in order of cost, simplest first.
    """
    chosen, best = leader, on_val
    for name, found in validated.items():
        if judge.difference(found, best).exceeds(BEYOND_NOISE):
            chosen, best = name, found
    return chosen
