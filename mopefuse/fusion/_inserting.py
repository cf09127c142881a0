"""Base class of methods that insert tokens of one modality (the source) into the encoder of the other (the reader).

Shapes: B batch, P inserted tokens, C width of a feature, D width of the reader's tokens, N labels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from mopefuse.config.schema import RunConfig
from mopefuse.core.precision import apply_in_own_type, normalize_feature
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, InsertedTokens
from mopefuse.fusion._tuned_encoders import TunedFusion
from mopefuse.fusion.base import Output


class InsertingFusion(TunedFusion):
    """The reader, the main encoder unless `roles` is overridden, processes inserted tokens ahead of its own.

    Inserted tokens enter the first layer without position embeddings and pass through all layers. Features of the source
    are normalised and projected to the reader's width (`project`). The head classifies the reader's pooled feature.

    Raises:
        EncoderError: the reader does not support inserted tokens (`Encoder.supports_inserted_tokens`).
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
        """Sides of the reader and of the source."""
        return "main", "comp"

    @property
    def head_sides(self) -> tuple[str, ...]:
        """The reader alone."""
        return (self.reader,)

    def dependency_of(self, name: str) -> str:
        """Dependency of a trainable tensor, see `dependencies`; also of the projection and the inserted prompts."""
        if name.startswith("project."):
            return f"{self.source} features"
        return self.reader if name == "prompt_PD" else super().dependency_of(name)

    def source_width(self) -> int:
        """Width C of the projected features."""
        return self.encoder(self.source).feature_width

    @abstractmethod
    def build_insert(self, batch: Batch) -> InsertedTokens:
        """Build the tokens to insert for a batch."""

    def project_features(self, feature_BXC: Tensor) -> Tensor:
        """Normalise features (B, ..., C) and project them to tokens (B, ..., D)."""
        return apply_in_own_type(self.project, normalize_feature(feature_BXC))

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N)."""
        insert, prompt_at = self.build_insert(batch), self.prompts(self.reader)
        encoded = self.encoder(self.reader).encode(batch.inputs[self.reader], prompt_at, insert)
        return Output(self.classify(encoded.pooled_BC))
