"""Late concatenation: a head on the concatenated pooled features.

The simplest fusion method, and a strong one on small data.

Shapes: B batch, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mopefuse.config.schema import RunConfig
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.fusion._tuned_encoders import TunedFusion
from mopefuse.fusion.base import Output


class LateConcat(TunedFusion):
    """Classifies by head(concat(norm(main), norm(comp), ...)); encoders are frozen by default (`tune`).

    With ``--tune full`` and ``head_norm: none`` it is the fine-tuned late fusion of the papers' tables.

    Raises:
        ConfigError: `either` without training samples that lack the main modality.
    """

    supports_multiple_comps: ClassVar[bool] = True

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.add_optional_missing_embeddings()
        self.head = self.make_head(sum(self.encoder(side).feature_width for side in self.uses), num_labels)

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N)."""
        return Output(self.classify(*(self.pooled(side, batch) for side in self.uses), batch=batch))
