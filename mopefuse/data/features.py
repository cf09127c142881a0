"""Features of frozen encoders, computed once per sample: what cannot change is not computed twice.

They are kept in a memory-mapped file that all runs share, under a digest of the encoder's weights, its preprocessing,
the precision, the software, and the samples' content. Each different value is computed once; what rows have none of is one
of them.

Shapes: S samples of the split, U different values, B batch, C width of the pooled feature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mopefuse import cache, distributed
from mopefuse import device as devices
from mopefuse.config import RunConfig
from mopefuse.data._base import Batch, DataSet
from mopefuse.data.collate import Samples
from mopefuse.encoders._base import Encoder, run_alone
from mopefuse.modality import of

VERSION = 1
_AT_ONCE = 64
Advance = Callable[[int, int], None]


class Sides(Protocol):
    """A model with encoders, some of them frozen."""

    frozen: tuple[str, ...]

    def encoder(self, side: str) -> Encoder:
        """The encoder of a side."""


class Features:
    """Pooled features by row: ``features[index_B]`` is (B, C)."""

    def __init__(self, table_UC: Tensor, number_S: NDArray[np.int64], origin: str) -> None:
        self.table_UC, self.number_S, self.origin = table_UC, torch.from_numpy(number_S), origin

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """(B, C)."""
        return self.table_UC[self.number_S[index_B]]


def split_features(
    encoder: Encoder,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    advance: Advance = lambda done, total: None,
) -> Features:
    """Pooled features of a split, on the CPU; from the cache where they are there.

    Args:
        advance: told of (values computed, values to compute) by this process.
    """
    rows = data.splits[split]
    keys = rows.keys[encoder.modality]
    values, first_U, number_S = np.unique(keys, return_index=True, return_inverse=True)
    samples = Samples(data, split, {"only": (encoder.modality, encoder.preprocess)}, config.data)
    probed = _probe(samples, first_U)
    key = cache.key_of(VERSION, *_conditions(encoder, config, device), probed, values.tobytes().hex())
    shape = (len(first_U), encoder.feature_width)
    path = _path(key)
    everywhere = all(distributed.gather(path is not None))
    if path is not None and everywhere:
        return Features(_map(path, shape), number_S, "read from the cache")
    table_UC = _compute(encoder, samples, first_U, config, device, advance)

    def write(folder: Path) -> None:
        table_UC.numpy().tofile(folder / "features.bin")

    facts = {"encoder": str(encoder.spec), "split": split, "root": str(data.root), "shape": list(shape)}
    kept = distributed.from_main(bool(cache.keep("features", key, write, facts)) if distributed.is_main() else None)
    return Features(table_UC, number_S, "kept in the cache" if kept else "kept in memory")


def _path(key: str) -> Path | None:
    found = cache.find("features", key)
    return found[0] / "features.bin" if found else None


def _map(path: Path, shape: tuple[int, int]) -> Tensor:
    return torch.from_file(str(path), shared=False, size=shape[0] * shape[1], dtype=torch.float32).reshape(shape)


def _conditions(encoder: Encoder, config: RunConfig, device: torch.device) -> tuple[object, ...]:
    """Everything but the samples that decides the bits of a feature."""
    machine = (device.type, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
    if device.type == "cuda":
        machine = (torch.cuda.get_device_name(device), 0, "")
    return (encoder.fingerprint(), encoder.digest(), config.train.precision, *machine)


def _probe(samples: Samples, first_U: NDArray[np.int64]) -> str:
    """A digest of what the encoder gets for some of the values: changes with the tokenizer and with how images are read."""
    most = 4 if of(samples.readers["only"][0]).is_file else 256
    some = first_U[:: -(-len(first_U) // most)]
    digest = hashlib.sha256()
    for row in some:
        item = samples[0, int(row)]
        if "error" not in item:
            for name, tensor in sorted(samples.readers["only"][1].batch([item["only"]]).items()):
                digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _compute(
    encoder: Encoder,
    samples: Samples,
    first_U: NDArray[np.int64],
    config: RunConfig,
    device: torch.device,
    advance: Advance,
) -> Tensor:
    starts = range(0, len(first_U), _AT_ONCE)[distributed.rank() :: distributed.world_size()]
    place = {int(row): number for number, row in enumerate(first_U)}
    keys = [[(0, int(row)) for row in first_U[start : start + _AT_ONCE]] for start in starts]
    total, done = sum(map(len, keys)), 0
    table_UC = torch.zeros(len(first_U), encoder.feature_width)
    for batch in samples.batches(keys, pin=device.type == "cuda"):
        with devices.autocast(config.train.precision, device):
            pooled_BC = run_alone(encoder, batch.to(device).inputs["only"])
        table_UC[[place[row] for row in batch.index.tolist()]] = pooled_BC.float().cpu()
        done += len(batch.index)
        advance(done, total)
    return distributed.summed(table_UC)  # each row is 0 in all processes but one


def fill(model: Sides, batch: Batch, config: RunConfig, device: torch.device) -> Batch:
    """A batch with the features of frozen encoders that were not computed earlier, to the same bits as if they had been."""
    features = dict(batch.features)
    for side in model.frozen:
        if side in batch.inputs and not config.data.cache_features:
            with devices.autocast(config.train.precision, device):
                features[side] = run_alone(model.encoder(side), batch.inputs[side]).float()
    return replace(batch, features=features)
