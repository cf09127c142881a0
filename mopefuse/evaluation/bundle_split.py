"""Run an exported bundle over a split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mopefuse.config.schema import Data as DataConfig
from mopefuse.data.base import DataSet, Row
from mopefuse.data.columns import require_column
from mopefuse.evaluation.outputs import Advance, BatchOutput
from mopefuse.inference.bundle import Bundle
from mopefuse.modalities.base import to_arguments


def bundle_outputs(
    bundle: Bundle,
    data: DataSet,
    split: str,
    config: DataConfig,
    *,
    batch_size: int = 32,
    advance: Advance = lambda done, total: None,
) -> Iterator[BatchOutput]:
    """The outputs of a bundle for all samples of a split, in order."""
    for name in bundle.modalities:
        require_column("the bundle", name, data.modalities, where=str(bundle.folder))
    rows = data.splits[split].rows
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        values = {name: [_read(data, split, row, name, config) for row in batch] for name in bundle.modalities}
        logits_BN = torch.from_numpy(bundle.run(bundle.collate(**to_arguments(values)))[0])
        yield BatchOutput(torch.arange(first, first + len(batch)), logits_BN)
        advance(first + len(batch), len(rows))


def _read(data: DataSet, split: str, row: Row, modality: str, config: DataConfig) -> Any:
    return None if row.values[modality] is None else data.read(data.splits[split], row, modality, config)
