"""Fusion methods: what is trained and saved, their limits, and that samples are independent."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import mopefuse
from mopefuse.config.schema import build_config
from mopefuse.core.precision import normalize_feature
from mopefuse.encoders.base import Encoder, Inputs, create_encoder, run_frozen
from mopefuse.errors import CheckpointError, ConfigError, DataError, EncoderError
from mopefuse.fusion._static_prompts import initial_bound
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model, require_rows

PAIRS = [("tiny:vision", "tiny:text"), ("tiny:text", "tiny:vision")]
METHODS = ["conditional", "late-concat", "main-only", "comp-only", "linear", "mlp", "cross-attention", "qmf"]
TEXTS = ["what is the green number?", "read the digit at the bottom left", "blue", "", "the one at the top right please"]


def images(count: int) -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (count, 20, 16, 3), dtype=np.uint8)
    return [Image.fromarray(value) for value in values]


PAPER = {"compat": "paper", "gate": "zero", "head_norm": "layer"}
WIDE = {"compat": "none", "head_features": "all", "head_hidden": 8, "film": True, "layers": "last:1/2"}


def build(main: str = "tiny:vision", comp: str = "tiny:text", **options: object) -> Fusion:
    """The papers' stack with gated prompts, changed by `options`."""
    return mopefuse.build_fusion(main=main, comp=comp, num_labels=7, **{**PAPER, **options})


def output_tokens(encoder: Encoder, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The output tokens of an encoder as a batch has them if they were cached."""
    encoded = run_frozen(encoder, inputs)
    mask_BL = torch.ones(encoded.tokens_BLD.shape[:2], dtype=torch.bool) if encoded.mask_BL is None else encoded.mask_BL
    return {"values_BLC": normalize_feature(encoded.tokens_BLD), "mask_BL": mask_BL}


def open_gates(model: Fusion) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_H", "_gate")) or "gates_H" in name:
                parameter.fill_(0.5)


@pytest.mark.parametrize(("main", "comp"), PAIRS)
@pytest.mark.parametrize(
    "options",
    [
        WIDE,
        {},
        {"gate": "none"},
        {"router": {"kind": "joint"}},
        {"router": {"top_m": 2}},
        {"comp_tuning": {"mode": "prompts"}},
        {"method": "late-concat"},
        {"method": "main-only"},
        {"method": "comp-only"},
        {"method": "linear"},
        {"method": "linear", "linear": {"features": "average"}},
        {"method": "mlp"},
        {"method": "cross-attention"},
        {"method": "qmf"},
        {"method": "flamingo"},
        {"method": "map"},
        {"method": "maple"},
    ],
    ids=str,
)
def test_a_sample_does_not_depend_on_its_batch(main: str, comp: str, options: dict[str, object]) -> None:
    model = build(main, comp, **options)
    open_gates(model)
    together = model(model.collate(images(5), TEXTS)).logits
    assert together.shape == (5, 7)
    for i, (image, text) in enumerate(zip(images(5), TEXTS, strict=True)):
        alone = model(model.collate([image], [text])).logits[0]
        torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("main", "comp"), PAIRS)
@pytest.mark.parametrize("options", [WIDE, {}], ids=["wide", "papers"])
def test_zero_gated_prompts_start_as_the_frozen_encoder_bit_for_bit(main: str, comp: str, options: dict[str, object]) -> None:
    model = build(main, comp, **options)
    probe = build(main, comp, **{**options, "static": 0, "dynamic": 0, "mapped": 0, "film": False})
    probe.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("stack.")})
    batch = model.collate(images(5), TEXTS)
    assert torch.equal(model(batch).logits, probe(batch).logits)
    open_gates(model)
    assert not torch.equal(model(batch).logits, probe(batch).logits)


@pytest.mark.parametrize(
    ("side", "spec", "where"), [("main", "tiny:visoin", "--main"), ("comp", "tiny:text?a=1", "--comp, tiny:text?a=1")]
)
def test_an_encoder_that_cannot_be_loaded_is_an_error_with_its_side(side: str, spec: str, where: str) -> None:
    with pytest.raises(EncoderError) as caught:
        build_model(build_config({"main": "tiny:vision", "comp": "tiny:text"} | {side: spec}), 2)
    assert caught.value.where == where


def test_an_encoder_whose_modality_no_row_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopefuse.fusion.build.create_encoder", lambda spec: replace_modality(create_encoder(spec)))
    with pytest.raises(ConfigError, match="reads smell, a modality that is not installed") as caught:
        build()
    assert caught.value.number == 134 and caught.value.where == "main"
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="tiny:vision reads image, but rows have text and audio") as caught:
        require_rows(build(), ("text", "audio"))
    assert caught.value.number == 132 and caught.value.where == "--main" and "--image-col NAME" in caught.value.fix


def replace_modality(encoder: Encoder) -> Encoder:
    encoder.modality = "smell"
    return encoder


def test_without_prompts_conditional_is_a_linear_probe() -> None:
    model = build(static=0, dynamic=0, mapped=0)
    batch = model.collate(images(3), TEXTS[:3])
    pooled_BC = model.encoder("main").encode(batch.inputs["main"]).pooled_BC
    normed_BC = (pooled_BC - pooled_BC.mean(-1, keepdim=True)) / pooled_BC.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(model(batch).logits, normed_BC @ model.head.weight.T + model.head.bias)
    assert set(model.named_trainable_parameters()) == {"head.weight", "head.bias"}
    probe = build(method="main-only")
    probe.load_trainable_state_dict(model.trainable_state_dict(), where="here")
    assert torch.equal(model(batch).logits, probe(batch).logits)
    as_published = build(static=0, dynamic=0, mapped=0, head_norm="none")
    as_published.load_trainable_state_dict(model.trainable_state_dict(), where="here")
    assert torch.equal(as_published(batch).logits, model.head(pooled_BC))


def test_only_static_prompts_are_independent_of_the_condition() -> None:
    for lengths, reaches in (({}, True), ({"dynamic": 0, "mapped": 0}, False)):
        model = build(gate="none", **lengths)
        one = model(model.collate(images(2), TEXTS[:2])).logits
        other = model(model.collate(images(2), TEXTS[2:4])).logits
        assert torch.equal(one, other) != reaches


def test_static_prompts_alone_do_not_read_the_other_modality() -> None:
    assert set(build(dynamic=0, mapped=0).collate(images(2), TEXTS[:2]).inputs) == {"main"}
    assert set(build(dynamic=0).collate(images(2), TEXTS[:2]).inputs) == {"main", "comp"}


CONDITIONAL = {
    "head.weight",
    "head.bias",
    "stack.router.weight_NKC",
    "stack.router.bias_NK",
    "stack.trunk.0.weight",
    "stack.trunk.0.bias",
    "stack.trunk.1.weight",
    "stack.trunk.1.bias",
} | {
    f"stack.layers.{i}.{name}"
    for i in range(4)
    for name in ("static_SD", "experts_KPD", "mapper.weight", "mapper.bias", "gate_H")
}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, CONDITIONAL),
        ({"gate": "none"}, {name for name in CONDITIONAL if not name.endswith("gate_H")}),
        ({"experts": 1}, {name for name in CONDITIONAL if "router" not in name}),
        ({"method": "late-concat"}, {"head.weight", "head.bias"}),
        ({"method": "late-concat", "head_hidden": 9}, {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}),
        ({"method": "main-only"}, {"head.weight", "head.bias"}),
        ({"method": "comp-only"}, {"head.weight", "head.bias"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_exactly_these_parameters_are_trained_and_saved(options: dict[str, object], expected: set[str]) -> None:
    model = build(**options)
    assert set(model.named_trainable_parameters()) == expected
    assert set(model.trainable_state_dict()) == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert sum(model.breakdown().values()) == sum(p.numel() for p in model.trainable_parameters())
    assert "other" not in model.breakdown()


def test_orthogonal_keys_are_saved_but_not_trained() -> None:
    model = build(router={"kind": "joint"})
    assert set(model.trainable_state_dict()) - set(model.named_trainable_parameters()) == {"stack.router.keys_NQK"}


@pytest.mark.parametrize("mode", ["frozen", "prompts", "lora", "full"])
def test_frozen_weights_never_change_and_all_trainable_ones_do(mode: str) -> None:
    model = build(comp_tuning={"mode": mode}).train()
    open_gates(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    batch = model.collate(images(5), TEXTS)
    torch.nn.functional.cross_entropy(model(batch).logits, torch.arange(5)).backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved <= set(model.named_trainable_parameters())
    ours = {name for name in model.named_trainable_parameters() if not name.startswith("comp.")}
    assert ours <= moved
    assert any(name.startswith("comp.") for name in moved) == (mode in ("full", "lora"))


def test_the_frozen_encoders_stay_in_evaluation_mode_and_a_tuned_one_does_not() -> None:
    model = build().train()
    assert model.training
    assert model.stack.training
    assert not model.encoder("main").training
    assert not model.encoder("comp").training
    assert build(comp_tuning={"mode": "full"}).train().encoder("comp").training


def test_no_graph_is_built_through_a_frozen_complementary_encoder() -> None:
    model = build().train()
    assert not model.psi("comp", model.collate(images(2), TEXTS[:2])).requires_grad
    assert build(comp_tuning={"mode": "prompts"}).psi("comp", model.collate(images(2), TEXTS[:2])).requires_grad


def test_cached_features_replace_the_encoder_bit_for_bit() -> None:
    for method in METHODS:
        model = build(method=method)
        batch = model.collate(images(4), TEXTS[:4])
        known = {side: model.pooled_feature(side, batch) for side in model.frozen}
        inputs = {side: value for side, value in batch.inputs.items() if side not in known}
        tokens = {side: output_tokens(model.encoder(side), batch.inputs[side]) for side in model.reads_tokens}
        cached = replace(batch, inputs=inputs, features=known, tokens=tokens)
        assert torch.equal(model(batch).logits, model(cached).logits), method


def test_the_same_seed_gives_the_same_model_regardless_of_random_state() -> None:
    one = build(seed=3, main="tiny:vision?pretrained=false").state_dict()
    torch.rand(7)
    other = build(seed=3, main="tiny:vision?pretrained=false").state_dict()
    third = build(seed=4, main="tiny:vision?pretrained=false").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["head.weight"], third["head.weight"])


def test_the_trainable_state_survives_a_round_trip() -> None:
    model, other = build(seed=1), build(seed=2)
    other.load_trainable_state_dict(model.trainable_state_dict(), where="here")
    batch = model.collate(images(2), TEXTS[:2])
    assert torch.equal(model(batch).logits, other(batch).logits)


def test_a_state_that_does_not_fit_is_an_error_that_names_the_tensor() -> None:
    model = build()
    state = model.trainable_state_dict()
    for change, message in [
        ({"head.weight": torch.zeros(3, 3)}, r"head\.weight is \(3, 3\), expected \(7, 96\)"),
        ({"head.bias": torch.full((7,), float("nan"))}, "not finite"),
        ({"main.extra": torch.zeros(1)}, r"main\.extra is not expected"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            model.load_trainable_state_dict(state | change, where="here")
    with pytest.raises(CheckpointError, match=r"head\.bias is missing"):
        model.load_trainable_state_dict({k: v for k, v in state.items() if k != "head.bias"}, where="here")


def test_prompts_are_initialised_by_the_papers_rule() -> None:
    class Like:
        modality, patch_size, widths = "image", 4, (128,)

    assert initial_bound(Like()) == pytest.approx(0.1846, abs=1e-4)  # the released code's Swin-B
    assert initial_bound(build().encoder("comp")) == 0.3


def test_an_encoder_without_promptable_layers_is_refused_as_main() -> None:
    with pytest.raises(EncoderError, match=r"usable as comp") as refused:
        build(main="timm:resnet18?pretrained=false", comp="tiny:text")
    assert refused.value.exit_code == 5


def test_compat_official_sets_the_choices_of_the_released_code_and_can_be_overridden() -> None:
    base = {"main": "tiny:vision", "comp": "tiny:text", "compat": "official"}
    config = build_config(base)
    assert (config.prompts.experts, config.prompts.gate, config.router.kind) == (4, "none", "joint")
    assert (config.train.select, config.data.image_stats, config.router.noise_in_eval) == ("last", "mmbt", True)
    assert build_config(base | {"prompts": {"experts": 9}}).prompts.experts == 9
    model = build_model(config, 3)
    assert model.encoder("main").preprocess.mean == pytest.approx((0.4678, 0.4453, 0.4066), abs=1e-4)
    batch = model.collate(images(2), TEXTS[:2])
    assert not torch.equal(model(batch).logits, model(batch).logits)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import mopefuse, sys; assert 'torch' not in sys.modules; mopefuse.build_fusion; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("pictures", "texts", "message"),
    [
        (images(1), ["a", "b"], "1 images and 2 texts"),
        ([], [], "0 images"),
        ([4], ["a"], "got int and str"),
        (["shoe.jpg"], ["a"], "image not found: shoe.jpg"),
        (images(1), [3], "got Image and int"),
    ],
)
def test_invalid_pairs_are_refused_and_never_broadcast(pictures: list[object], texts: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build().collate(pictures, texts)
