"""QMF: late fusion in which each side's prediction is weighted by its confidence, sample by sample.

Zhang et al., Provable Dynamic Fusion for Low-Quality Multimodal Data, https://arxiv.org/abs/2306.02050. The energy score is
that of Liu et al., https://arxiv.org/abs/2010.03759; for several labels a row, that of Wang et al.,
https://arxiv.org/abs/2109.14162. The ranking loss is that of Moon et al., https://arxiv.org/abs/2007.01458.

Shapes: B batch, S sides, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core.precision import apply_without_autocast
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.fusion.base import Fusion, Output
from mopefuse.fusion.output import SideOutputs

_LEAST = 0.01  # minimum energy, so that the only side present always has a positive weight


class QMF(Fusion):
    """Sums the logits of one head per side, weighted by the confidence of that head in the sample.

    Heads take standardised features of frozen encoders. A side's confidence is the energy score of its logits (their
    log-sum-exp, or for several labels a row the sum of log(1 + exp)), above 0, times ``qmf.scale``. The loss is the sum of
    the losses of the fused logits and of each side's own, plus a ranking loss: of two samples, a side should be more
    confident about the one that it predicts better, by a margin equal to the difference of its losses on the two.

    As in the paper: the fused logits, their weights, and the three losses; no gradients pass through the weights. Unlike the
    paper: encoders are frozen; a side's loss in the current step, as 1 - exp(-loss), replaces the average over all epochs so
    far, which would be a state outside of the model; samples are paired within a batch, or the part of it that one process
    computes at once. A side that a sample lacks has weight 0, and either side may be missing, even without ``--either``, since
    each head is trained to predict by itself. Limits: a sample that has one side only is classified as that side's head does;
    with equal confidences it is the sum of the sides' logits.
    """

    supports_multiple_comps: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("qmf",)
    parts: ClassVar[dict[str, str]] = {r"^head_": "head", **Fusion.parts}

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.frozen = self.uses
        self.standardise_features()
        for side in self.uses:
            width = self.encoder(side).feature_width
            self.add_module(f"head_{side}", self.make_head(width, num_labels, config.qmf.dropout))

    @property
    def heads(self) -> dict[str, tuple[str, ...]]:
        """A head for each side."""
        return {f"head_{side}": (side,) for side in self.uses}

    @property
    def droppable_sides(self) -> tuple[str, ...]:
        """Every side, if encoders read several modalities."""
        return self.uses if len({self.encoder(side).modality for side in self.uses}) > 1 else ()

    @property
    def optional_sides(self) -> tuple[str, ...]:
        """The same, as each head is trained by itself."""
        return self.droppable_sides

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N), and those of each side."""
        features = self.standardise(*(self.pooled_feature(side, batch) for side in self.uses))
        heads = (getattr(self, name) for name in self.heads)
        each_BN = [apply_without_autocast(head, one_BC) for head, one_BC in zip(heads, features, strict=True)]
        logits_BSN = torch.stack(each_BN, dim=1)
        present_BS = torch.ones_like(logits_BSN[..., 0], dtype=torch.bool)
        for number, side in enumerate(self.uses):
            if side in batch.missing:
                present_BS[:, number] = ~batch.missing[side]
        confidence_BS = self.config.qmf.scale * energy(logits_BSN, several=self.task.uses_thresholds)
        weights_BS = (confidence_BS * present_BS).detach()
        fused_BN = (weights_BS[..., None] * logits_BSN).sum(dim=1)
        return Output(fused_BN, by_side=SideOutputs(logits_BSN, confidence_BS, present_BS))


def energy(logits_BSN: Tensor, *, several: bool) -> Tensor:
    """The energy score of logits (B, S), above 0: larger for an input that resembles the training data.

    Args:
        several: whether a sample may have several labels.
    """
    score_BS = F.softplus(logits_BSN).sum(dim=-1) if several else logits_BSN.logsumexp(dim=-1)
    return score_BS.clamp(min=_LEAST)


def ranking_loss(confidence_BS: Tensor, loss_BS: Tensor, present_BS: Tensor) -> Tensor:
    """Penalty for confidences that are not ordered as the losses are, with a margin; summed over samples and sides.

    Each sample is paired with the next one in the batch, the last with the first; pairs in which one lacks the side do not
    count.

    Args:
        loss_BS: the classification loss of each side, without gradients.
    """
    badness_BS = 1 - torch.exp(-loss_BS)
    worse_BS = badness_BS - badness_BS.roll(-1, dims=0)
    surer_BS = confidence_BS - confidence_BS.roll(-1, dims=0)
    penalty_BS = F.relu(worse_BS.sign() * surer_BS + worse_BS.abs())
    return (penalty_BS * (present_BS & present_BS.roll(-1, dims=0))).sum()
