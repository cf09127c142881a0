"""Activation checkpointing: a block is recomputed in the backward pass instead of storing its activations.

Chen et al., Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174. Gradients are equal bit for
bit. Only a block's forward method is recomputed; the libraries' own checkpointing would also run its hooks again, which
request prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run_block(forward: Callable[..., Any], *inputs: Any, recompute: bool, trainable: bool, **options: Any) -> Any:
    """Run ``forward(*inputs, **options)`` of one block, with checkpointing if `recompute` is set and a gradient is needed.

    Args:
        trainable: whether the block has trainable weights; only then can it have dropout, whose random state is restored.
    """
    if not (recompute and torch.is_grad_enabled() and (trainable or _needs_gradient((*inputs, *options.values())))):
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=trainable, **options)


def _needs_gradient(values: Iterable[Any]) -> bool:
    return any(
        value.requires_grad if isinstance(value, Tensor) else isinstance(value, tuple) and _needs_gradient(value)
        for value in values
    )
