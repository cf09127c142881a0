"""Number of parameters of a model, whatever they are stored in."""

from __future__ import annotations

from torch import nn


def count_parameters(module: nn.Module) -> int:
    """Count parameters; a quantised layer counts as the layer that it replaces (see its `extra_parameters`)."""
    extra = sum(getattr(part, "extra_parameters", 0) for part in module.modules())
    return extra + sum(parameter.numel() for parameter in module.parameters())
