"""A model's answers to a split, batch by batch, and what is made of them while they pass: nothing holds all logits at once.

Every process answers its own share of the samples, and all make the same number of rounds, so that in each round the main
process can take what the others have for it. Numbers travel as tensors.

Shapes: S samples of the split, B of them in a batch, R those of one process, N labels, n some of them, L routed layers,
K experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.core.artifact import write_lines
from mopefuse.data.base import Batch, DataSet
from mopefuse.data.collate import Samples, plain_batches
from mopefuse.errors import NumericError
from mopefuse.evaluation.predictions import Predicted, lines, predicted
from mopefuse.evaluation.spool import Spool
from mopefuse.fusion.base import Fusion
from mopefuse.metrics import classification as metrics

Advance = Callable[[int, int], None]  # (samples done, samples in all)


@dataclass(frozen=True)
class Evaluation:
    """How right a model is on a split.

    Args:
        load_LK: routing summed over the split, where the model routes.
    """

    split: str
    metrics: dict[str, float]
    per_label: list[dict[str, Any]]
    load_LK: Tensor | None = None


class Answer(NamedTuple):
    """A model's answer to a batch, on the CPU: places of the samples (B,), logits (B, N), routing of each sample if any."""

    index_B: Tensor
    logits_BN: Tensor
    routing_BLK: Tensor | None = None


class Answers:
    """The answers of a model to this process's samples, computed while they are iterated over, once.

    Args:
        model: on `device`. samples: prepared for it. labels: N.
        advance: called with (samples done by all processes, samples in all).
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

    def __iter__(self) -> Iterator[Answer]:
        rank, world, count = distributed.rank(), distributed.world_size(), len(self._samples)
        size = self._config.train.batch_size
        was_training = self._model.training
        self._model.eval()
        done = 0
        batches = self._samples.batches(plain_batches(count, size, rank, world), pin=self._device.type == "cuda")
        try:
            for _ in range(-(-count // (size * world))):
                batch = next(batches, None)
                if batch is None:
                    yield Answer(torch.zeros(0, dtype=torch.long), torch.zeros(0, self._labels))
                    continue
                yield self._answer(batch)
                done += len(batch.index)
                self._advance(min(done * world, count), count)
        finally:
            self._model.train(was_training)
        distributed.barrier()

    def _answer(self, batch: Batch) -> Answer:
        with torch.no_grad(), devices.autocast(self._config.train.precision, self._device):
            output = self._model(batch.to(self._device))
        if output.load_LK is not None:
            self._load_LK = output.load_LK.float().cpu() + (0 if self._load_LK is None else self._load_LK)
        routing_BLK = None if output.routing_BLK is None else output.routing_BLK.float().cpu()
        return Answer(batch.index, output.logits.float().cpu(), routing_BLK)

    def load(self) -> Tensor | None:
        """The routing (L, K) summed over all answers that were given in all processes; None of a model that does not route."""
        loads = [load_LK for load_LK in distributed.gather(self._load_LK) if load_LK is not None]
        return torch.stack(loads).sum(dim=0) if loads else None


def judge(
    answers: Iterable[Answer],
    data: DataSet,
    split: str,
    thresholds: metrics.Thresholds = metrics.THRESHOLD,
    *,
    predictions: Path | None = None,
    together: bool = True,
) -> Evaluation:
    """Metrics from the answers to a split; predictions are written as they come, by the main process.

    Args:
        predictions: a file for them, see `mopefuse.evaluation.predictions`.
        together: whether each process has answers to its own samples only; else each has all.

    Raises:
        NumericError: a logit is not finite, as after a step that made the model diverge; nothing is written then.
        ResourceError: the disk is full or cannot be written.
    """
    multi, targets, rows = data.multi_label, data.sparse_targets(split), data.splits[split].rows
    tally = metrics.Tally(len(targets), len(data.labels), multi_label=multi)
    bad_S = torch.zeros(len(targets), dtype=torch.uint8)

    def written() -> Iterator[str]:
        for index_B, logits_BN, _ in answers:
            targets_of_batch = targets[index_B]
            bad_S[index_B] = (~logits_BN.isfinite().all(dim=-1)).byte()
            tally.add(index_B, logits_BN, targets_of_batch, thresholds)
            if predictions is not None:
                own = predicted(index_B, logits_BN, targets_of_batch, multi_label=multi, thresholds=thresholds)
                parts = [Predicted(*part) for part in distributed.to_main(own)] if together else [own]
                yield from lines(parts, rows, data.labels, multi_label=multi)
        if together:
            distributed.summed(bad_S)
        _refuse_infinite(bad_S, data, split)

    if predictions is not None and distributed.is_main():
        write_lines(predictions, written())
    else:
        deque(written(), maxlen=0)
    for sums in tally.sums() if together else ():
        distributed.summed(sums)
    load_LK = answers.load() if isinstance(answers, Answers) else None
    return Evaluation(split, tally.metrics(), tally.per_label(data.labels), load_LK)


def judge_tuned(answers: Answers, data: DataSet, split: str, folder: Path) -> tuple[Evaluation, list[float]]:
    """Metrics of a multi-label split with the threshold of each label that has the best F1 on it, and these thresholds.

    They are exact whatever the size: logits that are too many for memory wait in a temporary file.

    Args:
        folder: where that file may be.

    Raises:
        NumericError: a logit is not finite. ResourceError: the disk is full or cannot be written.
    """
    targets = data.sparse_targets(split)
    count, labels = len(targets), len(data.labels)
    bad_S = torch.zeros(count, dtype=torch.uint8)
    with Spool(count, labels, folder) as spool:
        for answer in answers:
            bad_S[answer.index_B] = (~answer.logits_BN.isfinite().all(dim=-1)).byte()
            parts = distributed.to_main((answer.index_B, answer.logits_BN.flatten()))
            if parts:
                order = torch.cat([index_B for index_B, _ in parts]).argsort()
                spool.add(torch.cat([logits.reshape(-1, labels) for _, logits in parts])[order])
        _refuse_infinite(distributed.summed(bad_S), data, split)
        load_LK = answers.load()

        def tune() -> tuple[Evaluation, list[float]]:
            tally, thresholds = metrics.Tally(count, labels, multi_label=True), []
            for first, logits_Sn in spool.blocks():
                targets_Sn = targets.columns(first, first + logits_Sn.shape[1])
                thresholds += (best := metrics.tuned_thresholds(logits_Sn, targets_Sn))
                tally.add(torch.arange(count), logits_Sn, targets_Sn, best, first=first)
            return Evaluation(split, tally.metrics(), tally.per_label(data.labels), load_LK), thresholds

        found: tuple[Evaluation, list[float]] = distributed.on_main(tune)
    return found


def _refuse_infinite(bad_S: Tensor, data: DataSet, split: str) -> None:
    if not bad_S.any():
        return
    first = data.splits[split].rows[int(bad_S.nonzero()[0])].id
    raise NumericError(
        2,
        f"the model's answer is not finite on {int(bad_S.sum())} of {len(bad_S)} samples",
        where=f"{split}, first id {first}",
        fix="lower train.lr and --resume from an earlier checkpoint, or begin anew",
    )


class Said(NamedTuple):
    """What a model says of a split: logits (S, N), the routing (L, K) summed over it, and if asked for that of each sample;
    all on the CPU."""

    logits_SN: Tensor
    load_LK: Tensor | None
    routing_SLK: Tensor | None = None


def collect(answers: Answers, data: DataSet, split: str, *, each: bool = False) -> Said:
    """All answers to a split at once, in its order, in every process; for splits that are known to be small.

    Args:
        each: keep the routing of each sample, too.

    Raises:
        NumericError: a logit is not finite.
    """
    count = len(data.splits[split].rows)
    own_RN = torch.empty(len(range(distributed.rank(), count, distributed.world_size())), len(data.labels))
    routing, done = [], 0
    for answer in answers:
        own_RN[done : done + len(answer.index_B)] = answer.logits_BN
        done += len(answer.index_B)
        if each and answer.routing_BLK is not None:
            routing.append(answer.routing_BLK)
    load_LK = answers.load()
    logits_SN = distributed.whole(own_RN, count)
    _refuse_infinite((~logits_SN.isfinite().all(dim=-1)).byte(), data, split)
    if not each or load_LK is None:
        return Said(logits_SN, load_LK)
    routing_RLK = torch.cat(routing) if routing else torch.zeros(0, *load_LK.shape)
    return Said(logits_SN, load_LK, distributed.whole(routing_RLK, count))
