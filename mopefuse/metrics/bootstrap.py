"""Paired bootstrap over test samples: the uncertainty of a difference between two systems due to the choice of samples.

Efron and Tibshirani, An Introduction to the Bootstrap, 1993 (percentile interval, chapter 13); Berg-Kirkpatrick,
Burkett and Klein, An Empirical Investigation of Statistical Significance in NLP, EMNLP 2012 (the test, paired).
Shapes: R resamples, S samples, N labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

RESAMPLES, SEED = 10_000, 0
_BLOCK = 4_000_000  # numbers in a block of resamples, by sample or by label

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Outcome(Protocol):
    """What a run predicted for the test samples, and what is true."""

    @property
    def shape(self) -> tuple[int, int]:
        """(S, N): the numbers of samples and of labels or targets."""

    def measure(self, metric: str, weights_RS: Floats) -> Floats:
        """The metric (R,) of resamples in which samples occur `weights_RS` times."""


@dataclass(frozen=True)
class LabelOutcome:
    """Predicted and true labels of the test samples in one run: sparse matrices (S, N) with 1 for each label."""

    predicted_SN: csr_array
    actual_SN: csr_array

    @property
    def shape(self) -> tuple[int, int]:
        """See `Outcome.shape`."""
        samples, labels = self.actual_SN.shape
        return samples, labels

    def measure(self, metric: str, weights_RS: Floats) -> Floats:
        """See `Outcome.measure`; the metric is one of `METRICS`."""
        return METRICS[metric](self, weights_RS)

    @cached_property
    def right_SN(self) -> csr_array:
        """Correctly predicted labels (S, N)."""
        return csr_array(self.predicted_SN.multiply(self.actual_SN))

    @cached_property
    def counts_3S(self) -> Floats:
        """Numbers of correct, predicted and true labels of each sample (3, S)."""
        return np.stack([each_SN.sum(axis=1) for each_SN in (self.right_SN, self.predicted_SN, self.actual_SN)])


@dataclass(frozen=True)
class Difference:
    """Difference of a metric between two systems, with its 95 % interval and a two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def difference(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], metric: str, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Difference:
    """Compare a metric between two systems, each given by one run per seed, on the same samples in the same order.

    The metric of a system is its mean over seeds, so the numbers of seeds may differ. Samples are drawn with replacement,
    the same for all runs of both systems. With d the difference on the test split and d* on a resample:

    * interval: the 2.5 and 97.5 percentiles of d*;
    * p = (1 + number of resamples with |d* - d| >= |d|) / (1 + resamples): d* centred at no difference, two-sided.

    Only the choice of test samples varies. The variation of models between seeds is not included.

    Args:
        metric: a metric of the task, see `mopefuse.tasks.base.Task.metrics`.
    """
    assert ours and theirs
    samples, labels = ours[0].shape
    whole = np.ones((1, samples))
    observed = float((_of_system(ours, metric, whole) - _of_system(theirs, metric, whole))[0])
    blocks = [
        _of_system(ours, metric, weights_RS) - _of_system(theirs, metric, weights_RS)
        for weights_RS in draw_resamples(samples, resamples, seed, labels=labels)
    ]
    drawn_R = np.concatenate(blocks)
    low, high = np.quantile(drawn_R, [0.025, 0.975])
    beyond = int((np.abs(drawn_R - observed) >= abs(observed) - 1e-12).sum())  # sums of the same terms in another order
    return Difference(observed, float(low), float(high), (1 + beyond) / (1 + resamples))


def draw_resamples(samples: int, resamples: int, seed: int, *, labels: int = 1) -> Iterator[Floats]:
    """Iterate over blocks (R, S) of how often each sample occurs in each resample, drawn with replacement.

    Args:
        labels: N; limits the size of blocks for metrics that need (R, N) numbers, without affecting the samples.
    """
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(samples, labels))
    for first in range(0, resamples, block):
        count = min(block, resamples - first)
        index_RS = random.integers(0, samples, (count, samples)) + samples * np.arange(count)[:, None]
        yield np.bincount(index_RS.ravel(), minlength=count * samples).reshape(count, samples).astype(np.float64)


def _of_system(runs: Sequence[Outcome], metric: str, weights_RS: Floats) -> Floats:
    return np.asarray(np.mean([run.measure(metric, weights_RS) for run in runs], axis=0), np.float64)


def _accuracy(run: LabelOutcome, weights_RS: Floats) -> Floats:
    """Fraction of samples with exactly the true labels."""
    right_S, predicted_S, actual_S = run.counts_3S
    exact_S: Bools = (right_S == predicted_S) & (right_S == actual_S)
    return _mean(exact_S.astype(np.float64), weights_RS)


def _f1_macro(run: LabelOutcome, weights_RS: Floats) -> Floats:
    """Mean F1 over the labels that occur in the resample, as in `mopefuse.metrics.tally`; 0 if none occur."""
    right_RN, both_RN, actual_RN = _counts(run, weights_RS)
    f1_RN = 2 * right_RN / np.maximum(both_RN, 1)
    present_RN = actual_RN > 0
    return np.asarray((f1_RN * present_RN).sum(axis=1) / np.maximum(present_RN.sum(axis=1), 1), np.float64)


def _f1_micro(run: LabelOutcome, weights_RS: Floats) -> Floats:
    right_RN, both_RN, _ = _counts(run, weights_RS)
    return np.asarray(2 * right_RN.sum(axis=1) / np.maximum(both_RN.sum(axis=1), 1), np.float64)


def _f1_samples(run: LabelOutcome, weights_RS: Floats) -> Floats:
    """Mean F1 of a sample; one without labels counts 1 if none is predicted, else 0."""
    right_S, predicted_S, actual_S = run.counts_3S
    both_S = predicted_S + actual_S
    return _mean(np.where(both_S == 0, 1.0, 2 * right_S / np.maximum(both_S, 1)), weights_RS)


def _mean(value_S: Floats, weights_RS: Floats) -> Floats:
    return np.asarray(weights_RS @ value_S / len(value_S), np.float64)


def _counts(run: LabelOutcome, weights_RS: Floats) -> tuple[Floats, Floats, Floats]:
    """Numbers (R, N) of correct predictions of a label, of predictions plus true occurrences, and of true occurrences."""
    right_RN = weights_RS @ run.right_SN
    actual_RN = weights_RS @ run.actual_SN
    return right_RN, weights_RS @ run.predicted_SN + actual_RN, actual_RN


METRICS: dict[str, Callable[[LabelOutcome, Floats], Floats]] = {
    "accuracy": _accuracy,
    "f1_macro": _f1_macro,
    "f1_micro": _f1_micro,
    "f1_samples": _f1_samples,
}
"""Metrics that map an outcome and weights (R, S) to values (R,); for weights of 1 they equal
`mopefuse.metrics.tally`."""
