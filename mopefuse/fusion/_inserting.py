"""What methods share that put tokens of the complementary modality among those of the main encoder.

Shapes: B batch, P inserted tokens, C width of a feature, D width of the main encoder's tokens, N labels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config import RunConfig
from mopefuse.data._base import Batch
from mopefuse.encoders._base import Encoder, Insert
from mopefuse.fusion._base import Output
from mopefuse.fusion._tuned import TunedFusion


class InsertingFusion(TunedFusion):
    """A main encoder that reads other tokens ahead of its own, through all its layers, and classifies.

    They enter its first layer without position. What comes from the complementary encoder loses its scale and is
    projected to the main encoder's width (`project`).

    Raises:
        EncoderError: a main encoder that takes no tokens beside its own (`Encoder.insertable`).
    """

    parts: ClassVar[dict[str, str]] = {r"^project\.": "projection", r"^prompt_PD$": "inserted prompts", **TunedFusion.parts}
    bonds: ClassVar[dict[str, str]] = {**TunedFusion.bonds, r"^project\.": "comp features", r"^prompt_PD$": "main"}

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        main = self.encoder("main")
        main.require_insertable()
        self.frozen = tuple(side for side in self.frozen if side == "comp")
        self.project = nn.Linear(self.source_width(), main.widths[0])
        self.head = self.make_head(main.feature_width, num_labels)

    @property
    def head_sides(self) -> tuple[str, ...]:
        """The main encoder alone, which has read the other one."""
        return ("main",)

    def source_width(self) -> int:
        """Width of what is projected, of the complementary encoder."""
        return self.encoder("comp").feature_width

    @abstractmethod
    def inserted(self, batch: Batch) -> Insert:
        """The tokens of a batch."""

    def projected(self, feature_BXC: Tensor) -> Tensor:
        """Features (B, ..., C) without their scale, as tokens (B, ..., D)."""
        tokens_BXD: Tensor = self.project(F.layer_norm(feature_BXC.float(), feature_BXC.shape[-1:], eps=1e-8))
        return tokens_BXD

    def forward(self, batch: Batch) -> Output:
        """Logits (B, N)."""
        insert, prompt_at = self.inserted(batch), self.prompts("main", batch)
        encoded = self.encoder("main").encode(batch.inputs["main"], prompt_at, insert)
        return Output(self.classify(encoded.pooled_BC))
