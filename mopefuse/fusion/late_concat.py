"""Late concatenation of frozen features: a head on both pooled features side by side.

The simplest fusion there is, and on small data a strong one.
"""

from __future__ import annotations

from collections.abc import Mapping

from mopefuse.config import RunConfig
from mopefuse.data._base import Batch
from mopefuse.encoders._base import Encoder
from mopefuse.fusion._base import Fusion, Output


class LateConcat(Fusion):
    """head(concat(norm(main), norm(comp))), both encoders frozen and unprompted; linear unless `head_hidden`."""

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.frozen = self.uses
        self.head = self.make_head(sum(self.encoder(side).feature_width for side in self.uses), num_labels)

    def forward(self, batch: Batch) -> Output:
        """Logits (B, N)."""
        return Output(self.classify(*(self.feature(side, batch) for side in self.uses)))
