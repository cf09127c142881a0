"""Tokens of each sample, stored without padding in a ragged `FeatureStore`.

Shapes: S samples of the split, U distinct values, B batch, L tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import distributed
from mopefuse.core.cache_sharing import ranks_that_share
from mopefuse.data.base import DataSet
from mopefuse.data.collate import Samples
from mopefuse.data.feature_cache import Computation, Numbers, describe_origin
from mopefuse.data.feature_shards import FeatureStore, Lookup, Shard, Values
from mopefuse.encoders.base import Encoder, Inputs
from mopefuse.errors import NumericError

_COUNTED = 256  # texts whose tokens are counted to estimate the size


class RaggedTable:
    """The tokens of each sample of a split.

    Args:
        shards: the shards that hold the tokens. found_S: shard and number in it, for each sample.
        different: number of distinct values. size: their size in bytes. origin: where they come from, for messages.
    """

    def __init__(self, shards: Sequence[Shard], found_S: Lookup, *, different: int, size: int, origin: str) -> None:
        self._shards, self._shard_S, self._number_S = shards, found_S.shard_U, found_S.row_U
        self.different, self.size, self.origin = different, size, origin

    def rows(self, index_B: Tensor) -> list[Values]:
        """The tokens (L, D) of some samples."""
        return [self._rows(index) for index in index_B.tolist()]

    def _rows(self, index: int) -> Values:
        shard = self._shards[int(self._shard_S[index])]
        return shard.values[shard.rows(int(self._number_S[index]))]


Table = TypeVar("Table", bound=RaggedTable)


def pad(rows: Sequence[Values]) -> Tensor:
    """Tokens of several samples as (B, L, D), padded with zeros."""
    out_BLD = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), dtype=rows[0].dtype)
    for number, tokens_LD in enumerate(rows):
        out_BLD[number, : len(tokens_LD)] = tokens_LD
    return torch.from_numpy(out_BLD)


def collect(computation: Computation, kind: type[Table]) -> Table | None:
    """Read the stored tokens of a split, and compute and store the others; None if the cache cannot keep them.

    Processes that share a cache folder share the computation, and use the same values; every process needs all of them at hand,
    so other machines with caches of their own compute them too.

    Raises:
        NumericError: the computation raised it, in this process or another.
    """
    computation.ranks = ranks_that_share()
    known_U, share_U = computation.divide()
    error: NumericError | None = None
    stored = False
    try:
        stored = not computation.compute_and_store(share_U, keep=False)
    except NumericError as found:
        error = found
    found_S = computation.find_stored(complete=stored)
    errors = [one for one in distributed.gather(error) if one is not None]
    if errors:
        raise errors[0]
    if found_S is None:
        return None
    size = sum(_size(computation.store, found_S, np.unique(computation.number_S, return_index=True)[1]))
    shards, origin = computation.store.shards, describe_origin(known_U)
    return kind(shards, found_S, different=len(known_U), size=size, origin=origin)


def _size(store: FeatureStore, found_S: Lookup, index_U: Numbers) -> list[int]:
    """Bytes of the tokens of some samples in each shard."""
    sizes = []
    for number, shard in enumerate(store.shards):
        assert shard.ends_M is not None
        counts_M = np.diff(shard.ends_M, prepend=0)
        here = index_U[found_S.shard_U[index_U] == number]
        sizes.append(int(counts_M[found_S.row_U[here]].sum()) * store.width * np.dtype(store.dtype).itemsize)
    return sizes


class Estimate(NamedTuple):
    """The estimated size of the tokens of some splits.

    Args:
        different: number of distinct values. size: their size in bytes. missing: bytes of those that are not stored yet.
    """

    different: int
    size: int
    missing: int


def estimate(
    store: FeatureStore,
    encoder: Encoder,
    data: DataSet,
    splits: Sequence[str],
    config: RunConfig,
    *,
    usual: int,
    count: Callable[[Inputs], Tensor | None],
) -> Estimate:
    """Estimate the size of the tokens of some splits.

    Args:
        usual: tokens of each value, if `count` does not count them.
        count: counts the tokens of each sample (B,) of a batch of inputs; None if all have the same number.
    """
    counts = [number for split in splits for number in _count_tokens(encoder, data, split, config, count)]
    tokens = sum(counts) / len(counts) if counts else usual
    keys_U = np.unique(np.concatenate([data.splits[split].keys[encoder.modality] for split in splits]))
    store.refresh()
    missing = int((~store.find(keys_U).known_U).sum())
    each = tokens * store.width * np.dtype(store.dtype).itemsize
    return Estimate(len(keys_U), round(len(keys_U) * each), round(missing * each))


def _count_tokens(
    encoder: Encoder, data: DataSet, split: str, config: RunConfig, count: Callable[[Inputs], Tensor | None]
) -> list[int]:
    """Count the tokens of some texts of a split; nothing for an encoder with a fixed number of tokens."""
    if count(encoder.blank_inputs(1)) is None:
        return []
    in_this_process = config.data.model_copy(update={"workers": 0})
    samples = Samples(data, split, {"only": (encoder.modality, encoder.preprocess)}, in_this_process)
    chosen = np.unique(np.linspace(0, len(samples) - 1, _COUNTED).astype(np.int64)).tolist()
    batch = next(samples.batches([[(0, index) for index in chosen]]))
    counts_B = count(batch.inputs["only"])
    return [] if counts_B is None else [int(number) for number in counts_B]
