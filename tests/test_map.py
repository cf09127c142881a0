"""The method map: prompts by what a sample lacks, its limits, and that it is an ordinary run on rows with holes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call
from missing_cases import holes
from test_fusion import PAIRS, TEXTS, build, images, open_gates
from test_mlp import config, missing
from test_swap import SMALL, pair
from torch import Tensor

from mopefuse.config.schema import build_config
from mopefuse.encoders.base import Prompt
from mopefuse.errors import ConfigError, EncoderError
from mopefuse.fusion.map import MAP
from mopefuse.training.train import train

ABSENT: dict[str, Any] = {"data": {"on_missing": "absent"}}


def missing_aware(**changed: Any) -> MAP:
    """A model whose gates are open and whose weights are random."""
    model = build(method="map", **{"static": 2} | changed)
    assert isinstance(model, MAP)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.normal_(std=0.5, generator=generator)
    return model


def prompts_of(model: MAP, side: str, layer: int, case: int, count: int) -> Tensor:
    """Those of one case: the cases follow one another in the parameter."""
    static_SD: Tensor = model.stacks[side].layers[str(layer)].static_SD  # type: ignore[union-attr, index, assignment]
    length = len(static_SD) // count
    return static_SD[case * length : (case + 1) * length]


# -- the definition


@pytest.mark.parametrize("gate", ["none", "zero"])
@torch.no_grad()
def test_each_sample_has_the_prompts_of_what_it_lacks(gate: str) -> None:
    model = missing_aware(gate=gate, either=True, **ABSENT)
    batch = missing(model.collate(images(4), TEXTS[:4]), "comp", [1, 3])
    batch.missing["main"] = torch.tensor([False, False, True, False])
    found_BN = model(batch).logits
    for row, (main_case, comp_case) in enumerate([(0, 0), (1, None), (None, 1), (1, None)]):
        alone = model.collate(images(4)[row : row + 1], TEXTS[row : row + 1])
        features = []
        for side, case in (("main", main_case), ("comp", comp_case)):
            gates = {layer: model.stacks[side].layers[str(layer)].gate_H for layer in range(len(model.encoder(side).widths))}
            at = lambda layer, tokens, mask, side=side, case=case, gates=gates: Prompt(  # noqa: E731
                prompts_of(model, side, layer, case, 2)[None], gates[layer]
            )
            if case is None:
                features.append(model.absent[side])
            else:
                pooled_C = model.encoder(side).encode(alone.inputs[side], at).pooled_BC[0]
                features.append(torch.nn.functional.layer_norm(pooled_C, pooled_C.shape))
        torch.testing.assert_close(found_BN[row], model.head(torch.cat(features)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cases_of_three_modalities_are_numbered_by_what_is_missing() -> None:
    model = missing_aware(comp=["tiny:text", "tiny:text?pool=cls"], either=True, **ABSENT)
    assert [model.count_cases(side) for side in model.uses] == [2, 2, 2], "both text encoders lose the text together"
    assert model.others("main") == ("comp",) and model.others("comp") == model.others("comp2") == ("main",)
    model.others = lambda side: ("comp", "comp2")  # type: ignore[method-assign]  # as if of two modalities
    batch = missing(model.collate(images(4), TEXTS[:4]), "comp", [1, 3])
    batch.missing["comp2"] = torch.tensor([False, False, True, True])
    numbers_BJPD = torch.arange(4.0).expand(4, 4)[..., None, None]
    assert model.choose("main", numbers_BJPD, batch).flatten().tolist() == [0, 1, 2, 3]
    del batch.missing["comp"]
    assert model.choose("main", numbers_BJPD, batch).flatten().tolist() == [0, 0, 2, 2]


def test_only_prompts_of_cases_in_the_batch_learn() -> None:
    model = missing_aware(dropout=0.0, **ABSENT)
    batch = model.collate(images(3), TEXTS[:3])
    for lacking, cases in (([], [0]), ([0, 1, 2], [1]), ([1], [0, 1])):
        model.zero_grad()
        model(missing(batch, "comp", lacking)).logits.square().sum().backward()
        gradient_SD = model.stacks["main"].layers["2"].static_SD.grad
        assert [case for case in (0, 1) if gradient_SD[2 * case : 2 * case + 2].any()] == cases
        assert len(model.stacks["comp"].layers["0"].static_SD) == 2, "without --either, the text encoder has one case"


# -- limits


@pytest.mark.parametrize("gate", ["none", "zero"])
@pytest.mark.parametrize(("main", "comp"), PAIRS)
def test_if_nothing_is_missing_it_is_p_late_concat_to_the_bit(main: str, comp: str, gate: str) -> None:
    model = missing_aware(main=main, comp=comp, gate=gate)
    plain = build(main, comp, method="p-late-concat", static=2, gate=gate)
    plain.load_trainable_state_dict(model.trainable_state_dict())
    batch = model.collate(images(5), TEXTS)
    assert torch.equal(model(batch).logits, plain(batch).logits)


@torch.no_grad()
def test_equal_prompts_for_every_case_are_p_late_concat() -> None:
    model, plain = missing_aware(**ABSENT), build(method="p-late-concat", static=2, **ABSENT)
    for layer in model.stacks["main"].layers.values():
        layer.static_SD[2:] = layer.static_SD[:2]
    state = {name: t[:2] if name.endswith("static_SD") else t for name, t in model.trainable_state_dict().items()}
    plain.load_trainable_state_dict(state)
    batch = missing(model.collate(images(3), TEXTS[:3]), "comp", [1])
    torch.testing.assert_close(model(batch).logits, plain(batch).logits)
    model.stacks["main"].layers["1"].static_SD[2:] += 1
    assert not torch.allclose(model(batch).logits[1], plain(batch).logits[1])
    torch.testing.assert_close(model(batch).logits[[0, 2]], plain(batch).logits[[0, 2]])


def test_closed_gates_and_no_prompts_are_late_concat_to_the_bit() -> None:
    for changed in ({"static": 0}, {"static": 2, "gate": "zero"}):
        model, plain = build(method="map", **changed, **ABSENT), build(method="late-concat", **ABSENT)
        own = {name: t for name, t in model.trainable_state_dict().items() if name.startswith(("head", "absent"))}
        plain.load_trainable_state_dict(own)
        batch = missing(model.collate(images(3), TEXTS[:3]), "comp", [1])
        assert torch.equal(model(batch).logits, plain(batch).logits)
        assert model.frozen == (model.uses if changed["static"] == 0 else ())
    open_gates(model)
    assert not torch.allclose(model(batch).logits, plain(batch).logits)


def test_its_defaults_and_what_it_refuses() -> None:
    values = build_config({"main": "tiny:vision", "comp": "tiny:text", "method": "map"})
    assert (values.prompts.static, values.prompts.layers) == (16, "all")
    with pytest.raises(EncoderError, match="resnet18") as refused:
        build(method="map", comp="timm:resnet18?pretrained=false", main="tiny:text")
    assert "late-concat" in refused.value.fix
    with pytest.raises(ConfigError) as never:
        build(method="map", either=True)
    assert never.value.number == 145
    parts = {"missing-aware prompts", "gates", "head", "replacements for missing modalities"}
    assert set(missing_aware(**ABSENT).breakdown()) == parts


# -- an ordinary run


@pytest.mark.parametrize("column", ["text", "img"])
def test_it_trains_on_rows_that_lack_a_modality(pairs: Path, tmp_path: Path, column: str) -> None:
    data = holes(pairs, tmp_path / "data", column=column)
    changed = {"data": {"path": str(data), "on_missing": "absent"}, "either": column == "img", "prompts": {"static": 2}}
    result = train(config(data, "map", **changed, train={"max_steps": 3, "batch_size": 4}), tmp_path / "run")
    assert result["steps"] == 3 and result["metrics"]["test"]["loss"] > 0


def test_a_resumed_run_with_modality_dropout_ends_as_an_uninterrupted_one(pairs: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 4, "schedule": "constant", "modality_dropout": 0.4}
    whole = train(config(pairs, "map", train={**settings, "epochs": 2}), tmp_path / "whole")
    train(config(pairs, "map", train={**settings, "epochs": 1}), tmp_path / "run")
    resumed = train(config(pairs, "map", train={**settings, "epochs": 2}), tmp_path / "run", resume=True)
    assert resumed["metrics"] == whole["metrics"] and resumed["steps"] == whole["steps"] == 6


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["onnx"])
def test_the_exported_graph_predicts_the_same_with_and_without_values(pairs: Path, tmp_path: Path, kind: str) -> None:
    changed = {"data": {"path": str(pairs), "on_missing": "absent"}, "either": True, "prompts": {"static": 2}}
    train(config(pairs, "map", **changed, train={"max_steps": 2}), tmp_path / "run")
    done = call("export", tmp_path / "run", "--format", kind, "-o", tmp_path / "bundle")  # compared with the model
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_it_is_evaluated_without_values_and_reported(pairs: Path, tmp_path: Path) -> None:
    changed = {"prompts": {"static": 2}, "train": {"max_steps": 2, "modality_dropout": 0.3}}
    train(config(pairs, "map", **changed), tmp_path / "run")
    done = call("eval", tmp_path / "run", "--missing", "text=0.7", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)
    done = call("report", tmp_path / "run")  # with an audit
    assert done.returncode == 0, done.stderr


def test_a_new_complementary_encoder_keeps_the_prompts_of_the_main_one() -> None:
    this = {"method": "map", "data": {"on_missing": "absent"}}
    _, _, origins = pair({**this, "comp": SMALL, "main": "tiny:text"}, {**this, "comp": "tiny:vision", "main": "tiny:text"})
    assert {origin for name, origin in origins.items() if name.startswith("stacks.main")} == {"kept"}
    assert {origin for name, origin in origins.items() if name.startswith(("stacks.comp", "absent"))} == {"new"}
