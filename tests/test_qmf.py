"""The method qmf: its definition, the losses that train it, what it does without a side, and that it is an ordinary run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import call, plain_config
from missing_cases import holes
from run_cases import check_eval_report_and_export
from tasks_of import MULTI, SINGLE
from test_cross_attention import Given
from test_fusion import TEXTS, build, images
from test_mlp import config, missing
from test_swap import pair
from torch import Tensor

import mopefuse
from mopefuse.data.base import Batch
from mopefuse.fusion.output import SideOutputs
from mopefuse.fusion.qmf import QMF, ranking_loss
from mopefuse.training.losses import side_loss
from mopefuse.training.step import Backward
from mopefuse.training.train import train


def qmf(**changed: Any) -> QMF:
    model = build(method="qmf", **{"head_hidden": 5} | changed)
    assert isinstance(model, QMF)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    out = tmp_path_factory.mktemp("qmf") / "run"
    train(config(pairs, "qmf", train={"epochs": 2, "batch_size": 4}), out)
    return out


# -- the definition


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
@torch.no_grad()
def test_logits_are_those_of_the_definition(task: str) -> None:
    model = qmf(task=task, qmf={"scale": 0.3})
    batch = model.collate(images(3), TEXTS[:3])
    output = model(batch)
    for row in range(3):
        expected_N = torch.zeros(7)
        for number, side in enumerate(("main", "comp")):
            head, feature_C = getattr(model, f"head_{side}"), model.pooled_feature(side, batch)[row]
            hidden_5 = F.gelu(head[0].weight @ feature_C + head[0].bias)
            logits = (head[2].weight @ hidden_5 + head[2].bias).tolist()
            terms = [math.log1p(math.exp(z)) if task == "multi-label" else math.exp(z) for z in logits]
            energy = sum(terms) if task == "multi-label" else math.log(sum(terms))
            assert energy > 0.01
            expected_N += 0.3 * energy * torch.tensor(logits)
            assert output.by_side.confidence_BS[row, number].item() == pytest.approx(0.3 * energy, rel=1e-4)
        torch.testing.assert_close(output.logits[row], expected_N, atol=1e-4, rtol=1e-4)


def test_no_gradient_passes_through_the_weights() -> None:
    model = qmf().train()
    output = model(model.collate(images(3), TEXTS[:3]))
    weights_BS1 = output.by_side.confidence_BS.detach()[..., None]
    head = list(model.head_main.parameters())
    found = torch.autograd.grad(output.logits.square().sum(), head, retain_graph=True)
    expected = torch.autograd.grad((weights_BS1 * output.by_side.logits_BSN).sum(dim=1).square().sum(), head)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


def test_exactly_the_heads_are_trained_and_saved_with_the_statistics() -> None:
    model = build(method="qmf", head_hidden=0)
    heads = {f"head_{side}.{name}" for side in ("main", "comp") for name in ("weight", "bias")}
    statistics = {f"standard.{side}.{name}" for side in ("main", "comp") for name in ("mean_C", "deviation_C")}
    assert set(model.named_trainable_parameters()) == heads
    assert set(model.trainable_state_dict()) == heads | statistics
    assert model.frozen == ("main", "comp") and set(model.breakdown()) == {"head"}
    assert {model.learning_rate_group(name) for name in heads} == {"head"}


# -- the losses


def test_the_ranking_loss_at_its_limits() -> None:
    loss_B1 = torch.tensor([0.1, 2.0, 0.7])[:, None]
    badness_B1, everywhere = 1 - torch.exp(-loss_B1), torch.ones(3, 1, dtype=torch.bool)
    assert ranking_loss(-badness_B1, loss_B1, everywhere).item() == pytest.approx(0, abs=1e-6)
    assert ranking_loss(-3 * badness_B1, loss_B1, everywhere).item() == 0
    level = ranking_loss(torch.ones(3, 1), loss_B1, everywhere).item()
    expected = sum(abs(badness_B1[i].item() - badness_B1[i - 1].item()) for i in range(3))
    assert level == pytest.approx(expected), "equal confidences are wrong by the margin of each pair"
    assert ranking_loss(badness_B1, loss_B1, everywhere).item() == pytest.approx(2 * expected)
    assert ranking_loss(torch.ones(1, 1), torch.ones(1, 1), everywhere[:1]).item() == 0
    lacks_one = torch.tensor([[True], [True], [False]])
    margin = abs(badness_B1[0].item() - badness_B1[1].item())
    assert ranking_loss(torch.ones(3, 1), loss_B1, lacks_one).item() == pytest.approx(margin), "only the pair that has both"


def test_the_loss_is_that_of_the_fused_logits_of_every_side_that_is_there_and_of_the_ranks() -> None:
    model = qmf(head_hidden=0).train()
    batch = missing(model.collate(images(4), TEXTS[:4]), "comp", [2])
    batch = replace(batch, targets=torch.tensor([0, 6, 2, 3]))
    values = plain_config({"main": "tiny:vision", "comp": "tiny:text", "qmf": {"rank_weight": 0.7}})
    weights_N = torch.arange(1.0, 8.0)
    loss = Backward(model, values, torch.device("cpu"), task=SINGLE, weights=weights_N)(batch, 4, has_share=True)
    output = model(batch)
    sides = output.by_side
    expected = F.cross_entropy(output.logits, batch.targets, weight=weights_N, reduction="sum")
    for number, rows in enumerate(([0, 1, 2, 3], [0, 1, 3])):
        each_B = F.cross_entropy(sides.logits_BSN[:, number], batch.targets, weight=weights_N, reduction="none")
        expected = expected + each_B[rows].sum()
        present_B1 = torch.tensor([[row in rows] for row in range(4)])
        expected = expected + 0.7 * ranking_loss(sides.confidence_BS[:, number, None], each_B.detach()[:, None], present_B1)
    assert loss.item() == pytest.approx(expected.item() / 4, rel=1e-5)
    for parameter, gradient in zip(
        model.trainable_parameters(), torch.autograd.grad(expected / 4, model.trainable_parameters()), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_loss_of_several_labels_is_a_mean_over_them() -> None:
    logits_BSN, targets_BN = torch.randn(3, 2, 5), torch.randint(2, (3, 5)).float()
    sides = SideOutputs(logits_BSN, torch.randn(3, 2), torch.ones(3, 2, dtype=torch.bool))
    batch = Batch({}, {}, targets_BN, torch.arange(3))
    both_BSN = targets_BN[:, None].expand(-1, 2, -1)
    expected = F.binary_cross_entropy_with_logits(logits_BSN, both_BSN, reduction="none").mean(dim=-1).sum()
    torch.testing.assert_close(side_loss(sides, batch, 0.0, MULTI), expected)


def test_each_side_is_trusted_where_it_knows_the_answer() -> None:
    """In each sample the feature of one side is the class, and that of the other is noise."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Batch, Tensor, Tensor]:
        label_B = torch.randint(4, (count,), generator=generator)
        main_knows_B = torch.rand(count, generator=generator) < 0.5
        noise_B4, clear_B4 = torch.randn(count, 4, generator=generator), 3 * torch.eye(4)[label_B]
        sides = {"main": main_knows_B, "comp": ~main_knows_B}
        features = {side: torch.where(knows_B[:, None], clear_B4, noise_B4) for side, knows_B in sides.items()}
        return Batch({}, features, label_B, torch.arange(count)), label_B, torch.stack([*sides.values()], dim=1)

    values = plain_config({"main": "a:1", "comp": "b:2", "method": "qmf", "head_hidden": 16})
    torch.manual_seed(0)
    model = QMF(values, {"main": Given("image", 4), "comp": Given("text", 4)}, 4).train()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    backward = Backward(model, values, torch.device("cpu"), task=SINGLE, weights=None)
    for _ in range(300):
        batch, _, _ = draw(64)
        optimizer.zero_grad()
        backward(batch, 64, has_share=True)
        optimizer.step()
    batch, label_B, knows_BS = draw(1000)
    with torch.no_grad():
        output = model.eval()(batch)
    alone_BS = output.by_side.logits_BSN.argmax(dim=2) == label_B[:, None]
    fused = (output.logits.argmax(dim=1) == label_B).float().mean().item()
    assert fused > alone_BS.float().mean(dim=0).max().item() + 0.15
    confidence_BS = output.by_side.confidence_BS
    assert confidence_BS[knows_BS].mean() > 1.5 * confidence_BS[~knows_BS].mean()


# -- samples that lack a modality


def test_a_sample_with_one_side_is_classified_by_its_head_alone_and_needs_no_flag() -> None:
    model = qmf()
    assert model.droppable_sides == model.optional_sides == ("main", "comp") and not model.absent
    with torch.no_grad():
        both = model(model.collate(images(2), TEXTS[:2])).by_side
        found = model(model.collate([None, images(2)[1]], [TEXTS[0], None])).logits
    for row, side in ((0, 1), (1, 0)):
        expected_N = both.confidence_BS[row, side] * both.logits_BSN[row, side]
        torch.testing.assert_close(found[row], expected_N)
        assert found[row].argmax() == both.logits_BSN[row, side].argmax()
    assert build(method="qmf", main="tiny:text", comp="tiny:text-b").droppable_sides == ()


@pytest.mark.parametrize("column", ["text", "img"])
def test_it_trains_on_rows_that_lack_a_modality(pairs: Path, tmp_path: Path, column: str) -> None:
    data = holes(pairs, tmp_path / "data", column=column)
    changed = {"data": {"path": str(data), "on_missing": "absent"}, "train": {"max_steps": 3, "batch_size": 4}}
    result = train(config(data, "qmf", **changed), tmp_path / "run")
    assert result["steps"] == 3 and result["metrics"]["test"]["loss"] > 0


def test_a_run_on_whole_rows_answers_each_modality_by_itself(run: Path) -> None:
    predictor = mopefuse.load(run, device="cpu")
    answers = predictor.predict([*images(1), None], [None, TEXTS[0]])
    assert all(sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5) for answer in answers)


# -- an ordinary run


@pytest.mark.process
def test_it_is_evaluated_exported_and_reported_as_any_run(pairs: Path, run: Path, tmp_path: Path) -> None:
    check_eval_report_and_export(run, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("multi", [True])
def test_the_exported_graph_predicts_the_same(pairs: Path, multi_pairs: Path, tmp_path: Path, multi: bool) -> None:
    train(config(multi_pairs if multi else pairs, "qmf", train={"epochs": 1}), tmp_path / "run")
    done = call("export", tmp_path / "run", "-o", tmp_path / "bundle")  # refused unless the predictions are the model's
    assert done.returncode == 0, done.stderr


def test_several_labels_a_row(multi_pairs: Path, tmp_path: Path) -> None:
    result = train(config(multi_pairs, "qmf", train={"epochs": 2}), tmp_path / "run")
    assert set(result["thresholds"]) == {"a", "b", "c"}


def test_a_resumed_run_ends_as_an_uninterrupted_one(pairs: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 4, "schedule": "constant"}
    whole = train(config(pairs, "qmf", train={**settings, "epochs": 3}), tmp_path / "whole")
    train(config(pairs, "qmf", train={**settings, "epochs": 1}), tmp_path / "run")
    resumed = train(config(pairs, "qmf", train={**settings, "epochs": 3}), tmp_path / "run", resume=True)
    assert resumed["metrics"] == whole["metrics"] and resumed["steps"] == whole["steps"] == 9


def test_a_new_complementary_encoder_needs_a_new_head_of_its_own_only() -> None:
    this = {"method": "qmf"}
    _, _, origins = pair(this, {**this, "comp": "tiny:text?pool=cls"})
    fresh = {name for name, origin in origins.items() if origin == "new"}
    assert fresh == {name for name in origins if name.startswith(("head_comp.", "standard.comp."))}


def test_settings_of_other_methods_are_reported_as_unused() -> None:
    assert build(method="mlp", qmf={"scale": 1.0}).unused_sections() == ["qmf"]
    assert build(method="qmf", mlp={"dropout": 0.0}, qmf={"scale": 1.0}).unused_sections() == ["mlp"]
