"""Whether a model is better than another by more than the noise of the samples on which both are evaluated.

Shapes: S samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_ERRORS = 2.576
"""Standard errors that a difference without a cause exceeds in one of two hundred comparisons: with ten validations a run, in
one of twenty runs."""
LASTING = 3
_SINGLE_ERRORS = 1.645
"""Standard errors that a difference without a cause exceeds in one of twenty comparisons. The average over `LASTING`
validations in a row must exceed it: if the validations of a run agree with each other, that is in one of twenty runs."""
_HIGHEST = 1e6  # of a difference that is the same for all samples, and has no standard error


def difference_in_errors(score_S: Tensor, baseline_S: Tensor) -> float:
    """The mean of paired differences between two models, in standard errors of this mean (the statistic of a paired z-test).

    For scores of 0 and 1 this is McNemar's test (Psychometrika 12, 1947) with the variance estimated from the sample.

    Args:
        score_S, baseline_S: scores of the same samples, such as `mopefuse.metrics.classification.Tally.by_sample`.
    """
    difference_S = score_S.double() - baseline_S.double()
    mean, error = float(difference_S.mean()), float(difference_S.std(correction=0)) / len(difference_S) ** 0.5
    limit = _HIGHEST * error
    return mean / error if abs(mean) < limit else _HIGHEST * ((mean > 0) - (mean < 0))


def exceeds_noise(differences: Sequence[float]) -> bool:
    """Whether the last of several validations shows that a model has become better than its baseline.

    It does if it is clearly better itself, or if the last `LASTING` validations are on average: an improvement that lasts is
    noticed with fewer samples, while a single lucky validation is not enough.

    Args:
        differences: `difference_in_errors` of successive validations.
    """
    lasting = differences[-LASTING:]
    return differences[-1] > _ERRORS or (len(lasting) == LASTING and sum(lasting) / LASTING > _SINGLE_ERRORS)


def is_probably_better(score_S: Tensor, baseline_S: Tensor) -> bool:
    """Whether a model is better than another in a single comparison, by more than chance gives in one of twenty.

    Args:
        score_S, baseline_S: see `difference_in_errors`.
    """
    return difference_in_errors(score_S, baseline_S) > _SINGLE_ERRORS
