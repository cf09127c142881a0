"""Products of the rows of a batch with weights that differ between groups of rows.

Shapes: B rows of a batch, U groups, R rows of the largest group, I inputs, O outputs (one or several axes), Z leading axes
that inputs and weights share, X any axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups:
    """Which group each row of a batch belongs to.

    Args:
        group_B: number of the group of each row, from 0 to U - 1; each group has a row.
    """

    def __init__(self, group_B: Sequence[int], device: torch.device) -> None:
        members: list[list[int]] = [[] for _ in range(max(group_B) + 1)]
        place_B = []
        for row, group in enumerate(group_B):
            place_B.append(len(members[group]))
            members[group].append(row)
        self.sizes = [len(rows) for rows in members]
        self.largest = max(self.sizes)
        self._single = len(members) == 1
        padded = [row for rows in members for row in rows + [rows[0]] * (self.largest - len(rows))]
        self._rows = torch.tensor(padded, device=device)
        self._places = torch.tensor(
            [group * self.largest + at for group, at in zip(group_B, place_B, strict=True)], device=device
        )

    def split(self, x_BX: Tensor) -> Tensor:
        """Arrange rows by group, (U, R, X); smaller groups are filled up with copies of their first row."""
        return x_BX[None] if self._single else x_BX[self._rows].unflatten(0, (-1, self.largest))

    def join(self, x_URX: Tensor) -> Tensor:
        """Undo `split`, (B, X)."""
        return x_URX[0] if self._single else x_URX.flatten(0, 1)[self._places]

    def repeat(self, x_UX: Tensor) -> Tensor:
        """The value of its group for each row, (B, X)."""
        return x_UX.expand(self.largest, *x_UX.shape[1:]) if self._single else x_UX[self._places // self.largest]


def stack_padded(tensors: Sequence[Tensor], value: float = 0.0) -> Tensor:
    """Stack tensors of equal or different shapes, (U, X), filled up at the end of each axis with `value`."""
    if len(tensors) == 1:
        return tensors[0][None]
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    return torch.stack([_padded(tensor, shape, value) for tensor in tensors])


def multiply(x_UZRI: Tensor, weights: Sequence[Tensor], leading: int = 0) -> Tensor:
    """The product of the rows of each group with the weights of that group, (U, Z, R, O), padded with 0.

    Args:
        x_UZRI: I of the group with the most inputs; a group with fewer uses the first ones.
        weights: (Z, I, O) of each group; sizes of I and O may differ.
        leading: number of axes of Z.
    """
    shape = [max(sizes) for sizes in zip(*(weight.shape[leading + 1 :] for weight in weights), strict=True)]
    if x_UZRI.is_cuda and len(weights) > 1:  # a few large kernels; on a CPU, copying the weights takes longer than the product
        stacked_UZIX = stack_padded(weights).flatten(leading + 2)
        product: Tensor = (x_UZRI @ stacked_UZIX).unflatten(-1, shape)
        return product
    products = []
    for x_ZRI, weight in zip(x_UZRI, weights, strict=True):
        inputs, outputs = weight.shape[leading], weight.shape[leading + 1 :]
        product = x_ZRI[..., :inputs] @ weight.flatten(leading + 1)
        own = product if len(outputs) == 1 else product.unflatten(-1, outputs)
        products.append(own if list(outputs) == shape else _padded(own, [*own.shape[: leading + 1], *shape], 0.0))
    return products[0][None] if len(products) == 1 else torch.stack(products)


def _padded(tensor: Tensor, shape: Sequence[int], value: float) -> Tensor:
    """Fill a tensor up to a shape, at the end of each axis."""
    missing = [wanted - found for wanted, found in zip(shape, tensor.shape, strict=True)]
    return F.pad(tensor, [count for size in reversed(missing) for count in (0, size)], value=value)
