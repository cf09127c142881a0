"""A warm start: step 0 is logistic regression, and later steps are selected only if validation improves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, make_pairs, matrix, plain_config
from tasks_of import SINGLE

from mopefuse.config.schema import RunConfig
from mopefuse.core.error_codes import ConfigCode
from mopefuse.core.tensor_files import read_tensors
from mopefuse.data.feature_cache import split_features
from mopefuse.data.load import load_data
from mopefuse.errors import ConfigError
from mopefuse.evaluation.split import model_outputs
from mopefuse.fusion.baselines import fit_baselines
from mopefuse.fusion.build import build_model
from mopefuse.fusion.mlp_fit import Network, NetworkSettings
from mopefuse.fusion.regression import FitSettings, Fold
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import load_model
from mopefuse.training.plan import resolve_defaults
from mopefuse.training.swap import swap_encoder
from mopefuse.training.train import train

BASE: dict[str, Any] = {
    "main": "tiny:vision",
    "comp": "tiny:text",
    "device": "cpu",
    "seed": 5,
    "prompts": {"static": 2, "dynamic": 2, "experts": 4},
    "linear": {"strengths": [0.01, 1.0]},
    "train": {"epochs": 2, "batch_size": 6, "lr": 1e-2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data", counts={"train": 20, "val": 7, "test": 5})


def config(data: Path, /, **changed: Any) -> Any:
    values = json.loads(json.dumps(BASE)) | {"data": {"path": str(data)}, "warm_start": "linear"}
    for path, value in changed.items():
        section, _, key = path.partition("__")
        values[section] = value if not key else {**values.get(section, {}), key: value}
    return plain_config(values)


def probabilities_of(run: Path) -> np.ndarray:
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    return np.array([list(row["probabilities"].values()) for row in rows])


VARIANTS: list[dict[str, Any]] = [
    {},
    {"main": "tiny:text", "comp": "tiny:vision"},
    {"prompts__dynamic": 0, "prompts__mapped": 0},
    {"prompts__static": 0, "prompts__dynamic": 0, "prompts__mapped": 0},
    {"router__kind": "joint"},
    {"comp_tuning__mode": "prompts"},
    {"comp_tuning__mode": "full"},
    {"data__cache_features": False},
]


@pytest.mark.parametrize("changed", VARIANTS, ids=str)
def test_step_0_predicts_like_the_method_linear(data: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    train(config(data, **changed, train__epochs=0), tmp_path / "warm")
    train(config(data, **changed, warm_start="none", method="linear"), tmp_path / "linear")
    weights = [read_tensors(RunFolder(tmp_path / n).checkpoint()[0] / "weights.safetensors") for n in ("warm", "linear")]
    for name in ("head.weight", "head.bias", "standard.main.mean_C", "standard.comp.deviation_C"):
        assert torch.equal(weights[0][name], weights[1][name]), name
    np.testing.assert_allclose(probabilities_of(tmp_path / "warm"), probabilities_of(tmp_path / "linear"), atol=1e-5)
    assert len(np.unique(probabilities_of(tmp_path / "warm").round(3))) > 3, "equal predictions could not show a difference"


def test_logits_of_step_0_equal_those_of_the_regression(data: Path, tmp_path: Path) -> None:
    logits = []
    for settings in (config(data, train__epochs=0), config(data, warm_start="none", method="linear")):
        train(settings, tmp_path / settings.method)
        model = build_model(settings, 3)
        path = RunFolder(tmp_path / settings.method).checkpoint()[0]
        model.load_trainable_state_dict(read_tensors(path / "weights.safetensors"), where="here")
        from test_fusion import TEXTS, images

        logits.append(model(model.collate(images(5), TEXTS)).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_later_steps_are_selected_only_if_validation_improves(data: Path, tmp_path: Path) -> None:
    result = train(config(data, train__lr=1e-6, train__epochs=1), tmp_path / "idle")  # too slow to change a prediction
    assert (result["selected_step"], result["steps"]) == (0, 4)
    log = RunFolder(tmp_path / "idle").read_log()
    assert [line["step"] for line in log if "val" in line] == [0, 4]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(data: Path, tmp_path: Path) -> None:
    train(config(data), tmp_path / "whole")
    train(config(data, train__epochs=1, train__schedule="constant"), tmp_path / "a")
    train(config(data, train__schedule="constant"), tmp_path / "b")
    train(config(data, train__schedule="constant"), tmp_path / "a", resume=True)
    one, other = (read_tensors(RunFolder(tmp_path / n).checkpoint("last")[0] / "weights.safetensors") for n in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_head_is_trained_and_the_statistics_are_fixed(data: Path, tmp_path: Path) -> None:
    settings = config(data)
    model = build_model(settings, 3)
    train(settings, tmp_path / "run")
    start, end = (
        read_tensors(RunFolder(tmp_path / "run").checkpoint(which)[0] / "weights.safetensors") for which in ("step-0", "last")
    )
    assert all(torch.equal(start[n], end[n]) for n in start if n.startswith("standard."))
    assert not torch.equal(start["head.weight"], end["head.weight"])
    assert not set(model.named_trainable_parameters()) & {n for n in start if n.startswith("standard.")}


def test_a_regression_cannot_be_the_start_of_ungated_prompts(data: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        build_model(config(data, prompts__gate="none"), 3)
    assert refused.value.number == ConfigCode.WARM_START_NEEDS_GATE


@pytest.mark.parametrize("changed", [{"prompts__gate": "none"}, {"either": True, "train__modality_dropout": 0.1}], ids=str)
def test_auto_means_none_if_step_0_could_not_equal_a_baseline(data: Path, changed: dict[str, Any]) -> None:
    settings = config(data, **{"warm_start": "auto", **changed})
    model = build_model(settings, 3)
    assert not model.starts_fitted and model.standard is None


def logits_on(run: Path, split: str) -> torch.Tensor:
    loaded = load_model(RunFolder(run), "step-0", torch.device("cpu"))
    data = load_data(loaded.config.data)
    outputs = model_outputs(loaded.model, data, split, loaded.config, torch.device("cpu"))
    return torch.cat([logits_BN for _, logits_BN, _ in outputs])


def features_on(run: Path, split: str) -> Fold:
    loaded = load_model(RunFolder(run), "step-0", torch.device("cpu"))
    data, model = load_data(loaded.config.data), loaded.model
    tables = {s: split_features(model.encoder(s), data, split, loaded.config, torch.device("cpu")) for s in model.uses}
    return Fold(tables, data.sparse_targets(split))


AUTO: list[dict[str, Any]] = [{"head_hidden": 0}, {"head_hidden": 8}, {"main": "tiny:text", "comp": "tiny:vision"}]


@pytest.mark.parametrize("changed", matrix(AUTO, AUTO[1:2]), ids=str)
def test_step_0_of_auto_is_the_best_baseline(
    data: Path, tmp_path: Path, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mopefuse.fusion.mlp_fit._STEPS", (50, 20_000))  # a thousand steps take seconds
    settings = config(data, **{"warm_start": "auto", "head_features": "all", "head_hidden": 8, "train__epochs": 0, **changed})
    train(settings, tmp_path / "run")
    how = FitSettings(3, SINGLE, threshold=0.5, balanced=False, settings=settings.linear)
    network = NetworkSettings(settings.head_hidden, settings.mlp.dropout, settings.seed) if settings.head_hidden else None
    folds = [features_on(tmp_path / "run", split) for split in ("train", "val", "test")]
    found = fit_baselines(folds[0], folds[1], how, network, lambda what, share: None, seed=settings.seed)
    assert json.loads((tmp_path / "run" / "start.json").read_text()) == json.loads(json.dumps(found.facts()))
    known = {side: folds[0].statistics(side) for side in folds[0].features}
    design, model = folds[2].design(known, 3), found.best.model
    expected = model.logits_of(design) if isinstance(model, Network) else design.logits(*model)
    torch.testing.assert_close(logits_on(tmp_path / "run", "test"), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.01, "constant logits could not show a difference"


@pytest.mark.soak
def test_training_continues_from_the_baseline_with_the_lowest_loss_also_when_resumed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mopefuse.fusion.mlp_fit._STEPS", (50, 20_000))
    settings = config(data, warm_start="auto", head_features="all", head_hidden=8, train__epochs=0)
    train(settings, tmp_path / "start")
    folder = RunFolder(tmp_path / "start")
    step_0 = folder.checkpoint("step-0")[0]
    facts = json.loads((tmp_path / "start" / "start.json").read_text())
    assert (facts["best"] != facts["trained_from"]) == (step_0 / "train-from.safetensors").exists()
    whole = settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": 1})})
    train(whole, tmp_path / "whole")
    train(whole, tmp_path / "start", resume=True)
    one, other = (
        read_tensors(RunFolder(tmp_path / name).checkpoint("last")[0] / "weights.safetensors") for name in ("whole", "start")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_later_step_must_exceed_step_0_by_more_than_noise(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(data, train__epochs=6, train__lr_head=1e-2, linear__strengths=[1e-6])
    monkeypatch.setattr("mopefuse.training.trainer.exceeds_noise", lambda differences: True)
    free = train(settings, tmp_path / "free")
    assert free["selected_step"] > 0, "this data and seed must improve, or the rest shows nothing"
    monkeypatch.setattr("mopefuse.training.trainer.exceeds_noise", lambda differences: False)
    assert train(settings, tmp_path / "strict")["selected_step"] == 0
    monkeypatch.undo()
    scores = read_tensors(RunFolder(tmp_path / "free").checkpoint("last")[0] / "start-scores.safetensors")["score_S"]
    log = RunFolder(tmp_path / "free").read_log()
    assert float(scores.mean()) == pytest.approx(next(line["val"]["accuracy"] for line in log if line["step"] == 0))


def test_training_continues_while_it_improves_although_step_0_is_not_exceeded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mopefuse.training.trainer.exceeds_noise", lambda differences: False)
    settings = config(data, train__epochs=5, train__patience=1, train__lr_head=1e-2, linear__strengths=[1e-6])
    log = [line for line in train_and_read(settings, tmp_path / "run") if "val" in line]
    losses = [line["val"]["loss"] for line in log]
    assert losses[1:-1] == sorted(losses[1:-1], reverse=True) and len(log) > 3, "two validations that improve are needed"
    still = settings.model_copy(update={"train": settings.train.model_copy(update={"lr": 1e-9, "lr_head": 1e-9})})
    assert len([line for line in train_and_read(still, tmp_path / "still") if "val" in line]) == 3  # 0, the first, and one more


def train_and_read(settings: RunConfig, out: Path) -> list[dict[str, Any]]:
    train(settings, out)
    return RunFolder(out).read_log()


def test_a_method_without_warm_start_reports_it_as_unused(data: Path, tmp_path: Path) -> None:
    done = call(
        "train", "--main", "tiny:vision", "--comp", "tiny:text", "--data", data, "--out", tmp_path / "run",
        "--method", "late-concat", "--warm-start", "linear", "--steps", "1",
    )  # fmt: skip
    assert done.returncode == 0 and "late-concat does not use the settings of warm_start" in done.stderr


def test_a_swapped_encoder_gets_its_own_statistics(data: Path, tmp_path: Path) -> None:
    train(config(data), tmp_path / "run")
    swap_encoder(tmp_path / "run", tmp_path / "new", comp="tiny:text-b")
    old, new = (read_tensors(RunFolder(tmp_path / n).checkpoint()[0] / "weights.safetensors") for n in ("run", "new"))
    train(config(data, warm_start="none", method="linear", comp="tiny:text-b"), tmp_path / "b")
    alone = read_tensors(RunFolder(tmp_path / "b").checkpoint()[0] / "weights.safetensors")
    for buffer in ("mean_C", "deviation_C"):
        assert torch.equal(new[f"standard.main.{buffer}"], old[f"standard.main.{buffer}"])
        assert torch.equal(new[f"standard.comp.{buffer}"], alone[f"standard.comp.{buffer}"])
    assert torch.equal(new["head.weight"][:, :96], old["head.weight"][:, :96])


def test_a_method_that_ignores_warm_start_keeps_the_learning_rate_of_its_head(data: Path) -> None:
    for method in ("late-concat", "main-only"):
        other = config(data, method=method)
        assert other.warm_start == "linear"
        assert resolve_defaults(other, build_model(other, 3)).train.lr_head == other.train.lr
