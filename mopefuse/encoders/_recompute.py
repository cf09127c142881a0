"""Activation checkpointing: a block computed once more in the backward pass, instead of keeping what its gradient needs.

Chen et al., Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174. Gradients are the same to the
bit. The libraries' own checkpointing would run a block's hooks again, which ask for prompts: only its forward method is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run_block(forward: Callable[..., Any], *inputs: Any, recompute: bool, learns: bool, **options: Any) -> Any:
    """``forward(*inputs, **options)`` of one block; recomputed where asked for, if there is a gradient to compute.

    Args:
        learns: whether weights of the block do; else nothing in it is random.
    """
    if not (recompute and torch.is_grad_enabled() and (learns or _needs_gradient((*inputs, *options.values())))):
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=learns, **options)


def _needs_gradient(values: Iterable[Any]) -> bool:
    return any(
        value.requires_grad if isinstance(value, Tensor) else isinstance(value, tuple) and _needs_gradient(value)
        for value in values
    )
