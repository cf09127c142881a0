"""Features of frozen encoders, computed once per sample: what cannot change is not computed twice.

Shapes: S samples of the split, C width of the pooled feature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopefuse import device as devices
from mopefuse import distributed
from mopefuse.config import RunConfig
from mopefuse.data._base import DataSet
from mopefuse.data.collate import Samples, plain_batches
from mopefuse.encoders._base import Encoder, run_frozen

_KEPT: dict[tuple[str, ...], Tensor] = {}
_MOST_KEPT = 8  # splits, the oldest of which makes room


def split_features(encoder: Encoder, data: DataSet, split: str, config: RunConfig, device: torch.device) -> Tensor:
    """Pooled features (S, C) of a split, on the CPU; computed once in a process for the same encoder and data."""
    rows = data.splits[split]
    by_encoder = (encoder.fingerprint(), str(encoder.spec), str(encoder.preprocess.describe()))
    key = (*by_encoder, str(rows.root), rows.sha256, config.train.precision, device.type)
    if key not in _KEPT:
        while len(_KEPT) >= _MOST_KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = _compute(encoder, data, split, config, device)
    return _KEPT[key]


def _compute(encoder: Encoder, data: DataSet, split: str, config: RunConfig, device: torch.device) -> Tensor:
    """In fixed batches, so that the result does not depend on the caller."""
    samples = Samples(data, split, {"only": (encoder.modality, encoder.preprocess)}, config.data)
    keys = list(plain_batches(len(samples), 64))
    mine = keys[distributed.rank() :: distributed.world_size()]
    table_SC = torch.zeros(len(samples), encoder.feature_width)
    for batch in samples.batches(mine, pin=device.type == "cuda"):
        with devices.autocast(config.train.precision, device):
            pooled_BC = run_frozen(encoder, batch.to(device).inputs["only"]).pooled_BC
        table_SC[batch.index] = pooled_BC.float().cpu()
    return distributed.summed(table_SC)  # each row is 0 in all processes but one
