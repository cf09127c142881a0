"""Standardised features of a split, read in blocks of rows so that tables larger than memory can be used.

Shapes: S samples, B samples of a block, C width of one side's feature, F of all features side by side, N labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mopefuse.core import device as devices
from mopefuse.data.collate import FeatureTable

_BLOCK_BYTES = 64 * 2**20
_BLOCK_ROWS = 8192
_MAX_FLOAT64_PRODUCTS = 1e8  # multiply-adds of one pass over the split, up to which float64 is used


class Side:
    """Standardised features of one side; 0, the mean, for samples that lack it.

    Args:
        table: features (S, C) by row.
        buffers: buffers of `Standard`: ``mean_C`` and ``deviation_C``.
        missing_S: which samples lack the side, if any do.
    """

    def __init__(self, table: FeatureTable, buffers: Mapping[str, Tensor], missing_S: Tensor | None = None) -> None:
        self.table, self.buffers, self.missing_S = table, buffers, missing_S
        self.width = len(buffers["mean_C"])

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """Return the features (B, C) of some rows, in float32."""
        ready_BC = (self.table[index_B].float() - self.buffers["mean_C"]) / self.buffers["deviation_C"]
        return ready_BC if self.missing_S is None else ready_BC.masked_fill(self.missing_S[index_B, None], 0.0)


class Design:
    """Design matrix (S, F) of a regression: the features of its sides, concatenated.

    Blocks of rows are cached if all of them fit into a quarter of the free memory. Small regressions use float64, large
    ones float32.

    Args:
        rows: S.
        outputs: N, which also limits the number of rows of a block.
    """

    def __init__(self, sides: Sequence[Side], rows: int, outputs: int) -> None:
        self.sides, self.rows, self.outputs = tuple(sides), rows, outputs
        self.width = sum(side.width for side in sides)
        self.dtype = torch.float64 if rows * self.width * outputs <= _MAX_FLOAT64_PRODUCTS else torch.float32
        free = devices.free_memory(torch.device("cpu"))
        self._caches_blocks = free is not None and self.dtype.itemsize * rows * self.width <= free / 4
        self._cache: dict[int, Tensor] = {}

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """Return the features (B, F) of some rows."""
        return torch.cat([side[index_B] for side in self.sides], dim=1).to(self.dtype)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Iterate over blocks of rows and their features (B, F), in order."""
        for rows in row_blocks(self.rows, max(self.width, self.outputs)):
            block_BF = self._cache.get(rows.start)
            if block_BF is None:
                block_BF = self[torch.arange(rows.start, rows.stop)]
                if self._caches_blocks:
                    self._cache[rows.start] = block_BF
            yield rows, block_BF

    def logits(self, weight_NF: Tensor, bias_N: Tensor) -> Tensor:
        """Compute the logits (S, N) of a linear head, in float32."""
        weight_NF, bias_N = weight_NF.to(self.dtype), bias_N.to(self.dtype)
        parts = [torch.addmm(bias_N, block_BF, weight_NF.T).float() for _, block_BF in self.blocks()]
        return torch.cat(parts) if parts else torch.zeros(0, len(bias_N))


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Split rows into consecutive slices whose float32 values take at most `_BLOCK_BYTES`."""
    size = min(_BLOCK_ROWS, max(64, _BLOCK_BYTES // (4 * max(1, width))))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def statistics(table: FeatureTable, index_S: Tensor) -> dict[str, Tensor]:
    """Compute the buffers of `Standard` over some rows of a table; constant features get a deviation of 1.

    Means and deviations are accumulated in float64, block by block (Chan, Golub and LeVeque 1983), which is accurate also
    if the mean is large compared to the deviation.
    """
    width = table[index_S[:0]].shape[1]
    mean_C, squares_C, size_C = torch.zeros(3, width, dtype=torch.double)
    for rows in row_blocks(len(index_S), 2 * width):
        wide_BC = table[index_S[rows]].double()
        block_C = wide_BC.mean(dim=0)
        apart_C, share = block_C - mean_C, len(wide_BC) / rows.stop
        squares_C = squares_C + (wide_BC - block_C).square().sum(dim=0) + apart_C**2 * share * rows.start
        mean_C = mean_C + apart_C * share
        size_C = size_C + wide_BC.abs().sum(dim=0)
    count = max(1, len(index_S))
    deviation_C = (squares_C / count).sqrt()
    constant_C = deviation_C <= 1e-6 * (size_C / count).clamp(min=1e-6)
    return {"mean_C": mean_C.float(), "deviation_C": deviation_C.masked_fill(constant_C, 1.0).float()}
