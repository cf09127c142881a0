"""Late concatenation: a head on all pooled features side by side.

The simplest fusion there is, and on small data a strong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mopefuse.config.schema import RunConfig
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.errors import ConfigError
from mopefuse.fusion._tuned import TunedFusion
from mopefuse.fusion.base import Output


class LateConcat(TunedFusion):
    """head(concat(norm(main), norm(comp), ...)); linear unless `head_hidden`. Encoders are frozen unless `tune` says otherwise.

    Fully tuned it is the fine-tuned late fusion of the papers' tables; they leave out the norm (`head_norm: none`).
    """

    several: ClassVar[bool] = True

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        if config.either and not self.does_without:
            what = "training would meet no sample without the main modality"
            raise ConfigError(145, what, where="--either", fix="add --modality-dropout 0.1, or --on-missing absent")
        self.learn_absence(self.does_without)
        self.head = self.make_head(sum(self.encoder(side).feature_width for side in self.uses), num_labels)

    def forward(self, batch: Batch) -> Output:
        """Logits (B, N)."""
        return Output(self.classify(*(self.pooled(side, batch) for side in self.uses), batch=batch))
