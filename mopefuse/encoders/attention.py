"""A prompt as extra keys and values of a frozen attention.

The papers (arXiv 2312.03734, 2403.10568) insert prompts as tokens and drop their outputs after every layer. A token
whose output is dropped acts only through its key and value, so nothing else of it is computed here: no query, no output
projection, no MLP. Shapes: B batch, N windows or images, H heads, L tokens, P prompt tokens, D width of the layer, E width
of one head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Prompt(NamedTuple):
    """What one layer is prompted with.

    tokens_BPD: enter the layer as tokens would, before the norm that it applies ahead of its attention.
    gate_H: None as in the papers: prompts share the softmax with the tokens. One scalar per head: prompts are attended
        to by a softmax of their own whose result is added, scaled by tanh(gate); a gate of 0 is the untouched layer.
    """

    tokens_BPD: Tensor
    gate_H: Tensor | None = None


class Insert(NamedTuple):
    """Tokens that go ahead of an encoder's own through all layers, and are dropped at the end.

    tokens_BPD: enter the first layer as they are, without position, segment or embedding norm; D is its width.
    blind: the first so many see one another and nothing else; everything else sees everything.
    """

    tokens_BPD: Tensor
    blind: int = 0

    def ahead(self, x_BLD: Tensor) -> Tensor:
        """The encoder's tokens with these ahead."""
        return torch.cat([self.tokens_BPD.to(x_BLD.dtype), x_BLD], dim=1)

    def real(self, mask_BL: Tensor | None) -> Tensor | None:
        """Which of all tokens are real, given which of the encoder's own are: the inserted ones are."""
        return None if mask_BL is None else F.pad(mask_BL, (self.tokens_BPD.shape[1], 0), value=True)

    def mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        """Who sees whom among all `length` tokens (queries, keys), given that of the encoder's own, alike for all queries.

        The one row of keys of `mask` that counts is its first.
        """
        if mask is not None:
            mask = F.pad(mask[..., :1, :], (self.tokens_BPD.shape[1], 0), value=mask.dtype == torch.bool)
        if not self.blind:
            return mask
        position = torch.arange(length, device=self.tokens_BPD.device)
        seen = (position[:, None] >= self.blind) | (position[None, :] < self.blind)
        if mask is None or mask.dtype == torch.bool:
            return seen[None, None] if mask is None else mask & seen
        return mask.masked_fill(~seen, -torch.inf)


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
) -> Tensor:
    """Attention of tokens to tokens and to prompts, (N, H, L, E).

    Prompts carry no position: whatever the mask (boolean, or additive as a position bias is; broadcastable to
    (N, H, L, L)) says of the tokens, and under causal attention too, every query sees every prompt with a bias of 0.
    Ungated, a mask of more keys than there are tokens also says which of the last prompt tokens are seen.
    """
    if gate_H is not None:
        tokens = F.scaled_dot_product_attention(
            q_NHLE, k_NHLE, v_NHLE, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        )
        return tokens + attend_prompts(q_NHLE, prompt_k_BHPE, prompt_v_BHPE, gate_H, scale=scale)
    if mask is None and causal:
        length = q_NHLE.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=q_NHLE.device).tril()
    prompt_k_BHPE, prompt_v_BHPE = (for_windows(part, q_NHLE.shape[0]) for part in (prompt_k_BHPE, prompt_v_BHPE))
    if mask is not None:
        unsaid = prompt_k_BHPE.shape[2] + k_NHLE.shape[2] - mask.shape[-1]
        mask = F.pad(mask, (unsaid, 0), value=mask.dtype == torch.bool)
    keys, values = torch.cat([prompt_k_BHPE, k_NHLE], dim=2), torch.cat([prompt_v_BHPE, v_NHLE], dim=2)
    return F.scaled_dot_product_attention(q_NHLE, keys, values, attn_mask=mask, scale=scale)


def attend_prompts(
    q_NHLE: Tensor, prompt_k_BHPE: Tensor, prompt_v_BHPE: Tensor, gate_H: Tensor, *, scale: float | None = None
) -> Tensor:
    """What gated prompts add to the attention of tokens to tokens, (N, H, L, E): exactly 0 where the gate is 0.

    Not the library's fused attention, which on a CPU takes three times as long for so few keys: a softmax along the
    last axis of a score matrix (L, P) falls out of its vector registers, along the other axis of (P, L) it does not.

    Args:
        q_NHLE: N = B, or N = B * W for the W windows of each image, adjacent; all of them see the image's prompts.
    """
    scale = q_NHLE.shape[-1] ** -0.5 if scale is None else scale
    gated_BHPE = prompt_v_BHPE * torch.tanh(gate_H).to(prompt_v_BHPE.dtype)[:, None, None]
    keys_NHPE, values_NHPE = (for_windows(part, q_NHLE.shape[0]) for part in (prompt_k_BHPE * scale, gated_BHPE))
    weights_NHPL = (keys_NHPE @ q_NHLE.contiguous().transpose(-2, -1)).softmax(dim=-2)
    return weights_NHPL.transpose(-2, -1) @ values_NHPE


def for_windows(x_BHPE: Tensor, count: int) -> Tensor:
    """What each image has, for each of its windows: (N, H, P, E) with N = `count`, the windows of an image adjacent."""
    windows = count // x_BHPE.shape[0]
    return x_BHPE if windows == 1 else x_BHPE[:, None].expand(-1, windows, -1, -1, -1).flatten(0, 1)


def split_heads(x_BPD: Tensor, heads: int) -> Tensor:
    """(B, P, H*E) to (B, H, P, E)."""
    split: Tensor = x_BPD.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def split_fused(qkv_BLX: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a fused projection query, key and value, (B, H, L, E) each, and the query once more, in memory in that order."""
    if torch.is_grad_enabled() and qkv_BLX.requires_grad:
        q, k, v, again = _SplitFused.apply(qkv_BLX, heads)
        return q, k, v, again
    q, k, v = parts_of(qkv_BLX, 3, heads)
    return q, k, v, q.contiguous()


def parts_of(fused_BLX: Tensor, parts: int, heads: int) -> Tensor:
    """Views of what a fused projection gives, (parts, B, H, L, E): query, key and value, or the last two."""
    split: Tensor = fused_BLX.unflatten(-1, (parts, heads, -1))
    return split.permute(2, 0, 3, 1, 4)


class _SplitFused(torch.autograd.Function):
    """Gradients go at once where the projection wants them, where views would have them stacked, added and copied."""

    @staticmethod
    def forward(context: Any, qkv_BLX: Tensor, heads: int) -> tuple[Tensor, ...]:
        q, k, v = parts_of(qkv_BLX, 3, heads)
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
