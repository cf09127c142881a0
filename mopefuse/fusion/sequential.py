"""Sequential fusion: the complementary feature is inserted as one token into the main encoder, which is fine-tuned.

The baseline SequentialFuse of Jiang et al., arXiv 2312.03734. Shapes: B batch, C width of psi.
"""

from __future__ import annotations

from typing import ClassVar

from mopefuse.data.base import Batch
from mopefuse.encoders.base import InsertedTokens
from mopefuse.fusion._inserting import InsertingFusion


class Sequential(InsertingFusion):
    """Inserts the projected psi ahead of the main encoder's own tokens; both encoders are fine-tuned by default (`tune`).

    As in the paper: one token, fine-tuning. Unlike the paper: psi is normalised before the projection, and the token has no
    position embedding. Limit: with `tune: probe` and a constant projection it is independent of the other modality.
    """

    default_tune: ClassVar[str] = "full"

    def build_insert(self, batch: Batch) -> InsertedTokens:
        """Project psi to one token."""
        return InsertedTokens(self.project_features(self.pooled("comp", batch))[:, None])
