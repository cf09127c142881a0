"""PMF: its two stages compared with plain layers run on all tokens, its limits, and what is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import call, plain_config
from encoder_cases import hf_case, save_hf, timm_case
from test_fusion import PAIRS, TEXTS, build, images, open_gates
from test_tuned import predict_logits
from torch import Tensor

from mopefuse.core.tensor_files import read_tensors
from mopefuse.errors import ConfigError, EncoderError
from mopefuse.evaluation.evaluate import evaluate
from mopefuse.fusion.build import build_model
from mopefuse.runs.folder import RunFolder
from mopefuse.training.swap import swap_encoder
from mopefuse.training.train import train
from mopefuse.training.transfer_weights import transfer_weights

LEARNED = ("query_QD", "query_context_XD", "fusion_context_PD")


def pmf(main: str = "tiny:vision", comp: str = "tiny:text", **options: Any) -> Any:
    return build(main, comp, method="pmf", **options)


class Stream(NamedTuple):
    """One encoder, divided into plain parts."""

    tokens_BLD: Tensor  # tokens that enter the first layer
    real_BL: Tensor
    layers: list[Callable[[Tensor, Tensor], Tensor]]  # of tokens and the mask of keys (B, 1, 1, L)
    pool: Callable[[Tensor], Tensor]


def by_definition(model: Any, streams: dict[str, Stream]) -> Tensor:
    """Compute logits by running the layer on everything in each stage, and dropping the outputs that are not needed."""
    x = {side: stream.tokens_BLD for side, stream in streams.items()}

    def run(side: str, layer: int, *extra: Tensor) -> Tensor:
        tokens = torch.cat([x[side], *(e.expand(len(x[side]), -1, -1) for e in extra)], dim=1)
        seen = F.pad(streams[side].real_BL, (0, tokens.shape[1] - x[side].shape[1]), value=True)
        return streams[side].layers[layer](tokens, seen[:, None, None])

    fusing = model.config.pmf.layers
    for side, stream in streams.items():
        for layer in range(len(stream.layers) - fusing):
            x[side] = run(side, layer)
    for at in range(-fusing, 0):
        given = {}
        for side in x:
            ours, length = model.stacks[side][at], x[side].shape[1]
            out = run(side, at, ours.query_QD, ours.query_context_XD)[:, length : length + len(ours.query_QD)]
            first, _, second = ours.mapping
            hidden = (out @ first.weight.T + first.bias).clamp(min=0)
            given["comp" if side == "main" else "main"] = hidden @ second.weight.T + second.bias
        x = {side: run(side, at, model.stacks[side][at].fusion_context_PD, given[side])[:, : x[side].shape[1]] for side in x}
    pooled = [streams[side].pool(x[side]) for side in ("main", "comp")]
    both = torch.cat([(one - one.mean(-1, keepdim=True)) / one.std(-1, correction=0, keepdim=True) for one in pooled], dim=-1)
    return both @ model.head.weight.T + model.head.bias


def tiny_stream(encoder: Any, inputs: dict[str, Tensor]) -> Stream:
    tokens, mask = encoder.embed(encoder.preprocess.finish(inputs))
    real = torch.ones(tokens.shape[:2]).bool() if mask is None else mask
    return Stream(tokens, real, list(encoder.blocks), lambda x: encoder._pooled(encoder.norm(x), mask))


@pytest.mark.parametrize(("main", "comp"), PAIRS)
def test_pmf_matches_the_papers_two_stages_with_encoders_of_different_depths(main: str, comp: str) -> None:
    model = pmf(main, comp, gate="none")
    batch = model.collate(images(5), TEXTS)
    streams = {side: tiny_stream(model.encoder(side), batch.inputs[side]) for side in ("main", "comp")}
    torch.testing.assert_close(model(batch).logits, by_definition(model, streams), atol=1e-5, rtol=1e-5)


def test_pmf_matches_the_papers_two_stages_on_library_layers(tmp_path: Path) -> None:
    save_hf("bert", tmp_path / "bert")
    cases = {"main": timm_case("vit"), "comp": hf_case(tmp_path / "bert")}
    model = pmf(cases["main"].spec, cases["comp"].spec, gate="none", init=0.5, pmf={"layers": 3})
    assert [model.encoder(side).widths for side in ("main", "comp")] == [(192,) * 3, (32,) * 3]
    assert model.stacks["comp"][0].mapping[2].weight.shape == (192, 96)
    texts = ["a photo of two cats", "no", "the quick brown fox jumps over the lazy dog"]
    batch = model.collate(images(3), texts)
    vit: Any
    bert: Any
    vit, bert = (cases[side].plain(model.encoder(side)) for side in ("main", "comp"))
    pixels = model.encoder("main").preprocess.finish(batch.inputs["main"])["pixels"]
    patches = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
    words, real = bert.embeddings(batch.inputs["comp"]["ids"]), batch.inputs["comp"]["mask"]
    assert not real.all()
    streams = {
        "main": Stream(patches, torch.ones(patches.shape[:2]).bool(), list(vit.blocks), lambda x: vit.norm(x)[:, 0]),
        "comp": Stream(words, real, list(bert.encoder.layer), lambda x: x[:, 0]),
    }
    torch.testing.assert_close(model(batch).logits, by_definition(model, streams), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", ["zero", "none"])
@pytest.mark.parametrize(("main", "comp"), PAIRS)
def test_a_sample_does_not_depend_on_its_batch_and_is_deterministic(main: str, comp: str, gate: str) -> None:
    model = pmf(main, comp, gate=gate, init=1.0)
    open_gates(model)
    together = predict_logits(model)
    assert torch.equal(predict_logits(model), together)
    for i, (image, text) in enumerate(zip(images(5), TEXTS, strict=True)):
        alone = model(model.collate([image], [text])).logits[0]
        torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["zero", "none"])
def test_all_three_kinds_of_prompts_are_trained_in_both_streams_and_no_encoder(gate: str) -> None:
    model = pmf(gate=gate, dropout=0.0).train()
    open_gates(model)
    F.cross_entropy(predict_logits(model), torch.arange(5)).backward()
    for side in ("main", "comp"):
        for layer in model.stacks[side]:
            assert all(getattr(layer, name).grad.abs().sum() > 0 for name in LEARNED)
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == set(model.named_trainable_parameters()) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("stacks.", "head.")) for name in moved)


def test_no_activations_below_the_fusion_layers_are_stored_for_gradients() -> None:
    model = pmf(gate="none", pmf={"layers": 1})
    graph: list[bool] = []
    for side in ("main", "comp"):
        model.encoder(side).blocks[-2].register_forward_hook(lambda block, args, out: graph.append(out.requires_grad))
    assert predict_logits(model).requires_grad
    assert graph == [False, False]


def test_gradients_match_the_definition() -> None:
    """The main encoder's fusion layers run twice; each run contributes the gradient of what it is used for."""
    model = pmf(gate="none")
    batch = model.collate(images(5), TEXTS)
    streams = {side: tiny_stream(model.encoder(side), batch.inputs[side]) for side in ("main", "comp")}
    ours, by_hand = (
        torch.autograd.grad(F.cross_entropy(logits, torch.arange(5)), list(model.trainable_parameters()))
        for logits in (model(batch).logits, by_definition(model, streams))
    )
    for name, one, other in zip(model.named_trainable_parameters(), ours, by_hand, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_the_streams_exchange_information_in_both_directions() -> None:
    model = pmf(gate="none")
    one, texts, pictures = (
        model.collate(images(2), TEXTS[:2]), model.collate(images(2), TEXTS[2:4]), model.collate(images(4)[2:], TEXTS[:2])
    )  # fmt: skip
    for side, other in (("main", texts), ("comp", pictures)):
        blind = pmf(gate="none", pmf={"queries": 0})
        with torch.no_grad():
            half = slice(96, None) if side == "main" else slice(0, 96)
            model.head.weight.copy_(blind.head.weight)
            for head in (model.head, blind.head):
                head.weight[:, half] = 0
        assert not torch.equal(model(one).logits, model(other).logits)
        assert torch.equal(blind(one).logits, blind(other).logits)


def test_without_fusion_layers_or_with_closed_gates_it_is_late_concatenation_bit_for_bit() -> None:
    plain, none, closed = build(method="late-concat"), pmf(pmf={"layers": 0}), pmf()
    assert none.frozen == plain.frozen and set(none.named_trainable_parameters()) == set(plain.named_trainable_parameters())
    for model in (none, closed):
        head = {n: t for n, t in model.trainable_state_dict().items() if n.startswith("head.")}
        plain.load_trainable_state_dict(head, where="here")
        assert torch.equal(predict_logits(model), predict_logits(plain))
    open_gates(closed)
    assert not torch.equal(predict_logits(closed), predict_logits(plain))


@pytest.mark.parametrize("gate", ["zero", "none"])
def test_without_query_prompts_it_is_static_prompts_in_the_last_layers_bit_for_bit(gate: str) -> None:
    model = pmf(gate=gate, pmf={"queries": 0, "fusion_context": 3})
    static = build(method="p-late-concat", gate=gate, layers="last:2", static=3)
    open_gates(model)
    state = {name: tensor for name, tensor in model.trainable_state_dict().items() if name.startswith("head.")}
    for side, depth in (("main", 4), ("comp", 2)):
        for at, layer in enumerate(model.stacks[side]):
            state[f"stacks.{side}.layers.{depth - 2 + at}.static_SD"] = layer.fusion_context_PD
            if gate == "zero":
                state[f"stacks.{side}.layers.{depth - 2 + at}.gate_H"] = layer.gate_H
    static.load_trainable_state_dict(state, where="here")
    assert torch.equal(predict_logits(model), predict_logits(static))


@pytest.mark.parametrize("lengths", [{"query_context": 0}, {"fusion_context": 0}, {"query_context": 0, "fusion_context": 0}])
def test_each_kind_of_prompt_can_be_left_out(lengths: dict[str, int]) -> None:
    model = pmf(gate="none", dropout=0.0, pmf=lengths)
    F.cross_entropy(predict_logits(model), torch.arange(5)).backward()
    assert all(parameter.grad is not None for parameter in model.trainable_parameters())
    missing = {f"{kind}_XD" if kind == "query_context" else f"{kind}_PD" for kind in lengths}
    assert {name.rpartition(".")[2] for name in model.named_trainable_parameters()} & set(LEARNED) == set(LEARNED) - missing


@pytest.mark.parametrize("side", ["main", "comp"])
@pytest.mark.parametrize("layer", [0, -1])
def test_an_exception_in_either_stream_is_raised_and_leaves_no_state(side: str, layer: int) -> None:
    model = pmf(gate="none")
    before = predict_logits(model)
    norm = model.encoder(side).blocks[layer].norm2
    handle = norm.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(ArithmeticError(side)))
    with pytest.raises(ArithmeticError, match=side):
        predict_logits(model)
    handle.remove()
    assert torch.equal(predict_logits(model), before)


def test_unsuitable_settings_and_encoders_are_refused() -> None:
    swin = "timm:swin_tiny?pretrained=false&img_size=32&window_size=1"
    for named, side in ((({"main": swin}), "main"), ({"comp": "timm:resnet18?pretrained=false"}, "comp")):
        with pytest.raises(EncoderError, match="does not support inserted tokens") as refused:
            pmf(**named)
        assert refused.value.number == 70 and f"as {side}" in refused.value.fix
    with pytest.raises(ConfigError, match="3 fusion layers, but tiny:text has 2") as too_many:
        pmf(pmf={"layers": 3})
    assert too_many.value.number == 103


def test_settings_of_other_methods_are_reported_as_unused() -> None:
    assert pmf(tune="full", inserted={"prompts": 3}, experts=2).unused_sections() == ["tune", "inserted"]
    assert build(method="late-concat", pmf={"layers": 1}).unused_sections() == ["pmf"]


def test_swapping_an_encoder_keeps_the_tensors_of_the_other() -> None:
    old, new = pmf(), pmf(main="tiny:vision-b")
    _, transferred = transfer_weights(old, new, list("abcdefg"), list("abcdefg"))
    fresh = {entry.name for entry in transferred if entry.origin == "new"}
    assert fresh == {f"stacks.main.{at}.mapping.0.{kind}" for at in (0, 1) for kind in ("weight", "bias")}
    assert all(old.dependency_of(name) for name in old.named_trainable_parameters() if not name.startswith("head."))


@pytest.mark.matrix
def test_a_run_can_be_evaluated_and_exported(pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--main", "tiny:vision", "--comp", "tiny:text", "--method", "pmf", "--set", "pmf.layers=1")
    done = call("train", *flags, "--data", pairs, "--steps", "3", "--batch", "4", "--out", run)
    assert done.returncode == 0, done.stderr
    assert RunFolder(run).config().pmf.bottleneck == 48
    assert evaluate(run).metrics["accuracy"] >= 0
    exported = call("export", run, "-o", tmp_path / "bundle")
    assert exported.returncode == 0, exported.stderr


def test_a_resumed_run_is_equal_bit_for_bit(pairs: Path, tmp_path: Path) -> None:
    def config(epochs: int) -> Any:
        values = {"main": "tiny:text", "comp": "tiny:vision", "method": "pmf", "data": {"path": str(pairs)}}
        return plain_config({**values, "train": {"epochs": epochs, "batch_size": 6, "schedule": "constant"}})

    train(config(2), tmp_path / "whole")
    train(config(1), tmp_path / "parts")
    train(config(2), tmp_path / "parts", resume=True)
    one, other = (
        read_tensors(RunFolder(tmp_path / name).checkpoint("last")[0] / "weights.safetensors") for name in ("whole", "parts")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    begun = build_model(config(1), 3).trainable_state_dict()
    assert all(not torch.equal(one[name], begun[name]) for name in one if name.endswith(LEARNED))


def test_the_default_bottleneck_follows_the_encoders(pairs: Path, tmp_path: Path) -> None:
    values = {"main": "tiny:vision", "comp": "tiny:text", "method": "pmf", "data": {"path": str(pairs)}, "train": {"epochs": 0}}
    wider = "timm:vit_tiny?pretrained=false&img_size=32&depth=2&embed_dim=128&num_heads=4"
    for name, chosen, expected in (("default", {}, (48, 64)), ("chosen", {"bottleneck": 7}, (7, 7))):
        train(plain_config({**values, "pmf": chosen}), tmp_path / name)
        swap_encoder(tmp_path / name, tmp_path / f"{name}-wider", main=wider)
        found = tuple(RunFolder(tmp_path / run).config().pmf.bottleneck for run in (name, f"{name}-wider"))
        assert found == expected
