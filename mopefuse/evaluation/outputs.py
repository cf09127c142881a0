"""The outputs of a model on a split, batch by batch, so that the logits of a large split are never in memory at once.

Each process computes the outputs of its own share of the samples. All processes yield the same number of batches, so that
the main process can collect the others' results after every batch. Processes exchange numbers as tensors.

Shapes: S samples of the split, B samples of a batch, R samples of one process, N labels, L routed layers, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.core.error_codes import NumericCode
from mopefuse.data.base import Batch, DataSet
from mopefuse.data.collate import Samples, plain_batches
from mopefuse.encoders.sharding import is_sharded
from mopefuse.errors import NumericError
from mopefuse.fusion.base import Fusion, Output

Advance = Callable[[int, int], None]  # (samples done, samples in all)


class BatchOutput(NamedTuple):
    """A model's output for a batch, on the CPU.

    Args:
        index_B: positions of the samples in the split.
        routing_BLK: expert weights of each sample, of a model that routes.
    """

    index_B: Tensor
    logits_BN: Tensor
    routing_BLK: Tensor | None = None


class ModelOutputs:
    """Iterates once over the outputs of a model for this process's samples, and computes them on the way.

    Args:
        model: on `device`. samples: prepared for the model. labels: N.
        advance: progress over the samples of all processes.
    """

    def __init__(
        self,
        model: Fusion,
        samples: Samples,
        config: RunConfig,
        device: torch.device,
        *,
        labels: int,
        advance: Advance = lambda done, total: None,
    ) -> None:
        self._model, self._samples, self._config, self._device = model, samples, config, device
        self._labels, self._advance = labels, advance
        self._load_LK: Tensor | None = None

    def __iter__(self) -> Iterator[BatchOutput]:
        rank, world, count = distributed.rank(), distributed.world_size(), len(self._samples)
        size = self._config.train.batch_size
        was_training = self._model.training
        self._model.eval()
        rounds, own = -(-count // (size * world)), -(-len(range(rank, count, world)) // size)
        done, blank = 0, self._blank_batch() if own < rounds else None
        batches = self._samples.batches(plain_batches(count, size, rank, world), pin=self._device.type == "cuda")
        try:
            for _ in range(rounds):
                batch = next(batches, None)
                if batch is None:
                    if blank is not None:
                        self._run(blank)
                    yield BatchOutput(torch.zeros(0, dtype=torch.long), torch.zeros(0, self._labels))
                    continue
                yield self._output(batch)
                done += len(batch.index)
                self._advance(min(done * world, count), count)
        finally:
            self._model.train(was_training)
        distributed.barrier()

    def _blank_batch(self) -> Batch | None:
        """What this process runs while only others have samples left; None if it need not run anything.

        All processes have to run sharded encoders equally often.
        """
        if not any(is_sharded(encoder) for encoder in self._model.encoders.values()):
            return None
        return next(self._samples.batches([[(0, 0)]]))

    def _run(self, batch: Batch) -> Output:
        with torch.no_grad(), devices.autocast(self._config.train.precision, self._device):
            output: Output = self._model(batch.to(self._device))
        return output

    def _output(self, batch: Batch) -> BatchOutput:
        output = self._run(batch)
        if output.load_LK is not None:
            self._load_LK = output.load_LK.float().cpu() + (0 if self._load_LK is None else self._load_LK)
        routing_BLK = None if output.routing_BLK is None else output.routing_BLK.float().cpu()
        return BatchOutput(batch.index, output.logits.float().cpu(), routing_BLK)

    def load(self) -> Tensor | None:
        """Expert weights (L, K) summed over all outputs so far in all processes; None for a model that does not route."""
        loads = [load_LK for load_LK in distributed.gather(self._load_LK) if load_LK is not None]
        return torch.stack(loads).sum(dim=0) if loads else None


@dataclass(frozen=True)
class SplitOutput:
    """A model's output for all samples of a split, in the order of the split and on the CPU.

    Args:
        load_LK: expert weights summed over the split, of a model that routes.
        routing_SLK: expert weights of each sample, where they were requested.
    """

    logits_SN: Tensor
    load_LK: Tensor | None = None
    routing_SLK: Tensor | None = None


def collect(outputs: ModelOutputs, data: DataSet, split: str, *, with_routing: bool = False) -> SplitOutput:
    """All outputs for a split at once, the same in every process; only for splits that are known to be small.

    Args:
        with_routing: also return the expert weights of each sample.

    Raises:
        NumericError: a logit is not finite.
    """
    count = len(data.splits[split].rows)
    own: list[Tensor] = []
    routing = []
    for output in outputs:
        own.append(output.logits_BN)
        if with_routing and output.routing_BLK is not None:
            routing.append(output.routing_BLK)
    load_LK = outputs.load()
    logits_SN = distributed.gather_rows(torch.cat([one for one in own if len(one)] or own), count)
    require_finite(is_nonfinite(logits_SN), data, split)
    if not with_routing or load_LK is None:
        return SplitOutput(logits_SN, load_LK)
    routing_RLK = torch.cat(routing) if routing else torch.zeros(0, *load_LK.shape)
    return SplitOutput(logits_SN, load_LK, distributed.gather_rows(routing_RLK, count))


def is_nonfinite(logits_SN: Tensor) -> Tensor:
    """(S,) uint8: 1 for samples with a logit that is NaN or infinite."""
    return (~logits_SN.flatten(1).isfinite().all(dim=-1)).byte()


def require_finite(nonfinite_S: Tensor, data: DataSet, split: str) -> None:
    """Refuse logits that are not finite, as they are after training diverged.

    Args:
        nonfinite_S: from `is_nonfinite`, for all samples of the split.

    Raises:
        NumericError: some are not finite; it names the first sample.
    """
    if not nonfinite_S.any():
        return
    first = data.splits[split].rows[int(nonfinite_S.nonzero()[0])].id
    raise NumericError(
        NumericCode.EVALUATION_NOT_FINITE,
        f"the model's output is not finite on {int(nonfinite_S.sum())} of {len(nonfinite_S)} samples",
        where=f"{split}, first id {first}",
        fix="train again with a lower --lr",
    )
