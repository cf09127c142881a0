"""The method cross-attention: its definition, that it finds one of several tokens, and that its runs are ordinary runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call
from missing_cases import holes
from run_cases import check_eval_report_and_export
from test_fusion import PAIRS, TEXTS, build, images
from test_mlp import SPECS, config, missing
from test_swap import config_of, pair
from torch import Tensor

from mopefuse.config.schema import build_config
from mopefuse.core.registry import Spec
from mopefuse.data.base import Batch
from mopefuse.encoders._types import EncoderOutput, Inputs
from mopefuse.encoders.base import Encoder
from mopefuse.encoders.tiny import TinyEncoder
from mopefuse.errors import ConfigError, EncoderError
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.cross_attention import CrossAttention
from mopefuse.fusion.mlp import MLP
from mopefuse.training.train import train

READER = {
    *(f"reader.{part}.{name}" for part in ("norm", "key", "value") for name in ("weight", "bias")),
    "reader.query.comp.weight", "reader.offset_QW",
}  # fmt: skip
HEAD = {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}


class Given(Encoder):
    """An encoder whose input is its output: tokens, whose mean is the pooled feature."""

    def __init__(self, modality: str, width: int) -> None:
        super().__init__(Spec("given", modality))
        self.modality, self.feature_width, self.token_width = modality, width, width

    def _finish_inputs(self, inputs: Inputs) -> Inputs:
        return inputs

    def _encode(self, inputs: Inputs) -> EncoderOutput:
        tokens_BLD = inputs["tokens"]
        return EncoderOutput(tokens_BLD.mean(dim=1), tokens_BLD, inputs.get("mask"))


def given_model(method: type[Fusion], width: int, comp_width: int, labels: int, **changed: Any) -> Fusion:
    names = {CrossAttention: "cross-attention", MLP: "mlp"}
    torch.manual_seed(0)
    values = build_config({"main": "a:1", "comp": "b:2", "method": names[method], **changed})
    return method(values, {"main": Given("image", width), "comp": Given("text", comp_width)}, labels)  # type: ignore[call-arg]


def given_batch(tokens_BLD: Tensor, psi_BC: Tensor, mask_BL: Tensor | None = None) -> Batch:
    inputs = {"main": {"tokens": tokens_BLD}, "comp": {"tokens": psi_BC[:, None]}}
    if mask_BL is not None:
        inputs["main"]["mask"] = mask_BL
    return Batch(inputs, {}, None, torch.arange(len(psi_BC)), {})


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tests must not change."""
    out = tmp_path_factory.mktemp("cross") / "run"
    train(config(pairs, "cross-attention", train={"epochs": 2, "batch_size": 4}), out)
    return out


# -- the definition


@torch.no_grad()
def test_logits_match_the_definition() -> None:
    settings = {"queries": 3, "width": 8, "heads": 2}
    model = given_model(CrossAttention, 6, 5, 4, head_hidden=7, cross_attention=settings).eval()
    for parameter in model.trainable_parameters():
        parameter.normal_()
    tokens_BLD, psi_BC = torch.randn(2, 5, 6), torch.randn(2, 5)
    mask_BL = torch.tensor([[True] * 5, [True, False, True, True, False]])
    logits_BN = model(given_batch(tokens_BLD, psi_BC, mask_BL)).logits
    reader = model.reader
    for b in range(2):
        tokens_LD = tokens_BLD[b, mask_BL[b]]
        normed_LD = (tokens_LD - tokens_LD.mean(1, keepdim=True)) / (tokens_LD.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        normed_LD = normed_LD * reader.norm.weight + reader.norm.bias
        keys_LW = normed_LD @ reader.key.weight.T + reader.key.bias
        values_LW = normed_LD @ reader.value.weight.T + reader.value.bias
        read = []
        for query in range(3):
            query_W = reader.query["comp"].weight @ psi_BC[b] + reader.offset_QW[query]
            for head in (slice(0, 4), slice(4, 8)):
                weights_L = (keys_LW[:, head] @ query_W[head] / 4**0.5).softmax(dim=0)
                read.append((query, head.start, weights_L @ values_LW[:, head]))
        by_head = [part for _, _, part in sorted(read, key=lambda one: (one[1], one[0]))]
        by_query = [part for _, _, part in sorted(read, key=lambda one: (one[0], one[1]))]
        assert not torch.equal(torch.cat(by_head), torch.cat(by_query))
        x_F = torch.cat([tokens_BLD[b].mean(dim=0), psi_BC[b], *by_query])
        hidden_H = torch.nn.functional.gelu(model.head[0].weight @ x_F + model.head[0].bias)
        torch.testing.assert_close(logits_BN[b], model.head[2].weight @ hidden_H + model.head[2].bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("main", "comp"), PAIRS)
def test_a_head_that_ignores_the_attention_output_equals_mlp(main: str, comp: str) -> None:
    model, mlp = build(main, comp, method="cross-attention"), build(main, comp, method="mlp")
    width = sum(model.encoder(side).feature_width for side in model.uses)
    batch = model.collate(images(4), TEXTS[:4])
    with torch.no_grad():
        model.head[0].weight[:, width:] = 0
        state = model.trainable_state_dict() | {"head.0.weight": model.head[0].weight[:, :width]}
        mlp.load_trainable_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("reader.")})
        torch.testing.assert_close(model(batch).logits, mlp(batch).logits)
        model.head[0].weight[:, width:] = 1
        assert not torch.allclose(model(batch).logits, mlp(batch).logits)


def test_only_the_attention_and_the_head_are_trained_and_saved() -> None:
    model = build(method="cross-attention")
    statistics = {f"standard.{side}.{name}" for side in ("main", "comp") for name in ("mean_C", "deviation_C")}
    assert set(model.named_trainable_parameters()) == READER | HEAD
    assert set(model.trainable_state_dict()) == READER | HEAD | statistics
    assert set(model.breakdown()) == {"cross-attention", "head"}


def test_the_main_encoder_runs_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(method="cross-attention").train()
    grad: list[bool] = []
    encode = model.encoder("main")._encode
    monkeypatch.setattr(
        model.encoder("main"), "_encode", lambda inputs: (grad.append(torch.is_grad_enabled()), encode(inputs))[1]
    )
    model(model.collate(images(2), TEXTS[:2])).logits.sum().backward()
    assert grad == [False]
    assert all(parameter.grad is not None for parameter in model.trainable_parameters())


def test_dropout_is_applied_in_training_only() -> None:
    model, without = (build(method="cross-attention", cross_attention={"dropout": p}) for p in (0.3, 0.0))
    without.load_trainable_state_dict(model.trainable_state_dict())
    batch = model.collate(images(3), TEXTS[:3])
    assert torch.equal(model(batch).logits, without(batch).logits)
    assert torch.equal(without.train()(batch).logits, model(batch).logits)
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(batch).logits, model(batch).logits)


def test_incompatible_settings_and_encoders_are_refused() -> None:
    with pytest.raises(ConfigError, match="width is 10, which is not a multiple of heads, 4"):
        build_config({**SPECS, "cross_attention": {"width": 10}})
    main = Given("image", 4)
    main.token_width = 0
    values = build_config({"main": "a:1", "comp": "b:2", "method": "cross-attention"})
    with pytest.raises(EncoderError, match="does not provide its tokens"):
        CrossAttention(values, {"main": main, "comp": Given("text", 4)}, 2)


# -- training


NAMES = 8


def draw(count: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """Draw tokens in random order, each with a name and a bit; psi contains a name, and the label is the bit of that token."""
    bits_BL = torch.randint(2, (count, NAMES), generator=generator)
    named_B = torch.randint(NAMES, (count,), generator=generator)
    tokens_BLD = torch.cat([torch.eye(NAMES).expand(count, NAMES, NAMES), 2.0 * bits_BL[..., None] - 1], dim=2)
    order_BL = torch.rand(count, NAMES, generator=generator).argsort(dim=1)
    tokens_BLD = tokens_BLD.gather(1, order_BL[..., None].expand(-1, -1, NAMES + 1))
    return given_batch(tokens_BLD, torch.eye(NAMES)[named_B]), bits_BL.gather(1, named_B[:, None])[:, 0]


def learned_accuracy(method: type[Fusion]) -> float:
    one = {"queries": 1, "heads": 1}  # with several queries, each could read one token regardless of psi
    model = given_model(method, NAMES + 1, NAMES, 2, cross_attention=one).train()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=3e-3)
    for _ in range(300):
        batch, label_B = draw(64, generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch).logits, label_B).backward()
        optimizer.step()
    batch, label_B = draw(1000, generator)
    return float((model.eval()(batch).logits.argmax(dim=1) == label_B).float().mean())


def test_it_learns_to_find_the_token_that_psi_names_and_an_mlp_on_pooled_features_does_not() -> None:
    assert learned_accuracy(CrossAttention) > 0.95
    assert learned_accuracy(MLP) < 0.75, "the mean of the tokens contains how many bits are set, not which"


@pytest.mark.parametrize("more", [{}, {"main": "tiny:text", "comp": "tiny:vision"}], ids=["image", "text"])
def test_features_and_tokens_are_computed_once(
    pairs: Path, tmp_path: Path, more: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"epochs": 2, "batch_size": 4, "modality_dropout": 0.3}
    data = {"path": str(pairs), "prefix_precision": "float32"}
    ran: list[str] = []
    own = TinyEncoder._encode
    monkeypatch.setattr(TinyEncoder, "_encode", lambda self, inputs: ran.append(self.modality) or own(self, inputs))
    results = []
    for name, cached in (("plain", False), ("cached", True), ("again", True)):
        ran.clear()
        values = config(pairs, "cross-attention", **more, train=training, data={**data, "cache_features": cached})
        results.append(train(values, tmp_path / name)["metrics"]["test"]["loss"])
        assert bool(ran) == (name != "again"), "once everything is cached, no encoder runs"
    assert results == pytest.approx([results[0]] * 3, abs=1e-4)


# -- samples that lack a modality


def test_a_row_without_main_does_not_depend_on_its_blank_input() -> None:
    model = build(method="cross-attention", either=True, data={"on_missing": "absent"})
    with torch.no_grad():
        model.absent["main"].normal_()
        one, other = (model.collate(pictures, TEXTS[:2]) for pictures in (images(2), images(3)[1:]))
        first, second = (model(missing(batch, "main", [0])).logits for batch in (one, other))
        assert torch.equal(first[0], second[0]) and not torch.allclose(first[1], second[1])
        psi_BC = model.pooled_feature("comp", one)
        read_BX = torch.zeros(2, model.reader.offset_QW.numel())
        expected_BN = model.head(torch.cat([model.absent["main"].expand(2, -1), psi_BC, read_BX], dim=1))
        torch.testing.assert_close(first[0], expected_BN[0])


@pytest.mark.parametrize("column", ["text", "img"])
def test_it_trains_on_rows_that_lack_a_modality(pairs: Path, tmp_path: Path, column: str) -> None:
    data = holes(pairs, tmp_path / "data", column=column)
    changed = {"data": {"path": str(data), "on_missing": "absent"}, "either": True, "train": {"max_steps": 3, "batch_size": 4}}
    result = train(config(data, "cross-attention", **changed), tmp_path / "run")
    assert result["steps"] == 3 and result["metrics"]["test"]["loss"] > 0


# -- an ordinary run


@pytest.mark.process
def test_a_run_can_be_evaluated_exported_and_reported(run: Path, tmp_path: Path) -> None:
    check_eval_report_and_export(run, tmp_path)


@pytest.mark.matrix
def test_the_exported_graph_predicts_the_same(run: Path, tmp_path: Path) -> None:
    done = call("export", run, "-o", tmp_path / "bundle")  # refused unless the predictions are the model's
    assert done.returncode == 0, done.stderr


@pytest.mark.matrix
def test_the_exported_graph_masks_padding(pairs: Path, tmp_path: Path) -> None:
    changed = {"main": "tiny:text", "comp": "tiny:vision", "train": {"max_steps": 2}}
    train(config(pairs, "cross-attention", **changed), tmp_path / "run")
    done = call("export", tmp_path / "run", "-o", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr


def test_a_multi_label_run_trains_and_predicts(multi_pairs: Path, tmp_path: Path) -> None:
    result = train(config(multi_pairs, "cross-attention", train={"max_steps": 2}), tmp_path / "run")
    assert set(result["thresholds"]) == {"a", "b", "c"}


def test_swapping_the_complementary_encoder_resets_only_the_tensors_that_read_it() -> None:
    this = {"method": "cross-attention"}
    old, state, origins = pair(this, {**this, "comp": "tiny:text?pool=cls"})
    fresh = {name for name, origin in origins.items() if origin == "new"}
    assert fresh == {"reader.query.comp.weight", "standard.comp.mean_C", "standard.comp.deviation_C"}
    main, comp = (old[f"standard.{side}.mean_C"].numel() for side in ("main", "comp"))
    columns = [column for column in range(state["head.0.weight"].shape[1]) if not main <= column < main + comp]
    assert torch.equal(state["head.0.weight"][:, columns], old["head.0.weight"][:, columns]), "also for what is read"
    assert not torch.equal(state["head.0.weight"], old["head.0.weight"])


def test_with_new_labels_and_the_same_encoders_only_the_output_layer_is_new() -> None:
    this = {"method": "cross-attention"}
    old, state, origins = pair(this, this, (["a", "b"], ["b", "c"]))
    assert {name for name, origin in origins.items() if origin != "kept"} == {"head.2.weight", "head.2.bias"}
    assert torch.equal(state["head.0.weight"], old["head.0.weight"])


def test_each_of_several_complementary_encoders_affects_the_queries() -> None:
    from mopefuse.fusion.build import build_model

    model = build_model(config_of(method="cross-attention", comp=["tiny:text", "tiny:text?pool=cls"]), 2)
    batch = model.collate(images(2), TEXTS[:2])
    psi_BC = {side: torch.randn(2, model.encoder(side).feature_width) for side in ("comp", "comp2")}
    tokens_BLD = model.encoder("main").encode(batch.inputs["main"]).tokens_BLD
    read_BX = model.reader(psi_BC, tokens_BLD, None)
    for side in psi_BC:
        assert not torch.allclose(model.reader({**psi_BC, side: 2 * psi_BC[side]}, tokens_BLD, None), read_BX), side
