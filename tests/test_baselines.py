"""Simple models on frozen features that a warm start compares."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tasks_of import MULTI, SINGLE
from torch import Tensor

from mopefuse.config.method_settings import CrossAttention, Linear
from mopefuse.fusion import baselines
from mopefuse.fusion.baselines import Baseline, Baselines, fit_baselines, hold_out
from mopefuse.fusion.mlp_fit import NetworkSettings
from mopefuse.fusion.regression import FitSettings, Fold
from mopefuse.fusion.token_reader_fit import Reading, ReadingSettings, fit_reading
from mopefuse.metrics.significance import difference_in_errors, exceeds_noise
from mopefuse.tasks.regression import Regression

HOW = FitSettings(2, SINGLE, threshold=0.5, balanced=False, settings=Linear(strengths=(0.01, 1.0)))
NETWORK = NetworkSettings(hidden=64, dropout=0.0, seed=0)


def fold(samples: int, seed: int, label: Any) -> Fold:
    draw = torch.Generator().manual_seed(seed)
    features = {side: torch.randn(samples, 4, generator=draw) for side in ("main", "comp")}
    return Fold(features, label(**features).long())


def fit(label: Any, *, train: int = 1000, val: int = 600, how: FitSettings = HOW) -> Baselines:
    return fit_baselines(fold(train, 0, label), fold(val, 1, label), how, NETWORK, lambda what, share: None, seed=0)


def main_decides(main: Tensor, comp: Tensor) -> Tensor:
    return main[:, 0] > 0


def sum_decides(main: Tensor, comp: Tensor) -> Tensor:
    return main[:, 0] + comp[:, 1] > 0


def product_decides(main: Tensor, comp: Tensor) -> Tensor:
    return main[:, 0] * comp[:, 1] > 0


@pytest.mark.parametrize(
    ("label", "best"),
    [
        (main_decides, "logistic regression on main"),
        (sum_decides, "logistic regression on main and comp"),
        (product_decides, "MLP on main and comp"),
    ],
)
def test_the_model_that_suits_the_label_is_selected(label: Any, best: str) -> None:
    found = fit(label)
    scores = {one.name: one.score for one in found.fitted}
    if best.startswith("logistic regression on main and"):  # the average of both regressions has the same optimum here
        assert scores[best] >= max(scores.values()) - 0.02 and scores["logistic regression on main"] < 0.85
    else:
        assert found.best.name == best, scores
    assert found.best.score > 0.9


@pytest.mark.parametrize(
    ("scores", "losses", "overfits"),
    [
        ([0.5, 0.6], [0.7, 0.8], False),
        ([0.5, 0.6, 0.6], [0.7, 0.8, 0.9], False),
        ([0.6, 0.5, 0.6], [0.7, 0.8, 0.9], True),
        ([0.6, 0.5, 0.6], [0.7, 0.6, 0.9], False),
        ([0.5, 0.6, 0.6, 0.6], [0.7, 0.6, 0.8, 0.7], True),
    ],
)
def test_regularisation_is_not_reduced_further_once_two_models_overfit(
    scores: list[float], losses: list[float], overfits: bool
) -> None:
    found = [scored("one", score, loss) for score, loss in zip(scores, losses, strict=True)]
    assert baselines._overfits(found) is overfits


def test_small_data_are_cross_validated_and_folds_are_disjoint() -> None:
    train, val = fold(53, 0, main_decides), fold(20, 1, main_decides)
    pairs = hold_out(train, val, seed=3)
    assert len(pairs) == 6 and pairs[-1] == (train, val)
    held, fitted = (
        [{tuple(row) for row in one.features["main"][torch.arange(len(one.targets))].tolist()} for one in folds]
        for folds in ([pair.out for pair in pairs[:-1]], [pair.train for pair in pairs[:-1]])
    )
    assert all(not out & own for out, own in zip(held, fitted, strict=True))
    assert set().union(*held) == {tuple(row) for row in train.features["main"].tolist()} and sum(map(len, held)) == 53
    assert fit(main_decides, train=53, val=20).samples == 73
    assert len(hold_out(train, fold(500, 1, main_decides), seed=3)) == 1


def test_a_regression_is_scored_on_samples_that_it_was_not_fitted_on() -> None:
    noise = lambda main, comp: torch.arange(len(main)) % 2  # noqa: E731
    found = fit(noise, train=40, val=10)
    assert all(one.score < 0.75 for one in found.fitted), "noise cannot be predicted; a score near 1 is that of training"


def test_the_regression_equals_scikit_learns() -> None:
    how = HOW._replace(settings=Linear(strengths=(0.1,)))
    found = fit(sum_decides, how=how)
    train = fold(1000, 0, sum_decides)
    x = torch.cat([(table - table.mean(0)) / table.std(0, correction=0) for table in train.features.values()], dim=1)
    weight_NF, bias_N = next(one.model for one in found.fitted if one.name == "logistic regression on main and comp")
    expected = LogisticRegression(C=0.1).fit(x.double().numpy(), train.targets.numpy()).decision_function(x.double().numpy())
    logits_SN = x @ weight_NF.T + bias_N
    torch.testing.assert_close((logits_SN[:, 1] - logits_SN[:, 0]).double(), torch.from_numpy(expected), atol=2e-3, rtol=1e-3)


def test_fits_are_repeatable() -> None:
    one, other = (fit(product_decides, train=60, val=20).best.model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_multi_label_data_and_class_weights_are_supported() -> None:
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(1000, 4, generator=draw)
    targets = (torch.stack([table[:, 0] > 0, table[:, 1] * table[:, 2] > 0, table[:, 3] > 1], dim=1)).float()
    both = Fold({"main": table, "comp": table.flip(1)}, targets)
    how = FitSettings(3, MULTI, threshold="tuned", balanced=True, settings=HOW.settings)
    found = fit_baselines(both, both.rows(torch.arange(500)), how, NETWORK, lambda what, share: None, seed=0)
    assert found.best.name.startswith("MLP") and found.best.score > 0.8


@pytest.mark.parametrize(
    ("error", "best"), [(0.02, "second"), (0.002, "first")], ids=["within a standard error", "beyond a standard error"]
)
def test_the_loss_ranks_models_whose_scores_differ_by_noise(error: float, best: str) -> None:
    values = {"first": (0.92, 0.30), "second": (0.91, 0.28), "third": (0.5, 0.1)}
    fitted = [scored(name, *scores, error=error) for name, scores in values.items()]
    assert Baselines(fitted, {}, 100, 0, "f1_macro").best.name == best


def test_the_noise_of_a_share_and_of_an_explained_variance_are_those_of_the_samples() -> None:
    draw = torch.Generator().manual_seed(0)
    table, noise_S1 = torch.randn(1200, 4, generator=draw), torch.randn(1200, 1, generator=draw)
    value_S1 = table[:, :1] + noise_S1
    numbers, last_S = Regression().with_statistics(value_S1.double().numpy()), torch.arange(600)
    errors = {}
    for name, labels, task, targets in (("share", 2, SINGLE, (value_S1[:, 0] > 0).long()), ("numbers", 1, numbers, value_S1)):
        both = Fold({"main": table, "comp": table.flip(1)}, targets)
        how = FitSettings(labels, task, threshold=0.5, balanced=False, settings=HOW.settings)
        best = fit_baselines(both, both.rows(last_S), how, None, lambda what, share: None, seed=0).best_simple
        errors[name] = best.error, best.score, best.val_S.double()
    error, share, _ = errors["share"]
    assert error == pytest.approx((share * (1 - share) / 600) ** 0.5)
    error, variance, score_S = errors["numbers"]
    assert error == pytest.approx(float(score_S.std(correction=0)) / 600**0.5)
    assert error > 1.3 * (variance * (1 - variance) / 600) ** 0.5  # which is what it would be for a share


def scored(name: str, score: float, loss: float, val_S: Tensor | None = None, error: float = 0.01) -> Baseline:
    val_S = torch.tensor([score]) if val_S is None else val_S
    return Baseline(name, (torch.zeros(1, 1), torch.zeros(1)), score, error, loss, val_score=float(val_S.mean()), val_S=val_S)


@pytest.mark.parametrize(
    ("gained", "lost", "best"), [(3, 0, "reading"), (2, 0, "simple"), (11, 5, "simple"), (0, 5, "simple"), (13, 5, "reading")]
)
def test_cross_attention_is_preferred_only_beyond_noise(gained: int, lost: int, best: str) -> None:
    simple_S = torch.cat([torch.zeros(gained), torch.ones(lost), torch.zeros(100)])
    reading_S = torch.cat([torch.ones(gained), torch.zeros(lost), torch.zeros(100)])
    fitted = [scored("simple", 0.9, 0.3, simple_S), scored("lower loss", 0.1, 0.2, simple_S)]
    found = Baselines(fitted, {}, 10_000, 5, "f1_macro", scored("reading", 0.2, 9.0, reading_S))
    assert found.best.name == best
    assert found.trained_from.name == ("reading" if best == "reading" else "lower loss")
    assert found.summary().startswith(f"step 0: {best},")
    assert found.facts()["cross_attention"]["samples"] == len(reading_S) and found.facts()["best"] == best


class Tokens(NamedTuple):
    """Tokens of the samples of a fold."""

    values_SLD: Tensor

    def __getitem__(self, index_B: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        values_BLD = self.values_SLD[index_B]
        return {"values_BLC": values_BLD, "mask_BL": torch.ones(values_BLD.shape[:2], dtype=torch.bool)}


def binding(samples: int, seed: int) -> Fold:
    """The label is the sign that the token at one of four positions has; comp tells which, and main is the mean of all."""
    draw = torch.Generator().manual_seed(seed)
    place_S = torch.randint(4, (samples,), generator=draw)
    sign_SL = torch.randint(2, (samples, 4), generator=draw) * 2.0 - 1
    tokens_SLD = torch.cat([torch.eye(4).expand(samples, 4, 4), sign_SL[..., None]], dim=2)
    features = {"main": tokens_SLD.mean(dim=1), "comp": torch.eye(4)[place_S]}
    return Fold(features, (sign_SL[torch.arange(samples), place_S] > 0).long(), tokens=Tokens(tokens_SLD))


def test_cross_attention_finds_what_the_pooled_features_do_not_contain() -> None:
    train, val = binding(2000, 0), binding(600, 1)
    settings = ReadingSettings(CrossAttention(width=16, dropout=0.0), 5, NETWORK)
    found = fit_baselines(train, val, HOW, NETWORK, lambda what, share: None, seed=0, reading=settings)
    assert found.best is found.reading and found.reading.score > 0.95 > 0.9 > found.best_simple.score
    assert isinstance(found.best.model, Reading)
    one, other = (fit_reading(train, binding(2, 2), known_of(train), HOW, settings) for _ in range(2))
    first, again = (next(epochs) for epochs in (one, other))
    assert torch.equal(first[1], again[1]) and len(first[1]) == 2, "fits must be repeatable"


def known_of(train: Fold) -> dict[str, dict[str, Tensor]]:
    return {side: train.statistics(side) for side in train.features}


@pytest.mark.parametrize(
    ("gained", "lost", "samples", "expected"),
    [
        *((0, 0, 100, False), (1, 0, 100, False), (3, 0, 100, False), (7, 0, 100, True)),
        *((10, 6, 400, False), (14, 3, 400, True), (3, 12, 400, False)),
    ],
)
def test_an_improvement_counts_only_beyond_noise(gained: int, lost: int, samples: int, expected: bool) -> None:
    start_S = torch.zeros(samples)
    start_S[:lost] = 1
    score_S = torch.zeros(samples)
    score_S[lost : lost + gained] = 1
    difference = difference_in_errors(score_S, start_S)
    assert exceeds_noise([difference]) == expected
    assert difference_in_errors(start_S, score_S) == -difference


@pytest.mark.parametrize(
    ("differences", "expected"),
    [([2.0], False), ([2.0] * 2, False), ([2.0] * 3, True), ([0.0, 2.5, 1.0], False), ([3.0, 3.0, -0.5], True),
     ([9.0, 0.0, 0.0, 0.0], False), ([0.0, 0.0, 2.6], True)],
)  # fmt: skip
def test_an_improvement_that_lasts_counts_when_one_validation_alone_is_within_noise(
    differences: list[float], expected: bool
) -> None:
    assert exceeds_noise(differences) == expected


def test_models_that_differ_on_every_sample_alike_differ_by_a_finite_number() -> None:
    right_S, wrong_S = torch.ones(5), torch.zeros(5)
    found = [difference_in_errors(*pair) for pair in ((right_S, wrong_S), (wrong_S, right_S), (right_S, right_S))]
    assert found == [1e6, -1e6, 0.0]
