"""Features of frozen encoders, computed once per sample and reused by every run.

They are computed in batches and kept by content in a `FeatureStore`, under a digest of the encoder's weights and description,
the precision and the kind of device. What the store holds is the definition: the run that computes features uses what it
stored, so a run that reads them gets the same bits. Features that are computed elsewhere (`data.cache_features: false`,
`mopefuse predict`) may differ in the last bits, about 1e-5, as batches of another shape round differently.

Shapes: S samples of the split, U different values, M of them missing, B batch, C width of the pooled feature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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
from mopefuse.encoders.base import Encoder, encode_pooled
from mopefuse.modalities.base import of

VERSION = 2
_BYTES, _SECONDS = 64 << 20, 60.0  # of features in a shard, and of work that a killed process can lose
_FILES_AT_ONCE, _VALUES_AT_ONCE = 64, 1024
Advance = Callable[[int, int], None]


class Features:
    """Pooled features by row: ``features[index_B]`` is (B, C).

    Args:
        tables: that hold them. at_S: which of these holds each row's, and where in it. different: values among the rows.
        origin: where they come from, for messages.
    """

    def __init__(self, tables: Sequence[Mapped | Values], at_S: Found, different: int, origin: str) -> None:
        self._tables, self._table_S, self._row_S = tables, at_S.shard_U, at_S.row_U
        self.different, self.origin = different, origin

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """(B, C)."""
        table_B, row_B = self._table_S[index_B.numpy()], self._row_S[index_B.numpy()]
        numbers = np.unique(table_B)
        if len(numbers) <= 1:
            return torch.from_numpy(self._tables[numbers[0] if len(numbers) else 0][row_B])
        pieces = {number: self._tables[number][row_B[table_B == number]] for number in numbers}
        out_BC = np.empty((len(row_B), next(iter(pieces.values())).shape[1]), dtype=np.float32)
        for number, piece in pieces.items():
            out_BC[table_B == number] = piece
        return torch.from_numpy(out_BC)


class _Work(NamedTuple):
    """What computing needs to know."""

    encoder: Encoder
    samples: Samples
    config: RunConfig
    device: torch.device
    advance: Advance


def split_features(
    encoder: Encoder,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    advance: Advance = lambda done, total: None,
) -> Features:
    """Pooled features of a split, on the CPU: those that are known from the store, the others computed and added to it.

    With several processes each computes its share, and all use the same values.

    Args:
        advance: called with (values computed, values to compute) by this process.
    """
    keys_S = data.splits[split].keys[encoder.modality]
    values_U, first_U, number_S = np.unique(keys_S, return_index=True, return_inverse=True)
    samples = Samples(data, split, {"only": (encoder.modality, encoder.preprocess)}, config.data)
    work = _Work(encoder, samples, config, device, advance)
    store = FeatureStore(_key(encoder, config, device), encoder.feature_width)
    store.refresh()
    known_U: NDArray[np.bool_] = distributed.from_main(store.find(values_U).known_U)
    share_U = _share(~known_U)
    facts = {"encoder": str(encoder.spec), "root": str(data.root)}
    unkept = _compute_and_keep(work, store, values_U, first_U, share_U, facts)
    missing = int((~known_U).sum())
    found = _all_in_store(store, values_U, complete=len(unkept) == 0)
    if found is not None:
        origin = "read from the cache" if not missing else "kept in the cache"
        if 0 < missing < len(values_U):
            origin = f"{missing:,} of them now and kept in the cache, the others known from it"
        tables = [shard.values for shard in store.shards]
        return Features(tables, Found(found.shard_U[number_S], found.row_U[number_S]), len(values_U), origin)
    mine_U = share_U | known_U if distributed.is_main() else share_U
    table_UC = _in_memory(work, store, values_U, first_U, mine_U, unkept)
    return Features([table_UC], Found(np.zeros(len(number_S), np.int32), number_S), len(values_U), "kept in memory")


def _key(encoder: Encoder, config: RunConfig, device: torch.device) -> str:
    """Everything but the samples that decides a feature, apart from rounding."""
    return cache.key_of(VERSION, encoder.fingerprint(), encoder.digest(), config.train.precision, device.type)


def _share(missing_U: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of the missing values this process computes."""
    share_U = np.zeros_like(missing_U)
    share_U[np.flatnonzero(missing_U)[distributed.rank() :: distributed.world_size()]] = True
    return share_U


def _compute_and_keep(
    work: _Work,
    store: FeatureStore,
    values_U: Keys,
    first_U: NDArray[np.int64],
    share_U: NDArray[np.bool_],
    facts: dict[str, str],
) -> list[tuple[NDArray[np.int64], Values]]:
    """Compute the features of a share and publish them shard by shard.

    Returns:
        Features by number of the value, of shards that could not be published.
    """
    unkept: list[tuple[NDArray[np.int64], Values]] = []
    waiting: list[tuple[NDArray[np.int64], Values]] = []
    began = time.monotonic()

    def publish() -> None:
        numbers, values = (np.concatenate(each) for each in zip(*waiting, strict=True))
        if not store.append(values_U[numbers], values, facts):
            unkept.append((numbers, values))
        waiting.clear()

    for numbers, values_MC in _encoded(work, np.flatnonzero(share_U), first_U):
        waiting.append((numbers, values_MC))
        if sum(values.nbytes for _, values in waiting) >= _BYTES or time.monotonic() - began >= _SECONDS:
            publish()
            began = time.monotonic()
    if waiting:
        publish()
    return unkept


def _encoded(
    work: _Work, numbers_M: NDArray[np.int64], first_U: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Values]]:
    """Numbers of values and their features, some at a time."""
    most = _FILES_AT_ONCE if of(work.encoder.modality).is_file else _VALUES_AT_ONCE
    chunks = [numbers_M[start : start + most] for start in range(0, len(numbers_M), most)]

    def keys() -> Iterator[list[Key]]:
        for chunk in chunks:
            yield [(0, row) for row in first_U[chunk].tolist()]

    done = 0
    for chunk, batch in zip(chunks, work.samples.batches(keys(), pin=work.device.type == "cuda"), strict=True):
        with devices.autocast(work.config.train.precision, work.device):
            pooled_BC = encode_pooled(work.encoder, batch.to(work.device).inputs["only"])
        yield chunk, pooled_BC.float().cpu().numpy()
        done += len(chunk)
        work.advance(done, len(numbers_M))


def _all_in_store(store: FeatureStore, values_U: Keys, *, complete: bool) -> Found | None:
    """Where all values are, if all processes find them in the same shards; None if one does not."""
    distributed.barrier()  # until all processes have published their shards, however long one takes
    if not all(distributed.gather(complete)):
        return None
    if distributed.is_main():
        store.refresh()
    names = distributed.from_main([shard.name for shard in store.shards])
    store.refresh(names)
    found = store.find(values_U)
    views = distributed.gather((bool(found.known_U.all()), [(shard.name, shard.sha256) for shard in store.shards]))
    return found if views[0][0] and all(view == views[0] for view in views) else None


def _in_memory(
    work: _Work,
    store: FeatureStore,
    values_U: Keys,
    first_U: NDArray[np.int64],
    mine_U: NDArray[np.bool_],
    unkept: list[tuple[NDArray[np.int64], Values]],
) -> Values:
    """A table (U, C) in memory, the same in all processes: each gives its own values, those in no other process's part."""
    table_UC = torch.zeros(len(values_U), work.encoder.feature_width)
    lacking_U = mine_U.copy()
    for numbers, values in unkept:
        table_UC[numbers] = torch.from_numpy(values)
        lacking_U[numbers] = False
    store.refresh()
    found = store.find(values_U)
    for number, shard in enumerate(store.shards):
        here = np.flatnonzero(lacking_U & (found.shard_U == number))
        table_UC[here] = torch.from_numpy(shard.values[found.row_U[here]])
        lacking_U[here] = False
    for numbers, values in _encoded(work, np.flatnonzero(lacking_U), first_U):  # published, and gone since
        table_UC[numbers] = torch.from_numpy(values)
    table: Values = distributed.summed(table_UC).numpy()
    return table
