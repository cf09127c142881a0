"""The tokens that enter a later layer of a frozen encoder are cached, so that training need not run the layers before it.

They are kept by content like features (`mopefuse.data.feature_cache`), one store for each encoder, layer and number format, and
without padding. Several processes share the computation and use the same values.

Shapes: S samples of the split, U distinct values, B batch, L tokens, D width of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core.error_codes import NumericCode, ResourceCode
from mopefuse.data.base import DataSet
from mopefuse.data.feature_cache import Advance, Computation, ComputedRows, Numbers, encoder_key, feature_store
from mopefuse.data.feature_shards import FeatureStore, Values
from mopefuse.data.ragged import Estimate, RaggedTable, collect, estimate, pad
from mopefuse.data.token_cache import lack_of_space, rows_to_store, token_store
from mopefuse.encoders.base import Encoder, Inputs
from mopefuse.encoders.frozen import can_continue, encode_prefixes, token_counts
from mopefuse.errors import NumericError, ResourceError

KIND = "prefixes"


class Prefixes(RaggedTable):
    """The tokens that enter a layer, by row: ``prefixes[index_B]`` is (B, L, D), padded with zeros."""

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """The tokens (B, L, D) of some samples."""
        return pad(self.rows(index_B))


class PrefixComputation(Computation):
    """Computes the tokens that enter a layer for the distinct values of a split.

    Args:
        layer: the layer.
        features, tokens: stores of pooled features and of output tokens, if those that are missing there are to be computed and
            stored too; they cost only the other layers.
    """

    def __init__(
        self, *args: Any, layer: int, features: FeatureStore | None, tokens: FeatureStore | None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.layer = layer
        self.others: dict[str, FeatureStore] = {}
        for name, store in (("features", features), ("tokens", tokens)):
            if store is not None:
                store.refresh()
                if not store.find(self.values_U).known_U.all():
                    self.others[name] = store
        self._waiting: dict[str, list[tuple[Values, Numbers]]] = {name: [] for name in self.others}

    def publish(self, rows: ComputedRows) -> bool:
        """See `Computation.publish`."""
        keys_M = self.values_U[rows.numbers_M]
        for name, store in self.others.items():
            values_RC, counts = (np.concatenate(parts) for parts in zip(*self._waiting[name], strict=True))
            new_M = ~store.find(keys_M).known_U
            if new_M.any():
                counts_M = counts[new_M] if store.ragged else None
                store.append(keys_M[new_M], values_RC[np.repeat(new_M, counts)], self.facts, counts_M)
            self._waiting[name].clear()
        return super().publish(rows)

    def encode(self, inputs: Inputs) -> tuple[Values, Numbers]:
        """See `Computation.encode`.

        Raises:
            NumericError: a value is too large for float16.
        """
        found, outputs = encode_prefixes(self.encoder, inputs, self.layer, outputs=bool(self.others))
        if outputs is not None and "features" in self.others:
            pooled_BC = outputs.pooled_BC.float().cpu().numpy()
            self._waiting["features"].append((pooled_BC, np.ones(len(pooled_BC), dtype=np.int64)))
        if outputs is not None and "tokens" in self.others:
            self._waiting["tokens"].append(rows_to_store(outputs.tokens, self.others["tokens"]))
        each = [tokens_LD.float().cpu() for tokens_LD in found]
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
    pooled: bool = False,
    tokens: bool = False,
    advance: Advance = lambda done, total: None,
) -> Prefixes:
    """Get the tokens that enter a layer for every sample of a split: stored ones are read, the others computed and stored.

    Several processes share the computation, and all use the same values.

    Args:
        pooled, tokens: whether pooled features, and output tokens, will be needed too; any not stored yet are computed along.
        advance: called with (values computed, values to compute) by this process.

    Raises:
        ResourceError: the cache cannot keep them. NumericError: a value is too large for float16.
    """
    store = _store(encoder, layer, config, device)
    others = {
        "features": feature_store(encoder, config, device) if pooled else None,
        "tokens": _token_store_with_space(encoder, data, split, config, device) if tokens else None,
    }
    computation = PrefixComputation(
        encoder, data, split, config, device, store=store, advance=advance, layer=layer, **others
    )
    found = collect(computation, Prefixes)
    if found is None:
        raise ResourceError(
            ResourceCode.PREFIX_CACHE_NOT_WRITABLE,
            f"outputs of early layers of {encoder.spec} cannot be kept in the cache",
            where="--cache-prefix",
            fix="set MOPEFUSE_CACHE to a folder with more space, shared on each machine, or use --cache-prefix off",
        )
    return found


def _token_store_with_space(
    encoder: Encoder, data: DataSet, split: str, config: RunConfig, device: torch.device
) -> FeatureStore | None:
    """The store of an encoder's output tokens; None if those of a split would not fit."""
    store = token_store(encoder, config, device)
    return None if lack_of_space(store, encoder, data, split, config, device) else store


def _store(encoder: Encoder, layer: int, config: RunConfig, device: torch.device) -> FeatureStore:
    dtype = config.data.prefix_precision
    key = encoder_key(encoder, config, device, "prefix", layer, dtype)
    return FeatureStore(key, encoder.widths[layer], kind=KIND, dtype=dtype, ragged=True)


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
    store, length = _store(encoder, layer, config, device), blank.tokens_BLD.shape[1]
    return estimate(store, encoder, data, splits, config, usual=length, count=partial(token_counts, encoder))
