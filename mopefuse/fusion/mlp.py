"""A multilayer perceptron on frozen features: what a small non-linear network gets from pooled features in seconds.

Rumelhart, Hinton and Williams, Learning representations by back-propagating errors, Nature 323 (1986). If the answer
depends on both modalities together and the pooled features contain it, this is the baseline that a fusion method must beat.

Shapes: B batch, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mopefuse.config.schema import RunConfig
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.fusion.base import Fusion, Output


class MLP(Fusion):
    """Classifies the standardised features of all frozen encoders by a network with one hidden layer of `head_hidden` units.

    As in the source: one hidden layer, trained by gradients. Unlike the source: GELU for the sigmoid, dropout, AdamW with a
    cosine schedule, and inputs standardised with statistics of the training split. Unlike `late-concat` with `head_hidden`,
    features keep their scale relative to the training split instead of being normalised within each sample, and encoders
    are always frozen. A side that a sample lacks is replaced by a learned vector. Limit: with ``head_hidden: 0`` it is the
    model of `linear`, trained by steps.

    Raises:
        ConfigError: `either` without training samples that lack the main modality.
    """

    supports_multiple_comps: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("mlp",)

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.frozen = self.uses
        self.add_optional_missing_embeddings()
        self.head = self.make_head(self.standardise_features(), num_labels, config.mlp.dropout)

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N)."""
        return Output(self.classify(*(self.pooled_feature(side, batch) for side in self.uses), batch=batch))
