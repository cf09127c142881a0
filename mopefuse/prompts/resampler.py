"""The output tokens of a complementary encoder as the condition of the mapped prompts, in place of one pooled vector.

A trunk maps each token to the width of the mapper's bottleneck. R learned queries then attend to the results, as in Perceiver
(Jaegle et al., arXiv 2103.03206) but with one head, and with what the trunk returns as the values. R tokens result for any
number of tokens; each layer maps each of them to prompt tokens. Without queries all tokens are mapped, padding masked.

Limit: for a sequence of one token, each of the R results is the trunk's output for that token, so that R = 1 and no queries
are both the pooled condition.

Shapes: B batch, L tokens of the condition, C their width, h width of the bottleneck, R resampled tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.schema import Prompts as PromptConfig
from mopefuse.core.precision import apply_in_own_type


class ConditionTokens(NamedTuple):
    """The output tokens of a complementary encoder for a batch.

    Attributes:
        values_BLC: normalised (`mopefuse.core.precision.normalize_feature`), of any floating-point type.
        mask_BL: False for padding; None without padding. Each sample has at least one token.
        missing_B: True for samples that lack the modality; None if none does.
    """

    values_BLC: Tensor
    mask_BL: Tensor | None
    missing_B: Tensor | None = None


class Resampler(nn.Module):
    """Maps the tokens of one condition to what every layer computes its mapped prompt from.

    Args:
        width: C.
    """

    def __init__(self, config: PromptConfig, width: int) -> None:
        super().__init__()
        self.width, self.trunk = width, make_trunk(config, width)
        queries, bottleneck = config.condition_tokens, config.bottleneck
        self.queries_Rh = nn.Parameter(torch.randn(queries, bottleneck)) if queries else None
        self.key = nn.Linear(bottleneck, bottleneck, bias=False) if queries else None
        self.absent_C: nn.Parameter | None = None

    def add_missing_token(self) -> None:
        """Add a trainable token, the only one of a sample that lacks the modality; without it, this token is 0."""
        self.absent_C = nn.Parameter(torch.zeros(self.width))

    def forward(self, tokens: ConditionTokens) -> tuple[Tensor, Tensor | None]:
        """The resampled tokens (B, R, h) and no mask; without queries, all tokens (B, L, h) and their mask."""
        values_BLC, mask_BL = self._replace_missing(tokens)
        flat = apply_in_own_type(self.trunk, values_BLC.flatten(0, 1))
        found_BLh = flat.view(*values_BLC.shape[:2], -1)
        if self.queries_Rh is None or self.key is None:
            return found_BLh, mask_BL
        queries_B1Rh = self.queries_Rh.to(found_BLh.dtype).expand(found_BLh.shape[0], 1, -1, -1)
        key_B1Lh, value_B1Lh = self.key(found_BLh).to(found_BLh.dtype)[:, None], found_BLh[:, None]
        mask_B11L = None if mask_BL is None else mask_BL[:, None, None]
        read_B1Rh = F.scaled_dot_product_attention(queries_B1Rh, key_B1Lh, value_B1Lh, attn_mask=mask_B11L)
        return read_B1Rh.squeeze(1), None

    def _replace_missing(self, tokens: ConditionTokens) -> tuple[Tensor, Tensor | None]:
        """Values and mask, with the absent token as the only one of each sample that lacks the modality."""
        values_BLC, mask_BL, missing_B = tokens
        if missing_B is None:
            return values_BLC, mask_BL
        absent_C = values_BLC.new_zeros(()) if self.absent_C is None else self.absent_C
        first_L = torch.arange(values_BLC.shape[1], device=values_BLC.device) == 0
        visible_BL = torch.ones_like(values_BLC[..., 0], dtype=torch.bool) if mask_BL is None else mask_BL
        # Not `where`, which ONNX Runtime does not have for booleans.
        mask_BL = (visible_BL & ~missing_B[:, None]) | (first_L & missing_B[:, None])
        return torch.where(missing_B[:, None, None], absent_C, values_BLC), mask_BL


def make_trunk(config: PromptConfig, width: int) -> nn.Sequential:
    """The first part of the mapper, shared by all layers, for rows of `width` numbers (any, C)."""
    norm = nn.LayerNorm if config.mapper_norm == "layer" else _FrozenBatchNorm
    return nn.Sequential(nn.Linear(width, config.bottleneck), norm(config.bottleneck), nn.GELU())


class _FrozenBatchNorm(nn.BatchNorm1d):
    """Batch norm that stays in evaluation mode, as in the released code: mean 0 and variance 1 are never updated."""

    def train(self, mode: bool = True) -> _FrozenBatchNorm:
        return super().train(False)
