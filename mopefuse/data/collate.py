"""Turn rows into batches. Order and augmentation are pure functions of (seed, epoch, index), so that a resumed run, or one with
another number of workers or processes, sees the same samples in the same form.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import ConfigCode, ResourceCode
from mopefuse.data.base import Batch, DataSet, Row
from mopefuse.data.image_cache import Pictures, pictures
from mopefuse.data.mask_targets import MaskTargets
from mopefuse.encoders.base import Preprocess
from mopefuse.errors import ConfigError, MopefuseError, ResourceError
from mopefuse.modalities.base import get_modality
from mopefuse.modalities.masks import resized

Key = tuple[int, int]  # (epoch, index)
Readers = Mapping[str, tuple[str, Preprocess]]  # side -> (modality, preprocess)


class FeatureTable(Protocol):
    """Features by row: a tensor (S, C), or something that can be indexed like one."""

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """The features (B, C) of some rows."""


class TokenSource(Protocol):
    """Tokens by row, padded to the longest."""

    def __getitem__(self, index_B: Tensor) -> dict[str, Tensor]:
        """``values_BLC`` and ``mask_BL`` of some rows."""


class Samples(Dataset[dict[str, Any]]):
    """Preprocessed samples of one split, by (epoch, index).

    Args:
        readers: modality and preprocessing of each side; sides with precomputed features are skipped.
        features: by side, precomputed features.
        tokens: by side, precomputed output tokens, for some of the sides in `features`.
        prefixes: by side, the tokens (B, L, D) that enter a layer of its encoder, precomputed. For such a side, inputs
            are read only if they have a mask (texts); otherwise they are blank.
        seed: seed of the augmentation.
        training: whether images are augmented.

    Where a row lacks a modality, its encoder gets a blank input that is never augmented, and `Batch.missing` marks it.
    """

    def __init__(
        self,
        data: DataSet,
        split: str,
        readers: Readers,
        config: DataConfig,
        *,
        features: Mapping[str, FeatureTable] | None = None,
        tokens: Mapping[str, TokenSource] | None = None,
        prefixes: Mapping[str, FeatureTable] | None = None,
        seed: int = 0,
        training: bool = False,
    ) -> None:
        self.data, self.split, self.config, self.seed = data, data.splits[split], config, seed
        self.features, self.tokens, self.prefixes = dict(features or {}), dict(tokens or {}), dict(prefixes or {})
        blank = {side: readers[side][1].batch([blank_input(*readers[side])]) for side in self.prefixes}
        self.blank = {side: inputs for side, inputs in blank.items() if "mask" not in inputs}
        self.readers = {side: reader for side, reader in readers.items() if side not in {*self.features, *self.blank}}
        self.targets = data.sparse_targets(split)
        self.modality_of = {side: modality for side, (modality, _) in readers.items()}
        lacks = {side: self.split.is_missing(modality) for side, (modality, _) in readers.items()}
        self.lacking: dict[str, NDArray[np.bool_]] = {side: lacks_S for side, lacks_S in lacks.items() if lacks_S.any()}
        self.pictures: dict[str, Pictures] = {}
        self.changes = {
            side: augmentation(config, preprocess.describe()["size"])
            for side, (modality, preprocess) in self.readers.items()
            if training and config.augment != "none" and get_modality(modality).is_picture
        }
        self.augmented_masks = self.targets if isinstance(self.targets, MaskTargets) and "main" in self.changes else None
        if self.augmented_masks is not None and config.augment == "randaugment":
            what = "masks cannot follow all changes that randaugment makes to an image"
            raise ConfigError(ConfigCode.SETTING_OF_OTHER_TASK, what, where="data.augment", fix="use data.augment=crop or flip")

    def cache_images(self, advance: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read decoded and resized images from the cache from now on, see `mopefuse.data.image_cache`."""
        for side, (modality, preprocess) in self.readers.items():
            if get_modality(modality).is_picture:
                self.pictures[side] = pictures(self.data, self.split, modality, preprocess, self.config, advance=advance)

    def __len__(self) -> int:
        return len(self.split.rows)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        try:
            unread = [side for side in self.readers if side not in self.pictures]
            row = self.split.rows[index] if unread else None
            absent = {side: self.is_missing(side, epoch, index) for side in self.lacking}
            found = {"index": index, "absent": absent} | {side: self.value(side, epoch, index, row) for side in self.readers}
            return found if self.augmented_masks is None else {**found, "mask": self.augmented_mask(epoch, index)}
        except MopefuseError as error:  # a worker would turn the exception into text; a value arrives unchanged
            return {"error": error}

    def is_missing(self, side: str, epoch: int, index: int) -> bool:
        """Whether a sample lacks the modality of a side; only for sides in `lacking`."""
        return bool(self.lacking[side][index])

    def value(self, side: str, epoch: int, index: int, row: Row | None) -> Any:
        """The preprocessed input of a side for one sample.

        Args:
            row: row of the sample; None if all images are cached.
        """
        if side in self.lacking and self.is_missing(side, epoch, index):
            return blank_input(*self.readers[side])
        return self.present_value(side, epoch, index, row)

    def present_value(self, side: str, epoch: int, index: int, row: Row | None) -> Any:
        """The preprocessed input of a side for a sample that does not lack it, see `value`."""
        modality, preprocess = self.readers[side]
        if side in self.pictures:
            reduced: Any = self.pictures[side][index]
        else:
            assert row is not None
            reduced = preprocess.reduce(self.data.read(self.split, row, modality, self.config))
        if side in self.changes:
            reduced = np.asarray(self._augmented(side, epoch, index, Image.fromarray(reduced)))
        return preprocess.ready(reduced)

    def _augmented(self, side: str, epoch: int, index: int, picture: Any) -> Any:
        """An image or a mask of a sample with the augmentation of a side, the same for both."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, epoch, index))
            return self.changes[side](picture)

    def augmented_mask(self, epoch: int, index: int) -> Tensor:
        """The mask (H, W) of a sample, changed as its main image is."""
        from torchvision.tv_tensors import Mask

        assert self.augmented_masks is not None
        classes = self.augmented_masks.classes(index)
        height, width = self.readers["main"][1].describe()["size"]
        changed = self._augmented("main", epoch, index, Mask(torch.from_numpy(resized(classes, (height, width)))))
        return torch.from_numpy(resized(changed.numpy(), classes.shape))

    def batch(self, items: Sequence[dict[str, Any]]) -> Batch | MopefuseError:
        """Combine samples into one batch; returns the error if one of them could not be read."""
        for item in items:
            if "error" in item:
                return cast(MopefuseError, item["error"])
        index_B = torch.tensor([item["index"] for item in items], dtype=torch.long)
        inputs = {side: preprocess.batch([item[side] for item in items]) for side, (_, preprocess) in self.readers.items()}
        for side, blank in self.blank.items():
            inputs[side] = {name: torch.cat([tensor] * len(items)) for name, tensor in blank.items()}
        features = {side: table[index_B] for side, table in self.features.items()}
        tokens = {side: table[index_B] for side, table in self.tokens.items()}
        prefixes = {side: _pad_like(inputs[side], table[index_B]) for side, table in self.prefixes.items()}
        missing = {side: torch.tensor([item["absent"][side] for item in items]) for side in self.lacking}
        changed = [item["mask"] for item in items if "mask" in item]
        targets = torch.stack(changed) if changed else self.targets[index_B]
        return Batch(inputs, features, targets, index_B, missing, prefixes, tokens)

    def batches(self, keys: Iterable[Sequence[Key]], *, pin: bool = False) -> Iterator[Batch]:
        """Yield a batch for each item of `keys`, read in the main process or in `data.workers` worker processes.

        Raises:
            DataError: a sample cannot be read. ResourceError: a worker was killed.
        """
        loader = DataLoader(
            self,
            batch_sampler=keys,  # type: ignore[arg-type]
            collate_fn=self.batch,
            num_workers=self.config.workers,
            pin_memory=pin,
            generator=torch.Generator().manual_seed(0),  # does not touch torch's global random state
            worker_init_fn=_ignore_signals,
        )
        iterator = iter(loader)
        while True:
            try:
                batch = next(iterator, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ResourceError(
                    ResourceCode.WORKER_KILLED,
                    "a data worker was killed; usually the host ran out of memory",
                    where="data.workers",
                    fix="lower data.workers",
                ) from error
            if batch is None:
                return
            if isinstance(batch, MopefuseError):
                raise batch
            yield batch


def _ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker: the main process handles them, and ends its workers after saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _pad_like(inputs: Mapping[str, Tensor], tokens_BLD: Tensor) -> Tensor:
    """Pad tokens to the length of the inputs, if these have a mask."""
    return F.pad(tokens_BLD, (0, 0, 0, inputs["mask"].shape[1] - tokens_BLD.shape[1])) if "mask" in inputs else tokens_BLD


def blank_input(modality: str, preprocess: Preprocess) -> Any:
    """The preprocessed input of a sample that lacks the modality."""
    return preprocess.ready(preprocess.reduce(get_modality(modality).blank_value()))


def augmentation(config: DataConfig, size: tuple[int, int]) -> Callable[[Any], Any]:
    """Build the augmentation of `data.augment`, which must not be none; it draws from torch's global generator.

    Args:
        size: (height, width) in pixels of the encoder's input.
    """
    from torchvision.transforms import v2  # takes as long to import as torch

    changes: dict[str, Callable[[], Any]] = {
        "flip": v2.RandomHorizontalFlip,
        "randaugment": lambda: v2.RandAugment(config.randaugment_ops, config.randaugment_magnitude),
        "crop": lambda: v2.Compose(
            [v2.RandomResizedCrop(size, scale=(config.crop_scale, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        ),
    }
    change: Callable[[Any], Any] = changes[config.augment]()
    return change


def derive_seed(*numbers: int) -> int:
    """Derive a 64-bit seed from numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order of `count` samples in an epoch."""
    order: list[int] = np.random.Generator(np.random.PCG64(derive_seed(seed, epoch))).permutation(count).tolist()
    return order


def epoch_batches(seed: int, epoch: int, count: int, batch_size: int) -> list[list[int]]:
    """The global batches of an epoch, the same for any number of processes; the last one may be smaller."""
    order = epoch_order(seed, epoch, count)
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def process_share(batch: Sequence[int], rank: int, world: int) -> list[int]:
    """The samples of a global batch that process `rank` of `world` computes; every sample belongs to exactly one process."""
    return list(batch[rank::world])


def plain_batches(count: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[list[Key]]:
    """Yield batches of samples in order; every sample belongs to exactly one process."""
    own = range(rank, count, world)
    for start in range(0, len(own), batch_size):
        yield [(0, index) for index in own[start : start + batch_size]]
