"""Logistic regression on frozen features: equal to scikit-learn's, an ordinary run, and a starting point for warm starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tasks_of import MULTI, SINGLE

from mopefuse.config.method_settings import Linear
from mopefuse.config.schema import build_config
from mopefuse.data.load import load_data
from mopefuse.encoders.base import create_encoder
from mopefuse.encoders.frozen import encode_pooled
from mopefuse.errors import ConfigError
from mopefuse.fusion._design_matrix import Design, Side, statistics
from mopefuse.fusion.regression import FitSettings, Fold, LinearHead, fit_heads, fit_regression
from mopefuse.runs.folder import RunFolder
from mopefuse.training.listener import Listener
from mopefuse.training.train import train

SPECS = {"main": "tiny:vision", "comp": "tiny:text"}
FEATURES = ("concat", "main", "comp", "average")
GRID = [0.01, 1.0]


def config(data: Path, /, features: str = "concat", **changed: Any) -> Any:
    values = {**SPECS, "method": "linear", "device": "cpu", "linear": {"features": features, "strengths": GRID}}
    return build_config(values | {"data": {"path": str(data)}} | changed)


def raw(data: Path, split: str, side: str) -> np.ndarray:
    """Features of a split, computed by the encoder alone."""
    where, encoder = build_config({**SPECS, "data": {"path": str(data)}}).data, create_encoder(SPECS[side])
    loaded = load_data(where)
    rows = loaded.splits[split].rows
    values = [loaded.read(loaded.splits[split], row, "text" if side == "comp" else "image", where) for row in rows]
    inputs = encoder.preprocess.batch([encoder.preprocess.item(value) for value in values])
    return encode_pooled(encoder, inputs).double().numpy()


def targets(data: Path, split: str) -> np.ndarray:
    return load_data(build_config({**SPECS, "data": {"path": str(data)}}).data).targets(split).numpy()


def by_hand(data: Path, sides: tuple[str, ...], split: str) -> tuple[np.ndarray, float]:
    """Return scikit-learn's probabilities on a split, and its C: scaler, regression, best accuracy on validation."""
    scaled = {s: StandardScaler().fit(raw(data, "train", s)) for s in sides}
    x = {name: np.hstack([scaled[s].transform(raw(data, name, s)) for s in sides]) for name in ("train", "val", split)}
    fitted = {c: LogisticRegression(C=c, max_iter=300).fit(x["train"], targets(data, "train")) for c in GRID}
    score = {c: (model.predict(x["val"]) == targets(data, "val")).mean() for c, model in fitted.items()}
    best = min(GRID, key=lambda c: (-score[c], c))
    return fitted[best].predict_proba(x[split]), best


def probabilities_of(run: Path) -> np.ndarray:
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    return np.array([list(row["probabilities"].values()) for row in rows])


@pytest.mark.parametrize("features", FEATURES)
def test_a_run_matches_scikit_learn(pairs: Path, tmp_path: Path, features: str) -> None:
    result = train(config(pairs, features), tmp_path / "run")
    if features == "average":
        expected = (by_hand(pairs, ("main",), "test")[0] + by_hand(pairs, ("comp",), "test")[0]) / 2
    else:
        expected, _ = by_hand(pairs, ("main", "comp") if features == "concat" else (features,), "test")
    np.testing.assert_allclose(probabilities_of(tmp_path / "run"), expected, atol=2e-4)
    assert (result["steps"], result["selected_step"]) == (0, 0)
    assert result["seconds"] > 0


@pytest.mark.parametrize("features", ["concat", "average"])
def test_multi_label_data_get_one_regression_per_label(multi_pairs: Path, tmp_path: Path, features: str) -> None:
    changed = {"linear": {"features": features, "strengths": [0.1]}, "train": {"threshold": "tuned"}}
    result = train(config(multi_pairs, **changed), tmp_path / "run")
    y, expected = targets(multi_pairs, "train"), []
    for sides in (("main", "comp"),) if features == "concat" else (("main",), ("comp",)):
        scaled = {s: StandardScaler().fit(raw(multi_pairs, "train", s)) for s in sides}
        x = {n: np.hstack([scaled[s].transform(raw(multi_pairs, n, s)) for s in sides]) for n in ("train", "test")}
        models = [LogisticRegression(C=0.1, max_iter=300).fit(x["train"], y[:, label]) for label in range(y.shape[1])]
        expected.append(np.stack([model.predict_proba(x["test"])[:, 1] for model in models], axis=1))
    np.testing.assert_allclose(probabilities_of(tmp_path / "run"), np.mean(expected, axis=0), atol=2e-4)
    assert set(result["thresholds"].values()) != {0.5}, "chosen on validation"


def test_a_run_can_be_evaluated_resumed_predicted_and_exported(pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(config(pairs), run)
    evaluated = call("eval", run, "--json")
    assert json.loads(evaluated.stdout)["metrics"] == pytest.approx(result["metrics"]["test"])
    again = train(config(pairs), run, resume=True)
    assert again == result
    assert call("predict", run, pairs / "test.jsonl", "-o", tmp_path / "predictions.jsonl").returncode == 0
    labels = [json.loads(line)["label"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert labels == [json.loads(line)["label"] for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert call("export", run, "--format", "adapter", "-o", tmp_path / "adapter").returncode == 0
    adapted = call("eval", tmp_path / "adapter", "--data", pairs, "--json")
    assert json.loads(adapted.stdout)["metrics"] == pytest.approx(result["metrics"]["test"])
    refused = call("swap-encoder", run, "--comp", "tiny:text-b", "-o", tmp_path / "swapped")
    assert (refused.returncode, "MF-CFG-100" in refused.stderr) == (3, True)


@pytest.mark.matrix
@pytest.mark.parametrize("features", ["average"])
def test_the_exported_graph_predicts_the_same(pairs: Path, tmp_path: Path, features: str) -> None:
    train(config(pairs, features), tmp_path / "run")
    done = call("export", tmp_path / "run", "-o", tmp_path / "bundle")  # refused unless the predictions match the model's
    assert done.returncode == 0, done.stderr


def test_a_run_killed_before_its_checkpoint_is_fitted_on_resume(pairs: Path, tmp_path: Path) -> None:
    class Killed(Listener):
        def on_notice(self, text: str) -> None:
            if "logistic" in text:
                raise KeyboardInterrupt

    whole = train(config(pairs), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config(pairs), tmp_path / "run", listener=Killed())
    assert train(config(pairs), tmp_path / "run", resume=True)["metrics"] == whole["metrics"]


@pytest.mark.parametrize(("method", "absent"), [("main-only", "comp"), ("comp-only", "main"), ("linear", "comp")])
def test_a_single_modality_method_needs_no_encoder_for_the_other(
    pairs: Path, tmp_path: Path, method: str, absent: str
) -> None:
    side = "comp" if absent == "main" else "main"
    extra = ["--set", "linear.features=main"] if method == "linear" else ["--steps", "1"]
    named = ("--method", method, f"--{side}", SPECS[side], "--data", pairs, "--out", tmp_path / "run")
    done = call("train", *named, "--batch", "4", *extra)
    assert done.returncode == 0, done.stderr
    assert call("eval", tmp_path / "run").returncode == 0
    assert list(RunFolder(tmp_path / "run").manifest()["encoders"]) == [side]
    with pytest.raises(ConfigError, match=f"{side} is missing"):
        build_config({"method": method, "linear": {"features": side}, absent: SPECS[absent]})
    with pytest.raises(ConfigError, match=f"{absent} is missing"):
        build_config({"method": "late-concat", side: SPECS[side]})


# -- the regression itself


def how(labels: int = 3, **changed: Any) -> FitSettings:
    known: dict[str, Any] = {"task": SINGLE, "threshold": 0.5, "balanced": False, "settings": Linear(strengths=(1.0,))}
    return FitSettings(labels, **(known | changed))


def drawn(rows: int = 40, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def design(x: torch.Tensor, labels: int = 3) -> Design:
    """Features that are already standardised."""
    known = {"mean_C": torch.zeros(x.shape[1]), "deviation_C": torch.ones(x.shape[1])}
    return Design([Side(x, known)], len(x), labels)


def fit(x: torch.Tensor, y: torch.Tensor, val_x: torch.Tensor, val_y: torch.Tensor, wanted: FitSettings) -> LinearHead:
    return fit_regression(design(x, wanted.labels), y, design(val_x, wanted.labels), val_y, wanted)


def test_statistics_come_from_the_training_split_and_constants_stay_finite() -> None:
    x = torch.cat([drawn() * 3 + 7, torch.full((40, 1), 1e4), torch.zeros(40, 1)], dim=1)
    found = statistics(x, torch.arange(len(x)))
    scaler = StandardScaler().fit(x.double().numpy())
    np.testing.assert_allclose(found["mean_C"], scaler.mean_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["deviation_C"], scaler.scale_, rtol=1e-5)
    assert found["deviation_C"][-2:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("present", [[0, 2], [1], [0, 1, 2]])
def test_labels_without_training_samples_are_never_predicted(present: list[int]) -> None:
    x, y = drawn(), torch.tensor(present * 40)[:40]
    found = fit(x, y, x, y, how())
    p = (x @ found.weight_NF.T + found.bias_N).softmax(dim=-1)
    assert p[:, [label for label in range(3) if label not in present]].sum() < 1e-4
    if len(present) == 2:
        expected = LogisticRegression(max_iter=300).fit(x.double(), y).predict_proba(x.double())
        np.testing.assert_allclose(p[:, present], expected, atol=1e-3)


def test_labels_of_all_or_no_samples_get_extreme_probabilities() -> None:
    x, y = drawn(), torch.stack([torch.ones(40), torch.zeros(40), (drawn(seed=1)[:, 0] > 0).float()], dim=1)
    found = fit(x, y, x, y, how(task=MULTI))
    p = (x @ found.weight_NF.T + found.bias_N).sigmoid()
    assert p[:, 0].min() > 0.999 and p[:, 1].max() < 0.001 and 0.001 < p[:, 2].mean() < 0.999


def test_the_smallest_c_with_the_best_validation_score_is_chosen() -> None:
    x = drawn(300)
    y = (x[:, 0] > 0).long()
    easy = fit(x, y, x * 2, y, how(2, settings=Linear(strengths=(10.0, 1e-9, 1.0))))
    assert easy.strength in (1.0, 10.0)
    same = fit(x, y, x[:0].new_zeros(4, 5), torch.zeros(4).long(), how(2, settings=Linear(strengths=(10.0, 1.0))))
    assert same.strength == 1.0


def test_balanced_class_weights_favour_rare_classes() -> None:
    x, y = drawn(200), torch.cat([torch.zeros(190), torch.ones(10)]).long()
    plain, balanced = (fit(x, y, x, y, how(2, balanced=on)) for on in (False, True))
    rare = [(x @ r.weight_NF.T + r.bias_N).argmax(dim=-1).sum() for r in (plain, balanced)]
    assert rare[1] > rare[0]


def test_heads_share_statistics_but_not_weights() -> None:
    folds = [Fold({"main": drawn(seed=1), "comp": drawn(seed=2)}, torch.arange(40) % 3) for _ in range(2)]
    state, chosen = fit_heads({"a": ("main",), "b": ("main", "comp")}, *folds, how())
    assert {name: tuple(t.shape) for name, t in state.items() if name.endswith("weight")} == {
        "a.weight": (3, 5), "b.weight": (3, 10)
    }  # fmt: skip
    assert chosen == {"main": 1.0, "main and comp": 1.0}
