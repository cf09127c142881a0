"""Prompts in the attention of transformers models whose layers `probe` can verify.

transformers looks the attention function up by name, and this module registers one. Without a prompt it calls transformers'
scaled-dot-product function; with one it also attends to the keys and values of the prompt in the layer's slot.

Shapes: B batch, L tokens, H heads of queries, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

from mopefuse.encoders._prompted import Slot
from mopefuse.encoders.attention import attend, attend_prompts
from mopefuse.encoders.probe import Recorder

ATTENTION = "mopefuse"  # name in transformers' attention interface


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute scaled-dot-product attention, including the prompt in the module's slot. Query (B, H, L, E)."""
    slot: Slot | Recorder | None = getattr(module, "prompt_slot", None)
    if isinstance(slot, Recorder):
        slot.attend(module, query, key, value, kwargs)
        slot = None
    prompt = slot.pop() if slot is not None else None
    if slot is not None and slot.insert is not None:
        attention_mask = slot.insert.attention_mask(attention_mask, query.shape[2])
    if prompt is None or prompt.gate_H is not None:
        out_BLHE, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if prompt is None:
        return out_BLHE, None
    assert slot is not None and slot.site is not None
    keys, values = slot.site.project(prompt.tokens_BPD)
    if prompt.gate_H is not None:
        added = attend_prompts(query, keys, values, prompt.gate_H, scale=scaling, mask_BP=prompt.mask_BP)
        return out_BLHE + added.transpose(1, 2), None
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
    out = attend(
        query,
        key,
        value,
        keys,
        values,
        mask=attention_mask,
        causal=causal,
        scale=scaling,
        prompt_mask_BP=prompt.mask_BP,
    )
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Suppress transformers' progress bar and warnings, for example about unused heads."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
