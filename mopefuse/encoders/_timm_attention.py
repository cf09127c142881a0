"""Attention of timm's blocks with the keys and values of a prompt: one function for each kind replaces its `forward`.

Without a prompt it calls timm's own method; with a gate of 0 the result is equal bit for bit. Keys of a prompt are treated
like those of tokens (norms, unit length), except that they have no position (bias, rotation). Windows of an image are
adjacent along the batch axis: a prompt is projected once per image, and its keys and values are repeated for each window.

How prompts are inserted follows arXiv 2312.03734; the attention functions follow the installed timm.

Shapes: B batch, W windows per image, N = B * W, H heads, L tokens, P prompt tokens, D width, E width of a head, X = 3 * H * E.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import beit, swin_transformer_v2
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from mopefuse.core.precision import to_float32
from mopefuse.encoders import _lora
from mopefuse.encoders._prompted import PromptedEncoder
from mopefuse.encoders._window_attention import attend_in_windows
from mopefuse.encoders.attention import InsertedTokens, Prompt, attend, attend_prompts, split_fused, split_heads, view_parts


def prompt_model(encoder: PromptedEncoder, model: Any) -> None:
    """Make the blocks of a timm model within `encoder` promptable, and set the encoder's attributes accordingly."""
    blocks, encoder.unpromptable_reason = _promptable(model)
    encoder.supports_inserted_tokens = bool(blocks) and isinstance(model, VisionTransformer)
    kinds = [_KINDS[type(block), type(block.attn)] for block in blocks]
    norms = [getattr(block, kind.norm) if kind.norm else None for block, kind in zip(blocks, kinds, strict=True)]
    slots = encoder._prompt_blocks(blocks, norms, [block.attn for block in blocks])
    for block, kind, slot in zip(blocks, kinds, slots, strict=True):
        block.attn.prompt_slot = slot
        block.attn.forward = partial(kind.forward, block.attn)
    encoder.widths = tuple(int(block.attn.proj.out_features) for block in blocks)
    encoder.heads = tuple(int(block.attn.num_heads) for block in blocks)
    if blocks:
        encoder.patch_size = int(model.patch_embed.patch_size[0])
        encoder.leading_tokens = _leading_tokens(model)
    apart = [part for block in blocks if block.attn.qkv is None for part in (block.attn.q_proj, block.attn.v_proj)]
    fused = [part for name, part in model.named_modules() if name.endswith(".qkv") and isinstance(part, nn.Linear)]
    encoder.lora_targets = _lora.names_of(encoder, fused + apart)


def _leading_tokens(model: Any) -> int | None:
    """Return the number of tokens ahead of the patches of a ViT whose positions are only added to its input, else None."""
    plain = isinstance(model, VisionTransformer) and all(type(block.attn) is Attention for block in model.blocks)
    return int(model.num_prefix_tokens) if plain and model.attn_pool is None else None


def _promptable(model: Any) -> tuple[list[Any], str]:
    """Find the promptable blocks, in order; if there are none, return the reason."""
    blocks: list[Any] = []
    if isinstance(model, VisionTransformer | beit.Beit | Eva):
        blocks = list(model.blocks)
    elif isinstance(model, SwinTransformer | swin_transformer_v2.SwinTransformerV2):
        blocks = [block for stage in model.layers for block in stage.blocks]
    if not blocks and isinstance(getattr(model, "blocks", None), nn.Module):
        return [], f"has blocks that cannot be prompted ({type(model).__name__}); usable as --comp (pooled feature)"
    if not blocks:
        return [], "has no token sequence to prompt; usable as --comp (pooled feature)"
    for block in blocks:
        attention = getattr(block, "attn", None)
        if (type(block), type(attention)) not in _KINDS or getattr(attention, "gate", None) is not None:
            name = type(block if attention is None else attention).__name__
            return [], f"has attention that cannot be prompted ({name}); usable as --comp (pooled feature)"
    return blocks, ""


def _vit(self: Any, x_BLD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`timm.layers.Attention.forward` with the prompt in the slot, and with blind inserted tokens."""
    prompt: Prompt | None = self.prompt_slot.pop()
    insert: InsertedTokens | None = self.prompt_slot.insert
    mask = None if insert is None else insert.attention_mask(None, x_BLD.shape[1])
    if prompt is None and mask is None:
        out: Tensor = Attention.forward(self, x_BLD, *args, **kwargs)
        return out
    _check_no_masks(args, kwargs)
    gated = prompt is not None and prompt.gate_H is not None
    q, k, v, q_copy = split_fused(self.qkv(x_BLD), self.num_heads) if gated else (*_project(self, x_BLD), None)
    q, k = self.q_norm(q), self.k_norm(k)
    if prompt is None or gated:
        if mask is None:
            attended = _attend_as_timm(self, q, k, v)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if prompt is not None:
        prompt_k, prompt_v = _project_prompt(self, prompt)
        prompt_k = self.k_norm(prompt_k)
        if prompt.gate_H is None:
            attended = attend(q, k, v, prompt_k, prompt_v, mask=mask, prompt_mask_BP=prompt.mask_BP)
        else:
            added = attend_prompts(self.q_norm(q_copy), prompt_k, prompt_v, prompt.gate_H, mask_BP=prompt.mask_BP)
            attended = attended + added
    return _project_out(self, attended)


def _beit(self: Any, x_BLD: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """`timm.models.beit.Attention.forward` with the prompt in the slot."""
    prompt: Prompt | None = self.prompt_slot.pop()
    if prompt is None:
        out: Tensor = beit.Attention.forward(self, x_BLD, shared_rel_pos_bias)
        return out
    own_bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
    biases = [bias for bias in (own_bias, shared_rel_pos_bias) if bias is not None]
    return _project_out(self, _attend(self, *_project(self, x_BLD), *_project_prompt(self, prompt), prompt, biases))


def _rotary(self: Any, x_BLD: Tensor, rope: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`EvaAttention.forward` and `AttentionRope.forward` with the prompt in the slot, which is not rotated."""
    prompt: Prompt | None = self.prompt_slot.pop()
    if prompt is None:
        out: Tensor = type(self).forward(self, x_BLD, rope, *args, **kwargs)
        return out
    _check_no_masks(args, kwargs)
    (q, k, v), (prompt_k, prompt_v) = _project(self, x_BLD), _project_prompt(self, prompt)
    q, k, prompt_k = self.q_norm(q), self.k_norm(k), self.k_norm(prompt_k)
    if rope is not None:
        q, k = (_rotate(self, part, rope).type_as(v) for part in (q, k))
    groups = getattr(self, "num_kv_groups", 1)
    if groups > 1:
        k, v, prompt_k, prompt_v = (part.repeat_interleave(groups, dim=1) for part in (k, v, prompt_k, prompt_v))
    return _project_out(self, _attend(self, q, k, v, prompt_k, prompt_v, prompt))


def _swin(self: Any, x_NLD: Tensor, mask: Tensor | None = None) -> Tensor:
    """`WindowAttention.forward` of Swin with the prompt in the slot."""
    prompt: Prompt | None = self.prompt_slot.pop()
    if prompt is None:
        out: Tensor = WindowAttention.forward(self, x_NLD, mask)
        return out
    prompt_k, prompt_v = _project_prompt(self, prompt)
    bias = self._get_rel_pos_bias()
    how: dict[str, Any] = {"gate_H": prompt.gate_H, "scale": self.scale, "prompt_mask_BP": prompt.mask_BP}
    if self.fused_attn:
        q, k, v = _project(self, x_NLD)
        bias = _add_mask(bias, mask, x_NLD.shape[0])
        return _project_out(self, attend(q, k, v, prompt_k, prompt_v, mask=bias, **how))
    attended_NLD = attend_in_windows(self.qkv(x_NLD), prompt_k, prompt_v, bias_1HLL=bias, mask_WLL=mask, **how)
    projected: Tensor = self.proj_drop(self.proj(attended_NLD))
    return projected


def _swin_v2(self: Any, x_NLD: Tensor, mask: Tensor | None = None) -> Tensor:
    """`WindowAttention.forward` of Swin V2 with the prompt in the slot: keys and queries of length 1, a scale per head.

    Replaces timm's method also in float16, in which timm's minimum length rounds to 0, so that padding becomes NaN.
    """
    prompt: Prompt | None = self.prompt_slot.pop()
    if prompt is None and x_NLD.dtype != torch.float16:
        out: Tensor = swin_transformer_v2.WindowAttention.forward(self, x_NLD, mask)
        return out
    q, k, v = _project(self, x_NLD)
    q, k = _normalize(q), _normalize(k)
    scale_H11 = self.logit_scale.clamp(max=math.log(100.0)).exp()
    bias = _position_bias_v2(self)
    if prompt is not None:
        prompt_k, prompt_v = _project_prompt(self, prompt)
        prompt_k = _normalize(prompt_k)
        if prompt.gate_H is None:
            bias = _add_mask(bias, mask, x_NLD.shape[0])
            q = q * scale_H11
            joint = attend(q, k, v, prompt_k, prompt_v, mask=bias, scale=1.0, prompt_mask_BP=prompt.mask_BP)
            return _project_out(self, joint)
    scores = (q @ k.transpose(-2, -1)) * scale_H11 + bias
    if mask is not None:
        scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
    attended = scores.softmax(dim=-1) @ v
    if prompt is not None and prompt.gate_H is not None:
        q, mask_BP = q * scale_H11, prompt.mask_BP
        attended = attended + attend_prompts(q, prompt_k, prompt_v, prompt.gate_H, scale=1.0, mask_BP=mask_BP)
    return _project_out(self, attended)


def _normalize(x_NHLE: Tensor) -> Tensor:
    return F.normalize(to_float32(x_NHLE), dim=-1).to(x_NHLE.dtype)


class _Kind(NamedTuple):
    """How the attention of a kind of block is prompted.

    Attributes:
        forward: replaces the attention's own method.
        norm: name of the norm that the block applies ahead of its attention; None in a post-norm block.
    """

    forward: Callable[..., Tensor]
    norm: str | None


_KINDS: dict[tuple[type, type], _Kind] = {
    (Block, Attention): _Kind(_vit, "norm1"),
    (ResPostBlock, Attention): _Kind(_vit, None),
    (beit.Block, beit.Attention): _Kind(_beit, "norm1"),
    (EvaBlock, EvaAttention): _Kind(_rotary, "norm1"),
    (EvaBlock, AttentionRope): _Kind(_rotary, "norm1"),
    (EvaBlockPostNorm, EvaAttention): _Kind(_rotary, None),
    (SwinTransformerBlock, WindowAttention): _Kind(_swin, "norm1"),
    (swin_transformer_v2.SwinTransformerV2Block, swin_transformer_v2.WindowAttention): _Kind(_swin_v2, None),
}


def _check_no_masks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert not args and not any(v is not None and v is not False for v in kwargs.values()), "no mask is passed to a ViT"


def _project(attention: Any, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens to query, key and value, each (B, H, L, E)."""
    if attention.qkv is None:
        k, v = _project_separately(attention, x_BLD)
        return split_heads(attention.q_proj(x_BLD), attention.num_heads), k, v
    bias_X = _bias_beside(attention)
    if bias_X is None:
        fused_BLX = attention.qkv(x_BLD)
    elif getattr(attention, "qkv_bias_separate", False):
        fused_BLX = attention.qkv(x_BLD) + bias_X
    else:
        fused_BLX = F.linear(x_BLD, attention.qkv.weight, bias_X)
    q, k, v = view_parts(fused_BLX, 3, attention.num_heads)
    return q, k, v


def _project_prompt(attention: Any, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Key and value of a prompt, each (B, H, P, E); a projection that LoRA wraps gives them only together with the query."""
    qkv = attention.qkv
    if qkv is None:
        return _project_separately(attention, prompt.tokens_BPD)
    if type(qkv) is not nn.Linear:
        return _project(attention, prompt.tokens_BPD)[1:]
    bias_X, query = _bias_beside(attention), qkv.out_features // 3
    bias_X = qkv.bias if bias_X is None else bias_X
    kv = F.linear(prompt.tokens_BPD, qkv.weight[query:], None if bias_X is None else bias_X[query:])
    k, v = view_parts(kv, 2, attention.num_heads)
    return k, v


def _project_separately(attention: Any, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Project tokens by separate projections of key and value, which may have fewer heads than the query."""
    heads = getattr(attention, "num_kv_heads", attention.num_heads)
    return split_heads(attention.k_proj(x_BLD), heads), split_heads(attention.v_proj(x_BLD), heads)


def _bias_beside(attention: Any) -> Tensor | None:
    """Bias of a fused projection that is stored separately, (X,); None if there is none."""
    if getattr(attention, "q_bias", None) is None:
        return None
    return torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])


def _rotate(attention: Any, x_BHLE: Tensor, rope: Tensor) -> Tensor:
    """Apply the rotary positions of patches; prefix tokens have none."""
    prefix = attention.num_prefix_tokens
    half = getattr(attention, "rotate_half", False)
    return torch.cat([x_BHLE[:, :, :prefix], apply_rot_embed_cat(x_BHLE[:, :, prefix:], rope, half=half)], dim=2)


def _attend(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor,
    prompt_v: Tensor,
    prompt: Prompt,
    biases: list[Tensor] | None = None,
) -> Tensor:
    """Compute attention of tokens to tokens and to a prompt, (B, H, L, E); `biases` are added to the scores of tokens."""
    scale, mask_BP = attention.scale, prompt.mask_BP
    if prompt.gate_H is None:
        return attend(q, k, v, prompt_k, prompt_v, mask=_sum(biases), scale=scale, prompt_mask_BP=mask_BP)
    added = attend_prompts(q, prompt_k, prompt_v, prompt.gate_H, scale=scale, mask_BP=mask_BP)
    return _attend_as_timm(attention, q, k, v, biases) + added


def _attend_as_timm(attention: Any, q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor] | None = None) -> Tensor:
    """Compute attention of tokens to tokens in the same steps as timm, (B, H, L, E)."""
    if attention.fused_attn:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_sum(biases))
    scores: Tensor = (q * attention.scale) @ k.transpose(-2, -1)
    for bias in biases or ():
        scores = scores + bias
    return scores.softmax(dim=-1) @ v


def _sum(biases: list[Tensor] | None) -> Tensor | None:
    return sum(biases[1:], biases[0]) if biases else None


def _add_mask(bias_1HLL: Tensor, mask_WLL: Tensor | None, count: int) -> Tensor:
    """Add the mask of windows to the position bias, for `count` windows."""
    if mask_WLL is None:
        return bias_1HLL
    return bias_1HLL + mask_WLL.repeat(count // mask_WLL.shape[0], 1, 1)[:, None]


def _position_bias_v2(attention: Any) -> Tensor:
    """Position bias within a window by Swin V2's network of relative coordinates, (1, H, L, L)."""
    table = attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads)
    index_LL = attention.relative_position_index
    bias_HLL = table[index_LL.view(-1)].view(*index_LL.shape, -1).permute(2, 0, 1).contiguous()
    return (16 * torch.sigmoid(bias_HLL))[None]


def _project_out(attention: Any, attended_NHLE: Tensor) -> Tensor:
    """Apply the attention's output norm, if any, and its output projection: (N, L, D)."""
    attended_NLD = attended_NHLE.transpose(1, 2).flatten(2)
    if getattr(attention, "norm", None) is not None:
        attended_NLD = attention.norm(attended_NLD)
    projected: Tensor = attention.proj_drop(attention.proj(attended_NLD))
    return projected
