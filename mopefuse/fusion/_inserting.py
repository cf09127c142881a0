"""What methods share that put tokens of one modality among those of the other one's encoder, the reader.

Shapes: B batch, P inserted tokens, C width of a feature, D width of the reader's tokens, N labels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from mopefuse.config.schema import RunConfig
from mopefuse.core.precision import apply_in_own_type
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, Insert
from mopefuse.fusion._tuned import TunedFusion
from mopefuse.fusion.base import Output
from mopefuse.prompts.stack import scaleless


class InsertingFusion(TunedFusion):
    """An encoder, the main one unless `roles` says otherwise, that reads other tokens ahead of its own and classifies.

    They enter its first layer without position, and go through all. What comes from the other encoder loses its scale and
    is projected to the reader's width (`project`).

    Raises:
        EncoderError: a reader that takes no tokens beside its own (`Encoder.insertable`).
    """

    parts: ClassVar[dict[str, str]] = {r"^project\.": "projection", r"^prompt_PD$": "inserted prompts", **TunedFusion.parts}

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.reader, self.source = self.roles()
        reader = self.encoder(self.reader)
        reader.require_insertable(self.reader)
        self.frozen = tuple(side for side in self.frozen if side == self.source)
        self.project = nn.Linear(self.source_width(), reader.widths[0])
        self.head = self.make_head(reader.feature_width, num_labels)

    def roles(self) -> tuple[str, str]:
        """The side whose encoder reads and classifies, and the side that it reads tokens of."""
        return "main", "comp"

    @property
    def head_sides(self) -> tuple[str, ...]:
        """The encoder alone that has read the other one."""
        return (self.reader,)

    def bond(self, name: str) -> str:
        """Also of what is inserted."""
        if name.startswith("project."):
            return f"{self.source} features"
        return self.reader if name == "prompt_PD" else super().bond(name)

    def source_width(self) -> int:
        """Width of what is projected."""
        return self.encoder(self.source).feature_width

    @abstractmethod
    def inserted(self, batch: Batch) -> Insert:
        """The tokens of a batch."""

    def projected(self, feature_BXC: Tensor) -> Tensor:
        """Features (B, ..., C) without their scale, as tokens (B, ..., D)."""
        return apply_in_own_type(self.project, scaleless(feature_BXC))

    def forward(self, batch: Batch) -> Output:
        """Logits (B, N)."""
        insert, prompt_at = self.inserted(batch), self.prompts(self.reader)
        encoded = self.encoder(self.reader).encode(batch.inputs[self.reader], prompt_at, insert)
        return Output(self.classify(encoded.pooled_BC))
