"""A hash that identifies the weights of an encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Hash names, shapes, types and values of tensors: 16 hex digits, equal on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 4096)].cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{_sum_of_bits(flat)}".encode())
        digest.update(picked.double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sum_of_bits(flat: Tensor) -> int:
    """Sum of all values reinterpreted as integers: changes with any single value, and is equal on every device."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size())
    if flat.dtype == torch.bool or whole is None:
        return int(flat.double().sum())
    return int(flat.contiguous().view(whole).sum(dtype=torch.int64))
