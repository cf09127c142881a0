"""Logistic regression with a ridge penalty, as scikit-learn defines it, for all labels at once.

One label or two classes are a binary regression (Cox, J. R. Stat. Soc. B 20, 1958), more classes a multinomial one. The
objective is scikit-learn's divided by C and the number of samples: the mean weighted loss plus the squared weights, without
the bias, times 1 / (2 C S).

The optimizer works in the eigenbasis of the features' covariance, where the Hessian of a label is nearly diagonal: the
curvature of its loss, averaged over samples, times the eigenvalues (compare Böhning, Ann. Inst. Stat. Math. 44, 1992).

Shapes: S samples, B samples of a block, F features, R directions of the eigenbasis, N labels or classes, A active ones
among them, P = R + 1 parameters of a label, its bias last, G problems (labels, or 1 for a softmax).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mopefuse.data.collate import FeatureTable
from mopefuse.fusion._design_matrix import Design
from mopefuse.fusion._lbfgs import Evaluation, minimise

_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-7}  # relative error of the objective at convergence
_NOISE = {torch.float64: 1e-12, torch.float32: 1e-6}  # relative rounding error of the objective
_MEMORY = 10
_HISTORY_BYTES = 512 * 2**20
_SIGN_BYTES = 256 * 2**20
_WIDEST = 2048  # features of one eigenbasis; more are split into groups that are treated as uncorrelated
_SAMPLED = 32768  # samples from which the covariance is estimated
_LEAST_CURVATURE = 1e-8


class Basis:
    """Eigenbasis of the features' covariance: orthonormal directions and their mean squares.

    If there are fewer samples than features, only the directions that they span are included; the optimum has no weight
    along the others.
    """

    def __init__(self, design: Design) -> None:
        index_S = torch.arange(0, design.rows, max(1, -(-design.rows // _SAMPLED)))
        parts = [self._part(design, index_S, start) for start in range(0, design.width, _WIDEST)]
        self.bases = [basis_FR for basis_FR, _ in parts]
        self.square_R = torch.cat([square_R for _, square_R in parts])

    @staticmethod
    def _part(design: Design, index_S: Tensor, start: int) -> tuple[Tensor, Tensor]:
        columns = slice(start, min(start + _WIDEST, design.width))
        width = columns.stop - start
        if design.rows < width:  # then `index_S` holds all rows
            spanned_FS, _ = torch.linalg.qr(design[index_S][:, columns].double().T)
        else:
            spanned_FS = None
        gram_FF = torch.zeros(width, width, dtype=torch.double)
        for some_B in index_S.split(4096):
            rows_BF = design[some_B][:, columns]
            gram_FF += rows_BF.T @ rows_BF
        gram_FF /= len(index_S)
        if spanned_FS is None:
            square_R, basis_FR = torch.linalg.eigh(gram_FF)
        else:
            square_R, turned_SR = torch.linalg.eigh(spanned_FS.T @ gram_FF @ spanned_FS)
            basis_FR = spanned_FS @ turned_SR
        return basis_FR, square_R.clamp(min=0)

    def weights(self, along_AR: Tensor) -> Tensor:
        """Convert components (A, R) along the directions to weights (A, F)."""
        parts = along_AR.split([basis_FR.shape[1] for basis_FR in self.bases], dim=1)
        return torch.cat([part_AR @ basis_FR.T for part_AR, basis_FR in zip(parts, self.bases, strict=True)], dim=1)

    def along(self, weight_AF: Tensor) -> Tensor:
        """Convert weights (A, F), or their gradients, to components (A, R) along the directions."""
        parts = weight_AF.split([basis_FR.shape[0] for basis_FR in self.bases], dim=1)
        return torch.cat([part_AF @ basis_FR for part_AF, basis_FR in zip(parts, self.bases, strict=True)], dim=1)


class BlockLoss(NamedTuple):
    """Loss of a block: summed over samples, its derivatives by the logits, and its summed second derivatives."""

    loss_G: Tensor
    slope_BA: Tensor
    curvature_A: Tensor


class Sigmoids:
    """Loss of independent binary regressions, one for each of some labels.

    Args:
        targets: zeros and ones (S, all labels) by row.
        columns_N: indices of the labels that are fitted.
        weight_2N: weights of samples without and with each label; None for equal weights.
    """

    joint = False

    def __init__(self, targets: FeatureTable, columns_N: Tensor, weight_2N: Tensor | None) -> None:
        self.targets, self.columns_N, self.weight_2N = targets, columns_N, weight_2N
        self._free_bytes = _SIGN_BYTES
        self._signs: dict[int, Tensor] = {}

    def _sign(self, rows: slice) -> Tensor:
        """Return 1 for samples with a label, else -1 (B, N); cached up to `_SIGN_BYTES`."""
        sign_BN = self._signs.get(rows.start)
        if sign_BN is None:
            targets_BN = self.targets[torch.arange(rows.start, rows.stop)][:, self.columns_N]
            sign_BN = (targets_BN > 0.5).to(torch.int8).mul_(2).sub_(1)
            if sign_BN.numel() <= self._free_bytes:
                self._free_bytes -= sign_BN.numel()
                self._signs[rows.start] = sign_BN
        return sign_BN

    def block(self, rows: slice, logits_BA: Tensor, index_A: Tensor) -> BlockLoss:
        """Compute the loss of the labels at positions `index_A` of `columns_N`."""
        sign_BA = self._sign(rows)
        if len(index_A) < sign_BA.shape[1]:
            sign_BA = sign_BA[:, index_A]
        against_BA = torch.mul(logits_BA, sign_BA).neg_()
        loss_BA, wrong_BA = F.softplus(against_BA), torch.sigmoid(against_BA)
        curvature_BA = torch.addcmul(wrong_BA, wrong_BA, wrong_BA, value=-1)
        slope_BA = wrong_BA.mul_(sign_BA).neg_()
        if self.weight_2N is not None:
            without_A, with_A = self.weight_2N[:, index_A].to(logits_BA.dtype)
            weight_BA = torch.where(sign_BA > 0, with_A, without_A)
            for tensor in (loss_BA, slope_BA, curvature_BA):
                tensor.mul_(weight_BA)
        return BlockLoss(loss_BA.sum(dim=0, dtype=torch.double), slope_BA, curvature_BA.sum(dim=0, dtype=torch.double))


class Softmax:
    """Loss of one multinomial regression.

    Args:
        targets_S: class indices.
        weight_N: weight of the samples of each class; None for equal weights.
    """

    joint = True

    def __init__(self, targets_S: Tensor, weight_N: Tensor | None) -> None:
        self.targets_S, self.weight_N = targets_S, weight_N

    def block(self, rows: slice, logits_BA: Tensor, index_A: Tensor) -> BlockLoss:
        """Compute the loss of all classes."""
        actual_B1 = self.targets_S[rows, None]
        log_p_BA = logits_BA.log_softmax(dim=-1)
        loss_B1, slope_BA = -log_p_BA.gather(1, actual_B1), log_p_BA.exp_()
        curvature_BA = torch.addcmul(slope_BA, slope_BA, slope_BA, value=-1)
        slope_BA.scatter_add_(1, actual_B1, torch.full_like(loss_B1, -1.0))
        if self.weight_N is not None:
            weight_B1 = self.weight_N.to(logits_BA.dtype)[actual_B1]
            for tensor in (loss_B1, slope_BA, curvature_BA):
                tensor.mul_(weight_B1)
        return BlockLoss(loss_B1.sum(dtype=torch.double)[None], slope_BA, curvature_BA.sum(dim=0, dtype=torch.double))


class LogisticRegression:
    """Regressions on one design, solved for one C after another; each is warm-started at the previous solution.

    Args:
        start_N: initial biases of the labels or classes.
    """

    def __init__(self, design: Design, loss: Sigmoids | Softmax, start_N: Tensor) -> None:
        self.design, self.loss, self.basis = design, loss, Basis(design)
        width = len(self.basis.square_R)
        self.solution_NP = torch.cat([torch.zeros(len(start_N), width, dtype=torch.double), start_N.double()[:, None]], dim=1)

    def solve(self, strength: float, max_iter: int, advance: Callable[[float], None]) -> tuple[Tensor, Tensor]:
        """Compute the weights (N, F) and biases (N,) for a C (`strength`), in float64.

        Args:
            max_iter: limit of optimizer steps.
            advance: called with the estimated fraction of the work that is done.
        """
        labels, width = self.solution_NP.shape
        size = labels if self.loss.joint else max(1, _HISTORY_BYTES // (16 * _MEMORY * width))
        for first in range(0, labels, size):
            part = slice(first, min(first + size, labels))

            def report(share: float, part: slice = part) -> None:
                advance((part.start + share * (part.stop - part.start)) / labels)

            self.solution_NP[part] = self._minimum(part, strength, max_iter, report)
        if self.loss.joint:  # a softmax is invariant to a constant added to all biases
            self.solution_NP[:, -1] -= self.solution_NP[:, -1].mean()
        return self.basis.weights(self.solution_NP[:, :-1]), self.solution_NP[:, -1].clone()

    def _minimum(self, part: slice, strength: float, max_iter: int, advance: Callable[[float], None]) -> Tensor:
        """Minimise the objective of some labels, or of all classes: parameters (A, P)."""
        start_AP = self.solution_NP[part]

        def evaluate(x_GP: Tensor, index_G: Tensor) -> Evaluation:
            return self._evaluate(x_GP, index_G + part.start, strength)

        return minimise(
            evaluate,
            start_AP.reshape(1, -1) if self.loss.joint else start_AP,
            tolerance=_TOLERANCE[self.design.dtype],
            noise=_NOISE[self.design.dtype],
            max_iter=max_iter,
            memory=min(_MEMORY, max(3, _HISTORY_BYTES // (16 * start_AP.numel()))),
            advance=advance,
        ).reshape(start_AP.shape)

    def _evaluate(self, x_GP: Tensor, index_G: Tensor, strength: float) -> Evaluation:
        """Evaluate the objective of the labels `index_G`, or of all classes together."""
        x_AP, samples = x_GP.reshape(-1, self.solution_NP.shape[1]), self.design.rows
        along_AR, bias_A = x_AP[:, :-1], x_AP[:, -1].to(self.design.dtype)
        weight_AF = self.basis.weights(along_AR).to(self.design.dtype)
        loss_G, slope_A, curvature_A = x_GP.new_zeros(len(x_GP)), x_GP.new_zeros(len(x_AP)), x_GP.new_zeros(len(x_AP))
        slope_AF = x_GP.new_zeros(weight_AF.shape)
        for rows, block_BF in self.design.blocks():
            found = self.loss.block(rows, torch.addmm(bias_A, block_BF, weight_AF.T), index_G)
            loss_G += found.loss_G / samples
            curvature_A += found.curvature_A / samples
            slope_A += found.slope_BA.sum(dim=0, dtype=torch.double) / samples
            slope_AF += (found.slope_BA.T @ block_BF) / samples
        penalty = 1 / (strength * samples)
        curvature_A1 = curvature_A.clamp(min=_LEAST_CURVATURE)[:, None]
        return Evaluation(
            loss_G + penalty / 2 * along_AR.square().sum(dim=1).reshape(len(x_GP), -1).sum(dim=1),
            torch.cat([self.basis.along(slope_AF) + penalty * along_AR, slope_A[:, None]], dim=1).reshape(x_GP.shape),
            torch.cat([curvature_A1 * self.basis.square_R + penalty, curvature_A1], dim=1).reshape(x_GP.shape),
        )
