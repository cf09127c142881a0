"""The paired bootstrap compared with other implementations, and where the result is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.sparse import csr_array
from sklearn.metrics import f1_score
from tasks_of import MULTI, SINGLE

from mopefuse.metrics.bootstrap import METRICS, LabelOutcome, difference, draw_resamples

LABELS = 5


def outcome(predicted: np.ndarray, actual: np.ndarray) -> LabelOutcome:
    return LabelOutcome(csr_array(predicted.astype(float)), csr_array(actual.astype(float)))


def single(samples: int, share: float, seed: int) -> LabelOutcome:
    """A classifier that is right with a probability of about `share`; the true labels do not depend on the seed."""
    true = np.random.default_rng(0).integers(0, LABELS, samples)
    random = np.random.default_rng(seed)
    predicted = np.where(random.random(samples) < share, true, random.integers(0, LABELS, samples))
    return outcome(np.eye(LABELS)[predicted], np.eye(LABELS)[true])


def multi(samples: int, noise: float, seed: int) -> LabelOutcome:
    """Several labels per sample, or none; the fourth is rare and the fifth never true."""
    true = np.random.default_rng(0).random((samples, LABELS)) < np.array([0.5, 0.3, 0.2, 0.02, 0.0])
    return outcome(true ^ (np.random.default_rng(seed).random(true.shape) < noise), true)


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
def test_without_resampling_a_metric_equals_that_of_training(metric: str) -> None:
    run = single(80, 0.5, 1)
    logits, targets = torch.from_numpy(run.predicted_SN.toarray()), torch.from_numpy(run.actual_SN.toarray().argmax(1))
    expected = SINGLE.compute(logits, targets)[metric]
    assert METRICS[metric](run, np.ones((1, 80)))[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", ["f1_macro", "f1_micro", "f1_samples"])
def test_without_resampling_a_multi_label_metric_equals_that_of_training(metric: str) -> None:
    run = multi(80, 0.2, 1)
    logits = torch.from_numpy(run.predicted_SN.toarray()) * 2 - 1
    expected = MULTI.compute(logits, torch.from_numpy(run.actual_SN.toarray()).float())[metric]
    assert METRICS[metric](run, np.ones((1, 80)))[0] == pytest.approx(expected, abs=1e-12)


def by_hand(ours: list[LabelOutcome], theirs: list[LabelOutcome], metric: str, resamples: int, seed: int) -> list[float]:
    """Compute differences on resamples one by one, with scikit-learn on the samples that were drawn."""

    def score(run: LabelOutcome, chosen: np.ndarray) -> float:
        predicted, true = (table.toarray().astype(bool)[chosen] for table in (run.predicted_SN, run.actual_SN))
        if metric == "accuracy":
            return float(np.mean([(s == t).all() for s, t in zip(predicted, true, strict=True)]))
        if metric == "f1_samples":
            pairs = zip(predicted, true, strict=True)
            return float(np.mean([2 * (s & t).sum() / (s.sum() + t.sum()) if (s | t).any() else 1.0 for s, t in pairs]))
        labels = np.flatnonzero(true.any(axis=0)) if metric == "f1_macro" else None
        return float(f1_score(true, predicted, labels=labels, average=metric.removeprefix("f1_"), zero_division=0))

    random = np.random.default_rng(seed)
    size = ours[0].actual_SN.shape[0]
    found = []
    for _ in range(resamples):
        chosen = random.integers(0, size, size)
        found.append(np.mean([score(run, chosen) for run in ours]) - np.mean([score(run, chosen) for run in theirs]))
    return found


@pytest.mark.parametrize("metric", list(METRICS))
def test_interval_and_p_equal_those_computed_one_resample_at_a_time(metric: str) -> None:
    kind = single if metric == "accuracy" else multi
    ours, theirs = [kind(40, 0.2, seed) for seed in (1, 2)], [kind(40, 0.3, seed) for seed in (3, 4, 5)]
    drawn_by_hand = np.array(by_hand(ours, theirs, metric, 60, seed=9))
    found = difference(ours, theirs, metric, resamples=60, seed=9)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn_by_hand, [2.5, 97.5])), abs=1e-12)
    beyond = sum(abs(d - found.value) >= abs(found.value) - 1e-12 for d in drawn_by_hand)
    assert found.p == (1 + beyond) / 61


def test_the_interval_agrees_with_scipy() -> None:
    ours, theirs = single(500, 0.6, 1), single(500, 0.5, 2)
    right = [(run.predicted_SN.toarray() == run.actual_SN.toarray()).all(axis=1).astype(float) for run in (ours, theirs)]
    how = {"paired": True, "method": "percentile", "n_resamples": 10_000, "random_state": 3}
    scipy = stats.bootstrap(right, lambda a, b, axis: a.mean(axis) - b.mean(axis), **how)
    found = difference([ours], [theirs], "accuracy")
    assert found.value == pytest.approx(right[0].mean() - right[1].mean())
    assert (found.low, found.high) == pytest.approx(tuple(scipy.confidence_interval), abs=0.006)
    deviation = (right[0] - right[1]).std() / math.sqrt(500)
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(found.value) / deviation), abs=0.02)


@pytest.mark.parametrize("metric", list(METRICS))
def test_systems_with_equal_predictions_do_not_differ(metric: str) -> None:
    run = multi(60, 0.2, 1)
    found = difference([run, run], [run], metric, resamples=500)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_always_right_against_always_wrong_is_certain() -> None:
    right = single(50, 1.1, 1)
    wrong = outcome(np.roll(right.actual_SN.toarray(), 1, axis=1), right.actual_SN.toarray())
    found = difference([right], [wrong], "accuracy", resamples=999)
    assert (found.value, found.low, found.high, found.p) == (1, 1, 1, 1 / 1000)


def test_the_bootstrap_is_paired() -> None:
    """If two systems are right on almost the same samples, even a small difference is significant, however uncertain each
    metric is."""
    true = np.eye(2, dtype=bool)[np.zeros(400, dtype=int)]
    theirs = np.eye(2, dtype=bool)[np.arange(400) % 2]
    ours = theirs.copy()
    ours[1:21:2] = [True, False]
    found = difference([outcome(ours, true)], [outcome(theirs, true)], "accuracy")
    assert found.value == pytest.approx(10 / 400)
    assert found.low > 0
    assert found.p < 0.01


def test_swapping_the_systems_negates_the_difference() -> None:
    one, other = single(90, 0.6, 1), single(90, 0.5, 2)
    there, back = difference([one], [other], "f1_macro"), difference([other], [one], "f1_macro")
    assert (back.value, back.low, back.high, back.p) == pytest.approx((-there.value, -there.high, -there.low, there.p))


def test_resamples_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(draw_resamples(30, 50, seed=4)))
    monkeypatch.setattr("mopefuse.metrics.bootstrap._BLOCK", 90)
    assert len(list(draw_resamples(30, 50, seed=4))) == 17
    assert (np.concatenate(list(draw_resamples(30, 50, seed=4))) == whole).all()
    assert (whole.sum(axis=1) == 30).all()


def test_resamples_do_not_depend_on_the_number_of_labels() -> None:
    few, many = (np.concatenate([*draw_resamples(7, 50, 1, labels=labels)]) for labels in (5, 1_000_000))
    assert (few == many).all()
    assert few.shape == (50, 7)
