"""A prompt as extra keys and values of a frozen attention.

The papers (arXiv 2312.03734, 2403.10568) insert prompts as tokens and drop their outputs after every layer. A token
whose output is dropped acts only through its key and value, so nothing else of it is computed here: no query, no output
projection, no MLP. Shapes: B batch, H heads, L tokens, P prompt tokens, D width of the layer, E width of one head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
    q_BHLE: Tensor,
    k_BHLE: Tensor,
    v_BHLE: Tensor,
    prompt_k_BHPE: Tensor,
    prompt_v_BHPE: Tensor,
    *,
    gate_H: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of tokens to tokens and to prompts, (B, H, L, E).

    Prompts carry no position: whatever the mask (boolean, or additive as a position bias is; broadcastable to
    (B, H, L, L)) says of the tokens, and under causal attention too, every query sees every prompt with a bias of 0.
    Ungated, a mask of more keys than there are tokens also says which of the last prompt tokens are seen.
    """
    if gate_H is not None:
        tokens = F.scaled_dot_product_attention(
            q_BHLE, k_BHLE, v_BHLE, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        )
        return tokens + attend_prompts(q_BHLE, prompt_k_BHPE, prompt_v_BHPE, gate_H, scale=scale)
    if mask is None and causal:
        length = q_BHLE.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=q_BHLE.device).tril()
    if mask is not None:
        unsaid = prompt_k_BHPE.shape[2] + k_BHLE.shape[2] - mask.shape[-1]
        mask = F.pad(mask, (unsaid, 0), value=mask.dtype == torch.bool)
    keys, values = torch.cat([prompt_k_BHPE, k_BHLE], dim=2), torch.cat([prompt_v_BHPE, v_BHLE], dim=2)
    return F.scaled_dot_product_attention(q_BHLE, keys, values, attn_mask=mask, scale=scale)


def attend_prompts(
    q_BHLE: Tensor, prompt_k_BHPE: Tensor, prompt_v_BHPE: Tensor, gate_H: Tensor, *, scale: float | None = None
) -> Tensor:
    """What gated prompts add to the attention of tokens to tokens, (B, H, L, E): exactly 0 where the gate is 0."""
    prompts = F.scaled_dot_product_attention(q_BHLE, prompt_k_BHPE, prompt_v_BHPE, scale=scale)
    return torch.tanh(gate_H).to(prompts.dtype)[:, None, None] * prompts


def split_heads(x_BPD: Tensor, heads: int) -> Tensor:
    """(B, P, H*E) to (B, H, P, E)."""
    split: Tensor = x_BPD.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)
