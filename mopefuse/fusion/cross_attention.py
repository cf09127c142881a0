"""Cross-attention: queries computed from the complementary feature attend to the frozen main encoder's output tokens.

Attention is that of Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762; the use of a few queries
for any number of tokens is from Jaegle et al., Perceiver, https://arxiv.org/abs/2103.03206. It can find which of several tokens
matters, which a pooled feature may no longer hold, without reaching into the encoder as `conditional` does.

Shapes: B batch, L tokens of the main encoder, D their width, C width of psi, Q queries, W width of the attention, H heads, E
width of one head, X = Q * W, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.method_settings import CrossAttention as Settings
from mopefuse.config.schema import RunConfig
from mopefuse.core.error_codes import EncoderCode
from mopefuse.core.precision import apply_in_own_type, apply_without_autocast, to_float32
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.errors import EncoderError
from mopefuse.fusion.base import Fusion, Output


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


class CrossAttention(Fusion):
    """A few queries, projected from psi, attend to the main encoder's output tokens; a network classifies what they read.

    The head has one hidden layer of `head_hidden` units and takes [pooled main ; psi ; what the queries read], the first two
    standardised with statistics of the training split. All encoders are frozen, so features and tokens are computed once.

    As in Vaswani et al.: scaled dot-product attention with several heads. As in Perceiver: the number of queries is fixed,
    and each has a learned vector of its own. Unlike both: the vectors are offsets to one projection of psi; there is a single
    layer of attention, without a residual connection, an output projection or positions, since output tokens still contain
    their position. Limit: if the head ignores the output of the attention, it is the head of `mlp`.

    Raises:
        ConfigError: `either` without training samples that lack the main modality.
        EncoderError: the main encoder does not provide its tokens.
    """

    supports_multiple_comps: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("cross_attention",)
    parts: ClassVar[dict[str, str]] = {r"^reader\.": "cross-attention", **Fusion.parts}
    dependencies: ClassVar[dict[str, str]] = {
        **Fusion.dependencies,
        r"^reader\.query\.(\w+)\.": r"\1 features",
        r"^reader\.(norm|key|value)\.": "main",
    }

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        main, settings = self.encoder("main"), config.cross_attention
        if not main.token_width:
            what = f"{main.spec} does not provide its tokens"
            raise EncoderError(EncoderCode.TOKEN_WIDTH_UNKNOWN, what, fix="use it as --comp instead, or use --method mlp")
        self.frozen, self.reads_tokens = self.uses, ("main",)
        self.add_optional_missing_embeddings()
        self.reader = TokenReader(
            settings, main.token_width, {side: self.encoder(side).feature_width for side in self.uses[1:]}
        )
        width = self.standardise_features() + settings.queries * settings.width
        self.head = self.make_head(width, num_labels, settings.dropout)

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N)."""
        main_BC, tokens_BLD, mask_BL = self.feature_and_tokens("main", batch)
        comps = self.uses[1:]
        features = self.normalise(main_BC, *(self.pooled_feature(side, batch) for side in comps), batch=batch)
        read_BX = to_float32(self.reader(dict(zip(comps, features[1:], strict=True)), tokens_BLD, mask_BL))
        if "main" in batch.missing:  # a blank input has no content to attend to
            read_BX = read_BX.masked_fill(batch.missing["main"][:, None], 0.0)
        return Output(apply_without_autocast(self.head, torch.cat([*features, read_BX], dim=-1)))
