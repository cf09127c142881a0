"""Prompts as the papers insert them, as tokens of every layer whose outputs are dropped, to measure what keys/values save.

For benchmarks. Outputs equal those of ungated prompts as keys and values; here prompts pass through everything that tokens
pass through: query, attention, output projection and, except in Swin, the MLP. Swin's prompts are repeated for each window.

Shapes: B batch, W windows per image, H heads, L tokens, P prompt tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from mopefuse.encoders._prompted import PromptedEncoder
from mopefuse.encoders.attention import view_parts
from mopefuse.encoders.base import Encoder
from mopefuse.encoders.tiny import TinyEncoder


def why_not_insertable(encoder: Encoder) -> str:
    """Reason why an encoder's prompts cannot be inserted as tokens; empty if they can."""
    if encoder.supports_inserted_tokens or in_windows(encoder):
        return ""
    return f"{encoder.spec} does not support prompts as tokens"


def in_windows(encoder: Encoder) -> bool:
    """Whether a prompt that is inserted as tokens is repeated for each window of an image."""
    return isinstance(encoder, PromptedEncoder) and isinstance(_blocks(encoder)[0], SwinTransformerBlock)


@contextmanager
def as_tokens(encoder: Encoder) -> Iterator[None]:
    """Insert the prompts of an encoder, which must be ungated, as tokens within the context."""
    assert not why_not_insertable(encoder), why_not_insertable(encoder)
    request_prompt = encoder._request_prompt
    pending: list[Tensor] = []  # the prompt of the current layer

    def store_prompt(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None = None) -> None:
        prompt = request_prompt(layer, tokens_BLD, mask_BL)
        assert prompt is None or prompt.gate_H is None, "gated prompts cannot be inserted as tokens"
        pending[:] = [] if prompt is None else [prompt.tokens_BPD]

    handles: list[Any] = []
    windowed = [block for block in _blocks(encoder) if isinstance(block, SwinTransformerBlock)]
    plain = [block.attn.forward for block in windowed]
    encoder._request_prompt = store_prompt  # type: ignore[method-assign]
    for block in windowed:
        block.attn.forward = MethodType(_InWindows(block.norm1, pending), block.attn)
    for block in () if windowed else _blocks(encoder):
        handles += [
            block.register_forward_pre_hook(_Enter(pending), with_kwargs=True),
            block.register_forward_hook(_Leave(pending)),
        ]
    try:
        yield
    finally:
        del encoder._request_prompt
        for handle in handles:
            handle.remove()
        for block, forward in zip(windowed, plain, strict=True):
            block.attn.forward = forward


def _blocks(encoder: Encoder) -> list[Any]:
    if isinstance(encoder, TinyEncoder):
        return list(encoder.blocks)
    return [slot.block for slot in encoder._slots] if isinstance(encoder, PromptedEncoder) else []


class _Enter:
    """Prepends the prompt to the tokens that enter a block, and extends its mask."""

    def __init__(self, pending: list[Tensor]) -> None:
        self.pending = pending

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.pending:
            return None
        (prompt_BPD,) = self.pending
        count = prompt_BPD.shape[1]
        values: dict[int | str, Any] = dict(enumerate(args))
        values.update(kwargs)
        for name, value in values.items():
            if isinstance(value, Tensor):
                tokens = value.dim() == 3
                values[name] = torch.cat([prompt_BPD, value], dim=1) if tokens else _padded(value, count)
        return tuple(values[number] for number in range(len(args))), {name: values[name] for name in kwargs}


class _Leave:
    """Removes the prompt's outputs."""

    def __init__(self, pending: list[Tensor]) -> None:
        self.pending = pending

    def __call__(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if not self.pending:
            return out
        count = self.pending.pop().shape[1]
        return out[:, count:] if isinstance(out, Tensor) else (out[0][:, count:], *out[1:])


def _padded(mask: Tensor, count: int) -> Tensor:
    """Extend a mask (B, 1, 1 or L, L) to prompts; the rows of prompts do not matter."""
    rows = count if mask.shape[-2] > 1 else 0
    return F.pad(mask, (count, 0, rows, 0), value=mask.dtype == torch.bool)


class _InWindows:
    """Attention of a Swin block with the prompt in each of its windows."""

    def __init__(self, norm: nn.Module, pending: list[Tensor]) -> None:
        self.norm, self.pending = norm, pending

    def __call__(self, attention: Any, x_NLD: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.pending:
            plain: Tensor = type(attention).forward(attention, x_NLD, mask)
            return plain
        prompt_BPD: Tensor = self.norm(self.pending.pop())
        count, windows = prompt_BPD.shape[1], x_NLD.shape[0] // prompt_BPD.shape[0]
        both = torch.cat([prompt_BPD.repeat_interleave(windows, dim=0), x_NLD], dim=1)
        q, k, v = view_parts(attention.qkv(both), 3, attention.num_heads)
        scores = (q * attention.scale) @ k.transpose(-2, -1)  # not fused, as timm's own
        scores = scores + F.pad(attention._get_rel_pos_bias(), (count, 0, count, 0))
        if mask is not None:  # (W, L, L)
            padded = F.pad(mask, (count, 0, count, 0))
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + padded[:, None]).flatten(0, 1)
        attended = scores.softmax(dim=-1) @ v
        projected: Tensor = attention.proj_drop(attention.proj(attended.transpose(1, 2).flatten(2)))
        return projected[:, count:]
