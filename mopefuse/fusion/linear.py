"""Logistic regression on frozen features: what a practitioner tries first, and what a fusion has to beat.

Multinomial logistic regression (Cox, J. R. Stat. Soc. B 20, 1958), as scikit-learn fits it, on features of both frozen
encoders that are standardised by the training split; C is chosen on validation. It takes no training step.

Shapes: B batch, C width of one side's feature, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config import RunConfig
from mopefuse.data._base import Batch
from mopefuse.encoders._base import Encoder
from mopefuse.fusion._base import SIDES, Fusion, Output
from mopefuse.fusion._regression import Fold, How, fit_heads


class LinearFusion(Fusion):
    """A linear head on standardised features, fitted in closed form before what would be the first step.

    ``linear.features``: ``concat`` (both side by side), ``main`` or ``comp`` (one alone), ``average`` (the mean of the
    probabilities of one regression for each side). Limits: `concat` with its weights on one side set to 0 is the other
    side alone; `average` of two equal sides is one of them.
    """

    closed_form: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("linear",)

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.frozen = self.uses
        self.begin_as_regression(num_labels, self.uses)
        self.average = config.linear.features == "average"
        if self.average:
            widths = {side: self.encoder(side).feature_width for side in self.uses}
            self.head = nn.ModuleDict({side: nn.Linear(width, num_labels) for side, width in widths.items()})
            self.register_buffer("multi_label", torch.tensor(False))

    @classmethod
    def sides(cls, config: RunConfig) -> tuple[str, ...]:
        """The sides in ``linear.features``."""
        features = config.linear.features
        return (features,) if features in SIDES else SIDES

    def forward(self, batch: Batch) -> Output:
        """Logits (B, N)."""
        features = [self.feature(side, batch) for side in self.uses]
        if not self.average:
            return Output(self.classify(*features))
        assert isinstance(self.head, nn.ModuleDict)
        one_BN, other_BN = (
            head(feature_BC) for head, feature_BC in zip(self.head.values(), self.standardised(*features), strict=True)
        )
        multi = self.multi_label
        assert isinstance(multi, Tensor)
        return Output(torch.where(multi, mean_of_sigmoids(one_BN, other_BN), mean_of_softmaxes(one_BN, other_BN)))

    def fit(self, train: Fold, val: Fold, how: How) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weights of the regression, or of both, and the C of each."""
        if not self.average:
            return super().fit(train, val, how)
        state, chosen = fit_heads({f"head.{side}": (side,) for side in self.uses}, train, val, how)
        return state | {"multi_label": torch.tensor(how.multi_label)}, chosen


def mean_of_softmaxes(one_BN: Tensor, other_BN: Tensor) -> Tensor:
    """Logits whose softmax is the mean of two softmaxes."""
    return torch.logaddexp(one_BN.log_softmax(dim=-1), other_BN.log_softmax(dim=-1))


def mean_of_sigmoids(one_BN: Tensor, other_BN: Tensor) -> Tensor:
    """Logits whose sigmoid is the mean of two sigmoids."""
    yes_BN = torch.logaddexp(F.logsigmoid(one_BN), F.logsigmoid(other_BN))
    return yes_BN - torch.logaddexp(F.logsigmoid(-one_BN), F.logsigmoid(-other_BN))
