"""Sequential fusion: the complementary feature becomes one more token of the main encoder, which is fine-tuned.

A baseline of Jiang et al., arXiv 2312.03734, there called SequentialFuse. Shapes: B batch, C width of psi.
"""

from __future__ import annotations

from typing import ClassVar

from mopefuse.data.base import Batch
from mopefuse.encoders.base import Insert
from mopefuse.fusion._inserting import InsertingFusion


class Sequential(InsertingFusion):
    """psi, projected, ahead of the main encoder's own tokens; both encoders are fully tuned unless `tune` says otherwise.

    Equal to the paper's: one token, fine-tuning. Different: psi loses its scale before it is projected, and the token has no
    position of its own. Limit: with `tune: probe` and a projection that is constant it is blind to the other modality.
    """

    own_tune: ClassVar[str] = "full"

    def inserted(self, batch: Batch) -> Insert:
        """psi as one token."""
        return Insert(self.projected(self.pooled("comp", batch))[:, None])
