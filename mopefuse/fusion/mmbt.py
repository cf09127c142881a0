"""MMBT: image tokens, projected, are read by a text encoder together with the words.

Kiela et al., Supervised Multimodal Bitransformers for Classifying Images and Text, https://arxiv.org/abs/1909.02950.
Shapes: B batch, L tokens of the image encoder, M image tokens, C width of the image encoder's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F

from mopefuse.config.schema import RunConfig
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, Insert
from mopefuse.errors import EncoderError
from mopefuse.fusion._inserting import InsertingFusion


class MMBT(InsertingFusion):
    """``inserted.images`` tokens ahead of a text's own; both encoders are fully tuned unless `tune` says otherwise.

    Equal to the paper's: pooled parts of the image, one projection for all of them, one transformer over both, its own
    classification token. Different: any image encoder in place of ResNet-152, whose last tokens (a class token among them)
    are averaged in as many runs of neighbours; image tokens enter without position and segment embeddings; encoders are not
    unfrozen one after the other. Limit: with one image token of an encoder that pools by the mean it is `Sequential`.

    Raises:
        EncoderError: two encoders of one modality, a text encoder that takes no tokens beside its own, or an image encoder
            whose tokens are not known.
    """

    own_tune: ClassVar[str] = "full"
    sections: ClassVar[tuple[str, ...]] = (*InsertingFusion.sections, "inserted")

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        self.frozen = ()  # tokens of the image are read, not its pooled feature

    def roles(self) -> tuple[str, str]:
        """The text reads the image, whichever is main."""
        sides = {self.encoder(side).modality: side for side in self.uses}
        if sides.keys() != {"text", "image"}:
            what = f"{self.config.method} is of a text and an image; both encoders are of one modality"
            raise EncoderError(71, what, fix="name one of each as --main and --comp")
        return sides["text"], sides["image"]

    def source_width(self) -> int:
        """C, which for an encoder with a projection of its own is not that of its feature."""
        encoder = self.encoder(self.source)
        if not encoder.token_width:
            what = f"the width of the tokens of {encoder.spec} is not known"
            raise EncoderError(72, what, fix="use an image encoder of timm:, hf: or tiny:")
        return encoder.token_width

    def inserted(self, batch: Batch) -> Insert:
        """Parts of the image as tokens."""
        tokens_BLC = self.encode(self.source, batch).tokens_BLD
        count = min(self.config.inserted.images, tokens_BLC.shape[1])
        parts_BMC = F.adaptive_avg_pool1d(tokens_BLC.transpose(1, 2), count).transpose(1, 2)
        return Insert(self.projected(parts_BMC))
