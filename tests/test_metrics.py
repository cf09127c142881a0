"""Metrics compared with computations by hand and with scikit-learn, at their limits, and as JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from tasks_of import MULTI, SINGLE, task_of

from mopefuse.core.artifact import dump_json, finite
from mopefuse.metrics import classification as metrics
from mopefuse.metrics.thresholds import tuned_thresholds


def logits_of(predicted: list[int], labels: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predicted), labels).float() * 5


def flags(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float)


def multi_logits(predicted: torch.Tensor) -> torch.Tensor:
    return predicted * 8 - 4


def test_single_label_metrics_match_a_computation_by_hand() -> None:
    """Predicted 0 1 1 2, true 0 1 2 2: F1 of the labels is 1, 2/3 and 2/3."""
    got = SINGLE.compute(logits_of([0, 1, 1, 2], 3), torch.tensor([0, 1, 2, 2]))
    assert got["accuracy"] == 0.75
    assert got["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert got["absent_labels"] == 0
    right, wrong = -math.log(math.exp(5) / (math.exp(5) + 2)), -math.log(1 / (math.exp(5) + 2))
    assert got["loss"] == pytest.approx((3 * right + wrong) / 4, rel=1e-5)


def test_multi_label_metrics_match_a_computation_by_hand() -> None:
    """True {0}, {1}, {0,1}; predicted {0}, {0}, {1}: 2 true positives, 1 false positive, 2 false negatives."""
    got = MULTI.compute(multi_logits(flags([[1, 0], [1, 0], [0, 1]])), flags([[1, 0], [0, 1], [1, 1]]))
    assert got["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert got["f1_macro"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert got["f1_samples"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    right, wrong = math.log1p(math.exp(-4)), math.log1p(math.exp(4))
    assert got["loss"] == pytest.approx((3 * right + 3 * wrong) / 6, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits_SN = torch.randn(40, 4, generator=draw)
    single = torch.cat([torch.arange(4), torch.randint(4, (36,), generator=draw)])
    got, predicted = SINGLE.compute(logits_SN, single), logits_SN.argmax(-1).numpy()
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(single.numpy(), predicted))
    assert got["f1_macro"] == pytest.approx(sk.f1_score(single.numpy(), predicted, average="macro"))
    many = (torch.rand(40, 4, generator=draw) < 0.4).float()
    many[:, 0] = 1  # every sample has a label, and every label occurs
    many[0] = 1
    got, chosen = MULTI.compute(logits_SN, many), (logits_SN >= 0).numpy()
    for average in ("micro", "macro", "samples"):
        expected = sk.f1_score(many.numpy(), chosen, average=average, zero_division=0)
        assert got[f"f1_{average}"] == pytest.approx(expected)


def test_labels_that_a_split_lacks_are_counted_and_left_out_of_macro_f1() -> None:
    single = SINGLE.compute(logits_of([0, 1, 3], 5), torch.tensor([0, 1, 1]))
    assert single["absent_labels"] == 3
    assert single["f1_macro"] == pytest.approx((1 + 2 / 3) / 2)  # the wrong 3 costs recall of 1, not a third term
    multi = MULTI.compute(multi_logits(flags([[1, 0, 1], [1, 0, 0]])), flags([[1, 0, 0], [1, 0, 0]]))
    assert multi["absent_labels"] == 2
    assert multi["f1_macro"] == 1.0


@pytest.mark.parametrize(
    ("predicted", "expected"), [([[0, 0], [1, 0]], 1.0), ([[1, 0], [1, 0]], 0.5), ([[0, 0], [0, 1]], 0.5)]
)
def test_a_sample_without_labels_is_right_if_none_is_predicted(predicted: list[list[int]], expected: float) -> None:
    got = MULTI.compute(multi_logits(flags(predicted)), flags([[0, 0], [1, 0]]))
    assert got["f1_samples"] == expected


def test_a_split_without_any_label_has_finite_metrics() -> None:
    got = MULTI.compute(multi_logits(flags([[0, 0, 0], [1, 0, 0]])), torch.zeros(2, 3))
    assert (got["f1_samples"], got["f1_micro"], got["f1_macro"], got["absent_labels"]) == (0.5, 0.0, 0.0, 3)


def test_a_split_of_one_sample_has_metrics() -> None:
    assert SINGLE.compute(logits_of([1], 3), torch.tensor([1]))["f1_macro"] == 1.0
    assert MULTI.compute(multi_logits(flags([[1, 0]])), flags([[1, 0]]))["f1_samples"] == 1.0


def test_a_probability_at_the_threshold_counts_as_predicted() -> None:
    assert MULTI.compute(torch.zeros(1, 2), torch.ones(1, 2))["f1_micro"] == 1.0


@pytest.mark.parametrize("multi_label", [True, False])
def test_metrics_per_label_match_a_computation_by_hand(multi_label: bool) -> None:
    predicted, actual = [0, 1, 1, 0], [0, 1, 0, 0]
    if multi_label:
        tally = MULTI.count(
            multi_logits(torch.nn.functional.one_hot(torch.tensor(predicted), 3).float()),
            torch.nn.functional.one_hot(torch.tensor(actual), 3).float(),
        )
    else:
        tally = SINGLE.count(logits_of(predicted, 3), torch.tensor(actual))
    rows = tally.per_label(("a", "b", "c"))
    assert [row["label"] for row in rows] == ["a", "b", "c"]
    assert [row["support"] for row in rows] == [3, 1, 0]
    assert [row["precision"] for row in rows] == [1.0, 0.5, 0.0]
    assert [row["recall"] for row in rows] == [pytest.approx(2 / 3), 1.0, 0.0]


def test_probabilities_sum_to_one_or_are_independent() -> None:
    logits_SN = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(SINGLE.probabilities(logits_SN).sum(dim=-1), torch.ones(1))
    torch.testing.assert_close(MULTI.probabilities(logits_SN), 1 / (1 + (-logits_SN).exp()))


def test_the_selected_metric_is_among_the_computed_ones() -> None:
    assert SINGLE.metric == SINGLE.metrics[0] and {*SINGLE.metrics} <= {*SINGLE.compute(torch.eye(2), torch.arange(2))}
    assert MULTI.metric == MULTI.metrics[0] and {*MULTI.metrics} <= {*MULTI.compute(torch.eye(2), torch.eye(2))}


def test_nan_is_null_in_json() -> None:
    value = {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": (1, 2.5, True, None, "NaN")}
    assert finite(value) == {"a": None, "b": [None, {"c": None}], "d": [1, 2.5, True, None, "NaN"]}
    assert json.loads(dump_json(value)) == finite(value)


def test_metrics_are_plain_numbers_that_json_takes() -> None:
    for multi_label, target in ((False, torch.arange(2)), (True, torch.eye(2))):
        got = task_of(multi_label).compute(torch.eye(2), target)
        assert json.loads(json.dumps(got)) == got
        assert not any(isinstance(value, np.generic) for value in got.values())


# -- thresholds


def best_f1_by_trial(p_S: list[float], y_S: list[int]) -> float:
    """The best F1 over every set that a threshold can select."""
    best = 0.0
    for threshold in [*p_S, 2.0]:
        chosen = [p >= threshold for p in p_S]
        right = sum(c and y for c, y in zip(chosen, y_S, strict=True))
        best = max(best, 2 * right / max(1, sum(chosen) + sum(y_S)))
    return best


@given(st.lists(st.tuples(st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.2, 1.5]), st.booleans()), min_size=1, max_size=12))
def test_a_tuned_threshold_gives_the_best_possible_f1(samples: list[tuple[float, bool]]) -> None:
    logits = torch.tensor([[logit] * 2 for logit, _ in samples])
    targets = torch.tensor([[float(yes)] * 2 for _, yes in samples])
    threshold, same = tuned_thresholds(logits, targets)
    assert threshold == same
    assert 0 < threshold < 1
    if targets.sum() == 0:
        assert threshold == 0.5
        return
    found = MULTI.compute(logits, targets, thresholds=[threshold] * 2)
    p_S = MULTI.probabilities(logits)[:, 0].tolist()
    assert found["f1_macro"] == pytest.approx(best_f1_by_trial(p_S, [int(yes) for _, yes in samples]))


def test_each_label_has_its_own_threshold() -> None:
    logits = torch.tensor([[2.0, -2.0], [1.0, -3.0], [0.5, -4.0]])
    targets = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    thresholds = tuned_thresholds(logits, targets)
    p = logits.double().sigmoid()
    assert thresholds == pytest.approx([float(p[:2, 0].mean()), float(p[1:, 1].mean())])
    assert MULTI.compute(logits, targets, thresholds=thresholds)["f1_macro"] == 1
    assert MULTI.compute(logits, targets)["f1_macro"] == pytest.approx(0.25)
    rows = MULTI.count(logits, targets, thresholds).per_label(("x", "y"))
    assert [row["f1"] for row in rows] == [1, 1]


def test_calibration_matches_a_computation_by_hand() -> None:
    # four bins; confidences 0.55 and 0.75 share (0.5, 0.75], 0.9 is in the last
    p_SN = torch.tensor([[0.55, 0.45], [0.25, 0.75], [0.9, 0.1], [0.9, 0.1]])
    found = metrics.calibration(p_SN, torch.tensor([0, 0, 0, 0]), bins=4)
    assert found.bins[0] == found.bins[1] == (0.0, 0.0, 0)
    assert found.bins[2] == pytest.approx((0.65, 0.5, 2))
    assert found.bins[3] == pytest.approx((0.9, 1.0, 2))
    assert found.error == pytest.approx(0.5 * 0.15 + 0.5 * 0.1)


def test_for_multi_label_data_every_label_of_a_sample_is_a_prediction() -> None:
    p_SN, targets_SN = torch.tensor([[0.2, 0.7], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    found = metrics.calibration(p_SN, targets_SN, bins=2)
    assert found.bins == [pytest.approx((0.1, 0.0, 2)), pytest.approx((0.85, 1.0, 2))]
    assert found.error == pytest.approx(0.5 * 0.1 + 0.5 * 0.15)


def test_calibration_error_is_0_if_calibrated_and_1_if_confidently_wrong() -> None:
    targets = torch.tensor([0, 0, 0, 1])
    assert metrics.calibration(torch.tensor([[0.75, 0.25]] * 4), targets).error == pytest.approx(0.0, abs=1e-7)
    assert metrics.calibration(torch.tensor([[0.0, 1.0]] * 3), torch.tensor([0, 0, 0])).error == 1.0


def test_confusion_has_true_classes_in_rows_and_predictions_in_columns() -> None:
    found = metrics.confusion(torch.tensor([0, 2, 2, 1]), torch.tensor([0, 0, 2, 0]), 3)
    assert found.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]


def test_the_most_confused_classes_agree_with_the_confusion_matrix() -> None:
    draw = torch.Generator().manual_seed(0)
    predicted_S, targets_S = (torch.randint(6, (200,), generator=draw) for _ in range(2))
    matrix = metrics.confusion(predicted_S, targets_S, 6).tolist()
    pairs = sorted((-matrix[i][j], i, j) for i in range(6) for j in range(6) if i != j)
    assert metrics.most_confused(predicted_S, targets_S, 6, most=9) == [(-count, i, j) for count, i, j in pairs[:9]]
    assert metrics.most_confused(targets_S, targets_S, 6, most=9) == []


@pytest.mark.parametrize("multi_label", [False, True])
def test_sample_losses_average_to_the_loss(multi_label: bool) -> None:
    logits_SN = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    targets = (logits_SN > 0.3).float() if multi_label else torch.arange(9) % 4
    mean = float(task_of(multi_label).loss(logits_SN, targets).mean())
    assert mean == pytest.approx(task_of(multi_label).compute(logits_SN, targets)["loss"], rel=1e-5)


# -- metrics of probabilities


@pytest.mark.parametrize("multi", [False, True])
def test_ranking_metrics_equal_scikit_learns(multi: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    logits_SN = torch.randn(60, 7, generator=draw)
    targets = (torch.rand(60, 7, generator=draw) < 0.3).float() if multi else torch.randint(7, (60,), generator=draw)
    task, actual_SN = task_of(multi), (targets if multi else torch.nn.functional.one_hot(targets, 7)).numpy()
    p_SN = task.probabilities(logits_SN).double().numpy()
    found = task.compute(logits_SN, targets)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(actual_SN, p_SN, average="macro"))
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(actual_SN, p_SN, average="macro"))
    assert found["calibration_error"] == metrics.calibration(task.probabilities(logits_SN), targets).error
    if not multi:
        wanted = sk.top_k_accuracy_score(targets.numpy(), p_SN, k=5, labels=np.arange(7))
        assert found["top5_accuracy"] == pytest.approx(wanted)


def test_labels_that_all_or_no_samples_have_cannot_be_ranked() -> None:
    targets = torch.tensor([[1.0, 1, 0], [0, 1, 0], [1, 1, 0]])
    logits = torch.tensor([[2.0, 0, 0], [1, 0, 0], [3, 0, 0]])
    assert MULTI.compute(logits, targets)["auroc"] == 1.0
    assert math.isnan(MULTI.compute(logits[:, 1:], targets[:, 1:])["auroc"])


def test_ranking_metrics_of_large_splits_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopefuse.metrics.ranking.MOST", 20)
    found = SINGLE.compute(torch.randn(3, 7), torch.arange(3))
    assert {"auroc", "calibration_error"}.isdisjoint(found) and "top5_accuracy" in found
    assert "auroc" in SINGLE.compute(torch.randn(2, 7), torch.arange(2))


def test_the_top_five_break_ties_as_the_prediction_does() -> None:
    same = torch.zeros(7, 7)
    assert SINGLE.compute(same, torch.arange(7))["top5_accuracy"] == pytest.approx(5 / 7)
    assert SINGLE.compute(same, torch.arange(7))["accuracy"] == pytest.approx(1 / 7)
