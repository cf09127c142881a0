"""The method maple: coupled prompts of two encoders, its limits, and that it is an ordinary run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call
from encoder_cases import Case
from test_fusion import PAIRS, TEXTS, build, images, open_gates
from test_mlp import config
from test_swap import SMALL, pair

from mopefuse.config.schema import build_config
from mopefuse.encoders.base import Prompt
from mopefuse.errors import ConfigError, EncoderError
from mopefuse.fusion.maple import MaPLe
from mopefuse.training.train import train

pytest_plugins = ["families"]


def maple(**changed: Any) -> MaPLe:
    """A model whose gates are open and whose weights are random."""
    model = build(method="maple", **changed)
    assert isinstance(model, MaPLe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


# -- the definition


@pytest.mark.parametrize(("main", "comp"), PAIRS)
@pytest.mark.parametrize("gate", ["none", "zero"])
@torch.no_grad()
def test_image_prompts_are_a_linear_function_of_those_of_the_text(main: str, comp: str, gate: str) -> None:
    model: Any = maple(main=main, comp=comp, gate=gate, layers="first:2")
    batch = model.collate(images(3), TEXTS[:3])

    def text_at(layer: int, tokens_BLD: Any, mask_BL: Any) -> Prompt:
        own = model.stack.layers[str(layer)]
        return Prompt(own.static_SD.expand(3, -1, -1), own.gate_H)

    def image_at(layer: int, tokens_BLD: Any, mask_BL: Any) -> Prompt | None:
        if layer > 1:
            return None
        own, mapping = model.stack.layers[str(layer)], model.mappings[str(layer)]
        mapped_PD = own.static_SD @ mapping.weight.T + mapping.bias
        return Prompt(mapped_PD.expand(3, -1, -1), model.gates_H[str(layer)] if gate == "zero" else None)

    callbacks = {"image": image_at, "text": text_at}
    pooled = [
        model.encoder(side).encode(batch.inputs[side], callbacks[model.encoder(side).modality]).pooled_BC
        for side in ("main", "comp")
    ]
    features_BC = torch.cat([torch.nn.functional.layer_norm(one, one.shape[-1:]) for one in pooled], dim=1)
    torch.testing.assert_close(model(batch).logits, model.head(features_BC), atol=1e-5, rtol=1e-4)


def test_text_prompts_learn_from_the_image_and_no_encoder_is_trained() -> None:
    model: Any = maple(dropout=0.0)
    names = set(model.named_trainable_parameters())
    assert names == set(model.trainable_state_dict())
    assert {name.partition(".")[0] for name in names} == {"stack", "mappings", "gates_H", "head"}
    assert set(model.breakdown()) == {"text prompts", "mappings to image prompts", "gates", "head"}
    image = model.encoder("main").encode(model.collate(images(2), TEXTS[:2]).inputs["main"], model.image_prompt).pooled_BC
    image.square().sum().backward()
    assert all(layer.static_SD.grad.any() for layer in model.stack.layers.values())
    assert not any(parameter.grad is not None for parameter in model.encoder("main").parameters())


# -- limits


@pytest.mark.parametrize(("main", "comp"), PAIRS)
@torch.no_grad()
def test_without_prompts_and_with_closed_gates_it_is_late_concat_to_the_bit(main: str, comp: str) -> None:
    plain = build(main, comp, method="late-concat")
    for changed in ({"static": 0}, {"gate": "zero"}):
        model = build(main, comp, method="maple", **changed)
        plain.load_trainable_state_dict({name: t for name, t in model.trainable_state_dict().items() if "head" in name})
        batch = model.collate(images(5), TEXTS)
        assert torch.equal(model(batch).logits, plain(batch).logits)
        assert model.frozen == (model.uses if "static" in changed else ())
    open_gates(model)
    assert not torch.allclose(model(batch).logits, plain(batch).logits)


@pytest.mark.parametrize("gate", ["none", "zero"])
@torch.no_grad()
def test_mappings_of_weight_0_are_p_late_concat_to_the_bit(gate: str) -> None:
    model: Any = maple(gate=gate, static=3)
    plain: Any = build(method="p-late-concat", gate=gate, static=3, layers="first:2")
    plain.head.load_state_dict(model.head.state_dict())
    for name, mapping in model.mappings.items():
        mapping.weight.zero_()
        plain.stacks["comp"].layers[name].load_state_dict(model.stack.layers[name].state_dict())
        plain.stacks["main"].layers[name].static_SD.copy_(mapping.bias.expand(3, -1))
        if gate == "zero":
            plain.stacks["main"].layers[name].gate_H.copy_(model.gates_H[name])
    batch = model.collate(images(4), TEXTS[:4])
    assert torch.equal(model(batch).logits, plain(batch).logits)


def test_its_defaults_and_what_it_refuses() -> None:
    assert build_config({"main": "tiny:vision", "comp": "tiny:text", "method": "maple"}).prompts.static == 2
    assert list(maple().mappings) == ["0", "1"], "the layers that both encoders have"
    with pytest.raises(ConfigError, match="the encoder with fewer layers has 2 layers") as layers:
        build(method="maple", layers="first:3")
    assert layers.value.number == 7
    with pytest.raises(EncoderError, match="needs a text and an image encoder, but they read image and image"):
        build(method="maple", comp="tiny:vision-b")
    with pytest.raises(EncoderError, match="resnet18") as refused:
        build(method="maple", main="tiny:text", comp="timm:resnet18?pretrained=false")
    assert "late-concat" in refused.value.fix
    with pytest.raises(ConfigError) as several:
        build(method="maple", comp=["tiny:text", "tiny:text-b"])
    assert several.value.number == 142


# -- an ordinary run


def test_a_resumed_run_ends_as_an_uninterrupted_one(pairs: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 4, "schedule": "constant"}
    whole = train(config(pairs, "maple", train={**settings, "epochs": 2}), tmp_path / "whole")
    train(config(pairs, "maple", train={**settings, "epochs": 1}), tmp_path / "run")
    resumed = train(config(pairs, "maple", train={**settings, "epochs": 2}), tmp_path / "run", resume=True)
    assert resumed["metrics"] == whole["metrics"] and resumed["steps"] == whole["steps"] == 6


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["pt2"])
def test_it_is_an_ordinary_run_and_exports(multi_pairs: Path, tmp_path: Path, kind: str) -> None:
    result = train(config(multi_pairs, "maple", main="tiny:text", comp="tiny:vision", train={"max_steps": 2}), tmp_path / "run")
    assert set(result["thresholds"]) == {"a", "b", "c"}
    for command in (("report", tmp_path / "run"), ("export", tmp_path / "run", "--format", kind, "-o", tmp_path / "bundle")):
        done = call(*command)
        assert done.returncode == 0, (command, done.stderr)


def test_a_new_image_encoder_keeps_the_text_prompts() -> None:
    _, _, origins = pair({"method": "maple"}, {"method": "maple", "main": SMALL})
    assert {origin for name, origin in origins.items() if name.startswith("stack")} == {"kept"}
    assert {origin for name, origin in origins.items() if name.startswith(("mappings", "gates_H"))} == {"new"}
    assert all(maple().dependency_of(name) for name in maple().named_trainable_parameters() if "head" not in name)


@torch.no_grad()
def test_it_couples_the_two_encoders_of_clip(cases: Mapping[str, Case]) -> None:
    sides = {"main": cases["open_clip-visual"].spec, "comp": cases["open_clip-text"].spec}
    model, plain = maple(**sides, gate="none"), build(**sides, method="late-concat")
    plain.head.load_state_dict(model.head.state_dict())
    batch = model.collate(images(3), TEXTS[:3])
    together_BN = model(batch).logits
    assert not torch.allclose(together_BN, plain(batch).logits, atol=1e-2)
    for row in range(3):
        alone = model.collate(images(3)[row : row + 1], TEXTS[row : row + 1])
        torch.testing.assert_close(model(alone).logits[0], together_BN[row], atol=1e-4, rtol=1e-4)
