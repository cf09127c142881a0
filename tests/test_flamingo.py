"""The method flamingo: its definition, that it starts as the untouched encoder, and that it is an ordinary run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import call, plain_config
from missing_cases import holes
from run_cases import check_eval_report_and_export
from test_cross_attention import Given
from test_fusion import PAIRS, TEXTS, build, images, open_gates
from test_mlp import config, missing
from test_swap import SMALL, WIDER, config_of, pair
from torch import Tensor

from mopefuse.data.base import Batch
from mopefuse.encoders.base import Prompt, create_encoder
from mopefuse.errors import ConfigError, DataError, EncoderError
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model
from mopefuse.fusion.flamingo import Attention, FeedForward, Flamingo
from mopefuse.training.train import train

SMALLER = {"width": 8, "heads": 2, "hidden": 6, "resampled": 3}


def flamingo(**changed: Any) -> Flamingo:
    """A model whose gates are open and whose weights are random."""
    model = build(method="flamingo", **{"flamingo": SMALLER} | changed)
    assert isinstance(model, Flamingo)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.normal_(std=0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    out = tmp_path_factory.mktemp("flamingo") / "run"
    train(config(pairs, "flamingo", train={"epochs": 2, "batch_size": 4}), out)
    return out


# -- the definition, one sample at a time and without masks


def normed(norm: Any, x_LD: Tensor) -> Tensor:
    centred_LD = x_LD - x_LD.mean(1, keepdim=True)
    return centred_LD / (centred_LD.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def attended(attention: Attention, x_LD: Tensor, read_TW: Tensor) -> Tensor:
    query_LW = normed(attention.norm, x_LD) @ attention.query.weight.T
    key_TW, value_TW = (read_TW @ attention.key_value.weight.T).chunk(2, dim=1)
    heads = [
        (query_LW[:, one] @ key_TW[:, one].T / 4**0.5).softmax(dim=1) @ value_TW[:, one]
        for one in (slice(0, 4), slice(4, 8))
    ]
    return torch.cat(heads, dim=1) @ attention.output.weight.T


def fed(network: FeedForward, x_LD: Tensor) -> Tensor:
    return F.gelu(normed(network[0], x_LD) @ network[1].weight.T) @ network[4].weight.T


def expected_read(model: Flamingo, tokens_TC: Tensor) -> Tensor:
    resampler: Any = model.resamplers["comp"]
    read_TW = normed(resampler.norm_in, tokens_TC) @ resampler.project.weight.T + resampler.project.bias
    if resampler.query_RW is not None:
        x_RW = resampler.query_RW
        for attention, network in zip(resampler.attentions, resampler.feed_forwards, strict=True):
            x_RW = x_RW + attended(attention, x_RW, torch.cat([read_TW, normed(attention.norm, x_RW)]))
            x_RW = x_RW + fed(network, x_RW)
        read_TW = x_RW
    return normed(resampler.norm_out, read_TW)


@pytest.mark.parametrize("changed", [{}, {"resampled": 0}, {"resampler_layers": 2}], ids=str)
@torch.no_grad()
def test_logits_are_those_of_the_definition(changed: dict[str, Any]) -> None:
    model = flamingo(flamingo=SMALLER | changed, layers=[1, 3])
    found_BN = model(model.collate(images(3), TEXTS[:3])).logits
    main: Any = model.encoder("main")
    for row in range(3):
        alone = model.collate(images(3)[row : row + 1], TEXTS[row : row + 1])
        read_RW = expected_read(model, model.encoder("comp").encode(alone.inputs["comp"]).tokens_BLD[0])
        x_BLD = main.embed(main._finish_inputs(alone.inputs["main"]))[0]
        for layer, block in enumerate(main.blocks):
            if layer in (1, 3):
                gated: Any = model.layers[str(layer)]
                x_LD = x_BLD[0] + gated.attention_gate.tanh() * attended(gated.attention, x_BLD[0], read_RW)
                x_BLD = (x_LD + gated.feed_forward_gate.tanh() * fed(gated.feed_forward, x_LD))[None]
            x_BLD = block(x_BLD)
        pooled_D = main.norm(x_BLD)[0, 0]
        expected_N = model.head(F.layer_norm(pooled_D, pooled_D.shape))
        torch.testing.assert_close(found_BN[row], expected_N, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("main", "comp"), PAIRS)
@pytest.mark.parametrize(("features", "limit"), [("main", "main-only"), ("all", "late-concat")])
@torch.no_grad()
def test_with_gates_of_0_the_encoder_is_untouched_to_the_bit(main: str, comp: str, features: str, limit: str) -> None:
    model = build(main, comp, method="flamingo", head_features=features)
    plain = build(main, comp, method=limit)
    plain.load_trainable_state_dict({name: tensor for name, tensor in model.trainable_state_dict().items() if "head" in name})
    batch = model.collate(images(5), TEXTS)
    assert torch.equal(model(batch).logits, plain(batch).logits)
    open_gates(model)
    assert not torch.allclose(model(batch).logits, plain(batch).logits)


def test_exactly_the_new_layers_and_the_head_are_trained_and_saved() -> None:
    model = flamingo(layers="last:1")
    names = set(model.named_trainable_parameters())
    assert names == set(model.trainable_state_dict())
    assert {name.partition(".")[0] for name in names} == {"layers", "resamplers", "head"}
    assert {name.split(".")[1] for name in names if name.startswith("layers")} == {"3"}
    assert set(model.breakdown()) == {"cross-attention", "feed-forward", "resamplers", "gates", "head"}
    assert model.frozen == () and model.prefix_layers == {"main": 3}


def test_every_new_weight_learns_and_none_of_the_encoders() -> None:
    model = flamingo(flamingo=SMALLER | {"dropout": 0.0}).train()
    model(model.collate(images(3), TEXTS[:3])).logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.trainable_parameters())
    assert not any(parameter.grad is not None for side in model.uses for parameter in model.encoder(side).parameters())


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = flamingo(main=SMALL, train={"checkpoint_activations": recompute})
        model(model.collate(images(3), TEXTS[:3])).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.trainable_parameters()])
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


def test_a_layer_run_by_itself_adds_too() -> None:
    encoder = create_encoder("tiny:vision")
    tokens_BLD, added_BLD = torch.randn(2, 17, 96), torch.randn(2, 17, 96)
    found = encoder.run_layer(1, tokens_BLD, None, Prompt(tokens_BLD[:, :0], added_BLD=added_BLD))
    assert torch.equal(found, encoder.run_layer(1, tokens_BLD + added_BLD))


def test_settings_and_encoders_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="width is 10, which is not a multiple of heads, 4"):
        build(method="flamingo", flamingo={"width": 10})
    with pytest.raises(ConfigError, match="has 4 layers") as caught:
        build(method="flamingo", layers=[4])
    assert caught.value.number == 7
    with pytest.raises(EncoderError, match="resnet18"):
        build(method="flamingo", main="timm:resnet18?pretrained=false", comp="tiny:text")
    comp = Given("text", 4)
    comp.token_width = 0
    values = plain_config({"main": "tiny:vision", "comp": "b:2", "method": "flamingo"})
    with pytest.raises(EncoderError, match="does not provide its tokens"):
        Flamingo(values, {"main": create_encoder("tiny:vision"), "comp": comp}, 2)


# -- samples that lack a modality


def without_attention(model: Fusion) -> Fusion:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_gate"):
                parameter.zero_()
    return model


@torch.no_grad()
def test_a_row_without_a_text_attends_to_nothing() -> None:
    model = flamingo()
    batch = missing(model.collate(images(3), TEXTS[:3]), "comp", [1])
    found_BN, whole_BN = model(batch).logits, model(model.collate(images(3), TEXTS[:3])).logits
    assert torch.equal(found_BN[[0, 2]], whole_BN[[0, 2]]) and not torch.allclose(found_BN[1], whole_BN[1])
    torch.testing.assert_close(found_BN[1], without_attention(model)(batch).logits[1])


@torch.no_grad()
def test_a_row_that_lacks_one_of_two_attends_to_the_other() -> None:
    comps = ["tiny:text", "tiny:text?pool=cls"]
    model: Any = build_model(config_of(method="flamingo", comp=comps, flamingo=SMALLER), 2)
    batch: Batch = model.collate(images(2), TEXTS[:2])
    encoded = {side: model.encoder(side).encode(batch.inputs[side]) for side in model.comps}
    read_BRW, mask_BR = model.resample(encoded, missing(batch, "comp2", [1]))
    assert read_BRW.shape == (2, 6, 8) and mask_BR.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert model.resample(encoded, batch)[1].all()


def test_images_are_needed_and_no_flag_changes_that() -> None:
    model = build(method="flamingo")
    assert model.droppable_sides == ("comp",)
    with pytest.raises(DataError) as caught:
        model.collate([None, *images(1)], TEXTS[:2])
    assert caught.value.number == 100 and "--either" not in caught.value.fix
    with pytest.raises(ConfigError) as refused:
        build(method="flamingo", either=True)
    assert refused.value.number == 143


def test_it_trains_on_rows_that_lack_a_text_and_is_evaluated_without(pairs: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    changed = {"data": {"path": str(data), "on_missing": "absent"}, "head_features": "all"}
    result = train(config(data, "flamingo", **changed, train={"max_steps": 2, "batch_size": 4}), tmp_path / "run")
    assert result["steps"] == 2 and result["metrics"]["test"]["loss"] > 0
    assert call("eval", tmp_path / "run", "--missing", "text=0.9").returncode == 0
    refused = call("eval", tmp_path / "run", "--missing", "image=0.5")
    assert refused.returncode == 3 and "--either" not in refused.stderr and "--missing text=FRACTION" in refused.stderr


# -- an ordinary run


@pytest.mark.process
def test_it_is_evaluated_exported_and_reported_as_any_run(pairs: Path, run: Path, tmp_path: Path) -> None:
    check_eval_report_and_export(run, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("sides", PAIRS[:1])
def test_the_exported_graph_predicts_the_same(pairs: Path, tmp_path: Path, sides: tuple[str, str]) -> None:
    changed = {"main": sides[0], "comp": sides[1], "data": {"path": str(pairs), "on_missing": "absent"}}
    train(config(pairs, "flamingo", **changed, train={"max_steps": 2}), tmp_path / "run")
    done = call("export", tmp_path / "run", "-o", tmp_path / "bundle")  # refused unless the predictions are the model's
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_ends_as_an_uninterrupted_one(pairs: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 4, "schedule": "constant"}
    whole = train(config(pairs, "flamingo", train={**settings, "epochs": 2}), tmp_path / "whole")
    train(config(pairs, "flamingo", train={**settings, "epochs": 1}), tmp_path / "run")
    resumed = train(config(pairs, "flamingo", train={**settings, "epochs": 2}), tmp_path / "run", resume=True)
    assert resumed["metrics"] == whole["metrics"] and resumed["steps"] == whole["steps"] == 6


def test_several_labels_a_row(multi_pairs: Path, tmp_path: Path) -> None:
    result = train(config(multi_pairs, "flamingo", train={"max_steps": 2}), tmp_path / "run")
    assert set(result["thresholds"]) == {"a", "b", "c"}


def test_a_new_complementary_encoder_needs_a_new_way_into_the_resampler_only() -> None:
    this = {"method": "flamingo"}
    _, _, origins = pair(this, {**this, "comp": "tiny:text?pool=cls"})
    ways = {f"resamplers.comp.{part}.{kind}" for part in ("norm_in", "project") for kind in ("weight", "bias")}
    assert {name for name, origin in origins.items() if origin == "new"} == ways


def test_a_main_encoder_of_other_widths_keeps_the_resampler() -> None:
    _, _, origins = pair({"method": "flamingo", "main": SMALL}, {"method": "flamingo", "main": WIDER})
    assert {name.partition(".")[0] for name, origin in origins.items() if origin == "kept"} == {"resamplers"}


def test_its_defaults_are_its_own_and_settings_of_other_methods_are_reported_as_unused() -> None:
    values = plain_config({"main": "tiny:vision", "comp": "tiny:text", "method": "flamingo"})
    assert (values.train.lr, values.train.schedule, values.head_hidden) == (1e-3, "cosine", 0)
    assert build(method="mlp", flamingo=SMALLER).unused_sections() == ["flamingo"]
    changed = {"cross_attention": {"width": 8}, "flamingo": SMALLER, "layers": "last:1"}
    assert build(method="flamingo", **changed).unused_sections() == ["cross_attention"]
