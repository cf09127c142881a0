"""MMBT: a text encoder processes projected image tokens together with the tokens of the text.

Kiela et al., Supervised Multimodal Bitransformers for Classifying Images and Text, https://arxiv.org/abs/1909.02950.
Shapes: B batch, L tokens of the image encoder, M image tokens, C width of the image encoder's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F

from mopefuse.config.schema import RunConfig
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, InsertedTokens
from mopefuse.fusion._inserting import InsertingFusion
from mopefuse.fusion._text_and_image import text_and_image_sides


class MMBT(InsertingFusion):
    """Inserts ``inserted.images`` image tokens ahead of the text's own; both encoders are fine-tuned by default (`tune`).

    As in the paper: pooled regions of the image, one projection for all of them, one transformer over both modalities and
    its classification token. Unlike the paper: any image encoder instead of ResNet-152; its output tokens (including a
    class token) are averaged over that many runs of consecutive tokens; image tokens have no position or segment
    embeddings; encoders are not unfrozen in stages. Limit: with one image token, and an image encoder that pools by the
    mean, it equals `Sequential`.

    Raises:
        EncoderError: there is not one encoder of text and one of images, the text encoder does not support inserted tokens, or
            the image encoder does not provide its tokens.
    """

    default_tune: ClassVar[str] = "full"
    sections: ClassVar[tuple[str, ...]] = (*InsertingFusion.sections, "inserted")

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        self.frozen = ()  # the image's tokens are used, and only pooled features can be cached

    def roles(self) -> tuple[str, str]:
        """Sides of the text (reader) and of the image (source), whichever is main."""
        return text_and_image_sides(self)

    def source_width(self) -> int:
        """Width C of the image tokens, which differs from the feature's if the encoder projects its pooled output."""
        return self.encoder(self.source).require_tokens(fix="use an image encoder of timm:, hf: or tiny:")

    def build_insert(self, batch: Batch) -> InsertedTokens:
        """Pool the image tokens to M tokens and project them."""
        tokens_BLC = self.encode(self.source, batch).tokens_BLD
        count = min(self.config.inserted.images, tokens_BLC.shape[1])
        parts_BMC = F.adaptive_avg_pool1d(tokens_BLC.transpose(1, 2), count).transpose(1, 2)
        return InsertedTokens(self.project_features(parts_BMC))
