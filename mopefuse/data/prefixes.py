"""The tokens that enter a later layer of a frozen encoder are cached, so that training need not run the layers before it.

They are kept by content like features (`mopefuse.data.features`), one store for each encoder, layer and number format, and
without padding. Several processes share the computation and use the same values.

Shapes: S samples of the split, U different values, B batch, L tokens, D width of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import distributed
from mopefuse.core.error_codes import NumericCode, ResourceCode
from mopefuse.data.base import DataSet
from mopefuse.data.collate import Samples
from mopefuse.data.feature_store import FeatureStore, Found, Shard, Values
from mopefuse.data.features import Advance, Computation, Numbers, describe_origin, encoder_key
from mopefuse.encoders.base import Encoder, Inputs
from mopefuse.encoders.frozen import can_continue, encode_prefixes, token_counts
from mopefuse.errors import NumericError, ResourceError

KIND = "prefixes"
_COUNTED = 256  # texts whose tokens are counted to estimate the size


class Prefixes:
    """The tokens that enter a layer, by row: ``prefixes[index_B]`` is (B, L, D), padded with zeros.

    Args:
        shards: the shards that hold the tokens. found_S: shard and number in it, for each sample.
        different: number of different values. size: their size in bytes. origin: where they come from, for messages.
    """

    def __init__(self, shards: Sequence[Shard], found_S: Found, *, different: int, size: int, origin: str) -> None:
        self._shards, self._shard_S, self._number_S = shards, found_S.shard_U, found_S.row_U
        self.different, self.size, self.origin = different, size, origin

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """The tokens (B, L, D) of some samples."""
        rows = [self._rows(index) for index in index_B.tolist()]
        out_BLD = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), dtype=rows[0].dtype)
        for number, tokens_LD in enumerate(rows):
            out_BLD[number, : len(tokens_LD)] = tokens_LD
        return torch.from_numpy(out_BLD)

    def _rows(self, index: int) -> Values:
        shard = self._shards[int(self._shard_S[index])]
        return shard.values[shard.rows(int(self._number_S[index]))]


class PrefixComputation(Computation):
    """Computes the tokens that enter a layer for the different values of a split."""

    layer: int

    def encode(self, inputs: Inputs) -> tuple[Values, Numbers]:
        """See `Computation.encode`.

        Raises:
            NumericError: a value is too large for float16.
        """
        each = [tokens_LD.float().cpu() for tokens_LD in encode_prefixes(self.encoder, inputs, self.layer)]
        full_RD = torch.cat(each)
        rows_RD = full_RD.to(getattr(torch, self.store.dtype))
        if (rows_RD.isinf() & ~full_RD.isinf()).any():
            raise NumericError(
                NumericCode.PREFIX_EXCEEDS_FLOAT16,
                f"an output of the first {self.layer} layers of {self.encoder.spec} is too large for float16",
                where="--cache-prefix",
                fix="add --set data.prefix_precision=float32",
            )
        rows: Values = rows_RD.numpy()
        return rows, np.array([len(tokens_LD) for tokens_LD in each])


def split_prefixes(
    encoder: Encoder,
    layer: int,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    advance: Advance = lambda done, total: None,
) -> Prefixes:
    """Get the tokens that enter a layer for every sample of a split: stored ones are read, the others computed and stored.

    Several processes share the computation, and all use the same values.

    Args:
        advance: called with (values computed, values to compute) by this process.

    Raises:
        ResourceError: the cache cannot keep them. NumericError: a value is too large for float16.
    """
    store = _store(encoder, layer, config, device)
    computation = PrefixComputation(encoder, data, split, config, device, store=store, advance=advance)
    computation.layer = layer
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
        raise ResourceError(
            ResourceCode.PREFIX_CACHE_NOT_WRITABLE,
            f"outputs of early layers of {encoder.spec} cannot be kept in the cache",
            where="--cache-prefix",
            fix="set MOPEFUSE_CACHE to a folder with more space that all processes share, or use --cache-prefix off",
        )
    size = sum(_size(store, found_S, np.unique(computation.number_S, return_index=True)[1]))
    return Prefixes(store.shards, found_S, different=len(known_U), size=size, origin=describe_origin(known_U))


def _store(encoder: Encoder, layer: int, config: RunConfig, device: torch.device) -> FeatureStore:
    dtype = config.data.prefix_precision
    key = encoder_key(encoder, config, device, "prefix", layer, dtype)
    return FeatureStore(key, encoder.widths[layer], kind=KIND, dtype=dtype, ragged=True)


def _size(store: FeatureStore, found_S: Found, index_U: Numbers) -> list[int]:
    """Bytes of the tokens of some samples in each shard."""
    sizes = []
    for number, shard in enumerate(store.shards):
        assert shard.ends_M is not None
        counts_M = np.diff(shard.ends_M, prepend=0)
        here = index_U[found_S.shard_U[index_U] == number]
        sizes.append(int(counts_M[found_S.row_U[here]].sum()) * store.width * np.dtype(store.dtype).itemsize)
    return sizes


class Estimate(NamedTuple):
    """The estimated size of the prefixes of some splits.

    Args:
        different: number of different values. size: their size in bytes. missing: bytes of those that are not stored yet.
    """

    different: int
    size: int
    missing: int


def estimate_prefixes(
    encoder: Encoder, layer: int, data: DataSet, splits: Sequence[str], config: RunConfig, device: torch.device
) -> Estimate | None:
    """Estimate the size of prefixes; None if the encoder cannot continue from them.

    As a side effect, every layer runs once.
    """
    inputs = {name: tensor.to(device) for name, tensor in encoder.blank_inputs(1).items()}
    blank = encoder.compute_prefix(inputs, layer)
    if not can_continue(encoder, inputs, blank):
        return None
    counts = [int(count) for split in splits for count in _count_tokens(encoder, data, split, config)]
    tokens = sum(counts) / len(counts) if counts else blank.tokens_BLD.shape[1]
    keys_U = np.unique(np.concatenate([data.splits[split].keys[encoder.modality] for split in splits]))
    store = _store(encoder, layer, config, device)
    store.refresh()
    missing = int((~store.find(keys_U).known_U).sum())
    each = tokens * store.width * np.dtype(store.dtype).itemsize
    return Estimate(len(keys_U), round(len(keys_U) * each), round(missing * each))


def _count_tokens(encoder: Encoder, data: DataSet, split: str, config: RunConfig) -> list[int]:
    """Count the tokens of some texts of a split; nothing for an encoder with a fixed number of tokens."""
    if token_counts(encoder, encoder.blank_inputs(1)) is None:
        return []
    in_this_process = config.data.model_copy(update={"workers": 0})
    samples = Samples(data, split, {"only": (encoder.modality, encoder.preprocess)}, in_this_process)
    chosen = np.unique(np.linspace(0, len(samples) - 1, _COUNTED).astype(np.int64)).tolist()
    batch = next(samples.batches([[(0, index) for index in chosen]]))
    counts_B = token_counts(encoder, batch.inputs["only"])
    return [] if counts_B is None else [int(count) for count in counts_B]
