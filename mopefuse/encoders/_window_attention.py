"""Attention within windows to the tokens and to a prompt, in the same steps as timm's Swin.

Both variants have a custom backward pass: as separate operations, copying, adding and scaling gradients would cost more than
the prompt itself. With a gate of 0 the result equals timm's, bit for bit.

Shapes: B batch, W windows of an image, N = B * W with the windows of an image adjacent, H heads, Z = N * H, L tokens,
P prompt tokens, S = P + L, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mopefuse.core.precision import to_float32
from mopefuse.encoders.attention import repeat_for_windows, view_parts


def attend_in_windows(
    qkv_NLX: Tensor,
    prompt_k_BHPE: Tensor,
    prompt_v_BHPE: Tensor,
    *,
    gate_H: Tensor | None,
    prompt_mask_BP: Tensor | None = None,
    bias_1HLL: Tensor,
    mask_WLL: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute the output of the attention before its projection, (N, L, H * E).

    Args:
        qkv_NLX: output of the fused projection, X = 3 * H * E.
        prompt_mask_BP: see `mopefuse.encoders.attention.Prompt.mask_BP`.
        bias_1HLL, mask_WLL: added to the scores of tokens, not of prompts. They get no gradient.
    """
    form: type[_Form] = _Joint
    if gate_H is not None:
        form = _Gated
        prompt_v_BHPE = prompt_v_BHPE * torch.tanh(gate_H).to(prompt_v_BHPE.dtype)[..., None, None]
    hidden_ZP = None if prompt_mask_BP is None else _hidden(prompt_mask_BP, qkv_NLX.shape[0], prompt_k_BHPE.shape[1])
    inputs = (qkv_NLX, prompt_k_BHPE, prompt_v_BHPE, hidden_ZP, bias_1HLL, mask_WLL, scale)
    if not torch.is_grad_enabled():
        return _compute(form, inputs)[0]
    out_NLD: Tensor = form.apply(*inputs)
    return out_NLD


class _Form(torch.autograd.Function):
    """Interface of both variants, which start from the fused projection."""

    @staticmethod
    def compute(
        qkv_NLX: Tensor,
        k_BHPE: Tensor,
        v_BHPE: Tensor,
        hidden_ZP: Tensor | None,
        bias: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the result and the tensors that the backward pass needs."""
        raise NotImplementedError


class _Gated(_Form):
    """Gated prompts: the sum of an attention to tokens and an attention to the prompt."""

    @staticmethod
    def compute(
        qkv_NLX: Tensor,
        k_BHPE: Tensor,
        v_BHPE: Tensor,
        hidden_ZP: Tensor | None,
        bias: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        heads, count = k_BHPE.shape[1], qkv_NLX.shape[0]
        q, k, v = view_parts(qkv_NLX, 3, heads)
        q_ZLE = _scaled(q, scale)
        k_ZLE, v_ZLE = (part.contiguous().flatten(0, 1) for part in (k, v))
        weights_ZLL = _weights(torch.bmm(q_ZLE, k_ZLE.transpose(1, 2)), count, bias, mask)
        out_ZLE = torch.bmm(weights_ZLL, v_ZLE)
        key_ZPE, value_ZPE = (repeat_for_windows(part, count).flatten(0, 1) for part in (k_BHPE, v_BHPE))
        scores_ZPL = torch.bmm(key_ZPE, q_ZLE.transpose(1, 2))
        if hidden_ZP is not None:
            scores_ZPL.masked_fill_(hidden_ZP[:, :, None], -torch.inf)
        weights_ZPL = _softmax(scores_ZPL, dim=1)
        out_ZLE.baddbmm_(weights_ZPL.transpose(1, 2), value_ZPE)
        return _join_heads(out_ZLE, heads), (q_ZLE, k_ZLE, v_ZLE, weights_ZLL, key_ZPE, value_ZPE, weights_ZPL)

    @staticmethod
    def forward(context: Any, *inputs: Any) -> Tensor:
        return _forward(_Gated, context, inputs)

    @staticmethod
    @once_differentiable
    def backward(context: Any, of_out_NLD: Tensor) -> tuple[Tensor | None, ...]:
        q_ZLE, k_ZLE, v_ZLE, weights_ZLL, key_ZPE, value_ZPE, weights_ZPL = context.saved_tensors
        of_out_ZLE = _heads(of_out_NLD, context.heads)
        of_scores_ZPL = _softmax_gradient(torch.bmm(value_ZPE, of_out_ZLE.transpose(1, 2)), weights_ZPL, 1)
        of_key, of_value = torch.bmm(of_scores_ZPL, q_ZLE), torch.bmm(weights_ZPL, of_out_ZLE)
        of_qkv_NLX = None
        if context.needs_input_grad[0]:  # false in the first block, with nothing trainable before it
            of_scores_ZLL = _softmax_gradient(torch.bmm(of_out_ZLE, v_ZLE.transpose(1, 2)), weights_ZLL, -1)
            of_q = torch.bmm(of_scores_ZLL, k_ZLE).baddbmm_(of_scores_ZPL.transpose(1, 2), key_ZPE)
            of_k = torch.bmm(of_scores_ZLL.transpose(1, 2), q_ZLE)
            of_v = torch.bmm(weights_ZLL.transpose(1, 2), of_out_ZLE)
            of_qkv_NLX = _fused_gradient(context, of_q, of_k, of_v)
        return _gradients(context, of_qkv_NLX, of_key, of_value)


class _Joint(_Form):
    """Ungated prompts: one attention to tokens and prompt, with a shared softmax."""

    @staticmethod
    def compute(
        qkv_NLX: Tensor,
        k_BHPE: Tensor,
        v_BHPE: Tensor,
        hidden_ZP: Tensor | None,
        bias: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        heads, count, ahead = k_BHPE.shape[1], qkv_NLX.shape[0], (k_BHPE.shape[2], 0)
        q, k, v = view_parts(qkv_NLX, 3, heads)
        q_ZLE = _scaled(q, scale)
        key_ZSE, value_ZSE = (
            torch.cat([repeat_for_windows(prompt, count), tokens], dim=2).flatten(0, 1)
            for prompt, tokens in ((k_BHPE, k), (v_BHPE, v))
        )
        bias, mask = F.pad(bias, ahead), None if mask is None else F.pad(mask, ahead)
        scores_ZLS = torch.bmm(q_ZLE, key_ZSE.transpose(1, 2))
        if hidden_ZP is not None:
            scores_ZLS[:, :, : ahead[0]].masked_fill_(hidden_ZP[:, None], -torch.inf)
        weights_ZLS = _weights(scores_ZLS, count, bias, mask)
        return _join_heads(torch.bmm(weights_ZLS, value_ZSE), heads), (q_ZLE, weights_ZLS, key_ZSE, value_ZSE)

    @staticmethod
    def forward(context: Any, *inputs: Any) -> Tensor:
        return _forward(_Joint, context, inputs)

    @staticmethod
    @once_differentiable
    def backward(context: Any, of_out_NLD: Tensor) -> tuple[Tensor | None, ...]:
        q_ZLE, weights_ZLS, key_ZSE, value_ZSE = context.saved_tensors
        of_out_ZLE = _heads(of_out_NLD, context.heads)
        of_scores_ZLS = _softmax_gradient(torch.bmm(of_out_ZLE, value_ZSE.transpose(1, 2)), weights_ZLS, -1)
        of_key = torch.bmm(of_scores_ZLS.transpose(1, 2), q_ZLE)
        of_value = torch.bmm(weights_ZLS.transpose(1, 2), of_out_ZLE)
        prompts, of_qkv_NLX = key_ZSE.shape[1] - q_ZLE.shape[1], None
        if context.needs_input_grad[0]:
            of_q = torch.bmm(of_scores_ZLS, key_ZSE)
            of_qkv_NLX = _fused_gradient(context, of_q, of_key[:, prompts:], of_value[:, prompts:])
        return _gradients(context, of_qkv_NLX, of_key[:, :prompts], of_value[:, :prompts])


def _compute(form: type[_Form], inputs: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run `_Form.compute` in the type of the inputs, without autocast."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return form.compute(*inputs)


def _forward(form: type[_Form], context: Any, inputs: tuple[Any, ...]) -> Tensor:
    out_NLD, saved = _compute(form, inputs)
    context.save_for_backward(*saved)
    context.batch, context.heads = inputs[1].shape[:2]
    context.scale = inputs[-1]
    return out_NLD


def _hidden(mask_BP: Tensor, count: int, heads: int) -> Tensor:
    """Where a prompt token has no effect in one of `count` windows, (Z, P)."""
    return repeat_for_windows(~mask_BP[:, None, None], count).expand(-1, heads, -1, -1).flatten(0, 2)


def _scaled(q_NHLE: Tensor, scale: float) -> Tensor:
    """Copy, scale and reorder to contiguous heads, (Z, L, E)."""
    return q_NHLE.clone(memory_format=torch.contiguous_format).mul_(scale).flatten(0, 1)


def _fused_gradient(context: Any, of_q_ZLE: Tensor, of_k_ZLE: Tensor, of_v_ZLE: Tensor) -> Tensor:
    """Gradient of the fused projection (N, L, X) from those of key, value and scaled query, which is modified in place."""
    parts = (of_q_ZLE.mul_(context.scale), of_k_ZLE, of_v_ZLE)
    heads, (rows, length, width) = context.heads, of_q_ZLE.shape
    fused_NL3HE = of_q_ZLE.new_empty(rows // heads, length, 3, heads, width)
    for number, part in enumerate(parts):
        fused_NL3HE[:, :, number] = _view_heads(part, heads)
    return fused_NL3HE.flatten(2)


def _heads(x_NLD: Tensor, heads: int) -> Tensor:
    """Reshape (N, L, H * E) to (Z, L, E)."""
    split: Tensor = x_NLD.unflatten(-1, (heads, -1))
    return split.transpose(1, 2).contiguous().flatten(0, 1)


def _join_heads(x_ZLE: Tensor, heads: int) -> Tensor:
    """Invert `_heads`."""
    return _view_heads(x_ZLE, heads).flatten(2)


def _view_heads(x_ZLE: Tensor, heads: int) -> Tensor:
    """View (Z, L, E) as (N, L, H, E)."""
    split: Tensor = x_ZLE.unflatten(0, (-1, heads))
    return split.transpose(1, 2)


def _weights(scores_Z: Tensor, count: int, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Add bias and mask to the scores of `count` windows in place, and apply softmax, in float32 or better."""
    exact_Z = to_float32(scores_Z)
    exact_NH = exact_Z.unflatten(0, (count, -1))
    exact_NH += bias
    if mask is not None:
        exact_NH.unflatten(0, (-1, mask.shape[0])).add_(mask[:, None])
    return exact_Z.softmax(dim=-1).to(scores_Z.dtype)


def _softmax(scores_Z: Tensor, dim: int) -> Tensor:
    return to_float32(scores_Z).softmax(dim=dim).to(scores_Z.dtype)


def _softmax_gradient(of_weights: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Gradient of the scores from the gradient of their softmax."""
    return torch._softmax_backward_data(of_weights, weights, dim, weights.dtype)


def _gradients(
    context: Any, of_qkv_NLX: Tensor | None, of_key_ZPE: Tensor, of_value_ZPE: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of each input of `compute`; those of a prompt are summed over the windows of its image."""
    shape = (context.batch, -1, context.heads)
    of_key_BHPE, of_value_BHPE = (part.unflatten(0, shape).sum(dim=1) for part in (of_key_ZPE, of_value_ZPE))
    return of_qkv_NLX, of_key_BHPE, of_value_BHPE, None, None, None, None
