"""Standardised features of a split, read in blocks of rows, so that a table larger than memory can be fitted.

Shapes: S samples, B samples of a block, C width of one side's feature, F of all features side by side, N labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mopefuse.core import device as devices
from mopefuse.data.collate import Table

_BLOCK_BYTES = 64 * 2**20
_BLOCK_ROWS = 8192
_EXACT = 1e8  # products of features and weights that are few enough to be computed in float64


class Side:
    """Features of one side less their mean, by their deviation; 0 of samples that lack them.

    Args:
        table: features (S, C) by row.
        known: buffers of `Standard`: ``mean_C`` and ``deviation_C``.
        missing_S: which samples lack the side, if any do.
    """

    def __init__(self, table: Table, known: Mapping[str, Tensor], missing_S: Tensor | None = None) -> None:
        self.table, self.known, self.missing_S = table, known, missing_S
        self.width = len(known["mean_C"])

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """(B, C), in float32."""
        ready_BC = (self.table[index_B].float() - self.known["mean_C"]) / self.known["deviation_C"]
        return ready_BC if self.missing_S is None else ready_BC.masked_fill(self.missing_S[index_B, None], 0.0)


class Design:
    """Features (S, F) of the sides of a regression, next to each other.

    Blocks are computed once and kept where that takes no more than a quarter of the free memory; the values are the same.
    In float64 where the regression is small, else in float32.

    Args:
        rows: S. outputs: N, which also limits how many rows a block has.
    """

    def __init__(self, sides: Sequence[Side], rows: int, outputs: int) -> None:
        self.sides, self.rows, self.outputs = tuple(sides), rows, outputs
        self.width = sum(side.width for side in sides)
        self.dtype = torch.float64 if rows * self.width * outputs <= _EXACT else torch.float32
        free = devices.free_memory(torch.device("cpu"))
        self._keep = free is not None and self.dtype.itemsize * rows * self.width <= free / 4
        self._kept: dict[int, Tensor] = {}

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """(B, F)."""
        return torch.cat([side[index_B] for side in self.sides], dim=1).to(self.dtype)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the split and their features (B, F), in order."""
        for rows in row_blocks(self.rows, max(self.width, self.outputs)):
            block_BF = self._kept.get(rows.start)
            if block_BF is None:
                block_BF = self[torch.arange(rows.start, rows.stop)]
                if self._keep:
                    self._kept[rows.start] = block_BF
            yield rows, block_BF

    def logits(self, weight_NF: Tensor, bias_N: Tensor) -> Tensor:
        """Logits (S, N) of a linear head, in float32."""
        weight_NF, bias_N = weight_NF.to(self.dtype), bias_N.to(self.dtype)
        parts = [torch.addmm(bias_N, block_BF, weight_NF.T).float() for _, block_BF in self.blocks()]
        return torch.cat(parts) if parts else torch.zeros(0, len(bias_N))


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices that cover all rows, of at most some megabytes of float32 each."""
    size = min(_BLOCK_ROWS, max(64, _BLOCK_BYTES // (4 * max(1, width))))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def statistics(table: Table, index_S: Tensor) -> dict[str, Tensor]:
    """The buffers of `Standard` for some rows of a table; what never changes, or is not there, keeps a deviation of 1.

    Computed in float64, block by block (Chan, Golub and LeVeque 1983), so that a large mean costs no digits.
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
