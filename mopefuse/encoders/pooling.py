"""Pool the tokens of a text. Shapes: B batch, L tokens, D width."""

from __future__ import annotations

from torch import Tensor


def mean_of(tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean over the tokens of each sample that are not padding, (B, D)."""
    weights_BL1 = mask_BL[:, :, None].to(tokens_BLD.dtype)
    return (tokens_BLD * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1)
