"""The loss of a batch.

Shapes: B batch, S sides, N labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopefuse.data.base import Batch
from mopefuse.fusion.output import Output, SideOutputs
from mopefuse.fusion.qmf import ranking_loss
from mopefuse.tasks.base import Task


def task_loss(output: Output, batch: Batch, task: Task, weights: Tensor | None = None) -> Tensor:
    """The loss of the task, summed over the batch.

    The logits of the complementary side alone (`Output.alone_BN`), if a method has them, add a loss of the same form.

    Args:
        weights: from `Task.class_weights`.
    """
    assert batch.targets is not None
    loss = task.loss(output.logits_BN, batch.targets, weights).sum()
    if output.alone_BN is not None:
        loss = loss + task.loss(output.alone_BN, batch.targets, weights).sum()
    return loss


def side_loss(
    sides: SideOutputs, batch: Batch, rank_weight: float, task: Task, weights: Tensor | None = None
) -> Tensor:
    """The loss of each side that samples have, and the weighted ranking loss; summed over the batch.

    Args:
        rank_weight: weight of `mopefuse.fusion.qmf.ranking_loss`.
        weights: from `Task.class_weights`.
    """
    targets = batch.targets
    assert targets is not None
    each_B = [task.loss(one, targets, weights) for one in sides.logits_BSN.unbind(1)]
    loss_BS = torch.stack(each_B, dim=1)
    ranks = ranking_loss(sides.confidence_BS, loss_BS.detach(), sides.present_BS)
    return (loss_BS * sides.present_BS).sum() + rank_weight * ranks
