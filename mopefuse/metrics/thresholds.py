"""Decision thresholds: from which probability on a label is predicted, if a sample may have several.

Shapes: S samples of a split, N labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # predictions of exported bundles are made without torch
    from torch import Tensor

THRESHOLD = 0.5
"""Default threshold of multi-label predictions: a label is predicted from this probability on."""

Thresholds = Sequence[float] | float


def tuned_thresholds(logits_SN: Tensor, targets_SN: Tensor) -> list[float]:
    """Find for each label the threshold with the best F1 on a (validation) split, midway between two samples.

    Labels that do not occur in the split get 0.5.
    """
    import torch

    found = []
    for p_S, y_S in zip(logits_SN.float().sigmoid().double().T, targets_SN.T, strict=True):
        p_S, order = p_S.sort(descending=True)
        right_S = y_S[order].double().cumsum(0)
        chosen_S = torch.arange(1, len(p_S) + 1, dtype=torch.double)
        f1_S = 2 * right_S / (chosen_S + right_S[-1])
        next_S = torch.cat([p_S[1:], p_S[-1:] * 0])
        f1_S[p_S == next_S] = -1  # no threshold separates equal probabilities
        best = int(f1_S.argmax())
        found.append(float((p_S[best] + next_S[best]) / 2) if right_S[-1] > 0 else THRESHOLD)
    return found


def predicted_labels(probabilities_SN: Tensor, thresholds: Thresholds) -> Tensor:
    """Labels whose probability reaches the threshold (S, N)."""
    import torch

    return probabilities_SN.double() >= torch.as_tensor(thresholds, dtype=torch.double)
