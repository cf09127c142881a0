"""Logistic regression on frozen features: what a practitioner tries first, and what a fusion has to beat.

Logistic regression, with the objective of scikit-learn's, on features of the frozen encoders that are standardised by the
training split; C is chosen on validation. It takes no training step.

Shapes: B batch, C width of one side's feature, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.schema import RunConfig
from mopefuse.config.sides import is_comp
from mopefuse.core.precision import apply_exactly
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.fusion.base import Fusion, Output
from mopefuse.fusion.regression import Advance, Fold, How, fit_heads


class LinearFusion(Fusion):
    """A linear head on standardised features, fitted in closed form before what would be the first step.

    ``linear.features``: ``concat`` (all side by side), ``main`` or ``comp`` (one kind alone), ``average`` (the mean of the
    probabilities of one regression for each side). Limits: `concat` with its weights on one side set to 0 is the other
    side alone; `average` of two equal sides is one of them. What a sample lacks has the mean of the training split.
    """

    several: ClassVar[bool] = True
    closed_form: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("linear",)

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.frozen = self.uses
        self.begin_as_regression(num_labels)
        self.average = config.linear.features == "average"
        if self.average:
            widths = {side: self.encoder(side).feature_width for side in self.uses}
            self.head = nn.ModuleDict({side: nn.Linear(width, num_labels) for side, width in widths.items()})
            self.register_buffer("multi_label", torch.tensor(False))

    @classmethod
    def sides(cls, config: RunConfig) -> tuple[str, ...]:
        """The sides in ``linear.features``."""
        asked = config.linear.features
        both = asked in ("concat", "average")
        return tuple(side for side in super().sides(config) if both or is_comp(side) == (asked == "comp"))

    def forward(self, batch: Batch) -> Output:
        """Logits (B, N)."""
        features = [self.feature(side, batch) for side in self.uses]
        if not self.average:
            return Output(self.classify(*features, batch=batch))
        heads, multi = self.head, self.multi_label
        assert isinstance(heads, nn.ModuleDict) and isinstance(multi, Tensor)
        normed = dict(zip(self.uses, self.standardised(*features), strict=True))
        each_BN = [
            apply_exactly(heads[side], self.or_absent(side, feature_BC, batch)) for side, feature_BC in normed.items()
        ]
        return Output(torch.where(multi, mean_of_sigmoids(*each_BN), mean_of_softmaxes(*each_BN)))

    def fit(self, train: Fold, val: Fold, how: How, advance: Advance) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weights of the regression, or of both, and the C of each."""
        if not self.average:
            return super().fit(train, val, how, advance)
        state, chosen = fit_heads({f"head.{side}": (side,) for side in self.uses}, train, val, how, advance)
        return state | {"multi_label": torch.tensor(how.multi_label)}, chosen


def mean_of_softmaxes(*each_BN: Tensor) -> Tensor:
    """Logits whose softmax is the mean of those of all."""
    return torch.stack([one_BN.log_softmax(dim=-1) for one_BN in each_BN]).logsumexp(dim=0)


def mean_of_sigmoids(*each_BN: Tensor) -> Tensor:
    """Logits whose sigmoid is the mean of those of all."""
    yes_BN = torch.stack([F.logsigmoid(one_BN) for one_BN in each_BN]).logsumexp(dim=0)
    return yes_BN - torch.stack([F.logsigmoid(-one_BN) for one_BN in each_BN]).logsumexp(dim=0)
