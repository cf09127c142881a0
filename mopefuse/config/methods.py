"""Settings of single fusion methods, each a section of the configuration."""

from __future__ import annotations

from pydantic import Field

from mopefuse.config.section import Section


class QMF(Section):
    """Late fusion weighted by the confidence of each side (method qmf); `head_hidden` is the width of its heads."""

    scale: float = Field(0.1, gt=0, description="a side's weight is its energy score times this")
    rank_weight: float = Field(
        1.0, ge=0, description="weight of the loss that makes a side less confident about samples that it predicts badly"
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout on the hidden layer of each head, in training")
