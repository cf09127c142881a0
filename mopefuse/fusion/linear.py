"""Logistic or ridge regression on frozen features: the first baseline to try, and the one that a fusion method must beat.

The objective is scikit-learn's. Features of the frozen encoders are standardised with statistics of the training split, and
C is chosen on validation. There are no training steps.

Shapes: B batch, C width of one side's feature, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from mopefuse.config.encoder_sides import is_comp
from mopefuse.config.schema import RunConfig
from mopefuse.core.precision import apply_without_autocast
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.fusion.base import Fusion, Output
from mopefuse.fusion.regression import Advance, FitSettings, Fitted, Fold, fit_heads


class LinearFusion(Fusion):
    """A linear head on standardised features, fitted without training steps.

    ``linear.features`` selects ``concat`` (all features concatenated), ``main`` or ``comp`` (those of one kind), or
    ``average`` (the mean of the probabilities of one regression per side). Limits: `concat` with zero weights for one side
    is a regression on the other; `average` of two equal sides equals either. A side that a sample lacks is replaced by its
    mean over the training split.
    """

    supports_multiple_comps: ClassVar[bool] = True
    closed_form: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("linear",)

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.frozen = self.uses
        self.head: nn.Module = nn.Linear(self.standardise_features(), num_labels)
        self.starts_fitted = True
        self.average = config.linear.features == "average"
        if self.average:
            widths = {side: self.encoder(side).feature_width for side in self.uses}
            self.head = nn.ModuleDict({side: nn.Linear(width, num_labels) for side, width in widths.items()})

    @classmethod
    def sides(cls, config: RunConfig) -> tuple[str, ...]:
        """The sides that ``linear.features`` selects."""
        features = config.linear.features
        both = features in ("concat", "average")
        return tuple(side for side in super().sides(config) if both or is_comp(side) == (features == "comp"))

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N)."""
        features = [self.pooled_feature(side, batch) for side in self.uses]
        if not self.average:
            return Output(self.classify(*features, batch=batch))
        heads = self.head
        assert isinstance(heads, nn.ModuleDict)
        normed = dict(zip(self.uses, self.standardise(*features), strict=True))
        each_BN = [
            apply_without_autocast(heads[side], self.replace_missing(side, feature_BC, batch))
            for side, feature_BC in normed.items()
        ]
        return Output(self.task.average(each_BN))

    def load_trainable_state_dict(self, state: Mapping[str, Tensor], *, where: str = "load_trainable_state_dict") -> None:
        """See `Fusion.load_trainable_state_dict`; the average of earlier versions had a flag that the task now replaces."""
        own = {name: tensor for name, tensor in state.items() if name != "multi_label"}
        super().load_trainable_state_dict(own, where=where)

    def fit(self, train: Fold, val: Fold, how: FitSettings, advance: Advance) -> Fitted:
        """Fit the regression, or one for each side with `average`; see `Fusion.fit`."""
        heads = {f"head.{side}": (side,) for side in self.uses} if self.average else {"head": self.uses}
        return Fitted.of_regressions(fit_heads(heads, train, val, how, advance), how.task)
