"""Attention within windows and to a prompt: what it equals, and its hand-written gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mopefuse.encoders import _window_attention
from mopefuse.encoders._window_attention import attend_in_windows
from mopefuse.encoders.attention import attend, split_fused

B, W, H, L, P, E = 2, 3, 2, 4, 3, 5
SCALE = E**-0.5


def drawn(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    mask = torch.where(torch.rand(W, L, L, generator=generator) < 0.3, -100.0, 0.0).to(dtype)
    return {
        "qkv": draw(B * W, L, 3 * H * E).requires_grad_(),
        "k": draw(B, H, P, E).requires_grad_(),
        "v": draw(B, H, P, E).requires_grad_(),
        "gate": draw(H).requires_grad_(),
        "bias": draw(1, H, L, L),
        "mask": mask,
    }


def ours(x: dict[str, Tensor], *, gated: bool, masked: bool) -> Tensor:
    gate, mask = x["gate"] if gated else None, x["mask"] if masked else None
    return attend_in_windows(x["qkv"], x["k"], x["v"], gate_H=gate, bias_1HLL=x["bias"], mask_WLL=mask, scale=SCALE)


def plain(x: dict[str, Tensor], *, gated: bool, masked: bool) -> Tensor:
    """The same with torch's attention, with each window as a sample and each prompt repeated."""
    q, k, v = x["qkv"].unflatten(-1, (3, H, E)).permute(2, 0, 3, 1, 4).unbind(0)
    keys, values = (part.repeat_interleave(W, dim=0) for part in (x["k"], x["v"]))
    bias = x["bias"] + (x["mask"].repeat(B, 1, 1)[:, None] if masked else 0)
    out = attend(q, k, v, keys, values, gate_H=x["gate"] if gated else None, mask=bias, scale=SCALE)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_it_equals_attention_with_the_prompt_in_every_window(gated: bool, masked: bool) -> None:
    x = drawn()
    wanted, found = plain(x, gated=gated, masked=masked), ours(x, gated=gated, masked=masked)
    torch.testing.assert_close(found, wanted)
    learn = [x["qkv"], x["k"], x["v"], *([x["gate"]] if gated else [])]
    out = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    for one, other in zip(torch.autograd.grad(found, learn, out), torch.autograd.grad(wanted, learn, out), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_its_gradients_are_those_of_differences(gated: bool, padded: bool) -> None:
    x = drawn()
    form = _window_attention._Gated if gated else _window_attention._Joint
    hidden = _window_attention._hidden(torch.tensor([[True] * P, [False, True, False]]), B * W, H) if padded else None
    assert torch.autograd.gradcheck(
        lambda qkv, k, v: form.apply(qkv, k, v, hidden, x["bias"], x["mask"], SCALE), (x["qkv"], x["k"], x["v"])
    )


@pytest.mark.parametrize("gated", [False, True])
def test_outputs_without_gradients_are_identical(gated: bool) -> None:
    x = drawn(torch.float32)
    with torch.no_grad():
        output = ours(x, gated=gated, masked=True)
    assert torch.equal(output, ours(x, gated=gated, masked=True))


@pytest.mark.parametrize("gated", [False, True])
def test_frozen_tokens_do_not_change_the_gradient_of_the_prompt(gated: bool) -> None:
    x = drawn()
    wanted = torch.autograd.grad(ours(x, gated=gated, masked=True).square().sum(), (x["k"], x["v"]))
    x["qkv"] = x["qkv"].detach()
    found = torch.autograd.grad(ours(x, gated=gated, masked=True).square().sum(), (x["k"], x["v"]))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("gated", [False, True])
def test_under_autocast_it_computes_in_the_type_of_its_inputs(gated: bool) -> None:
    x = {name: tensor.detach().bfloat16().requires_grad_(name in ("qkv", "k", "v")) for name, tensor in drawn().items()}
    x["gate"] = x["gate"].float().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(x, gated=gated, masked=True)
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16
    assert x["qkv"].grad is not None and x["qkv"].grad.isfinite().all()


def test_a_split_projection_has_the_gradients_of_its_parts() -> None:
    qkv = drawn()["qkv"]
    parts = split_fused(qkv, H)
    plainly = qkv.unflatten(-1, (3, H, E)).permute(2, 0, 3, 1, 4).unbind(0)
    for one, other in zip(parts, (*plainly, plainly[0]), strict=True):
        assert torch.equal(one, other)
    out = [torch.randn_like(part) for part in parts]
    found = torch.autograd.grad(parts, qkv, out)[0]
    need = torch.autograd.grad((*plainly, plainly[0]), qkv, out)[0]
    torch.testing.assert_close(found, need)
