"""An MLP on standardised frozen features, fitted in memory in seconds: a starting point for training.

The method `mlp` trains the same network step by step, with checkpoints, missing modalities and modality dropout.

Shapes: S samples, B samples of a batch, F features, H hidden units, N labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mopefuse.fusion._design_matrix import Design
from mopefuse.fusion.regression import FitSettings, Targets

_LEARNING_RATE, _WEIGHT_DECAY = 1e-3, 1e-2  # the defaults of the method `mlp`
_BATCH = 64
_EPOCHS = 30
_STEPS = (1000, 20_000)  # on small data more epochs are needed, on large data fewer suffice
_MIN_EPOCHS, _MAX_EPOCHS = 3, 200


class Network(NamedTuple):
    """Parameters of an MLP with one hidden layer and GELU."""

    hidden_HF: Tensor
    hidden_bias_H: Tensor
    output_NH: Tensor
    output_bias_N: Tensor

    def logits(self, feature_BF: Tensor, keep_BH: Tensor | float = 1.0) -> Tensor:
        """Compute logits (B, N).

        Args:
            keep_BH: factors of the hidden units, for dropout.
        """
        hidden_BH = F.gelu(F.linear(feature_BF, self.hidden_HF, self.hidden_bias_H))
        return F.linear(hidden_BH * keep_BH, self.output_NH, self.output_bias_N)

    def logits_of(self, design: Design) -> Tensor:
        """Compute the logits (S, N) of a split."""
        parts = [self.logits(block_BF.float()) for _, block_BF in design.blocks()]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.output_bias_N))


class NetworkSettings(NamedTuple):
    """Settings of a network.

    Attributes:
        hidden: H.
        dropout: on the hidden layer.
    """

    hidden: int
    dropout: float
    seed: int


def epochs_for(samples: int) -> int:
    """Return the number of epochs for a training split of this size."""
    return epochs_within(samples, _BATCH, _EPOCHS, steps=_STEPS, limits=(_MIN_EPOCHS, _MAX_EPOCHS))


def epochs_within(samples: int, batch: int, usual: int, *, steps: tuple[int, int], limits: tuple[int, int]) -> int:
    """Return the usual number of epochs, changed so that steps are within bounds, and then epochs within limits."""
    per_epoch = max(1, -(-samples // batch))
    return min(limits[1], max(limits[0], max(steps[0], min(steps[1], usual * per_epoch)) // per_epoch))


def fit_network(
    design: Design, targets: Targets, how: FitSettings, network: NetworkSettings, epochs: int | None = None
) -> Iterator[Network]:
    """Train an MLP by AdamW with a cosine schedule; yields its parameters after each epoch.

    Args:
        targets: of all samples.
        epochs: default: `epochs_for` the samples.
    """
    draw = torch.Generator().manual_seed(network.seed)
    parameters = [parameter.requires_grad_() for parameter in _initial(design.width, network.hidden, how.labels, draw)]
    model = Network(*parameters)
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, fused=True)
    epochs, step = epochs or epochs_for(design.rows), 0
    total = epochs * -(-design.rows // _BATCH)
    for _ in range(epochs):
        for index_B in torch.randperm(design.rows, generator=draw).split(_BATCH):
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 + math.cos(math.pi * step / total)) / 2
            kept_BH = torch.rand(len(index_B), network.hidden, generator=draw) >= network.dropout
            logits_BN = model.logits(design[index_B].float(), kept_BH / (1 - network.dropout))
            loss_B = how.task.loss(logits_BN, targets[index_B], how.class_weights)
            optimizer.zero_grad(set_to_none=True)
            loss_B.mean().backward()
            optimizer.step()
            step += 1
        yield Network(*(parameter.detach().clone() for parameter in parameters))


def _initial(width: int, hidden: int, labels: int, draw: torch.Generator) -> Network:
    """Draw initial parameters as `torch.nn.Linear` does."""

    def uniform(*shape: int, inputs: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=draw) - 1) / math.sqrt(inputs)

    first = (uniform(hidden, width, inputs=width), uniform(hidden, inputs=width))
    return Network(*first, uniform(labels, hidden, inputs=hidden), uniform(labels, inputs=hidden))
