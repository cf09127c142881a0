"""The classification loss of a batch."""

from __future__ import annotations

from torch import Tensor

from mopefuse.data.base import Batch
from mopefuse.fusion.base import Output
from mopefuse.metrics.losses import label_loss


def classification_loss(output: Output, batch: Batch, *, multi_label: bool, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy, or binary cross-entropy averaged over labels, summed over the batch.

    The logits of the complementary side alone (`Output.alone_BN`), if a method has them, add a loss of the same form.

    Args:
        weights: class weights of `mopefuse.metrics.losses.balanced_weights`.
    """
    assert batch.targets is not None
    loss = label_loss(output.logits_BN.float(), batch.targets, multi_label=multi_label, weights=weights)
    if output.alone_BN is not None:
        loss = loss + label_loss(output.alone_BN.float(), batch.targets, multi_label=multi_label, weights=weights)
    return loss
