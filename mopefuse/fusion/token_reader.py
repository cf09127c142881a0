"""Multi-head attention of a few queries, computed from complementary features, to the output tokens of an encoder.

Shapes: B batch, L tokens of the encoder, D their width, C width of psi, Q queries, W width of the attention, H heads, E
width of one head, X = Q * W.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.method_settings import CrossAttention as Settings
from mopefuse.core.precision import apply_in_own_type


class TokenReader(nn.Module):
    """Reads tokens by multi-head attention with queries computed from psi.

    Args:
        token_width: D. conditions: C of each complementary side.
    """

    def __init__(self, settings: Settings, token_width: int, conditions: Mapping[str, int]) -> None:
        super().__init__()
        width = settings.width
        self.heads, self.dropout = settings.heads, settings.dropout
        self.norm = nn.LayerNorm(token_width)
        self.key, self.value = nn.Linear(token_width, width), nn.Linear(token_width, width)
        self.query = nn.ModuleDict({side: nn.Linear(size, width, bias=False) for side, size in conditions.items()})
        self.offset_QW = nn.Parameter(torch.randn(settings.queries, width) / 2)  # about as large as a projected psi

    def forward(self, psi_BC: Mapping[str, Tensor], tokens_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """Read the tokens where `mask_BL` is True, with all queries: (B, X).

        Args:
            psi_BC: standardised feature of each complementary side.
        """
        normed_BLD = apply_in_own_type(self.norm, tokens_BLD)
        k_BHLE, v_BHLE = (self._split(apply_in_own_type(project, normed_BLD)) for project in (self.key, self.value))
        asked_BW = torch.stack([apply_in_own_type(self.query[side], feature) for side, feature in psi_BC.items()]).sum(dim=0)
        q_BHQE = self._split(asked_BW[:, None] + self.offset_QW).to(k_BHLE.dtype)
        mask_B11L = None if mask_BL is None else mask_BL[:, None, None]
        dropout = self.dropout if self.training else 0.0
        read_BHQE = F.scaled_dot_product_attention(q_BHQE, k_BHLE, v_BHLE, attn_mask=mask_B11L, dropout_p=dropout)
        return F.dropout(read_BHQE.transpose(1, 2).flatten(1), self.dropout, self.training)

    def _split(self, x_BXW: Tensor) -> Tensor:
        """Split the last dimension into heads: (B, H, X, E)."""
        split_BHXE: Tensor = x_BXW.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split_BHXE
