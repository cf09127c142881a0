"""Losses of classifiers, and class weights.

Shapes: B batch, S samples, N labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def label_loss(logits_BN: Tensor, targets: Tensor, *, multi_label: bool, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy, or binary cross-entropy averaged over labels, of each sample (B,), in float32.

    Args:
        targets: class indices (B,), or zeros and ones (B, N).
        weights: class weights of `balanced_weights`.
    """
    logits_BN = logits_BN.float()
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
