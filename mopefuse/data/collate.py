"""From rows to batches. Order and augmentation are pure functions of (seed, epoch, index): a resumed run, another
number of workers and another number of processes see the same samples in the same form.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mopefuse.config import Data as DataConfig
from mopefuse.data._base import Batch, DataSet, Row
from mopefuse.data.images import open_image
from mopefuse.encoders._base import Preprocess
from mopefuse.errors import MopefuseError, ResourceError

Key = tuple[int, int]  # (epoch, index)
Readers = Mapping[str, tuple[str, Preprocess]]  # side -> (modality, preprocess)


class Samples(Dataset[dict[str, Any]]):
    """Prepared samples of one split, by (epoch, index).

    Args:
        readers: the sides to prepare; a side whose features are known already is left out.
        features: side to features (rows of the split, C) known already.
        seed: of the augmentation.
        training: whether images are augmented.
    """

    def __init__(
        self,
        data: DataSet,
        split: str,
        readers: Readers,
        config: DataConfig,
        *,
        features: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        training: bool = False,
    ) -> None:
        self.data, self.split, self.config, self.seed = data, data.splits[split], config, seed
        self.features = dict(features or {})
        self.readers = {side: reader for side, reader in readers.items() if side not in self.features}
        self.targets = torch.stack([data.target(row) for row in self.split.rows])
        self._augment = augmentation(config) if training else None
        self._memory: dict[tuple[str, int], Any] = {}

    def __len__(self) -> int:
        return len(self.split.rows)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        try:
            return {"index": index} | {side: self._prepared(side, epoch, index) for side in self.readers}
        except MopefuseError as error:  # a worker would turn it into text; as a value it arrives whole
            return {"error": error}

    def _prepared(self, side: str, epoch: int, index: int) -> Any:
        if (side, index) in self._memory:
            return self._memory[side, index]
        modality, preprocess = self.readers[side]
        item = preprocess.item(self._value(modality, epoch, index))
        if modality == "text" or self.config.cache_images:
            self._memory[side, index] = item
        return item

    def _value(self, modality: str, epoch: int, index: int) -> Any:
        row = self.split.rows[index]
        if modality == "text":
            return row.text
        image = read_image(self.data, self.split.file, row, self.config)
        if self._augment is None:
            return image
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            return self._augment(image)

    def batch(self, items: Sequence[dict[str, Any]]) -> Batch | MopefuseError:
        """Prepared samples as one batch, or the error of one of them."""
        for item in items:
            if "error" in item:
                return cast(MopefuseError, item["error"])
        index = torch.tensor([item["index"] for item in items], dtype=torch.long)
        inputs = {
            side: preprocess.batch([item[side] for item in items]) for side, (_, preprocess) in self.readers.items()
        }
        features = {side: table[index] for side, table in self.features.items()}
        return Batch(inputs, features, self.targets[index], index)

    def batches(self, keys: Iterable[Sequence[Key]], *, pin: bool = False) -> Iterator[Batch]:
        """Batches for `keys`, in that order; read in the main process or in `data.workers` others.

        Raises:
            DataError: a sample that cannot be read. ResourceError: a worker was killed.
        """
        loader = DataLoader(
            self,
            batch_sampler=keys,  # type: ignore[arg-type]
            collate_fn=self.batch,
            num_workers=self.config.workers,
            pin_memory=pin,
            generator=torch.Generator().manual_seed(0),  # keeps torch's global stream untouched
            worker_init_fn=_leave_signals_to_the_main_process,
        )
        iterator = iter(loader)
        while True:
            try:
                batch = next(iterator, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ResourceError(
                    7, "a data worker was killed; usually host memory", where="data.workers", fix="lower data.workers"
                ) from error
            if batch is None:
                return
            if isinstance(batch, MopefuseError):
                raise batch
            yield batch


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the main process ends its workers when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def read_image(data: DataSet, file: str, row: Row, config: DataConfig) -> Image.Image:
    """The image of a row; a DataError names file, line and id."""
    return open_image(data.root, row.img, where=f"{file}:{row.line}, id {row.id}", max_pixels=config.max_pixels)


def augmentation(config: DataConfig) -> Callable[[Image.Image], Image.Image] | None:
    """What `data.augment` does to a training image; it draws from torch's global generator."""
    if config.augment == "none":
        return None
    change: Callable[[Image.Image], Image.Image] = (
        v2.RandomHorizontalFlip()
        if config.augment == "flip"
        else v2.RandAugment(config.randaugment_ops, config.randaugment_magnitude)
    )
    return change


def seed_of(*numbers: int) -> int:
    """A seed of 64 bits that is a function of `numbers` and of nothing else."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The permutation of `count` samples in which an epoch sees them."""
    order: list[int] = np.random.Generator(np.random.PCG64(seed_of(seed, epoch))).permutation(count).tolist()
    return order


def epoch_batches(seed: int, epoch: int, count: int, batch_size: int) -> list[list[int]]:
    """The global batches of an epoch, the last one smaller if it must be; the same for any number of processes."""
    order = epoch_order(seed, epoch, count)
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def share(batch: Sequence[int], rank: int, world: int) -> list[int]:
    """What process `rank` of `world` computes of a global batch: every sample is in exactly one share."""
    return list(batch[rank::world])


def plain_batches(count: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[list[Key]]:
    """Samples in order, each in exactly one process's batches."""
    mine = range(rank, count, world)
    for start in range(0, len(mine), batch_size):
        yield [(0, index) for index in mine[start : start + batch_size]]
