"""FiLM in the conditional method: it starts as the frozen encoder, is conditioned per sample, and can be combined with
prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fusion import PAIRS, TEXTS, build, images, open_gates
from test_prompts import B, C, ask, psi_BC, tokens  # noqa: F401
from test_prompts import build as build_stack
from torch import Tensor

from mopefuse.config.schema import Prompts
from mopefuse.core.precision import normalize_feature
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.mlp_fit import Network
from mopefuse.fusion.wide_head import head_state
from mopefuse.prompts.stack import PromptStack

FILM: dict[str, Any] = {"static": 0, "dynamic": 0, "mapped": 0, "film": True}


def set_outputs(model: Fusion | PromptStack) -> None:
    """Move FiLM away from its initial value of 0."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "film" in name and "output" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))


@pytest.mark.parametrize(("main", "comp"), PAIRS)
@pytest.mark.parametrize("experts", [1, 4])
def test_film_starts_as_the_frozen_encoder_bit_for_bit(main: str, comp: str, experts: int) -> None:
    model = build(main, comp, **FILM, prompts={"film_mixture": experts})
    probe = build(main, comp, static=0, dynamic=0, mapped=0, film=False)
    probe.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("stack.")})
    batch = model.collate(images(5), TEXTS)
    assert torch.equal(model(batch).logits, probe(batch).logits)
    set_outputs(model)
    assert not torch.allclose(model(batch).logits, probe(batch).logits, atol=1e-3)


@pytest.mark.parametrize(("main", "comp"), PAIRS)
@pytest.mark.parametrize("options", [FILM, {"film": True}, {"film": True, "gate": "none"}], ids=["alone", "gated", "ungated"])
def test_a_sample_does_not_depend_on_its_batch(main: str, comp: str, options: dict[str, Any]) -> None:
    model = build(main, comp, **options)
    open_gates(model)
    set_outputs(model)
    together = model(model.collate(images(5), TEXTS)).logits
    for i, (image, text) in enumerate(zip(images(5), TEXTS, strict=True)):
        alone = model(model.collate([image], [text])).logits[0]
        torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=1e-5)


def test_scale_and_shift_match_the_definition(psi_BC: Tensor) -> None:  # noqa: F811
    stack = build_stack(**FILM)
    set_outputs(stack)
    for i, width in enumerate((8, 8, 16)):
        prompt = ask(stack, psi_BC)(i, tokens(i), None)
        trunk_Bh = stack.trunk(normalize_feature(psi_BC))  # type: ignore[misc]
        output = stack.layers[str(i)].film.output  # type: ignore[union-attr]
        expected = trunk_Bh @ output.weight.T + output.bias  # type: ignore[union-attr, operator]
        assert prompt is not None and prompt.modulation is not None
        assert prompt.tokens_BPD.shape == (B, 0, width) and prompt.gate_H is None
        torch.testing.assert_close(prompt.modulation.scale_BD, expected[:, :width])
        torch.testing.assert_close(prompt.modulation.shift_BD, expected[:, width:])


def test_equal_experts_are_one_linear_map(psi_BC: Tensor) -> None:  # noqa: F811
    """The softmax sums to 1, so equal experts average to themselves for any weights."""
    plain, mixture = build_stack(**FILM), build_stack(**FILM, film_mixture=3)
    set_outputs(plain)
    mixture.trunk.load_state_dict(plain.trunk.state_dict())  # type: ignore[union-attr]
    for one, other in zip(plain.layers.values(), mixture.layers.values(), strict=True):
        other.film.output.weight.data = one.film.output.weight.data.repeat(3, 1)  # type: ignore[union-attr, operator]
        other.film.output.bias.data = one.film.output.bias.data.repeat(3)  # type: ignore[union-attr, operator]
    for i in range(3):
        one, other = (ask(stack, psi_BC)(i, tokens(i), None).modulation for stack in (plain, mixture))
        torch.testing.assert_close(one.scale_BD, other.scale_BD)
        torch.testing.assert_close(one.shift_BD, other.shift_BD)


def test_experts_are_weighted_by_the_condition(psi_BC: Tensor) -> None:  # noqa: F811
    stack = build_stack(**FILM, film_mixture=3)
    set_outputs(stack)
    film = stack.layers["0"].film
    trunk_Bh = stack.trunk(normalize_feature(psi_BC))  # type: ignore[misc]
    got = film(trunk_Bh)  # type: ignore[operator]
    by_hand = torch.zeros_like(got)
    for b in range(B):
        weights = film.weigh(trunk_Bh[b]).softmax(-1)  # type: ignore[operator, union-attr]
        each = film.output(trunk_Bh[b]).reshape(3, 16)  # type: ignore[operator, union-attr]
        by_hand[b] = sum(weight * one for weight, one in zip(weights, each, strict=True))
    torch.testing.assert_close(got, by_hand)


def test_several_conditions_add_up() -> None:
    torch.manual_seed(0)
    config = Prompts(static=0, dynamic=0, mapped=0, film=True, dropout=0.0)
    from mopefuse.config.schema import Router

    both = PromptStack(config, Router(), widths=(8,), heads=(2,), conditions={"comp": C, "comp2": 4}, bound=0.3).eval()
    set_outputs(both)
    psi = {"comp": torch.randn(B, C), "comp2": torch.randn(B, 4)}
    zero = {name: torch.zeros_like(one) for name, one in psi.items()}
    at = lambda values: both.condition(values)(0, torch.zeros(B, 6, 8), None).modulation.scale_BD  # noqa: E731
    torch.testing.assert_close(
        at(psi) - at(zero), (at({**psi, "comp2": zero["comp2"]}) - at(zero)) + (at({**psi, "comp": zero["comp"]}) - at(zero))
    )


@pytest.mark.parametrize("experts", [1, 4])
def test_every_parameter_is_trained_and_saved(experts: int) -> None:
    model = build(film=True, gate="none", prompts={"film_mixture": experts, "dropout": 0.0})
    set_outputs(model)
    model.train()
    logits = model(model.collate(images(5), TEXTS)).logits
    (logits * torch.randn(logits.shape)).sum().backward()
    trainable = model.named_trainable_parameters()
    assert any(".film." in name for name in trainable)
    for name, parameter in trainable.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert set(trainable) <= set(model.trainable_state_dict())
    assert model.breakdown()["FiLM"] == sum(p.numel() for name, p in trainable.items() if ".film." in name)


def test_film_can_be_disabled_like_a_kind_of_prompt() -> None:
    model = build(film=True)
    set_outputs(model)
    open_gates(model)
    batch = model.collate(images(5), TEXTS)
    whole = model(batch).logits
    assert model.prompt_kinds == ("static", "dynamic", "mapped", "film")
    without = build()
    without.load_trainable_state_dict(
        {name: tensor for name, tensor in model.trainable_state_dict().items() if ".film." not in name}
    )
    with model.without_prompts("film"):
        assert torch.equal(model(batch).logits, without(batch).logits)
    assert torch.equal(model(batch).logits, whole)
    assert not torch.equal(whole, without(batch).logits)


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_head_on_all_features_without_conditions_is_late_concatenation(hidden: int) -> None:
    """Without prompts and FiLM, it equals late concatenation; with FiLM at its initial value too, bit for bit.

    The linear path of a head with a hidden layer is set to 0.
    """
    options = {"head_features": "all", "head_hidden": hidden}
    bare, film = build(**FILM | {"film": False}, **options), build(**FILM, **options)
    late = build(method="late-concat", head_hidden=hidden)
    for model in (bare, film):
        state = late.head.state_dict()
        model.head.load_state_dict(head_state(model.head, Network(*state.values())) if hidden else state)
        batch = model.collate(images(5), TEXTS)
        assert torch.equal(model(batch).logits, late(late.collate(images(5), TEXTS)).logits)
    set_outputs(film)
    assert not torch.equal(film(batch).logits, late(batch).logits)


def test_a_head_on_all_features_replaces_missing_ones() -> None:
    model = build(film=True, head_features="all", train={"modality_dropout": 0.2})
    with torch.no_grad():
        model.absent["comp"].fill_(0.7)
    set_outputs(model)
    gone, there = model.collate(images(2), [None, TEXTS[1]]), model.collate(images(2), TEXTS[:2])
    logits, whole = model(gone).logits, model(there).logits
    assert not torch.allclose(logits[0], whole[0])
    torch.testing.assert_close(logits[1], whole[1])
    with torch.no_grad():
        model.absent["comp"].fill_(-0.7)
    assert not torch.allclose(model(gone).logits[0], logits[0])
