"""Ridge regression on standardised features, in closed form.

The objective is scikit-learn's with ``alpha = 1 / C``: half the squared error summed over samples, times C, plus half the
squared weights; the bias is not regularised. Targets are in standard deviations.

Shapes: S samples, F features, T targets, Q quantiles, N = T Q outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mopefuse.fusion._design_matrix import Design
from mopefuse.tasks.regression import Regression


class RidgeProblem:
    """Regressions on one design, which share everything that does not depend on C.

    With fewer samples than features, the system of equations has a row for each sample, else one for each feature.

    Args:
        wanted_ST: standardised numbers.
    """

    def __init__(self, train: Design, wanted_ST: Tensor, task: Regression) -> None:
        self._task, wanted_ST = task, wanted_ST.double()
        self._mean_T, self._is_dual = wanted_ST.mean(dim=0), train.rows < train.width
        self._wanted_ST, sum_F = wanted_ST - self._mean_T, torch.zeros(train.width, dtype=torch.double)
        for _, block_BF in train.blocks():
            sum_F += block_BF.double().sum(dim=0)
        self._mean_F = sum_F / train.rows
        self._train = train
        if self._is_dual:
            self._centred_SF = torch.cat([block_BF.double() for _, block_BF in train.blocks()]) - self._mean_F
            self._square, self._product = self._centred_SF @ self._centred_SF.T, self._wanted_ST
            return
        self._square = torch.zeros(train.width, train.width, dtype=torch.double)
        self._product = torch.zeros(train.width, self._wanted_ST.shape[1], dtype=torch.double)
        for rows, block_BF in train.blocks():
            centred_BF = block_BF.double() - self._mean_F
            self._square += centred_BF.T @ centred_BF
            self._product += centred_BF.T @ self._wanted_ST[rows]

    def solve(self, strength: float, max_iter: int, advance: Callable[[float], None]) -> tuple[Tensor, Tensor]:
        """Compute the weights (N, F) and biases (N,) for a C, in float32."""
        advance(0.0)
        system = self._square + torch.eye(len(self._square), dtype=torch.double) / strength
        solution = torch.linalg.solve(system, self._product)
        weight_TF = (self._centred_SF.T @ solution if self._is_dual else solution).T
        bias_T = self._mean_T - weight_TF @ self._mean_F
        return self._with_quantiles(weight_TF.float(), bias_T.float())

    def _with_quantiles(self, weight_TF: Tensor, bias_T: Tensor) -> tuple[Tensor, Tensor]:
        """Repeat a regression for each quantile, moved by the quantile of its errors in training."""
        levels = torch.tensor(self._task.quantiles, dtype=torch.float32)
        if len(levels) == 1:
            return weight_TF, bias_T
        predicted_ST = self._train.logits(weight_TF, bias_T)
        error_ST = (self._wanted_ST + self._mean_T).float() - predicted_ST
        moved_QT = torch.quantile(error_ST[: 2**20], levels, dim=0)
        bias_TQ = bias_T[:, None] + moved_QT.T
        return weight_TF.repeat_interleave(len(levels), dim=0), bias_TQ.flatten()
