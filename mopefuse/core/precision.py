"""Which type a computation runs in: what must stay exact does, whatever autocast or the type of a model's weights is.

Shapes: B batch, X any others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def exact(x: Tensor) -> Tensor:
    """In float32; in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def weight_type(module: nn.Module) -> torch.dtype:
    """The type of a module's floating-point parameters; float32 if it has none."""
    types = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return next(types, torch.float32)


def apply_in_own_type(module: nn.Module, x_BX: Tensor) -> Tensor:
    """A module's output for a tensor that may be of another type than its weights."""
    out: Tensor = module(x_BX.to(weight_type(module)))
    return out


def apply_exactly(module: nn.Module, x_BX: Tensor) -> Tensor:
    """A module's output without autocast: in the type of its weights, float32 unless the whole model was converted."""
    with torch.autocast(x_BX.device.type, enabled=False):
        return apply_in_own_type(module, x_BX)
