"""Projections of two sets of features into one space, fitted in closed form: the start of `conditional` for retrieval.

A feature becomes its similarity to some training rows, the landmarks (a Gaussian kernel; Williams and Seeger, Using the Nyström
Method to Speed Up Kernel Machines, NeurIPS 2000), and canonical correlation analysis with ridge regularisation finds directions
in which two sides agree (Hotelling, Biometrika 28, 1936; Vinod, Journal of Econometrics 4, 1976; with kernels Hardoon, Szedmak
and Shawe-Taylor, Neural Computation 16, 2004). Directions are weighted by their correlation.

Shapes: S samples, B batch, C width of a feature, M landmarks, E numbers of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNELS = (0.2, 0.5, 1.0)
"""Widths of the kernel that are tried: factors of the squared distance of features of length 1."""
RIDGES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 1e-2)
"""Regularisation that is tried, as a share of the total variance."""
SCALES = (3.0, 5.0, 8.0, 12.0, 18.0, 27.0, 40.0)
"""Scales of the scores that are tried."""
_SMALLEST = 1e-6  # eigenvalue of a kernel relative to the largest, below which it is noise
_NO_VARIANCE = 1e-12  # of features that are all the same

Pair = tuple[Tensor, Tensor]
Loss = Callable[[Tensor], Tensor]
"""Maps the outputs of a model (S, 2 E) to the mean loss."""


class Landmarks(nn.Module):
    """Similarities of features to landmarks, in coordinates whose dot products are the kernel (M).

    Landmarks have random directions until they are placed. A place without one has zeros in both tensors, and no effect.

    Limit: for two landmarks, the dot product of their coordinates is exp(-sharpness |a - b|²) of their directions a and b.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.register_buffer("landmark_MC", F.normalize(torch.randn(count, width), dim=-1))
        self.register_buffer("whiten_MM", torch.eye(count))
        self.register_buffer("sharpness", torch.ones(()))
        self.landmark_MC: Tensor
        self.whiten_MM: Tensor
        self.sharpness: Tensor

    def place(self, feature_MC: Tensor, sharpness: float) -> None:
        """Use these features as landmarks; directions in which they differ by no more than noise are left out."""
        direction_MC = F.normalize(feature_MC.double(), dim=-1)
        value_M, vector_MM = torch.linalg.eigh(kernel(direction_MC, direction_MC, sharpness))
        root_M = torch.where(value_M > _SMALLEST * value_M.max(), value_M.clamp(min=1e-300).rsqrt(), 0.0)
        self.landmark_MC.copy_(direction_MC)
        self.whiten_MM.copy_(vector_MM * root_M @ vector_MM.T)
        self.sharpness.fill_(sharpness)

    def forward(self, feature_BC: Tensor) -> Tensor:
        """Coordinates (B, M) of features."""
        return kernel(F.normalize(feature_BC, dim=-1), self.landmark_MC, self.sharpness) @ self.whiten_MM


def kernel(one_BC: Tensor, other_MC: Tensor, sharpness: Tensor | float) -> Tensor:
    """The Gaussian kernel (B, M) of features of length 1."""
    return torch.exp(sharpness * (2 * one_BC @ other_MC.T - 2))


class Projection(NamedTuple):
    """A linear map of both sides: weights (E, M) and biases (E,), main first; `scale` of the scores, `loss` on validation."""

    weights_EM: Pair
    biases_E: Pair
    scale: float
    loss: float


def fit_projection(train: Pair, val: Pair, width: int, loss: Loss, ridges: Sequence[float] = RIDGES) -> Projection:
    """Fit projections with canonical correlation analysis; regularisation and scale have the lowest loss on validation.

    Args:
        train, val: coordinates of both sides (S, M).
    """
    means_M = [one_SM.double().mean(dim=0) for one_SM in train]
    centred = [one_SM.double() - mean_M for one_SM, mean_M in zip(train, means_M, strict=True)]
    spectra = [torch.linalg.eigh(one_SM.T @ one_SM / len(one_SM)) for one_SM in centred]
    cross_MM = centred[0].T @ centred[1] / len(centred[0])
    best: Projection | None = None
    for ridge in ridges:
        roots = [
            vector_MM * (value_M.clamp(min=0) + ridge * value_M.sum()).clamp(min=_NO_VARIANCE).rsqrt() @ vector_MM.T
            for value_M, vector_MM in spectra
        ]
        left_MM, strength_M, right_MM = torch.linalg.svd(roots[0] @ cross_MM @ roots[1], full_matrices=False)
        pairs = zip(roots, (left_MM, right_MM.T), strict=True)
        weights = [_padded((root_MM @ own_MM[:, :width] * strength_M[:width]).T, width) for root_MM, own_MM in pairs]
        biases = [-weight_EM @ mean_M for weight_EM, mean_M in zip(weights, means_M, strict=True)]
        both = zip(val, weights, biases, strict=True)
        embedded = [F.normalize(one @ weight.float().T + bias.float(), dim=-1) for one, weight, bias in both]
        losses = {scale: float(loss(torch.cat([scale * embedded[0], embedded[1]], dim=1))) for scale in SCALES}
        scale, value = min(losses.items(), key=lambda one: one[1])
        if best is None or value < best.loss:
            weights_EM, biases_E = ((one.float(), other.float()) for one, other in (weights, biases))
            best = Projection(weights_EM, biases_E, scale, value)
    assert best is not None and math.isfinite(best.loss)
    return best


def _padded(weight_EM: Tensor, width: int) -> Tensor:
    """`weight_EM` with rows of zeros up to `width`."""
    return F.pad(weight_EM, (0, 0, 0, width - len(weight_EM)))
