"""Encoder features are cached and reused.

They are computed in batches and kept by content in a `FeatureStore`, under a digest of the encoder's weights and description,
the precision and the kind of device. Stored values are authoritative: the run that computes features also uses what it has
stored, so that a run that reads them later gets the same bits. Features that are computed elsewhere
(`data.cache_features: false`, `mopefuse predict`) may differ in the last bits, about 1e-5, as batches of another shape round
differently.

Shapes: S samples of the split, U different values, M values to compute, B batch, C width of the pooled feature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import cache, distributed
from mopefuse.core import device as devices
from mopefuse.data.base import DataSet, Keys
from mopefuse.data.collate import Key, Samples
from mopefuse.data.feature_store import FeatureStore, Found, Mapped, Values
from mopefuse.encoders.base import Encoder
from mopefuse.encoders.frozen import encode_pooled
from mopefuse.modalities.base import get_modality

VERSION = 2
_SHARD_BYTES, _SHARD_SECONDS = 64 << 20, 60.0  # limits of a shard; a killed process loses at most one
_FILES_AT_ONCE, _VALUES_AT_ONCE = 64, 1024
Advance = Callable[[int, int], None]
Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]
Piece = tuple[Numbers, Values]  # numbers of values, and their features


class Features:
    """Pooled features by row: ``features[index_B]`` is (B, C).

    Args:
        tables: that hold the features. found_S: table and row in it, for each sample.
        different: number of different values. origin: where the features come from, for messages.
    """

    def __init__(self, tables: Sequence[Mapped | Values], found_S: Found, *, different: int, origin: str) -> None:
        self._tables, self._table_S, self._row_S = tables, found_S.shard_U, found_S.row_U
        self.different, self.origin = different, origin

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """The features (B, C) of some samples."""
        table_B, row_B = self._table_S[index_B.numpy()], self._row_S[index_B.numpy()]
        numbers = np.unique(table_B)
        if len(numbers) <= 1:
            return torch.from_numpy(self._tables[numbers[0] if len(numbers) else 0][row_B])
        pieces = {number: self._tables[number][row_B[table_B == number]] for number in numbers}
        out_BC = np.empty((len(row_B), next(iter(pieces.values())).shape[1]), dtype=np.float32)
        for number, piece in pieces.items():
            out_BC[table_B == number] = piece
        return torch.from_numpy(out_BC)


def split_features(
    encoder: Encoder,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    advance: Advance = lambda done, total: None,
) -> Features:
    """Get the pooled features of a split, on the CPU: stored ones are read, the others computed and stored.

    Several processes share the computation, and all use the same values.

    Args:
        advance: called with (values computed, values to compute) by this process.
    """
    keys_S = data.splits[split].keys[encoder.modality]
    values_U, first_U, number_S = np.unique(keys_S, return_index=True, return_inverse=True)
    computation = _Computation(
        encoder=encoder,
        samples=Samples(data, split, {"only": (encoder.modality, encoder.preprocess)}, config.data),
        config=config,
        device=device,
        advance=advance,
        store=FeatureStore(_key(encoder, config, device), encoder.feature_width),
        values_U=values_U,
        first_U=first_U,
    )
    store = computation.store
    store.refresh()
    known_U: Mask = distributed.broadcast_from_main(store.find(values_U).known_U)
    share_U = _share(~known_U)
    not_stored = computation.compute_and_store(share_U, {"encoder": str(encoder.spec), "root": str(data.root)})
    missing = int((~known_U).sum())
    found = computation.find_stored(complete=len(not_stored) == 0)
    if found is not None:
        origin = "read from the cache" if not missing else "kept in the cache"
        if 0 < missing < len(values_U):
            origin = f"{missing:,} of them computed and kept in the cache, the others read from it"
        tables = [shard.values for shard in store.shards]
        found_S = Found(found.shard_U[number_S], found.row_U[number_S])
        return Features(tables, found_S, different=len(values_U), origin=origin)
    own_U = share_U | known_U if distributed.is_main() else share_U
    table_UC = computation.collect_in_memory(own_U, not_stored)
    found_S = Found(np.zeros(len(number_S), np.int32), number_S)
    return Features([table_UC], found_S, different=len(values_U), origin="kept in memory")


def _key(encoder: Encoder, config: RunConfig, device: torch.device) -> str:
    """The key of a store: everything except the samples that decides a feature, apart from rounding."""
    return cache.make_key(VERSION, encoder.fingerprint(), encoder.digest(), config.train.precision, device.type)


def _share(missing_U: Mask) -> Mask:
    """Which of the missing values this process computes."""
    share_U = np.zeros_like(missing_U)
    share_U[np.flatnonzero(missing_U)[distributed.rank() :: distributed.world_size()]] = True
    return share_U


@dataclass(frozen=True)
class _Computation:
    """Computes the features of different values of a split.

    Args:
        values_U: digests of the values. first_U: number of the first sample that has each value.
    """

    encoder: Encoder
    samples: Samples
    config: RunConfig
    device: torch.device
    advance: Advance
    store: FeatureStore
    values_U: Keys
    first_U: Numbers

    def compute_and_store(self, share_U: Mask, facts: dict[str, str]) -> list[Piece]:
        """Compute the features of the values in `share_U` and store them shard by shard.

        Args:
            facts: about the shards, for listings of the cache.

        Returns:
            The features that could not be stored.
        """
        not_stored: list[Piece] = []
        waiting: list[Piece] = []
        began = time.monotonic()

        def publish() -> None:
            numbers, features = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
            if not self.store.append(self.values_U[numbers], features, facts):
                not_stored.append((numbers, features))
            waiting.clear()

        for piece in self._encode(np.flatnonzero(share_U)):
            waiting.append(piece)
            size = sum(features.nbytes for _, features in waiting)
            if size >= _SHARD_BYTES or time.monotonic() - began >= _SHARD_SECONDS:
                publish()
                began = time.monotonic()
        if waiting:
            publish()
        return not_stored

    def _encode(self, numbers_M: Numbers) -> Iterator[Piece]:
        """Encode values, some at a time."""
        size = _FILES_AT_ONCE if get_modality(self.encoder.modality).is_file else _VALUES_AT_ONCE
        chunks = [numbers_M[start : start + size] for start in range(0, len(numbers_M), size)]

        def keys() -> Iterator[list[Key]]:
            for chunk in chunks:
                yield [(0, row) for row in self.first_U[chunk].tolist()]

        done = 0
        for chunk, batch in zip(chunks, self.samples.batches(keys(), pin=self.device.type == "cuda"), strict=True):
            with devices.autocast(self.config.train.precision, self.device):
                pooled_BC = encode_pooled(self.encoder, batch.to(self.device).inputs["only"])
            yield chunk, pooled_BC.float().cpu().numpy()
            done += len(chunk)
            self.advance(done, len(numbers_M))

    def find_stored(self, *, complete: bool) -> Found | None:
        """Find all values in the store; None unless all processes find them in the same shards.

        Args:
            complete: whether this process stored all that it computed.
        """
        store = self.store
        distributed.barrier()  # until all processes have stored their shards, however long one takes
        if not all(distributed.gather(complete)):
            return None
        if distributed.is_main():
            store.refresh()
        names = distributed.broadcast_from_main([shard.name for shard in store.shards])
        store.refresh(names)
        found = store.find(self.values_U)
        views = distributed.gather((bool(found.known_U.all()), [(shard.name, shard.sha256) for shard in store.shards]))
        return found if views[0][0] and all(view == views[0] for view in views) else None

    def collect_in_memory(self, own_U: Mask, not_stored: list[Piece]) -> Values:
        """Collect a table (U, C) that is the same in all processes.

        Args:
            own_U: values that this process contributes; each value is contributed by one process.
            not_stored: features that this process computed but could not store.
        """
        table_UC = torch.zeros(len(self.values_U), self.encoder.feature_width)
        lacking_U = own_U.copy()
        for numbers, features in not_stored:
            table_UC[numbers] = torch.from_numpy(features)
            lacking_U[numbers] = False
        self.store.refresh()
        found = self.store.find(self.values_U)
        for number, shard in enumerate(self.store.shards):
            here = np.flatnonzero(lacking_U & (found.shard_U == number))
            table_UC[here] = torch.from_numpy(shard.values[found.row_U[here]])
            lacking_U[here] = False
        for numbers, features in self._encode(np.flatnonzero(lacking_U)):  # features of shards that were removed since
            table_UC[numbers] = torch.from_numpy(features)
        table: Values = distributed.sum_over_processes(table_UC).numpy()
        return table
