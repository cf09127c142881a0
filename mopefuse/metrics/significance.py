"""Whether a model is better than another by more than the noise of the samples on which both are evaluated.

Shapes: S samples.
"""

from __future__ import annotations

from torch import Tensor

ERRORS = 2.576
"""Standard errors that a difference without a cause exceeds in one of two hundred comparisons: with ten validations a run, in
one of twenty runs."""


def exceeds_noise(score_S: Tensor, baseline_S: Tensor, errors: float = ERRORS) -> bool:
    """Whether the mean of paired differences between two models exceeds `errors` of its standard errors (paired z-test).

    For scores of 0 and 1 this is McNemar's test (Psychometrika 12, 1947) with the variance estimated from the sample.

    Args:
        score_S, baseline_S: scores of the same samples, such as `mopefuse.metrics.classification.Tally.by_sample`.
    """
    difference_S = score_S.double() - baseline_S.double()
    mean = float(difference_S.mean())
    return mean > 0 and mean > errors * float(difference_S.std(correction=0)) / len(difference_S) ** 0.5
