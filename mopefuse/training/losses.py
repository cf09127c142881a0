"""The classification loss, and class weights for imbalanced data.

Shapes: B batch, S samples of the training split, in `side_loss` sides, N labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mopefuse.data.base import Batch
from mopefuse.fusion.base import Output
from mopefuse.fusion.output import SideOutputs
from mopefuse.fusion.qmf import ranking_loss


def classification_loss(output: Output, batch: Batch, *, multi_label: bool, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy, or binary cross-entropy averaged over labels, summed over the batch.

    The logits of the complementary side alone (`Output.alone_BN`), if a method has them, add a loss of the same form.

    Args:
        weights: class weights of `balanced_weights`.
    """
    assert batch.targets is not None
    loss = _loss_B(output.logits_BN.float(), batch.targets, multi_label, weights).sum()
    if output.alone_BN is not None:
        loss = loss + _loss_B(output.alone_BN.float(), batch.targets, multi_label, weights).sum()
    return loss


def side_loss(
    sides: SideOutputs, batch: Batch, rank_weight: float, *, multi_label: bool, weights: Tensor | None = None
) -> Tensor:
    """The classification loss of each side that samples have, and the weighted ranking loss; summed over the batch.

    Args:
        rank_weight: of `mopefuse.fusion.qmf.ranking_loss`. weights: class weights of `balanced_weights`.
    """
    targets = batch.targets
    assert targets is not None
    each_B = [_loss_B(logits_BN.float(), targets, multi_label, weights) for logits_BN in sides.logits_BSN.unbind(dim=1)]
    loss_BS = torch.stack(each_B, dim=1)
    ranks = ranking_loss(sides.confidence_BS, loss_BS.detach(), sides.present_BS)
    return (loss_BS * sides.present_BS).sum() + rank_weight * ranks


def _loss_B(logits_BN: Tensor, targets: Tensor, multi_label: bool, weights: Tensor | None) -> Tensor:
    if multi_label:
        loss_BN = F.binary_cross_entropy_with_logits(logits_BN, targets, reduction="none")
        if weights is not None:
            loss_BN = loss_BN * torch.where(targets > 0, weights[0], weights[1])
        return loss_BN.mean(dim=-1)
    return F.cross_entropy(logits_BN, targets, weight=weights, reduction="none")


def balanced_weights(counts_N: Tensor, samples: int, *, multi_label: bool) -> Tensor:
    """Weights that give every class the same total weight, 1 on average over samples (scikit-learn's "balanced").

    Args:
        counts_N: number of samples with each label. samples: S.

    Returns:
        (N,): S / (number of classes * samples of the class). For multi-label data (2, N), for the positives and the negatives
        of each label: S / (2 * their number). 1 if there are no samples.
    """
    counts_N = counts_N.float()
    if multi_label:
        counts_2N = torch.stack([counts_N, samples - counts_N])
        return torch.where(counts_2N > 0, samples / (2 * counts_2N.clamp(min=1)), 1.0)
    present = int((counts_N > 0).sum())
    return torch.where(counts_N > 0, samples / (present * counts_N.clamp(min=1)), 1.0)
