"""The prompt stack: compared with its definition, its limits, what is trained, and how routing behaves.

Shapes: B batch, N layers, K experts, P prompt tokens, D width, C conditioning width.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mopefuse.config.schema import Prompts, Router
from mopefuse.core.precision import normalize_feature
from mopefuse.errors import ConfigError
from mopefuse.prompts.experts import Router as RouterModule
from mopefuse.prompts.experts import importance_loss, keep_largest, masked_mean, mix
from mopefuse.prompts.stack import (
    ConditionedPrompts,
    PromptStack,
    fill_prompt_lengths,
    select_layers,
    stage_starts,
)

B, C, K, WIDTHS, HEADS = 5, 12, 4, (8, 8, 16), (2, 2, 4)


def build(router: Router | None = None, **prompts: object) -> PromptStack:
    torch.manual_seed(0)
    config = Prompts(**({"static": 2, "dynamic": 3, "mapped": 1, "experts": K, "dropout": 0.0} | prompts))
    return PromptStack(
        config, router or Router(), widths=WIDTHS, heads=HEADS, conditions={"comp": C}, bound=0.3
    ).eval()


def ask(stack: PromptStack, psi_BC: torch.Tensor) -> ConditionedPrompts:
    return stack.condition({"comp": normalize_feature(psi_BC)})


@pytest.fixture
def psi_BC() -> torch.Tensor:
    return torch.randn(B, C, generator=torch.Generator().manual_seed(1)) * 7 + 3


def tokens(layer: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(B, 6, WIDTHS[layer], generator=torch.Generator().manual_seed(seed))


def test_prompts_match_the_definition(psi_BC: torch.Tensor) -> None:
    stack = build()
    conditioned = ask(stack, psi_BC)
    normed_BC = (psi_BC - psi_BC.mean(-1, keepdim=True)) / (psi_BC.var(-1, correction=0, keepdim=True)).sqrt()
    trunk = stack.trunk
    for i, width in enumerate(WIDTHS):
        layer = stack.layers[str(i)]
        got_BPD = conditioned(i, tokens(i), None).tokens_BPD
        assert got_BPD.shape == (B, 2 + 3 + 1, width)
        for b in range(B):
            scores_K = stack.router.weight_NKC[i] @ normed_BC[b] + stack.router.bias_NK[i]
            weights_K = torch.exp(scores_K / 0.1) / torch.exp(scores_K / 0.1).sum()
            mixed_PD = sum(w * expert for w, expert in zip(weights_K, layer.experts_KPD, strict=True))
            hidden_h = F.gelu(trunk[1](trunk[0](normed_BC[b])))
            mapped_D = F.gelu(layer.mapper(hidden_h))
            expected = torch.cat([layer.static_SD, mixed_PD, mapped_D[None]])
            torch.testing.assert_close(got_BPD[b], expected)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [((2, 0, 0), 2), ((0, 3, 0), 3), ((0, 0, 2), 2), ((2, 3, 1), 6), ((0, 3, 1), 4)],
)
def test_each_kind_of_prompt_can_be_disabled(lengths: tuple[int, int, int], expected: int, psi_BC: torch.Tensor) -> None:
    stack = build(static=lengths[0], dynamic=lengths[1], mapped=lengths[2])
    assert ask(stack, psi_BC)(0, tokens(0), None).tokens_BPD.shape == (B, expected, WIDTHS[0])
    names = {name for name, _ in stack.named_parameters()}
    assert any("static" in n for n in names) == bool(lengths[0])
    assert any("experts" in n for n in names) == any("router" in n for n in names) == bool(lengths[1])
    assert any("mapper" in n for n in names) == any("trunk" in n for n in names) == bool(lengths[2])


def test_no_prompts_means_no_parameters_and_no_layers() -> None:
    stack = build(static=0, dynamic=0, mapped=0)
    assert not list(stack.parameters())
    assert not len(stack.layers)


def test_one_expert_is_plain_prompt_tuning_without_a_router(psi_BC: torch.Tensor) -> None:
    stack = build(experts=1, static=0, mapped=0).train()
    prompt_BPD = ask(stack, psi_BC)(1, tokens(1), None).tokens_BPD
    torch.testing.assert_close(prompt_BPD, stack.layers["1"].experts_KPD.expand(B, -1, -1))
    assert not [name for name, _ in stack.named_parameters() if "router" in name]


def test_static_prompts_alone_are_independent_of_the_condition(psi_BC: torch.Tensor) -> None:
    stack = build(dynamic=0, mapped=0)
    one, other = (ask(stack, p)(2, tokens(2), None).tokens_BPD for p in (psi_BC, torch.randn(B, C)))
    assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_routing_does_not_depend_on_the_scale_of_psi_and_does_not_start_saturated(kind: str, scale: float) -> None:
    router = Router(kind=kind)
    stack = build(router, experts=16)
    psi_BC = torch.randn(200, C) * scale
    conditioned = ask(stack, psi_BC)
    for i in range(len(WIDTHS)):
        conditioned(i, torch.randn(200, 6, WIDTHS[i]), None)
    weights_BNK = conditioned.routing()
    entropy = -(weights_BNK * weights_BNK.log()).sum(-1).mean() / math.log(16)
    assert 0.7 < entropy < 0.995, f"mean entropy {entropy:.3f} of the uniform one: saturated, or constant"


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_noise_is_added_in_training_only(kind: str, psi_BC: torch.Tensor) -> None:
    stack = build(Router(kind=kind))

    def prompts() -> torch.Tensor:
        return ask(stack, psi_BC)(0, tokens(0), None).tokens_BPD

    assert torch.equal(prompts(), prompts())
    stack.train()
    assert not torch.equal(prompts(), prompts())
    conditioned = ask(stack, psi_BC)
    conditioned(0, tokens(0), None)
    noisy, clean = conditioned.routed[0].weights_BK, conditioned.routed[0].clean_BK
    stack.eval()
    again = ask(stack, psi_BC)
    again(0, tokens(0), None)
    assert not torch.equal(noisy, clean)
    torch.testing.assert_close(again.routed[0].weights_BK, clean)


def test_noise_has_the_variance_given_in_the_paper() -> None:
    torch.manual_seed(0)
    router = RouterModule(Router(), conditions={"comp": C}, widths=[8], experts=K).train()
    scores = router.score_conditions([torch.randn(4000, C)])
    with torch.no_grad():
        routed = router(scores, 0, torch.zeros(4000, 1, 8), None)
    shift_BK = routed.weights_BK.log() - routed.clean_BK.log()
    noise_BK = shift_BK - shift_BK.mean(-1, keepdim=True)  # the softmax determines noise up to a constant per row
    assert noise_BK.std() * math.sqrt(K / (K - 1)) == pytest.approx(1 / K, rel=0.05)


def test_noise_in_evaluation_has_its_own_setting(psi_BC: torch.Tensor) -> None:
    stack = build(Router(noise_in_eval=True))
    one, other = (ask(stack, psi_BC)(0, tokens(0), None).tokens_BPD for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_top_m_keeps_the_largest_and_sums_to_one(m: int) -> None:
    weights_BK = torch.rand(50, K).softmax(-1)
    kept_BK = keep_largest(weights_BK, m)
    assert ((kept_BK > 0).sum(-1) == m).all()
    torch.testing.assert_close(kept_BK.sum(-1), torch.ones(50))
    for row, kept in zip(weights_BK, kept_BK, strict=True):
        chosen = row.argsort(descending=True)[:m]
        torch.testing.assert_close(kept[chosen], row[chosen] / row[chosen].sum())


def test_mixing_few_of_many_experts_equals_dense_mixing_and_reads_only_those() -> None:
    experts_KX = torch.randn(64, 5, requires_grad=True)
    weights_BK = keep_largest(torch.randn(3, 64).softmax(-1), 2).requires_grad_()
    found, need = mix(weights_BK, experts_KX, 2), weights_BK @ experts_KX
    torch.testing.assert_close(found, need)
    used = weights_BK > 0
    of_found, of_need = (torch.autograd.grad(out.sin().sum(), (experts_KX, weights_BK)) for out in (found, need))
    torch.testing.assert_close(of_found[0], of_need[0])
    torch.testing.assert_close(of_found[1][used], of_need[1][used])
    unused = ~used.any(dim=0)
    spoilt = experts_KX.detach().clone()
    spoilt[unused] = torch.nan
    assert mix(weights_BK, spoilt, 2).isfinite().all()


@pytest.mark.parametrize("m", [None, K, K + 1])
def test_top_m_of_all_experts_is_dense(m: int | None) -> None:
    weights_BK = torch.rand(5, K).softmax(-1)
    assert keep_largest(weights_BK, m) is weights_BK


def test_the_joint_router_uses_psi_and_tokens_and_its_keys_are_orthogonal_constants(psi_BC: torch.Tensor) -> None:
    stack = build(Router(kind="joint"), experts=12)

    def weights(condition: torch.Tensor, seed: int) -> torch.Tensor:
        conditioned = ask(stack, condition)
        conditioned(0, tokens(0, seed), None)
        return conditioned.routed[0].clean_BK

    base = weights(psi_BC, 2)
    assert not torch.allclose(base, weights(psi_BC, 3))
    assert not torch.allclose(base, weights(psi_BC.flip(0), 2))
    keys_NQK = stack.router.keys_NQK
    gram = keys_NQK.transpose(1, 2) @ keys_NQK
    torch.testing.assert_close(gram, gram[0, 0, 0] * torch.eye(12).expand_as(gram), atol=1e-5, rtol=1e-5)
    assert "router.keys_NQK" not in dict(stack.named_parameters())
    assert "router.keys_NQK" in stack.state_dict()


def test_the_joint_router_ignores_padding(psi_BC: torch.Tensor) -> None:
    stack = build(Router(kind="joint"))
    short, mask = tokens(0), torch.ones(B, 9, dtype=torch.bool)
    mask[:, 6:] = False
    padded = torch.cat([short, torch.full((B, 3, WIDTHS[0]), 1e3)], dim=1)
    one = ask(stack, psi_BC)(0, short, None).tokens_BPD
    torch.testing.assert_close(ask(stack, psi_BC)(0, padded, mask).tokens_BPD, one)


def test_the_masked_mean_of_no_tokens_is_zero_and_not_nan() -> None:
    assert torch.equal(masked_mean(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool)), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("weights_BK", "expected"),
    [
        (torch.full((B, K), 1 / K), 0.0),
        (torch.eye(K)[[2] * B], K - 1.0),
        (torch.ones(B, 1), 0.0),
        (torch.tensor([[1.0, 0.0], [0.5, 0.5]]), 0.25),  # load 1.5 and 0.5: deviation 0.5, mean 1
    ],
)
def test_importance_loss_at_its_limits(weights_BK: torch.Tensor, expected: float) -> None:
    assert importance_loss(weights_BK.sum(0, keepdim=True)).item() == pytest.approx(expected, abs=1e-6)


def test_importance_loss_counts_each_layer_only_above_the_threshold() -> None:
    load_NK = torch.tensor([[1.5, 0.5], [2.0, 0.0]])  # squared variation 0.25 and 1
    assert importance_loss(load_NK, 0.0).item() == pytest.approx(0.625)
    assert importance_loss(load_NK, 0.25).item() == pytest.approx(0.5)
    assert importance_loss(load_NK, 1.0).item() == 0.0


def test_the_importance_gradient_moves_load_to_unused_experts() -> None:
    logits_BK = torch.tensor([[3.0, 0.0, 0.0]], requires_grad=True)
    importance_loss(logits_BK.softmax(-1)).backward()
    assert logits_BK.grad[0, 0] > 0 > logits_BK.grad[0, 1]


def test_every_parameter_of_the_stack_receives_gradient(psi_BC: torch.Tensor) -> None:
    for kind in ("cross", "joint"):
        stack = build(Router(kind=kind)).train()
        conditioned = ask(stack, psi_BC)
        prompts = [conditioned(i, tokens(i), None) for i in range(len(WIDTHS))]
        weigh = torch.Generator().manual_seed(5)
        total = sum((p.tokens_BPD * torch.randn(p.tokens_BPD.shape, generator=weigh)).sum() for p in prompts)
        (total + sum(p.gate_H.sum() for p in prompts)).backward()
        for name, parameter in stack.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_prompts_are_initialised_as_in_the_papers() -> None:
    stack = build()
    values = torch.cat([stack.layers["0"].static_SD.flatten(), stack.layers["2"].experts_KPD.flatten()])
    assert values.abs().max() <= 0.3
    assert values.detach().std() == pytest.approx(0.3 / math.sqrt(3), rel=0.15)


def test_dropout_is_applied_to_prompts_in_training_only(psi_BC: torch.Tensor) -> None:
    stack = build(dropout=0.5, dynamic=0, mapped=0, static=50)
    assert (ask(stack, psi_BC)(0, tokens(0), None).tokens_BPD != 0).all()
    stack.train()
    dropped = (ask(stack, psi_BC)(0, tokens(0), None).tokens_BPD == 0).float().mean()
    assert dropped.item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", (0, 1, 2)), ("last:2", (1, 2)), ("first:1", (0,)), ((2, 0), (0, 2)), ("last:3", (0, 1, 2))],
)
def test_layers_can_be_chosen(layers: object, expected: tuple[int, ...], psi_BC: torch.Tensor) -> None:
    assert select_layers(layers, 3) == expected
    stack = build(layers=layers)
    got = [i for i in range(3) if ask(stack, psi_BC)(i, tokens(i), None) is not None]
    assert tuple(got) == expected


@pytest.mark.parametrize("layers", ["last:4", (3,), (-1,)])
def test_layers_that_the_encoder_does_not_have_are_refused(layers: object) -> None:
    with pytest.raises(ConfigError, match="3 layers"):
        select_layers(layers, 3)


def test_without_stage_start_routing_first_blocks_of_stages_have_no_dynamic_prompt(psi_BC: torch.Tensor) -> None:
    swin_base = (128,) * 2 + (256,) * 2 + (512,) * 18 + (1024,) * 2
    assert len(set(range(24)) - stage_starts(swin_base)) == 20
    assert stage_starts((768,) * 12) == set()
    stack = build(route_stage_starts=False)
    assert stack.routed == (1,)
    conditioned = ask(stack, psi_BC)
    lengths = [conditioned(i, tokens(i), None).tokens_BPD.shape[1] for i in range(3)]
    assert lengths == [3, 6, 3]


def test_the_frozen_batch_norm_of_the_released_code_works_on_a_batch_of_one() -> None:
    stack = build(mapper_norm="batch-frozen").train()
    norm = next(m for m in stack.modules() if isinstance(m, nn.BatchNorm1d))
    before = norm.running_mean.clone()
    ask(stack, torch.randn(1, C))(0, tokens(0)[:1], None)
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize(("modality", "expected"), [("image", 6), ("text", 4)])
def test_prompt_lengths_default_to_those_of_the_papers(modality: str, expected: int) -> None:
    filled = fill_prompt_lengths(Prompts(), modality)
    assert (filled.static, filled.dynamic) == (expected, expected)
    assert fill_prompt_lengths(Prompts(static=0, dynamic=9), modality).dynamic == 9


def test_a_gate_is_one_scalar_per_head_that_starts_at_zero(psi_BC: torch.Tensor) -> None:
    gates = [ask(build(), psi_BC)(i, tokens(i), None).gate_H for i in range(3)]
    assert [tuple(gate.shape) for gate in gates] == [(h,) for h in HEADS]
    assert not any(gate.any() for gate in gates)
    assert ask(build(gate="none"), psi_BC)(0, tokens(0), None).gate_H is None
