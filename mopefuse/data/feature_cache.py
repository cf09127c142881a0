"""Cache the features of encoders and reuse them.

They are computed in batches and kept by content in a `FeatureStore`, under a digest of the encoder's weights and description,
the precision and the kind of device. Stored values are authoritative: the run that computes features also uses what it has
stored, so that a run that reads them later gets the same bits. Features that are computed elsewhere
(`data.cache_features: false`, `mopefuse predict`) may differ in the last bits, about 1e-5, as batches of another shape round
differently.

Shapes: S samples of the split, U distinct values, M values to compute, B batch, C width of the pooled feature.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import cache, distributed
from mopefuse.core import device as devices
from mopefuse.data.base import DataSet
from mopefuse.data.collate import Key, Samples
from mopefuse.data.feature_shards import FeatureStore, Lookup, Mapped, Values
from mopefuse.encoders.base import Encoder, Inputs
from mopefuse.encoders.frozen import encode_pooled
from mopefuse.encoders.sharding import uneven_calls
from mopefuse.modalities.base import get_modality

VERSION = 2
_SHARD_BYTES, _SHARD_SECONDS = 64 << 20, 60.0  # limits of a shard; a killed process loses at most one
_FILES_AT_ONCE, _VALUES_AT_ONCE = 64, 1024
Advance = Callable[[int, int], None]
Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]


class ComputedRows(NamedTuple):
    """What was computed for some of the distinct values.

    Args:
        numbers_M: numbers of the values. rows_RC: the computed rows, in the same order.
        counts_M: number of rows of each value; None if each has one.
    """

    numbers_M: Numbers
    rows_RC: Values
    counts_M: Numbers | None = None

    @classmethod
    def join(cls, pieces: Sequence[ComputedRows]) -> ComputedRows:
        """Concatenate pieces."""
        numbers_M, rows_RC = (np.concatenate(parts) for parts in list(zip(*pieces, strict=True))[:2])
        counts = [piece.counts_M for piece in pieces if piece.counts_M is not None]
        return cls(numbers_M, rows_RC, np.concatenate(counts) if counts else None)


class Features:
    """Pooled features by row: ``features[index_B]`` is (B, C).

    Args:
        tables: the tables that hold the features. found_S: table and row in it, for each sample.
        different: number of distinct values. origin: where the features come from, for messages.
    """

    def __init__(self, tables: Sequence[Mapped | Values], found_S: Lookup, *, different: int, origin: str) -> None:
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
    store = feature_store(encoder, config, device)
    computation = FeatureComputation(encoder, data, split, config, device, store=store, advance=advance)
    known_U, share_U = computation.divide()
    not_stored = computation.compute_and_store(share_U)
    found_S = computation.find_stored(complete=len(not_stored) == 0)
    different = len(known_U)
    if found_S is not None:
        tables = [shard.values for shard in store.shards]
        return Features(tables, found_S, different=different, origin=describe_origin(known_U))
    table_UC = computation.collect_in_memory(share_U | computation.first_to_know(), not_stored)
    found_S = Lookup(np.zeros(len(computation.number_S), np.int32), computation.number_S)
    return Features([table_UC], found_S, different=different, origin="kept in memory")


def feature_store(encoder: Encoder, config: RunConfig, device: torch.device) -> FeatureStore:
    """The store of an encoder's pooled features."""
    return FeatureStore(encoder_key(encoder, config, device), encoder.feature_width)


def encoder_key(encoder: Encoder, config: RunConfig, device: torch.device, *more: object) -> str:
    """The key of a store: everything except the samples that decides a feature, apart from rounding."""
    return cache.make_key(VERSION, encoder.fingerprint(), encoder.digest(), config.train.precision, device.type, *more)


def describe_origin(known_U: Mask) -> str:
    """Describe where values come from, given which of them were already stored."""
    missing = int((~known_U).sum())
    if 0 < missing < len(known_U):
        return f"{missing:,} of them computed and kept in the cache, the others read from it"
    return "kept in the cache" if missing else "read from the cache"


class Computation:
    """Computes and stores something for each distinct value of a modality in a split, shared by all processes.

    Attributes:
        values_U: digests of the values. first_U: number of the first sample that has each value.
        number_S: number of the value of each sample. facts: what a shard says about its origin.
        ranks: the processes that share the computation. known_by: which values (U,) each process had stored before.
    """

    def __init__(
        self,
        encoder: Encoder,
        data: DataSet,
        split: str,
        config: RunConfig,
        device: torch.device,
        *,
        store: FeatureStore,
        advance: Advance,
    ) -> None:
        keys_S = data.splits[split].keys[encoder.modality]
        self.values_U, self.first_U, self.number_S = np.unique(keys_S, return_index=True, return_inverse=True)
        self.samples = Samples(data, split, {"only": (encoder.modality, encoder.preprocess)}, config.data)
        self.encoder, self.config, self.device, self.store, self.advance = encoder, config, device, store, advance
        self.facts = {"encoder": str(encoder.spec), "root": str(data.root)}
        self.ranks = tuple(range(distributed.world_size()))
        self.known_by: list[Mask] = []

    @abstractmethod
    def encode(self, inputs: Inputs) -> tuple[Values, Numbers | None]:
        """Encode some values; returns what to store, and the number of rows of each value if that is not one."""

    def divide(self) -> tuple[Mask, Mask]:
        """Which values (U,) any process of `ranks` has stored already, and which this process has to compute."""
        self.store.refresh()
        self.known_by = distributed.gather_patiently(self.store.find(self.values_U).known_U)
        known_U: Mask = np.logical_or.reduce([self.known_by[rank] for rank in self.ranks])
        share_U = np.zeros_like(known_U)
        share_U[np.flatnonzero(~known_U)[self.ranks.index(distributed.rank()) :: len(self.ranks)]] = True
        return known_U, share_U

    def compute_and_store(self, share_U: Mask, *, keep: bool = True) -> list[ComputedRows]:
        """Compute what belongs to the values in `share_U` and store it shard by shard.

        Args:
            keep: whether to continue if a shard cannot be stored.

        Returns:
            What could not be stored.
        """
        not_stored: list[ComputedRows] = []
        waiting: list[ComputedRows] = []
        began = time.monotonic()

        def publish() -> None:
            joined = ComputedRows.join(waiting)
            if not self.publish(joined):
                not_stored.append(joined)
            waiting.clear()

        with uneven_calls(self.encoder):
            for piece in self.compute(np.flatnonzero(share_U)):
                waiting.append(piece)
                size = sum(piece.rows_RC.nbytes for piece in waiting)
                if size >= _SHARD_BYTES or time.monotonic() - began >= _SHARD_SECONDS:
                    publish()
                    began = time.monotonic()
                if not_stored and not keep:
                    return not_stored
        if waiting:
            publish()
        return not_stored

    def publish(self, rows: ComputedRows) -> bool:
        """Store rows as a new shard; False if the cache cannot keep it."""
        return self.store.append(self.values_U[rows.numbers_M], rows.rows_RC, self.facts, rows.counts_M)

    def compute(self, numbers_M: Numbers) -> Iterator[ComputedRows]:
        """Encode values, some at a time."""
        size = _FILES_AT_ONCE if self.store.ragged or get_modality(self.encoder.modality).is_file else _VALUES_AT_ONCE
        chunks = [numbers_M[start : start + size] for start in range(0, len(numbers_M), size)]

        def keys() -> Iterator[list[Key]]:
            for chunk in chunks:
                yield [(0, row) for row in self.first_U[chunk].tolist()]

        done = 0
        for chunk, batch in zip(chunks, self.samples.batches(keys(), pin=self.device.type == "cuda"), strict=True):
            with devices.autocast(self.config.train.precision, self.device):
                encoded = self.encode(batch.to(self.device).inputs["only"])
            yield ComputedRows(chunk, *encoded)
            done += len(chunk)
            self.advance(done, len(numbers_M))

    def find_stored(self, *, complete: bool) -> Lookup | None:
        """Find the value of each sample in the store; None unless all processes of `ranks` find them in the same shards.

        Args:
            complete: whether this process stored all that it computed.
        """
        store, first = self.store, self.ranks[0]
        distributed.barrier()  # until all processes have stored their shards, however long one takes
        if not all(distributed.gather(complete)):
            return None
        if distributed.rank() == first:
            store.refresh()
        names = distributed.gather([shard.name for shard in store.shards])
        store.refresh(names[first])
        found = store.find(self.values_U)
        shards = [(shard.name, shard.sha256) for shard in store.shards]
        views = distributed.gather((first, bool(found.known_U.all()), shards))
        if not all(known and shards == views[leader][2] for leader, known, shards in views):
            return None
        return Lookup(found.shard_U[self.number_S], found.row_U[self.number_S])


class FeatureComputation(Computation):
    """Computes the pooled features of distinct values of a split."""

    def encode(self, inputs: Inputs) -> tuple[Values, None]:
        """See `Computation.encode`."""
        return encode_pooled(self.encoder, inputs).float().cpu().numpy(), None

    def first_to_know(self) -> Mask:
        """Which values (U,) this process had stored before, and no process of a lower rank."""
        rank = distributed.rank()
        known_U: Mask = self.known_by[rank] & ~np.logical_or.reduce([*self.known_by[:rank], np.zeros_like(self.known_by[rank])])
        return known_U

    def collect_in_memory(self, own_U: Mask, not_stored: list[ComputedRows]) -> Values:
        """Collect a table (U, C) that is the same in all processes.

        Args:
            own_U: values that this process contributes; each value is contributed by one process.
            not_stored: features that this process computed but could not store.
        """
        table_UC = torch.zeros(len(self.values_U), self.encoder.feature_width)
        lacking_U = own_U.copy()
        for piece in not_stored:
            table_UC[piece.numbers_M] = torch.from_numpy(piece.rows_RC)
            lacking_U[piece.numbers_M] = False
        self.store.refresh()
        found = self.store.find(self.values_U)
        for number, shard in enumerate(self.store.shards):
            here = np.flatnonzero(lacking_U & (found.shard_U == number))
            table_UC[here] = torch.from_numpy(shard.values[found.row_U[here]])
            lacking_U[here] = False
        with uneven_calls(self.encoder):
            for piece in self.compute(np.flatnonzero(lacking_U)):  # features of shards that were removed since
                table_UC[piece.numbers_M] = torch.from_numpy(piece.rows_RC)
        table: Values = distributed.sum_over_processes(table_UC).numpy()
        return table
