"""Activation checkpointing: less memory for the same gradients, bit for bit, in every family of encoders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import matrix
from families import FAMILIES, QUICK
from test_encoders import batch_of, prompts_for
from test_fusion import TEXTS, build, images, open_gates
from test_lora import learn
from test_train import assert_same_run, config, data  # noqa: F401 (a fixture)
from torch import Tensor

from mopefuse.config.method_settings import Lora
from mopefuse.encoders.base import Encoder, InsertedTokens, Prompt, create_encoder
from mopefuse.fusion.base import Fusion
from mopefuse.training.train import train

pytest_plugins = ["families"]
FRESH = [*FAMILIES, "tiny-vision", "tiny-text"]
Gradients = dict[str, Tensor]


def encoder_of(family: str, encoders: Mapping[str, Encoder]) -> Encoder:
    """A separate encoder of the family."""
    return create_encoder(family.replace("-", ":")) if family.startswith("tiny") else copy.deepcopy(encoders[family])


def backward_here(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def backward_elsewhere(loss: Tensor) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(backward_here, loss).result()


def gradients(
    encoder: Encoder,
    *,
    gated: bool,
    recompute: bool,
    insert: bool = False,
    backward: Callable[[Tensor], None] = backward_here,
) -> Gradients:
    """Gradients of prompts, gates, inserted tokens and the encoder's trainable parameters."""
    prompts = [prompt.requires_grad_() for prompt in prompts_for(encoder)]
    gates = [torch.full((heads,), 0.5, requires_grad=True) for heads in encoder.heads]
    ahead = torch.randn(3, 2, encoder.widths[0], generator=torch.Generator().manual_seed(4)).requires_grad_()
    encoder.zero_grad()
    encoder.recompute = recompute
    torch.manual_seed(0)  # seeds dropout
    encoded = encoder.encode(
        batch_of(encoder),
        lambda layer, tokens, mask: Prompt(prompts[layer], gates[layer] if gated else None),
        InsertedTokens(ahead, blind=1) if insert else None,
    )
    random = torch.Generator().manual_seed(5)
    backward((encoded.pooled_BC * torch.randn(encoded.pooled_BC.shape, generator=random)).sum())
    assert encoder._current_call.value is None
    found = {f"prompt {layer}": prompt.grad for layer, prompt in enumerate(prompts)}
    found |= {f"gate {layer}": gate.grad for layer, gate in enumerate(gates)} if gated else {}
    found |= {"insert": ahead.grad} if insert else {}
    found |= {name: weight.grad for name, weight in encoder.named_parameters() if weight.grad is not None}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_equal(found: Gradients, need: Gradients) -> None:
    assert found.keys() == need.keys()
    assert [name for name in need if not torch.equal(found[name], need[name])] == []


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("family", matrix(FRESH, [*QUICK, "tiny-text"]))
def test_gradients_are_equal_bit_for_bit(family: str, gated: bool, encoders: Mapping[str, Encoder]) -> None:
    encoder = encoder_of(family, encoders)
    plain = gradients(encoder, gated=gated, recompute=False)
    assert_equal(gradients(encoder, gated=gated, recompute=True), plain)


@pytest.mark.parametrize("family", ["timm-vit", "hf-bert", "tiny-text"])
def test_inserted_tokens_are_recomputed_too(family: str, encoders: Mapping[str, Encoder]) -> None:
    encoder = encoder_of(family, encoders)
    plain = gradients(encoder, gated=False, recompute=False, insert=True)
    assert_equal(gradients(encoder, gated=False, recompute=True, insert=True), plain)


@pytest.mark.parametrize("family", ["timm-vit", "hf-albert", "open_clip-visual", "tiny-text"])
def test_the_backward_pass_may_run_in_another_thread(family: str, encoders: Mapping[str, Encoder]) -> None:
    """On a GPU, it always does."""
    encoder = encoder_of(family, encoders)
    insert = encoder.supports_inserted_tokens
    plain = gradients(encoder, gated=True, recompute=False, insert=insert)
    assert_equal(gradients(encoder, gated=True, recompute=True, insert=insert, backward=backward_elsewhere), plain)


@pytest.mark.parametrize("family", ["timm-vit", "timm-swin-padded", "hf-bert", "tiny-vision"])
def test_loras_dropout_is_the_same_in_the_recomputation(family: str, encoders: Mapping[str, Encoder]) -> None:
    encoder = encoder_of(family, encoders)
    encoder.adapt(Lora(rank=2, dropout=0.5))
    encoder.train()
    learn(encoder)
    plain = gradients(encoder, gated=True, recompute=False)
    assert any(".lora_A." in name for name in plain)
    assert_equal(gradients(encoder, gated=True, recompute=True), plain)


def test_a_tuned_encoder_gets_its_gradients(encoders: Mapping[str, Encoder]) -> None:
    encoder = encoder_of("hf-bert", encoders)
    encoder.tune()
    encoder.train()  # with BERT's own dropout
    plain = gradients(encoder, gated=False, recompute=False)
    assert_equal(gradients(encoder, gated=False, recompute=True), plain)


def kept(model: Fusion, recompute: bool) -> int:
    """Bytes that the forward pass of a batch stores for the backward pass, besides weights."""
    for side in model.uses:
        model.encoder(side).recompute = recompute
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(model.collate(images(4), TEXTS[:4])).logits.sum()
    return sum(found.values())


@pytest.mark.parametrize("options", [{}, {"comp_tuning": {"mode": "lora"}}, {"method": "p-mmbt"}, {"method": "pmf"}], ids=str)
def test_recomputation_stores_less_memory(options: dict[str, Any]) -> None:
    model = build("tiny:text", "tiny:vision", **options)
    assert kept(model, True) < kept(model, False) / 2


def test_without_a_gradient_nothing_is_recomputed(encoders: Mapping[str, Encoder]) -> None:
    """A frozen encoder without trainable prompts builds no graph, and neither does prediction."""
    encoder = encoder_of("hf-bert", encoders)
    encoder.recompute = True
    prompts = prompts_for(encoder)
    out = encoder.encode(batch_of(encoder), lambda layer, tokens, mask: Prompt(prompts[layer]))
    assert not out.pooled_BC.requires_grad
    with torch.no_grad():
        out = encoder.encode(batch_of(encoder), lambda layer, tokens, mask: Prompt(prompts[layer].requires_grad_()))
    assert not out.pooled_BC.requires_grad


@pytest.mark.parametrize("method", ["conditional", "pmf", "mmbt", "late-concat"])
def test_every_method_gets_the_same_gradients(method: str) -> None:
    """`late-concat` without prompts builds no graph through an encoder, so the setting has no effect on it."""
    found = []
    for recompute in (False, True):
        model = build("tiny:text", "tiny:vision", method=method, train={"checkpoint_activations": recompute})
        assert {model.encoder(side).recompute for side in model.uses} == {recompute}
        open_gates(model)
        model.train()
        torch.manual_seed(0)
        model(model.collate(images(4), TEXTS[:4])).logits.square().sum().backward()
        found.append({name: ours.grad for name, ours in model.named_trainable_parameters().items() if ours.grad is not None})
    assert_equal(found[1], found[0])


def test_a_run_may_be_resumed_with_recomputation(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """It ends with the same weights, bit for bit."""
    same = {"comp_tuning": {"mode": "lora"}, "train__schedule": "constant"}
    train(config(data, train__max_steps=8, **same), tmp_path / "plain")
    train(config(data, train__max_steps=4, **same), tmp_path / "both")
    again = config(data, train__max_steps=8, train__checkpoint_activations=True, **same)
    train(again, tmp_path / "both", resume=True)
    assert_same_run(tmp_path / "plain", tmp_path / "both")
