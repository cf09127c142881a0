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

from mopefuse.config.schema import RunConfig
from mopefuse.core.precision import apply_without_autocast, to_float32
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.fusion.base import Fusion, Output
from mopefuse.fusion.token_reader import TokenReader


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
        token_width = main.require_tokens(fix="use it as --comp instead, or use --method mlp")
        self.frozen, self.reads_tokens = self.uses, ("main",)
        self.add_optional_missing_embeddings()
        self.reader = TokenReader(
            settings, token_width, {side: self.encoder(side).feature_width for side in self.uses[1:]}
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
