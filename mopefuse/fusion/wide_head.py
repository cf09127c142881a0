"""A head with a linear path beside an MLP, so that it can start as logistic regression or as an MLP and learn the other.

Cheng et al., Wide & Deep Learning for Recommender Systems, 2016 (arXiv 1606.07792), for the sum of both paths.

Shapes: B batch, F features, H hidden units, N labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.fusion.mlp_fit import Network


class WideHead(nn.Module):
    """``linear(x) + output(dropout(GELU(hidden(x))))``.

    Args:
        width: F.
        hidden: H.
        dropout: on the hidden layer.
    """

    def __init__(self, width: int, hidden: int, num_labels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_labels)
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, num_labels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, feature_BF: Tensor) -> Tensor:
        """Compute logits (B, N)."""
        hidden_BH: Tensor = self.dropout(F.gelu(self.hidden(feature_BF)))
        logits_BN: Tensor = self.linear(feature_BF) + self.output(hidden_BH)
        return logits_BN


def head_state(head: nn.Module, start: Network | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Compute the parameters with which a head equals a regression or an MLP.

    Weights of features that the head takes in addition, after those of `start`, are 0. Of a `WideHead` that starts as a
    regression, the hidden layer keeps its random weights and its output is 0.

    Args:
        head: a linear layer or a `WideHead`.
        start: a network, or weight (N, F) and bias (N,) of a regression.
    """
    state = {name: torch.zeros_like(value) for name, value in head.state_dict().items() if not name.startswith("hidden")}
    linear = "linear." if isinstance(head, WideHead) else ""
    names = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
    state |= zip(names if isinstance(start, Network) else (f"{linear}weight", f"{linear}bias"), start, strict=True)
    width = head.state_dict()[f"{linear}weight"].shape[1]
    for name in {f"{linear}weight", "hidden.weight"} & state.keys():
        state[name] = F.pad(state[name], (0, width - state[name].shape[1]))
    return state
