"""The loss and the gradients of one optimizer step on a global batch, on one process of possibly several.

Shapes: L routed layers, K experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.data.base import Batch
from mopefuse.fusion.base import Fusion, Output
from mopefuse.prompts.experts import importance_loss
from mopefuse.tasks.base import Task
from mopefuse.training.losses import side_loss, task_loss


class Backward:
    """Accumulates the gradients of a global batch in the parameters of a model, on every process.

    Args:
        model: on `device`. weights: from `Task.class_weights`.
    """

    def __init__(
        self, model: Fusion, config: RunConfig, device: torch.device, *, task: Task, weights: Tensor | None
    ) -> None:
        self._config, self._device, self._task, self._weights = config, device, task, weights
        self._forward: Any = devices.compile_as_one_graph(model) if config.train.compile else model

    def __call__(self, batch: Batch, batch_size: int, *, has_share: bool) -> Tensor:
        """Add the gradients of this process's share, in `train.accumulate` parts; returns its part of the loss.

        Args:
            batch: this process's share. batch_size: size of the global batch.
            has_share: False if the global batch is smaller than the number of processes and this one has no share of
                it: it then computes a dummy sample with weight zero.
        """
        weight = 1.0 if has_share else 0.0
        count = min(self._config.train.accumulate, max(1, batch_size // distributed.world_size()))
        parts = [batch.part(number, count) for number in range(count)] if count > 1 else [batch]
        global_load_LK = self._global_load(parts, weight) if count > 1 else None
        loss = torch.zeros((), device=self._device)
        for part in parts:
            with devices.autocast(self._config.train.precision, self._device):
                output = self._forward(part)
            task = weight * self._task_loss(output, part) / batch_size
            balance = self._balance_loss(output, weight, global_load_LK)
            (task + balance).backward()
            loss += task.detach() + balance.detach() / (len(parts) * distributed.world_size())
        return loss

    def _task_loss(self, output: Output, part: Batch) -> Tensor:
        """All losses that are sums over samples."""
        loss = task_loss(output, part, self._task, self._weights)
        if output.by_side is not None:
            loss = loss + side_loss(output.by_side, part, self._config.qmf.rank_weight, self._task, self._weights)
        return loss

    @torch.no_grad()
    def _global_load(self, parts: list[Batch], weight: float) -> Tensor | None:
        """Expert weights summed over the global batch, before its parts are computed one by one with gradients."""
        loads = []
        for part in parts if self._config.router.importance_weight else ():
            with devices.autocast(self._config.train.precision, self._device):
                load_LK = self._forward(part).load_LK
            if load_LK is None:
                return None
            loads.append(load_LK)
        return distributed.sum_over_processes(weight * torch.stack(loads).sum(dim=0)) if loads else None

    def _balance_loss(self, output: Output, weight: float, global_load_LK: Tensor | None) -> Tensor:
        """Weighted importance loss of the global batch.

        Args:
            global_load_LK: expert weights of the global batch, where `output` is of one of several parts; the value of the
                loss is then that of the global batch, its gradient that of the part.
        """
        router = self._config.router
        if output.load_LK is None or not router.importance_weight:
            return torch.zeros((), device=self._device)
        load_LK = weight * output.load_LK
        if global_load_LK is None:
            load_LK = distributed.sum_with_gradient(load_LK)
        else:
            load_LK = global_load_LK + load_LK - load_LK.detach()
        return router.importance_weight * importance_loss(load_LK, router.importance_threshold)
