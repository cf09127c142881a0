"""A prompt as extra keys and values of a frozen attention.

The papers (arXiv 2312.03734, 2403.10568) insert prompts as tokens and drop their outputs after every layer. A token
whose output is dropped acts only through its key and value, so only these are computed here: no query, no output
projection, no MLP. Shapes: B batch, N windows or images, H heads, L tokens, P prompt tokens, D width of the layer, E width
of one head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Modulation(NamedTuple):
    """A scale and a shift of what the attention of one layer reads: x becomes x * (1 + scale) + shift.

    FiLM, Perez et al., https://arxiv.org/abs/1709.07871. Applied after the norm ahead of the attention, so that it changes
    queries, keys and values but not the residual; 0 leaves the layer unchanged.
    """

    scale_BD: Tensor
    shift_BD: Tensor

    def apply(self, x_NLD: Tensor) -> Tensor:  # not __call__: torch 2.10 does not compile calls of named tuples
        """Modulate tokens (N, L, D): N = B, or N = B * W for the W windows of each image, which are adjacent."""
        scale_BD, shift_BD = (part.to(x_NLD.dtype) for part in self)
        windows = x_NLD.shape[0] // scale_BD.shape[0]
        if windows > 1:
            scale_BD, shift_BD = (part.repeat_interleave(windows, dim=0) for part in (scale_BD, shift_BD))
        return x_NLD * (1 + scale_BD[:, None]) + shift_BD[:, None]


class Prompt(NamedTuple):
    """The condition of one layer: prompt tokens, a modulation, something to add to its input, or several of these.

    Attributes:
        tokens_BPD: prompt tokens at the layer's input, before the norm ahead of its attention; P may be 0.
        gate_H: None as in the papers: prompts and tokens share one softmax. With one scalar per head, prompts have a separate
            softmax whose result is scaled by tanh(gate) and added; a gate of 0 leaves the layer unchanged. Samples may have
            gates of their own, (B, H).
        modulation: modulation of the layer's own tokens; it does not apply to the prompt.
        mask_BP: False for prompt tokens without effect; samples may differ in how many they have; None without any. Each
            sample has at least one token with effect.
        added_BLD: what is added to the layer's input tokens, before everything else and also in the residual; None for
            nothing, 0 leaves the layer unchanged.
    """

    tokens_BPD: Tensor
    gate_H: Tensor | None = None
    modulation: Modulation | None = None
    mask_BP: Tensor | None = None
    added_BLD: Tensor | None = None

    def add_to(self, x_BLD: Tensor) -> Tensor:
        """Add `added_BLD`, if there is something to add, to the layer's input (B, ..., D), which may be a grid."""
        return x_BLD if self.added_BLD is None else x_BLD + self.added_BLD.to(x_BLD.dtype).view_as(x_BLD)

    def modulate(self, x_NLD: Tensor) -> Tensor:
        """Apply the modulation, if there is one, to what the attention reads."""
        return x_NLD if self.modulation is None else self.modulation.apply(x_NLD)


class InsertedTokens(NamedTuple):
    """Tokens that precede an encoder's own through all layers and are dropped from the output.

    Attributes:
        tokens_BPD: inputs of the first layer, of width D, without position, segment embedding or embedding norm.
        blind: the number of leading tokens that attend to one another only; all other tokens attend to everything.
    """

    tokens_BPD: Tensor
    blind: int = 0

    def prepend_to(self, x_BLD: Tensor) -> Tensor:
        """Prepend the inserted tokens to the encoder's own, (B, P + L, D)."""
        return torch.cat([self.tokens_BPD.to(x_BLD.dtype), x_BLD], dim=1)

    def extend_mask(self, mask_BL: Tensor | None) -> Tensor | None:
        """Extend a padding mask to the inserted tokens, which are never padding: (B, P + L)."""
        return None if mask_BL is None else F.pad(mask_BL, (self.tokens_BPD.shape[1], 0), value=True)

    def attention_mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        """Build the attention mask of all `length` tokens, broadcastable to (B, H, length, length).

        Args:
            mask: attention mask of the encoder's own tokens, boolean or additive; its rows must be equal for all queries,
                and only the first is used.
        """
        if mask is not None:
            mask = F.pad(mask[..., :1, :], (self.tokens_BPD.shape[1], 0), value=mask.dtype == torch.bool)
        if not self.blind:
            return mask
        position = torch.arange(length, device=self.tokens_BPD.device)
        visible = (position[:, None] >= self.blind) | (position[None, :] < self.blind)
        if mask is None or mask.dtype == torch.bool:
            return visible[None, None] if mask is None else mask & visible
        return mask.masked_fill(~visible, -torch.inf)


def attend(
    q_NHLE: Tensor,
    k_NHLE: Tensor,
    v_NHLE: Tensor,
    prompt_k_BHPE: Tensor,
    prompt_v_BHPE: Tensor,
    *,
    gate_H: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    prompt_mask_BP: Tensor | None = None,
) -> Tensor:
    """Compute the attention of tokens to tokens and to prompts, (N, H, L, E).

    Prompts have no position: every query attends to every prompt token with a bias of 0, regardless of the mask or causality
    of the tokens.

    Args:
        mask: boolean or additive (as a position bias), broadcastable to (N, H, L, L). Without a gate it may have more keys
            than there are tokens; then it also masks the last prompt tokens.
        prompt_mask_BP: see `Prompt.mask_BP`.
    """
    if gate_H is not None:
        tokens = F.scaled_dot_product_attention(
            q_NHLE, k_NHLE, v_NHLE, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        )
        added = attend_prompts(q_NHLE, prompt_k_BHPE, prompt_v_BHPE, gate_H, scale=scale, mask_BP=prompt_mask_BP)
        return tokens + added
    if mask is None and causal:
        length = q_NHLE.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=q_NHLE.device).tril()
    prompt_k_BHPE, prompt_v_BHPE = (repeat_for_windows(part, q_NHLE.shape[0]) for part in (prompt_k_BHPE, prompt_v_BHPE))
    if mask is not None:
        uncovered = prompt_k_BHPE.shape[2] + k_NHLE.shape[2] - mask.shape[-1]
        mask = F.pad(mask, (uncovered, 0), value=mask.dtype == torch.bool)
    if prompt_mask_BP is not None:
        mask = _mask_prompts(mask, F.pad(_mask_for_windows(prompt_mask_BP, q_NHLE.shape[0]), (0, k_NHLE.shape[2]), value=True))
    keys, values = torch.cat([prompt_k_BHPE, k_NHLE], dim=2), torch.cat([prompt_v_BHPE, v_NHLE], dim=2)
    return F.scaled_dot_product_attention(q_NHLE, keys, values, attn_mask=mask, scale=scale)


def _mask_prompts(mask: Tensor | None, visible_N11K: Tensor) -> Tensor:
    """Combine an attention mask, boolean or additive, with the keys that are visible at all."""
    if mask is None:
        return visible_N11K
    return mask & visible_N11K if mask.dtype == torch.bool else mask.masked_fill(~visible_N11K, -torch.inf)


def attend_prompts(
    q_NHLE: Tensor,
    prompt_k_BHPE: Tensor,
    prompt_v_BHPE: Tensor,
    gate_H: Tensor,
    *,
    scale: float | None = None,
    mask_BP: Tensor | None = None,
) -> Tensor:
    """Compute the term that gated prompts add to the attention of tokens to tokens, (N, H, L, E); exactly 0 for a gate of 0.

    Does not use PyTorch's fused attention, which takes three times as long on a CPU for so few keys: its softmax along the
    last axis of (L, P) scores vectorises badly, a softmax along the first axis of (P, L) scores well.

    Args:
        q_NHLE: N = B, or N = B * W for the W windows of each image, which are adjacent and share the image's prompts.
        mask_BP: see `Prompt.mask_BP`.
    """
    scale = q_NHLE.shape[-1] ** -0.5 if scale is None else scale
    gated_BHPE = prompt_v_BHPE * torch.tanh(gate_H).to(prompt_v_BHPE.dtype)[..., None, None]
    keys_NHPE, values_NHPE = (repeat_for_windows(part, q_NHLE.shape[0]) for part in (prompt_k_BHPE * scale, gated_BHPE))
    scores_NHPL = keys_NHPE @ q_NHLE.contiguous().transpose(-2, -1)
    if mask_BP is not None:
        scores_NHPL = scores_NHPL.masked_fill(~_mask_for_windows(mask_BP, q_NHLE.shape[0]).transpose(-2, -1), -torch.inf)
    return scores_NHPL.softmax(dim=-2).transpose(-2, -1) @ values_NHPE


def _mask_for_windows(mask_BP: Tensor, count: int) -> Tensor:
    """The mask of a prompt for `count` windows, (N, 1, 1, P)."""
    return repeat_for_windows(mask_BP[:, None, None], count)


def repeat_for_windows(x_BHPE: Tensor, count: int) -> Tensor:
    """Repeat the values of each image for each of its windows: (N, H, P, E) with N = `count`, windows of an image adjacent."""
    windows = count // x_BHPE.shape[0]
    return x_BHPE if windows == 1 else x_BHPE[:, None].expand(-1, windows, -1, -1, -1).flatten(0, 1)


def split_heads(x_BPD: Tensor, heads: int) -> Tensor:
    """Reshape (B, P, H * E) to (B, H, P, E)."""
    split: Tensor = x_BPD.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def split_fused(qkv_BLX: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split a fused projection into query, key, value and a contiguous copy of the query, (B, H, L, E) each."""
    if torch.is_grad_enabled() and qkv_BLX.requires_grad:
        q, k, v, again = _SplitFused.apply(qkv_BLX, heads)
        return q, k, v, again
    q, k, v = view_parts(qkv_BLX, 3, heads)
    return q, k, v, q.contiguous()


def view_parts(fused_BLX: Tensor, parts: int, heads: int) -> Tensor:
    """View the output of a fused projection as (parts, B, H, L, E): query, key and value, or the last two."""
    split: Tensor = fused_BLX.unflatten(-1, (parts, heads, -1))
    return split.permute(2, 0, 3, 1, 4)


class _SplitFused(torch.autograd.Function):
    """Splits a fused projection; the backward pass writes gradients directly into the fused layout.

    With plain views, autograd would stack, add and copy them.
    """

    @staticmethod
    def forward(context: Any, qkv_BLX: Tensor, heads: int) -> tuple[Tensor, ...]:
        q, k, v = view_parts(qkv_BLX, 3, heads)
        return q, k, v, q.contiguous()

    @staticmethod
    @once_differentiable
    def backward(context: Any, of_q: Tensor, of_k: Tensor, of_v: Tensor, of_again: Tensor) -> tuple[Tensor, None]:
        batch, heads, length, width = of_q.shape
        parts_BL3HE = of_q.new_empty(batch, length, 3, heads, width)
        parts_BL3HE[:, :, 0] = of_q.transpose(1, 2)
        parts_BL3HE[:, :, 0] += of_again.transpose(1, 2)
        parts_BL3HE[:, :, 1] = of_k.transpose(1, 2)
        parts_BL3HE[:, :, 2] = of_v.transpose(1, 2)
        return parts_BL3HE.flatten(2), None
