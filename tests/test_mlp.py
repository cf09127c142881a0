"""The method mlp: its definition, what it learns that `linear` cannot, and that its runs are ordinary runs on cached
features."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, ranks, write_rows
from missing_cases import holes
from PIL import Image
from run_cases import check_eval_report_and_export
from test_fusion import TEXTS, build, images
from test_linear import raw
from test_swap import pair
from torch import Tensor

from mopefuse.config.schema import build_config
from mopefuse.data.base import Batch
from mopefuse.errors import ConfigError
from mopefuse.fusion.base import Fusion, Output
from mopefuse.fusion.mlp import MLP
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import load_model
from mopefuse.training.train import train

SPECS = {"main": "tiny:vision", "comp": "tiny:text", "device": "cpu"}
CPU = torch.device("cpu")
WORDS = ("red", "blue")


def config(data: Path, method: str = "mlp", /, **changed: Any) -> Any:
    return build_config({**SPECS, "method": method, "data": {"path": str(data)}, **changed})


def make_xor(root: Path, counts: dict[str, int]) -> Path:
    """Light and dark images with one of two words: the label is "yes" for a light image with the first word or a dark one with
    the second."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for split, count in counts.items():
        rows = []
        for i in range(count):
            light, word = bool(i & 1), bool(i & 2)
            pixels = rng.integers(160 if light else 0, 256 if light else 96, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"images/{split}-{i}.png")
            label = "yes" if light != word else "no"
            rows.append({"id": f"{split}-{i}", "text": WORDS[word], "img": f"images/{split}-{i}.png", "label": label})
        write_rows(root / f"{split}.jsonl", rows)
    return root


@pytest.fixture(scope="module")
def xor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_xor(tmp_path_factory.mktemp("xor") / "data", {"train": 64, "val": 32, "test": 32})


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tests must not change."""
    out = tmp_path_factory.mktemp("mlp") / "run"
    train(config(pairs, train={"epochs": 2, "batch_size": 4}), out)
    return out


# -- the definition


def test_logits_match_the_definition() -> None:
    model = build(method="mlp", head_hidden=9)
    batch = model.collate(images(4), TEXTS[:4])
    with torch.no_grad():
        for side in model.uses:
            model.standard[side].mean_C.normal_()
            model.standard[side].deviation_C.uniform_(0.5, 2)
        x_BF = torch.cat(
            [
                (model.encoder(side).encode(batch.inputs[side]).pooled_BC - model.standard[side].mean_C)
                / model.standard[side].deviation_C
                for side in ("main", "comp")
            ],
            dim=1,
        )
        hidden_BH = torch.nn.functional.gelu(x_BF @ model.head[0].weight.T + model.head[0].bias)
        expected_BN = hidden_BH @ model.head[2].weight.T + model.head[2].bias
        torch.testing.assert_close(model(batch).logits, expected_BN)


def test_dropout_is_on_the_hidden_layer_and_in_training_only() -> None:
    model, without = build(method="mlp"), build(method="mlp", mlp={"dropout": 0})
    without.load_trainable_state_dict(model.trainable_state_dict())
    batch = model.collate(images(4), TEXTS[:4])
    assert torch.equal(model(batch).logits, without(batch).logits)
    assert torch.equal(without.train()(batch).logits, model(batch).logits)
    with torch.no_grad():
        model.head[2].weight.zero_()
    model.train()
    assert torch.equal(model(batch).logits, model.head[2].bias.expand(4, -1)), "dropout on the logits"
    with torch.no_grad():
        model.head[2].weight.fill_(1)
    assert not torch.allclose(model(batch).logits, model(batch).logits)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}),
        ({"head_hidden": 0}, {"head.weight", "head.bias"}),
        ({"data": {"on_missing": "absent"}}, {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias", "absent.comp"}),
    ],
    ids=["a hidden layer", "none", "an absent condition"],
)
def test_only_the_network_is_trained_and_it_is_saved_with_the_statistics(options: dict[str, Any], expected: set[str]) -> None:
    model = build(method="mlp", **options)
    statistics = {f"standard.{side}.{name}" for side in ("main", "comp") for name in ("mean_C", "deviation_C")}
    assert set(model.named_trainable_parameters()) == expected
    assert set(model.trainable_state_dict()) == expected | statistics
    assert set(model.frozen) == {"main", "comp"}


def test_without_a_hidden_layer_it_equals_the_model_of_linear() -> None:
    mlp, linear = build(method="mlp", head_hidden=0), build(method="linear")
    mlp.load_trainable_state_dict(linear.trainable_state_dict())
    batch = mlp.collate(images(4), TEXTS[:4])
    assert torch.equal(mlp(batch).logits, linear(batch).logits)


def test_it_has_its_own_defaults_which_settings_override() -> None:
    usual, other = build_config({**SPECS, "method": "mlp"}), build_config({**SPECS, "method": "late-concat"})
    assert (usual.head_hidden, usual.train.lr, usual.train.schedule, usual.train.epochs) == (512, 1e-3, "cosine", 30)
    assert (other.head_hidden, other.train.lr, other.train.schedule, other.train.epochs) == (0, None, "paper", 10)
    given = build_config({**SPECS, "method": "mlp", "head_hidden": 8, "train": {"schedule": "constant"}})
    assert (given.head_hidden, given.train.lr, given.train.schedule) == (8, 1e-3, "constant")


def test_without_main_it_needs_training_samples_without_main() -> None:
    with pytest.raises(ConfigError) as caught:
        build(method="mlp", either=True)
    assert caught.value.number == 145


# -- training


def test_statistics_come_from_the_training_split(pairs: Path, run: Path) -> None:
    state = load_model(RunFolder(run), "last", CPU).model.trainable_state_dict()
    for side in ("main", "comp"):
        feature_SC = raw(pairs, "train", side)
        np.testing.assert_allclose(state[f"standard.{side}.mean_C"], feature_SC.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(state[f"standard.{side}.deviation_C"], feature_SC.std(axis=0), rtol=1e-3, atol=1e-5)


def test_it_learns_xor_of_two_modalities_and_linear_does_not(xor: Path, tmp_path: Path) -> None:
    score = {}
    for method in ("mlp", "linear"):
        result = train(config(xor, method, train={"epochs": 10, "batch_size": 16}), tmp_path / method)
        score[method] = result["metrics"]["test"]["accuracy"]
    assert score["mlp"] > 0.95 and score["linear"] <= 0.75, "a linear head gets at most three of four combinations right"


def test_no_image_or_text_is_read_once_features_are_cached(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(pairs, train={"epochs": 1}), tmp_path / "first")
    monkeypatch.setattr("mopefuse.data.collate.Samples.value", lambda *_: pytest.fail("a sample is read"))
    assert train(config(pairs, train={"epochs": 2}), tmp_path / "second")["steps"] == 2


def test_it_is_in_training_mode_in_steps_and_not_in_validation(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[tuple[bool, bool]] = []
    forward: Callable[[MLP, Batch], Output] = MLP.forward

    def spy(self: MLP, batch: Batch) -> Output:
        modes.append((self.training, torch.is_grad_enabled()))
        return forward(self, batch)

    monkeypatch.setattr(MLP, "forward", spy)
    train(config(pairs, train={"epochs": 2, "batch_size": 6}), tmp_path / "run")
    assert modes.count((True, True)) == 4, "two steps in each of two epochs"
    assert set(modes) == {(True, True), (False, False)}


def test_a_resumed_run_ends_like_an_uninterrupted_one(pairs: Path, tmp_path: Path) -> None:
    settings = {"epochs": 4, "batch_size": 4, "schedule": "constant"}
    whole = train(config(pairs, train=settings), tmp_path / "whole")
    train(config(pairs, train={**settings, "epochs": 2}), tmp_path / "run")
    resumed = train(config(pairs, train=settings), tmp_path / "run", resume=True)
    assert resumed["metrics"] == whole["metrics"] and resumed["steps"] == whole["steps"] == 12


@pytest.mark.process
def test_two_processes_train_like_one(pairs: Path, tmp_path: Path) -> None:
    options = ("--method", "mlp", "--main", "tiny:vision", "--comp", "tiny:text", "--device", "cpu", "--data", pairs)
    options += ("--set", "mlp.dropout=0", "--steps", 4, "--batch", 4)
    done = ranks(2, "train", *options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert call("train", *options, "--out", tmp_path / "one").returncode == 0
    states = [load_model(RunFolder(tmp_path / name), "last", CPU).model for name in ("one", "two")]
    one, two = (model.trainable_state_dict() for model in states)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_augmented_images_are_encoded_again_but_statistics_are_kept(pairs: Path, tmp_path: Path) -> None:
    changed = {"data": {"path": str(pairs), "augment": "crop"}, "train": {"epochs": 1, "batch_size": 12}}
    train(config(pairs, **changed), tmp_path / "run")
    state = load_model(RunFolder(tmp_path / "run"), "last", CPU).model.trainable_state_dict()
    np.testing.assert_allclose(state["standard.main.mean_C"], raw(pairs, "train", "main").mean(axis=0), atol=1e-5)


def test_rows_without_a_text_use_a_learned_vector_and_are_left_out_of_the_statistics(pairs: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    changed = {"data": {"path": str(data), "on_missing": "absent"}, "train": {"epochs": 2, "batch_size": 4}}
    train(config(data, **changed), tmp_path / "run")
    state = load_model(RunFolder(tmp_path / "run"), "last", CPU).model.trainable_state_dict()
    assert state["absent.comp"].any()
    present_SC = np.delete(raw(pairs, "train", "comp"), slice(None, None, 3), axis=0)
    np.testing.assert_allclose(state["standard.comp.mean_C"], present_SC.mean(axis=0), atol=1e-5)


# -- an ordinary run


@pytest.mark.process
def test_a_run_can_be_evaluated_exported_and_reported(pairs: Path, run: Path, tmp_path: Path) -> None:
    check_eval_report_and_export(run, tmp_path)
    assert call("export", run, "--format", "adapter", "-o", tmp_path / "adapter").returncode == 0
    adapted = call("eval", tmp_path / "adapter", "--data", pairs, "--json")
    assert json.loads(adapted.stdout)["metrics"] == pytest.approx(RunFolder(run).result()["metrics"]["test"])


@pytest.mark.matrix
def test_the_exported_graph_predicts_the_same(run: Path, tmp_path: Path) -> None:
    done = call("export", run, "-o", tmp_path / "bundle")  # refused unless the predictions are the model's
    assert done.returncode == 0, done.stderr


def test_a_multi_label_run_trains_and_predicts(multi_pairs: Path, tmp_path: Path) -> None:
    result = train(config(multi_pairs, train={"epochs": 2, "threshold": "tuned"}), tmp_path / "run")
    assert set(result["thresholds"]) == {"a", "b", "c"} and np.isfinite(result["metrics"]["test"]["f1_micro"])


def test_a_swap_keeps_the_columns_of_the_other_encoder_and_recomputes_statistics(run: Path, tmp_path: Path) -> None:
    done = call("swap-encoder", run, "--comp", "tiny:text?pool=cls", "-o", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    old, new = (
        load_model(RunFolder(path), "best", CPU).model.trainable_state_dict() for path in (run, tmp_path / "new")
    )
    width = old["standard.main.mean_C"].numel()
    assert torch.equal(old["head.0.weight"][:, :width], new["head.0.weight"][:, :width])
    assert not torch.equal(old["head.0.weight"][:, width:], new["head.0.weight"][:, width:])
    assert torch.equal(old["standard.main.mean_C"], new["standard.main.mean_C"])
    assert not torch.equal(old["standard.comp.mean_C"], new["standard.comp.mean_C"])
    assert new["standard.comp.deviation_C"].ne(1).any()


def test_other_labels_keep_the_hidden_layer() -> None:
    old, state, origins = pair({"method": "mlp"}, {"method": "mlp"}, (["a", "b"], ["b", "c", "d"]))
    assert {origins["head.0.weight"], origins["head.0.bias"]} == {"kept"} and origins["head.2.weight"] == "partial"
    assert torch.equal(state["head.2.weight"][0], old["head.2.weight"][1])


def missing(batch: Batch, side: str, rows: list[int]) -> Batch:
    mask_B = torch.zeros(len(batch.index), dtype=torch.bool)
    mask_B[rows] = True
    return replace(batch, missing={side: mask_B})


def test_a_row_without_main_is_predicted_from_the_learned_vector() -> None:
    model: Fusion = build(method="mlp", either=True, data={"on_missing": "absent"})
    with torch.no_grad():
        model.absent["main"].normal_()
        batch = model.collate(images(2), TEXTS[:2])
        psi_BC: Tensor = model.pooled_feature("comp", batch)
        expected_BN = model.head(torch.cat([model.absent["main"].expand(2, -1), psi_BC], dim=1))
        torch.testing.assert_close(model(missing(batch, "main", [1])).logits[1], expected_BN[1])
