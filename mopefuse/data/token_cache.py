"""Cache the output tokens of frozen encoders, like their pooled features, for methods that use them (`Fusion.reads_tokens`).

They are normalised first, so that float16 can hold them, and stored without padding, one store for each encoder and number
format. `data.cache_prefix_limit` and the free space limit their size; beyond, encoders run in every step.

Shapes: B batch, L tokens, C their width.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import cache, distributed
from mopefuse.core.formatting import size
from mopefuse.core.precision import normalize_feature
from mopefuse.data.base import DataSet
from mopefuse.data.feature_cache import Advance, Computation, Numbers, encoder_key
from mopefuse.data.feature_shards import FeatureStore, Values
from mopefuse.data.ragged import RaggedTable, collect, estimate, pad
from mopefuse.encoders.base import Encoder, Inputs
from mopefuse.encoders.frozen import encode_tokens
from mopefuse.encoders.sharding import uneven_calls

KIND = "tokens"


class TokenTable(RaggedTable):
    """Normalised tokens by row: ``tokens[index_B]`` has ``values_BLC``, padded with zeros, and ``mask_BL``."""

    def __getitem__(self, index_B: Tensor) -> dict[str, Tensor]:
        """The tokens of some samples."""
        rows = self.rows(index_B)
        values_BLC = pad(rows)
        length_B = torch.tensor([len(row) for row in rows])
        return {"values_BLC": values_BLC, "mask_BL": torch.arange(values_BLC.shape[1]) < length_B[:, None]}


class TokenComputation(Computation):
    """Computes the output tokens for the distinct values of a split."""

    def encode(self, inputs: Inputs) -> tuple[Values, Numbers]:
        """See `Computation.encode`."""
        return rows_to_store(encode_tokens(self.encoder, inputs), self.store)


def rows_to_store(tokens: Sequence[Tensor], store: FeatureStore) -> tuple[Values, Numbers]:
    """Normalise the output tokens (L, C) of some values, and count those of each."""
    each = [normalize_feature(tokens_LC).cpu() for tokens_LC in tokens]
    rows: Values = torch.cat(each).to(getattr(torch, store.dtype)).numpy()
    return rows, np.array([len(tokens_LC) for tokens_LC in each])


def split_tokens(
    encoder: Encoder,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    advance: Advance = lambda done, total: None,
) -> TokenTable | str:
    """Get the output tokens of a split: stored ones are read, the others computed and stored.

    Several processes share the computation, and all use the same values.

    Args:
        advance: called with (values computed, values to compute) by this process.

    Returns:
        The tokens, or the reason why they are not cached and how to change it.
    """
    store = token_store(encoder, config, device)
    if reason := lack_of_space(store, encoder, data, split, config, device):
        return reason
    computation = TokenComputation(encoder, data, split, config, device, store=store, advance=advance)
    found = collect(computation, TokenTable)
    return found or "the cache cannot keep them; set MOPEFUSE_CACHE to a folder with more space, shared on each machine"


def token_store(encoder: Encoder, config: RunConfig, device: torch.device) -> FeatureStore:
    """The store of an encoder's output tokens."""
    dtype = config.data.prefix_precision
    return FeatureStore(
        encoder_key(encoder, config, device, "tokens", dtype), encoder.token_width, kind=KIND, dtype=dtype, ragged=True
    )


def lack_of_space(
    store: FeatureStore, encoder: Encoder, data: DataSet, split: str, config: RunConfig, device: torch.device
) -> str:
    """Why the tokens of a split do not fit into the limit or the free space of any process; empty if they do, or are stored.

    All processes have the same answer.
    """

    def find_reason() -> str:
        with uneven_calls(encoder):  # the stores of different machines may differ
            return _lack_of_space(store, encoder, data, split, config, device)

    return next(filter(None, distributed.run_on_all(find_reason)), "")


def _lack_of_space(
    store: FeatureStore, encoder: Encoder, data: DataSet, split: str, config: RunConfig, device: torch.device
) -> str:
    store.refresh()
    if store.find(np.unique(data.splits[split].keys[encoder.modality])).known_U.all():
        return ""
    inputs = {name: tensor.to(device) for name, tensor in encoder.blank_inputs(1).items()}
    length = len(encode_tokens(encoder, inputs)[0])
    needed = estimate(store, encoder, data, [split], config, usual=length, count=_count_real)
    limit, folder = config.data.cache_prefix_limit * 2**30, cache.root()
    if needed.size > limit:
        enough = f"{needed.size / 2**30 * 1.1:.2g}"
        what = f"they take {size(needed.size)}, more than data.cache_prefix_limit ({config.data.cache_prefix_limit:g} GiB)"
        return f"{what}; to cache them, add --set data.cache_prefix_limit={enough}"
    free = shutil.disk_usage(folder).free // 2 if folder else 0
    if needed.missing > free:
        what = f"they take {size(needed.missing)}, more than half of the cache's free space ({size(free)})"
        return f"{what}; to cache them, set MOPEFUSE_CACHE to a folder with more space"
    return ""


def _count_real(inputs: Inputs) -> Tensor | None:
    """Count the tokens of each sample that are not padding (B,)."""
    return inputs["mask"].sum(dim=1) if "mask" in inputs else None
