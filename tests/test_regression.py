"""Regressions of all labels at once: the optimum that scikit-learn finds for each, in little time and bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import matrix
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from tasks_of import MULTI, SINGLE, task_of
from torch import Tensor

from mopefuse.cli import _train_display
from mopefuse.config.method_settings import Linear
from mopefuse.core import device as devices
from mopefuse.errors import NumericError
from mopefuse.fusion import _design_matrix, _logistic
from mopefuse.fusion._design_matrix import Design, Side
from mopefuse.fusion._lbfgs import Evaluation, minimise
from mopefuse.fusion.regression import FitSettings, Fold, LinearHead, fit_heads, fit_regression
from mopefuse.fusion.regression import _binary_problem as binary_problem
from mopefuse.fusion.regression import _multinomial_problem as multinomial_problem

STRENGTHS = (1e-3, 1e-1, 10.0)


def how(labels: int, **changed: Any) -> FitSettings:
    known: dict[str, Any] = {"task": SINGLE, "threshold": 0.5, "balanced": False, "settings": Linear()}
    return FitSettings(labels, **(known | changed))


def design(x: Tensor, labels: int) -> Design:
    known = {"mean_C": torch.zeros(x.shape[1]), "deviation_C": torch.ones(x.shape[1])}
    return Design([Side(x, known)], len(x), labels)


def correlated(rows: int, width: int, *, seed: int = 0) -> Tensor:
    """Features whose covariance has eigenvalues that decrease like those of real encoders; every deviation is 1."""
    random = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(width, width, generator=random))[0]
    x = torch.randn(rows, width, generator=random) / torch.arange(1, width + 1) @ turned
    return (x - x.mean(dim=0)) / x.std(dim=0, correction=0)


def classes(x: Tensor, labels: int, *, seed: int = 1, sure: float = 2.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    score = x @ torch.randn(x.shape[1], labels, generator=random)
    noise = -torch.log(-torch.log(torch.rand(len(x), labels, generator=random)))
    return (sure * score / score.std(dim=0) + noise).argmax(dim=1)


def several(x: Tensor, labels: int, *, seed: int = 1) -> Tensor:
    """Labels of different frequency, from about 1 in 50 samples to half of them."""
    random = torch.Generator().manual_seed(seed)
    score = x @ torch.randn(x.shape[1], labels, generator=random)
    share = torch.sigmoid(2 * score / score.std(dim=0) + torch.linspace(-6, 0, labels))
    return (torch.rand(len(x), labels, generator=random) < share).float()


def separable(x: Tensor, labels: int) -> Tensor:
    return (x[:, :labels] > 0).float() if labels > 1 else (x[:, 0] > 0).long()


PROBLEMS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]] = {
    "binary": (lambda: correlated(400, 20), lambda x: classes(x, 2)),
    "multinomial": (lambda: correlated(600, 30), lambda x: classes(x, 5)),
    "several": (lambda: correlated(600, 30), lambda x: several(x, 6)),
    "fewer samples than features": (lambda: correlated(50, 80), lambda x: classes(x, 3)),
    "separable": (lambda: correlated(200, 10), lambda x: separable(x, 1)),
    "separable, several": (lambda: correlated(200, 10), lambda x: separable(x, 3)),
    "constant feature": (lambda: torch.cat([correlated(300, 10), torch.zeros(300, 2)], dim=1), lambda x: several(x[:, :10], 4)),
    "equal features": (lambda: correlated(300, 10).repeat(1, 3), lambda x: classes(x, 4)),
    "badly scaled": (lambda: correlated(400, 12) * torch.logspace(-3, 3, 12), lambda x: classes(x / x.std(dim=0), 3)),
}


def objective(x: Tensor, y: Tensor, weight: np.ndarray, bias: np.ndarray, strength: float, balanced: bool) -> np.ndarray:
    """scikit-learn's objective in float64, for each label, or for all classes together."""
    logits = x.double() @ torch.from_numpy(weight).double().T + torch.from_numpy(bias).double()
    if y.ndim == 2:
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.double(), reduction="none")
        penalty = np.square(weight).sum(axis=1)
    else:
        losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")[:, None]
        penalty = np.square(weight).sum(keepdims=True)[0]
    sample_weight = np.ones(losses.shape)
    if balanced:
        columns = y.T if y.ndim == 2 else y[None]
        sample_weight = np.stack([compute_sample_weight("balanced", column) for column in columns], axis=1)
    return np.asarray(strength * (losses.numpy() * sample_weight).sum(axis=0) + penalty / 2)


def by_scikit_learn(x: Tensor, y: Tensor, strength: float, balanced: bool) -> tuple[np.ndarray, np.ndarray]:
    weights = "balanced" if balanced else None
    model = lambda: LogisticRegression(C=strength, tol=1e-8, class_weight=weights, solver="newton-cholesky")  # noqa: E731
    if y.ndim == 2:
        models = [model().fit(x.double(), column) for column in y.T.int().numpy()]
        return np.concatenate([m.coef_ for m in models]), np.concatenate([m.intercept_ for m in models])
    found = model().fit(x.double(), y)
    return found.coef_, found.intercept_


def solved(x: Tensor, y: Tensor, balanced: bool, strengths: tuple[float, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Our solutions for one C after another; for two classes the single row that scikit-learn has."""
    labels = y.shape[1] if y.ndim == 2 else int(y.max()) + 1
    wanted = how(labels, task=task_of(y.ndim == 2), balanced=balanced)
    fitted = (binary_problem if wanted.task.uses_thresholds else multinomial_problem)(design(x, labels), y, wanted)
    assert fitted.regression is not None
    return [
        tuple(part.numpy() for part in fitted.regression.solve(strength, 1000, lambda share: None)) for strength in strengths
    ]


@pytest.mark.parametrize("balanced", matrix([False, True], [True]))
@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_optimum_equals_scikit_learns(
    problem: str, exact: bool, balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_design_matrix, "_MAX_FLOAT64_PRODUCTS", 1e9 if exact else 0)
    make, label = PROBLEMS[problem]
    x = make()
    y = label(x)
    judged = torch.nn.functional.one_hot(y).float()[:, 1:] if y.ndim == 1 and int(y.max()) == 1 else y  # one row
    for strength, (weight, bias) in zip(STRENGTHS, solved(x, y, balanced, STRENGTHS), strict=True):
        theirs = by_scikit_learn(x, y, strength, balanced)
        expected = objective(x, judged, *theirs, strength, balanced)
        np.testing.assert_allclose(objective(x, judged, weight, bias, strength, balanced), expected, rtol=1e-4)
        if exact:
            features = x.double().numpy()
            logits, expected = (features @ part[0].T + part[1] for part in ((weight, bias), theirs))
            if y.ndim == 1 and logits.shape[1] > 1:  # adding a constant to all classes changes nothing
                logits, expected = (each - each.mean(axis=1, keepdims=True) for each in (logits, expected))
            np.testing.assert_allclose(logits, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("strength", [1e-10, 1e10])
@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("labels", [1, 3])
def test_extreme_values_of_c_give_finite_weights(
    strength: float, exact: bool, labels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_design_matrix, "_MAX_FLOAT64_PRODUCTS", 1e9 if exact else 0)
    x = correlated(200, 10)
    y = separable(x, labels)
    steps = 0
    evaluate = _logistic.LogisticRegression._evaluate

    def counted(self: Any, *args: Any) -> Evaluation:
        nonlocal steps
        steps += 1
        return evaluate(self, *args)

    monkeypatch.setattr(_logistic.LogisticRegression, "_evaluate", counted)
    weight, bias = solved(x, y, False, (strength,))[0]
    assert np.isfinite(weight).all() and np.isfinite(bias).all()
    assert steps < 2000
    if strength > 1:
        truth = y.numpy() if y.ndim == 2 else y[:, None].numpy()
        assert (((x.numpy() @ weight.T + bias) > 0) == (truth > 0)).all()
    else:
        assert np.abs(weight).max() < 1e-6


def test_features_of_any_scale_are_standardised_as_in_scikit_learn() -> None:
    x = correlated(500, 12)
    raw = {"main": x[:, :6] * 1e4 + 1e5, "comp": x[:, 6:] * 1e-5 + 1e-4}
    y = classes(x, 4)
    fold = Fold(raw, y)
    wanted = how(4, settings=Linear(strengths=(0.1,)))
    state, _ = fit_heads({"head": ("main", "comp")}, fold, fold, wanted)
    ready = [(raw[s].double() - state[f"standard.{s}.mean_C"]) / state[f"standard.{s}.deviation_C"] for s in raw]
    ours = torch.cat(ready, dim=1) @ state["head.weight"].double().T + state["head.bias"]
    scaled = np.hstack([StandardScaler().fit_transform(raw[side].double()) for side in raw])
    model = LogisticRegression(C=0.1, tol=1e-8, max_iter=20_000).fit(scaled, y)
    np.testing.assert_allclose(ours.softmax(dim=-1), model.predict_proba(scaled), atol=2e-3)


def test_samples_that_lack_a_side_use_its_mean() -> None:
    x = correlated(400, 12)
    y = several(x, 3)
    lacks = torch.rand(400, generator=torch.Generator().manual_seed(5)) < 0.3
    fold = Fold({"main": x[:, :6], "comp": x[:, 6:].masked_fill(lacks[:, None], 1e6)}, y, {"comp": lacks})
    wanted = how(3, task=MULTI, settings=Linear(strengths=(1.0,)))
    state, _ = fit_heads({"head": ("main", "comp")}, fold, fold, wanted)
    comp = StandardScaler().fit(x[~lacks, 6:].double()).transform(x[:, 6:].double())
    comp[lacks.numpy()] = 0
    ready = np.hstack([StandardScaler().fit_transform(x[:, :6].double()), comp])
    weight, bias = by_scikit_learn(torch.from_numpy(ready), y, 1.0, False)
    np.testing.assert_allclose(state["head.weight"], weight, atol=1e-3)
    np.testing.assert_allclose(state["head.bias"], bias, atol=1e-3)


def test_constant_labels_do_not_affect_the_others() -> None:
    x = correlated(300, 10)
    y = several(x, 4)
    padded = torch.cat([torch.ones(300, 1), y[:, :2], torch.zeros(300, 1), y[:, 2:]], dim=1)
    wanted = how(4, task=MULTI)
    alone = fit(x, y, wanted)
    among = fit(x, padded, wanted._replace(labels=6))
    kept = [1, 2, 4, 5]
    torch.testing.assert_close(among.weight_NF[kept], alone.weight_NF, atol=1e-4, rtol=1e-4)
    assert among.bias_N[0] > 20 and among.bias_N[3] < -20
    assert not among.weight_NF[[0, 3]].any()


def fit(x: Tensor, y: Tensor, wanted: FitSettings) -> LinearHead:
    return fit_regression(design(x, wanted.labels), y, design(x, wanted.labels), y, wanted)


class Recorder:
    """A table that records how many rows are read at once."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.reads = x, list[int]()

    def __getitem__(self, index_B: Tensor) -> Tensor:
        self.reads.append(len(index_B))
        return self.x[index_B]


@pytest.mark.parametrize("multi", [True, False])
def test_a_table_larger_than_memory_is_read_in_blocks_with_identical_results(
    multi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_design_matrix, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(_logistic, "_SAMPLED", 100)
    x = correlated(500, 8)
    y = several(x, 3) if multi else classes(x, 3)
    found, reads = [], []
    for free in (2**40, 1000, None):
        monkeypatch.setattr(devices, "free_memory", lambda device, free=free: free)
        table = Recorder(x)
        fold = Fold({"main": table}, y)
        wanted = how(3, task=task_of(multi), settings=Linear(strengths=(0.1, 1.0)))
        found.append(fit_heads({"head": ("main",)}, fold, fold, wanted)[0])
        reads.append(table.reads)
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])
    assert max(map(max, reads)) <= 125, "a block, or the rows for the covariance estimate"
    assert len(reads[0]) < len(reads[1]) == len(reads[2]), "blocks are cached if memory allows"


def test_many_labels_are_fitted_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(300, 10)
    y = several(x, 7)
    whole = fit(x, y, how(7, task=MULTI))
    monkeypatch.setattr(_logistic, "_HISTORY_BYTES", 16 * 10 * 11 * 3)  # three labels
    parts = fit(x, y, how(7, task=MULTI))
    torch.testing.assert_close(parts.weight_NF, whole.weight_NF, atol=1e-3, rtol=1e-3)
    assert parts.strength == whole.strength


def test_more_features_than_one_eigenbasis_holds_are_fitted_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_logistic, "_WIDEST", 8)
    x = correlated(400, 20)
    y = classes(x, 3)
    weight, bias = solved(x, y, False, (1.0,))[0]
    expected = objective(x, y, *by_scikit_learn(x, y, 1.0, False), 1.0, False)
    np.testing.assert_allclose(objective(x, y, weight, bias, 1.0, False), expected, rtol=1e-6)


def test_the_fit_is_deterministic() -> None:
    x = correlated(300, 10)
    for y, multi in ((several(x, 4), True), (classes(x, 4), False)):
        one, two = (fit(x, y, how(4, task=task_of(multi))) for _ in range(2))
        assert torch.equal(one.weight_NF, two.weight_NF) and torch.equal(one.bias_N, two.bias_N)


def test_many_labels_take_seconds() -> None:
    """40 labels and six strengths: one fit of scikit-learn for each takes 38 s of one core, all at once less than 2 s."""
    x = correlated(3000, 384)
    y = several(x, 40)
    began = time.process_time()
    fit(x, y, how(40, task=MULTI))
    assert time.process_time() - began < 12


def test_progress_grows_from_0_to_1() -> None:
    x = correlated(300, 10)
    progress = list[tuple[str, float]]()
    fold = Fold({"main": x, "comp": x}, several(x, 4))
    wanted = how(4, task=MULTI)
    fit_heads({"a": ("main",), "b": ("main", "comp")}, fold, fold, wanted, lambda what, share: progress.append((what, share)))
    shares = [share for _, share in progress]
    assert shares == sorted(shares) and shares[0] < 0.1 and 0.95 < shares[-1] <= 1 + 1e-9
    assert progress[0][0] == "logistic regression on main, C 0.0001"
    assert progress[-1][0] == "logistic regression on main and comp, C 10"


# -- the minimiser


def test_each_problem_is_minimised_independently() -> None:
    random = torch.Generator().manual_seed(0)
    scale_GP = torch.logspace(0, 5, 6, dtype=torch.double).expand(4, 6) * torch.rand(4, 6, generator=random).double()
    goal_GP = torch.randn(4, 6, generator=random).double()
    active = list[int]()

    def quadratic(x_AP: Tensor, index_A: Tensor) -> Evaluation:
        active.append(len(index_A))
        away_AP = x_AP - goal_GP[index_A]
        value_A = 1 + (scale_GP[index_A] * away_AP**2).sum(dim=-1) / 2
        return Evaluation(value_A, scale_GP[index_A] * away_AP, torch.ones_like(x_AP))

    start_GP = torch.zeros(4, 6, dtype=torch.double)
    start_GP[1] = goal_GP[1]  # solved from the start
    found = minimise(quadratic, start_GP, tolerance=1e-12, noise=1e-15, max_iter=500)
    torch.testing.assert_close(found, goal_GP, atol=1e-4, rtol=1e-4)
    assert active[0] == 4 and max(active[1:]) <= 3, "solved problems are not evaluated again"
    cut = minimise(quadratic, start_GP, tolerance=1e-12, noise=1e-15, max_iter=2)
    assert torch.isfinite(cut).all() and not torch.allclose(cut, goal_GP, atol=1e-4)


def test_the_line_search_backtracks_from_overflow() -> None:
    def steep(x_AP: Tensor, index_A: Tensor) -> Evaluation:
        value_A = (x_AP.exp() - 2 * x_AP).sum(dim=-1)  # with a curvature of 1e-3, the first step goes to 1000
        return Evaluation(value_A, x_AP.exp() - 2, torch.full_like(x_AP, 1e-3))

    found = minimise(steep, torch.zeros(2, 1, dtype=torch.double), tolerance=1e-12, noise=1e-15, max_iter=200)
    torch.testing.assert_close(found, torch.full((2, 1), 2.0, dtype=torch.double).log(), atol=1e-5, rtol=0)


def test_a_long_fit_shows_its_remaining_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 0.0, 4.0, 8.0, 12.0])
    monkeypatch.setattr(_train_display, "time", SimpleNamespace(monotonic=lambda: next(times)))
    display = _train_display.Display(tmp_path, json=False)  # at 0 s
    for done in (0, 10, 20, 30):  # 4 s for each tenth; a line after 10 s
        display.on_data_progress("logistic regression on main, C 0.1", done, 100)
    assert capsys.readouterr().err == "logistic regression on main, C 0.1  30/100  eta 0:28\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_an_error(value: float) -> None:
    features = correlated(30, 8)
    features[3, 2] = value
    fold = Fold({"comp": features}, torch.arange(30) % 3)
    with pytest.raises(NumericError, match="a feature of the comp encoder is not finite"):
        fit_heads({"head": ("comp",)}, fold, fold, how(3))


@pytest.mark.parametrize("rows", [3, 50])
@pytest.mark.parametrize("balanced", [False, True])
def test_uninformative_features_give_the_frequencies_of_classes(rows: int, balanced: bool) -> None:
    fold = Fold({"comp": torch.zeros(rows, 8)}, torch.arange(rows) % 3)
    state, _ = fit_heads({"head": ("comp",)}, fold, fold, how(3, balanced=balanced))
    assert not state["head.weight"].any()
    counts = torch.bincount(fold.targets).double()  # type: ignore[arg-type]
    wanted = torch.full((3,), 1 / 3, dtype=torch.double) if balanced else counts / rows
    assert (state["head.bias"].double().softmax(dim=0) - wanted).abs().max() < 1e-4
