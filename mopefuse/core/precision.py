"""Floating-point types of computations that must not run in reduced precision.

Shapes: B batch, C width of a feature, X any others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_float32(x: Tensor) -> Tensor:
    """Convert to float32; float64 is kept."""
    return x if x.dtype == torch.float64 else x.float()


def normalize_feature(psi_BC: Tensor) -> Tensor:
    """Features with mean 0 and variance 1 over their last axis, in float32; an all-zero feature stays zero."""
    return F.layer_norm(to_float32(psi_BC), psi_BC.shape[-1:], eps=1e-8)


def weight_type(module: nn.Module) -> torch.dtype:
    """Type of a module's floating-point parameters; float32 if it has none."""
    types = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return next(types, torch.float32)


def apply_in_own_type(module: nn.Module, x_BX: Tensor) -> Tensor:
    """Apply a module to a tensor that is first converted to the type of the module's weights."""
    out: Tensor = module(x_BX.to(weight_type(module)))
    return out


def apply_without_autocast(module: nn.Module, x_BX: Tensor) -> Tensor:
    """Apply a module without autocast, in the type of its weights: float32 unless the whole model was converted."""
    with torch.autocast(x_BX.device.type, enabled=False):
        return apply_in_own_type(module, x_BX)
