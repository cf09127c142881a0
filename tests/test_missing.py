"""Samples that lack a modality: what replaces it, how it occurs in training, and what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, plain_config
from missing_cases import holes, train, weights
from tasks_of import SINGLE
from test_fusion import TEXTS, build, images, open_gates

from mopefuse.data.collate import Samples
from mopefuse.data.load import load_data
from mopefuse.data.modality_dropout import ModalityDropout, removal_order
from mopefuse.errors import ConfigError, DataError
from mopefuse.evaluation.split import prepare_samples
from mopefuse.fusion._design_matrix import statistics
from mopefuse.fusion.base import Fusion
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import load_model
from mopefuse.training.losses import task_loss

METHODS: list[dict[str, Any]] = [
    {},
    {"router": {"kind": "joint"}},
    {"warm_start": "linear"},
    {"comp_tuning": {"mode": "prompts"}},
    {"method": "late-concat"},
    {"method": "linear"},
    {"method": "linear", "linear": {"features": "average"}},
    {"method": "mlp"},
    {"method": "cross-attention"},
    {"method": "qmf"},
    {"method": "map"},
    {"method": "flamingo"},
    {"method": "flamingo", "head_features": "all"},
]


def build_with_absence(comp: Any = "tiny:text", **options: Any) -> Fusion:
    """A model with replacement vectors, and weights for which differences show."""
    torch.manual_seed(0)
    model = build(comp=comp, experts=4, data={"on_missing": "absent"}, **options)
    open_gates(model)
    with torch.no_grad():
        for name, parameter in model.named_trainable_parameters().items():
            if name.startswith(("head", "absent")):
                parameter.normal_()
    return model


def without(batch: Any, side: str, rows: list[int]) -> Any:
    mask_B = torch.zeros(len(batch.index), dtype=torch.bool)
    mask_B[rows] = True
    return replace(batch, missing={side: mask_B})


# -- the model


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_missing_values_change_only_the_predictions_of_their_own_rows(options: dict[str, Any]) -> None:
    model = build_with_absence(**options)
    whole = model.collate(images(4), TEXTS[:4])
    other = model.collate(images(4), [TEXTS[0], "what is the number at top right", "red", TEXTS[3]])  # as much padding
    with torch.no_grad():
        full, none, some, same = (
            model(batch).logits
            for batch in (whole, without(whole, "comp", []), without(whole, "comp", [1, 2]), without(other, "comp", [1, 2]))
        )
    assert torch.equal(full, none), "an empty mask changes a prediction"
    assert torch.equal(full[[0, 3]], some[[0, 3]])
    assert torch.equal(some, same), "a prediction depends on a missing text"
    assert not torch.allclose(full[[1, 2]], some[[1, 2]])
    alone = without(model.collate(images(4)[1:2], TEXTS[1:2]), "comp", [0])
    torch.testing.assert_close(model(alone).logits[0], some[1], atol=2e-5, rtol=1e-4)


def test_replacement_vectors_start_at_zero_and_are_trained_only_on_request() -> None:
    assert not any(name.startswith("absent") for name in build().trainable_state_dict())
    for settings in ({"data": {"on_missing": "absent"}}, {"train": {"modality_dropout": 0.1}}):
        model = build(**settings, either=True)
        assert [name for name in model.trainable_state_dict() if name.startswith("absent")] == ["absent.comp"]
        assert torch.equal(model.trainable_state_dict()["absent.comp"], torch.zeros(model.encoder("comp").feature_width))
    assert not build(either=True).absent and build(either=True).optional_sides == ("main",)
    model = build_with_absence()
    model(without(model.collate(images(2), TEXTS[:2]), "comp", [0])).logits.sum().backward()
    assert model.absent["comp"].grad is not None and model.absent["comp"].grad.any()
    assert model.dependency_of("absent.comp") == "comp features" and model.learning_rate_group("absent.comp") == "main"
    model = build_with_absence(method="linear")
    assert not model.absent, "a closed-form method trains nothing afterwards"


def test_each_of_several_modalities_can_be_missing_by_itself() -> None:
    model = build_with_absence(comp=["tiny:text", "tiny:vision"], either=True)
    batch = model.collate(images(3), TEXTS[:3])
    logits = [model(without(batch, side, [1])).logits[1] for side in ("comp", "comp2")]
    assert not torch.allclose(*logits)
    assert model.droppable_sides == ("main", "comp", "comp2")
    one_image_each = build(comp=["tiny:text", "tiny:vision"])
    assert one_image_each.droppable_sides == ("comp",), "if a sample has an image, both encoders get it"


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"method": "mmbt", "train": {"modality_dropout": 0.1}}, 144),
        ({"comp": "tiny:vision", "train": {"modality_dropout": 0.1}}, 144),
        ({"method": "late-concat", "either": True}, 145),
        ({"warm_start": "linear", "either": True}, 146),
    ],
    ids=str,
)
def test_settings_that_would_train_nothing_are_refused(options: dict[str, Any], number: int) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**options)
    assert caught.value.number == number


@pytest.mark.parametrize("method", ["main-only", "comp-only", "mmbt", "pmf", "promptfuse", "sequential", "maple"])
def test_methods_that_need_all_modalities_refuse_samples_that_lack_one(method: str) -> None:
    model = build(method=method)
    assert model.droppable_sides == ()
    texts = [None, "a"] if "comp" in model.uses else ["a", "b"]
    shown = images(2) if "comp" in model.uses else [None, images(1)[0]]
    with pytest.raises(DataError) as caught:
        model.collate(shown, texts)
    assert caught.value.number == 100 and "--on-missing skip" in caught.value.fix and "--either" not in caught.value.fix


def test_the_main_modality_is_required_unless_the_model_was_trained_without_it() -> None:
    with pytest.raises(DataError) as caught:
        build().collate([None, *images(1)], TEXTS[:2])
    assert caught.value.number == 100 and "--either" in caught.value.fix
    with pytest.raises(ConfigError) as refused:
        build(method="mmbt", either=True)
    assert refused.value.number == 143


def test_either_predicts_from_the_complementary_side_alone() -> None:
    model = build_with_absence(either=True)
    pictures = images(3)
    some = model(model.collate([pictures[0], None, pictures[2]], TEXTS[:3]))
    full = model(model.collate(pictures, TEXTS[:3]))
    assert torch.equal(some.logits[1], some.alone_BN[1]) and torch.equal(some.logits[[0, 2]], full.logits[[0, 2]])
    assert torch.equal(full.alone_BN, some.alone_BN), "the prediction from the complementary side alone depends on images"
    batch = replace(model.collate(pictures, TEXTS[:3]), targets=torch.tensor([0, 1, 2]))
    both = task_loss(full, batch, SINGLE)
    one = task_loss(full._replace(alone_BN=None), batch, SINGLE)
    cross = torch.nn.functional.cross_entropy(full.alone_BN, batch.targets, reduction="sum")
    torch.testing.assert_close(both, one + cross)
    model.zero_grad()
    one = torch.autograd.grad(one, model.head.weight, retain_graph=True)[0]
    assert torch.equal(one, torch.autograd.grad(both, model.head.weight)[0]), "the second head affects the first"


def test_with_either_late_concat_handles_a_missing_main_modality() -> None:
    model = build_with_absence(method="late-concat", either=True)
    assert model.droppable_sides == ("main", "comp")
    logits = model(model.collate([None, *images(1)], ["a", None])).logits
    assert logits.isfinite().all()


# -- in training


@pytest.fixture(scope="module")
def data(pairs: Path) -> Any:
    return load_data(plain_config({"main": "tiny:vision", "comp": "tiny:text", "data": {"path": str(pairs)}}).data)


def samples(data: Any, model: Fusion, **changed: Any) -> Samples:
    config = plain_config({"main": "a:1", "comp": "b:2", "data": {"path": str(data.root)}})
    return Samples(data, "train", model.readers(), config.data, training=True, **changed)


def drawn(dropped: ModalityDropout, epoch: int) -> list[bool]:
    return [dropped.is_missing("comp", epoch, index) for index in range(len(dropped))]


def test_dropout_is_a_function_of_seed_epoch_and_index(data: Any) -> None:
    model = build()
    one = ModalityDropout(samples(data, model, seed=3), ["comp"], 0.3)
    same = ModalityDropout(samples(data, model, seed=3), ["comp"], 0.3)
    assert drawn(one, 1) == drawn(same, 1) != drawn(one, 2)
    assert drawn(ModalityDropout(samples(data, model, seed=4), ["comp"], 0.3), 1) != drawn(one, 1)
    share = np.mean([drawn(one, epoch) for epoch in range(200)])
    count = 200 * len(one)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
    batch = next(iter(one.batches([[(1, index) for index in range(len(one))]])))
    assert batch.missing["comp"].tolist() == drawn(one, 1)


def test_encoders_of_one_modality_lose_it_together_and_no_sample_loses_everything(data: Any) -> None:
    how: dict[str, Any] = {"method": "late-concat", "either": True, "data": {"on_missing": "absent"}}
    model = build(comp=["tiny:text", "tiny:text?pool=cls", "tiny:vision"], **how)
    dropped = ModalityDropout(samples(data, model), model.droppable_sides, 0.9)
    every = 0
    for epoch in range(20):
        for index in range(len(dropped)):
            lost = {side: dropped.is_missing(side, epoch, index) for side in model.uses}
            assert lost["main"] == lost["comp3"] and lost["comp"] == lost["comp2"]
            assert not all(lost.values())
            every += any(lost.values())
    assert every


def test_a_larger_fraction_removes_a_superset_of_a_smaller_one() -> None:
    ids = [str(number) for number in range(500)]
    order = removal_order(ids, ["text"], 0)
    assert sorted(order) == list(range(500)) and order != list(range(500))
    assert removal_order(ids[::-1], ["text"], 0) == [499 - number for number in order]
    assert removal_order(ids, ["audio"], 0) != order != removal_order(ids, ["text"], 1)


def test_a_resumed_run_with_dropout_equals_an_uninterrupted_one(pairs: Path, tmp_path: Path) -> None:
    how = ("--modality-dropout", 0.5, "--set", "train.schedule=constant")
    assert train(pairs, tmp_path / "one", *how, "--steps", 6).returncode == 0
    assert train(pairs, tmp_path / "two", *how, "--steps", 3).returncode == 0
    done = call("train", "--resume", "--out", tmp_path / "two", "--steps", 6)
    assert done.returncode == 0, done.stderr
    one, two = (weights(tmp_path / name / "checkpoints" / "step-6") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert one["absent.comp"].any()


@pytest.mark.parametrize("column", ["text", "img"])
def test_rows_with_gaps_are_an_error_that_says_what_to_do(pairs: Path, tmp_path: Path, column: str) -> None:
    data = holes(pairs, tmp_path / "data", column=column)
    error = json.loads(train(data, tmp_path / "run", "--json").stdout.splitlines()[-1])["error"]
    assert error["code"].startswith("MF-DATA") and "--on-missing" in str(error)
    done = train(data, tmp_path / "skip", "--on-missing", "skip", "--steps", 1, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "skip" / "metrics.json").read_text())["rows"]
    every = {split: len((data / f"{split}.jsonl").read_text().splitlines()) for split in rows}
    assert rows == {split: count - len(range(0, count, 3)) for split, count in every.items()}
    done = train(data, tmp_path / "absent", "--on-missing", "absent", "--steps", 1, "--json")
    if column == "text":
        assert done.returncode == 0, done.stderr
    else:
        assert "--either" in json.loads(done.stdout.splitlines()[-1])["error"]["hint"]
        done = train(data, tmp_path / "either", "--on-missing", "absent", "--either", "--steps", 2, "--json")
        assert done.returncode == 0, done.stderr
    assert json.loads((done.stdout or "{}").splitlines()[-1])["ok"]


def test_a_regression_replaces_missing_features_by_the_mean(pairs: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    done = train(data, tmp_path / "run", "--method", "linear", "--on-missing", "absent")
    assert done.returncode == 0, done.stderr
    model = load_model(RunFolder(tmp_path / "run"), "best", torch.device("cpu")).model
    config = RunFolder(tmp_path / "run").config()
    found = prepare_samples(model, load_data(config.data), "train", config, torch.device("cpu"))
    lacking = torch.from_numpy(found.lacking["comp"])
    features = found.features["comp"][torch.arange(len(found))]
    assert 0 < lacking.sum() < len(lacking)
    nothing = statistics(features, torch.arange(0))
    assert torch.equal(nothing["mean_C"], torch.zeros(96)) and torch.equal(nothing["deviation_C"], torch.ones(96))
    torch.testing.assert_close(model.standard["comp"].mean_C, features[~lacking].double().mean(dim=0).float())


def test_modality_dropout_has_no_effect_if_the_model_ignores_the_other_modality(pairs: Path, tmp_path: Path) -> None:
    blind = ("--set", "prompts.dynamic=0", "--set", "prompts.mapped=0", "--steps", 2)
    assert train(pairs, tmp_path / "dropped", *blind, "--modality-dropout", 0.5).returncode == 0
    assert train(pairs, tmp_path / "whole", *blind).returncode == 0
    one, two = (weights(tmp_path / name / "checkpoints" / "step-2") for name in ("dropped", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    done = train(pairs, tmp_path / "linear", "--method", "linear", "--modality-dropout", 0.5)
    assert done.returncode == 0 and "linear does not use the settings of train.modality_dropout" in done.stderr


def test_either_is_refused_if_both_encoders_have_the_same_modality(pairs: Path, tmp_path: Path) -> None:
    images = ("--main", "tiny:vision", "--comp", "tiny:vision-b")
    done = call("train", *images, "--either", "--data", pairs, "--out", tmp_path / "run")
    assert done.returncode == 3 and "all encoders read image" in done.stderr


def test_a_dry_run_refuses_the_same_settings_as_training(pairs: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    for more in ((), ("--dry-run",)):
        error = json.loads(train(data, tmp_path / "run", "--method", "mmbt", "--on-missing", "absent", "--json", *more).stdout)
        assert error["error"]["code"] == "MF-DATA-100"
