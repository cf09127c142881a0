"""The default stack of conditional prompts, from training to a bundle, and the settings that ``compat`` restores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, make_pairs

import mopefuse
from mopefuse.config.method_defaults import CONDITIONAL
from mopefuse.config.schema import build_config
from mopefuse.config.setting_paths import flatten
from mopefuse.core.tensor_files import read_tensors
from mopefuse.fusion.build import build_model
from mopefuse.runs.folder import RunFolder

ENCODERS = ("--main", "tiny:vision", "--comp", "tiny:text", "--device", "cpu", "--experts", "2", "--batch", "6")
FEW = ("--set", "linear.strengths=[0.1]")
pytestmark = pytest.mark.usefixtures("short_starts")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(RunFolder(run).checkpoint("last")[0] / "weights.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data", counts={"train": 20, "val": 7, "test": 5})


def test_the_default_stack_trains_resumes_and_is_evaluated(data: Path, tmp_path: Path) -> None:
    schedule = ("--set", "train.schedule=constant", "--set", "train.warmup=0")  # others depend on the number of epochs
    train = ("train", *ENCODERS, *FEW, *schedule, "--data", data)
    assert call(*train, "--out", tmp_path / "whole", "--epochs", 2).returncode == 0
    assert call(*train, "--out", tmp_path / "parts", "--epochs", 1).returncode == 0
    assert call(*train, "--out", tmp_path / "parts", "--epochs", 2, "--resume").returncode == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and any(".film" in name for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    start = json.loads((tmp_path / "whole" / "start.json").read_text(encoding="utf-8"))
    assert {"MLP on main and comp", "logistic regression on main"} <= {row["name"] for row in start["baselines"]}
    assert call("eval", tmp_path / "whole", "--missing", "text=0.5").returncode == 0


@pytest.mark.matrix
def test_a_bundle_of_the_default_stack_predicts_as_the_run(data: Path, tmp_path: Path) -> None:
    assert call("train", *ENCODERS, "--data", data, "--out", tmp_path / "run").returncode == 0
    assert call("export", tmp_path / "run", "-o", tmp_path / "bundle").returncode == 0
    rows = [str(data / "images" / "test-0.png")], ["what is the red digit"]
    found = [mopefuse.load(tmp_path / name).predict(*rows)[0]["probabilities"] for name in ("run", "bundle")]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_compat_restores_the_stack_of_the_papers(compat: str) -> None:
    config = build_config({"main": "tiny:vision", "comp": "tiny:text", "compat": compat})
    assert (config.warm_start, config.head_features, config.head_hidden, config.head_norm) == ("none", "main", 0, "none")
    assert (config.prompts.film, config.prompts.layers, config.prompts.gate) == (False, "all", "none")
    assert config.prompts.token_dropout == 0 and config.train.schedule == "paper" and config.train.lr is None


def test_given_settings_override_the_defaults_of_the_method() -> None:
    values: dict[str, Any] = {"main": "tiny:vision", "comp": "tiny:text", "prompts": {"film": False}, "train": {"lr": 1e-4}}
    changed = {"prompts.film": False, "train.lr": 1e-4}
    found = flatten(build_config(values).model_dump())
    assert {path: found[path] for path in flatten(CONDITIONAL)} == flatten(CONDITIONAL) | changed


@pytest.mark.parametrize(
    ("changed", "dropped"),
    [
        ({}, 0.4),
        ({"main": "tiny:text", "comp": "tiny:vision"}, 0.0),
        ({"train": {"compile": True}}, 0.0),
        ({"prompts": {"token_dropout": 0.1}}, 0.1),
        ({"compat": "paper"}, 0.0),
    ],
    ids=["image", "text", "compiled", "given", "papers"],
)
def test_patches_are_dropped_by_default_where_they_can_be(changed: dict[str, Any], dropped: float) -> None:
    model = build_model(build_config({"main": "tiny:vision", "comp": "tiny:text", **changed}), 2)
    assert model.config.prompts.token_dropout == dropped
